"""A beta-VAE on unlabelled slices: its features are clustered into the pseudo-classes of cluster contrast.

An interpretation: that Zhang et al. extract features with a beta-VAE is all that is known.
"""

import torch
from torch import Tensor

from clseg.loop import Training, Work
from clseg.models import BetaVAE
from clseg.settings import AutoencoderStage
from clseg.stages.sampling import random_batch


def beta_vae_loss(image: Tensor, restored: Tensor, mean: Tensor, log_variance: Tensor, beta: float) -> Tensor:
    """[Σ (x - x')² / 2 + β Σ (μ² + σ² - log σ² - 1) / 2] / N, mean over images of N numbers each.

    The first sum runs over the N = C H W numbers of an image, the second over the features: β = 1 is the evidence bound
    of a VAE whose decoder has unit variance. The division by N makes losses of unlike sizes comparable.

    image, restored: [B, C, ...]; mean, log_variance: [B, latent]. Source: Higgins et al., ICLR 2017, eq. 4.
    """
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1).mean() / 2
    return (image - restored).square().mean() / 2 + beta * divergence / image[0].numel()


def autoencoder(work: Work, stage: AutoencoderStage) -> Training:
    """Trains a beta-VAE, saved beside the network, which stays as it was."""
    vae = BetaVAE(work.store.channels, work.store.size, stage.latent).to(work.device)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        image, generator = random_batch(work, "autoencoder", step)
        return image, torch.randn((len(image), stage.latent), generator=generator).to(work.device)

    def loss(image: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = vae.encode(image)
        restored = vae.decode(mean + (log_variance / 2).exp() * noise)
        return beta_vae_loss(image, restored, mean, log_variance, stage.beta)

    return Training({"autoencoder": vae}, draw, loss)
