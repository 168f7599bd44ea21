"""Adversarial training: predictions on slices without labels are to look like those on slices with labels.

Source: Zhang et al., MICCAI 2017, "Deep adversarial networks for biomedical image segmentation utilizing unannotated
images"; compared by Chaitanya et al., NeurIPS 2020.
*Deviation*: both networks learn in one step through gradient reversal, where the paper alternates between them and
swaps the label for the segmenter; a smaller discriminator, which sees image and prediction as channels.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clseg.loop import Training, Work
from clseg.models import CONV, MEAN, initialise
from clseg.recipes.supervised import drawn_batch, drawn_images, semi_supervised_loss
from clseg.settings import AdversarialRecipe, NetworkConfig


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * gradient, None


def reverse(value: Tensor, weight: float) -> Tensor:
    """The value itself, whose gradient comes back times -weight (Ganin et al., JMLR 2016)."""
    return _Reversal.apply(value, weight)


class Discriminator(nn.Sequential):
    """Images [B, C, ...] to a logit [B, 1], positive for real ones: 4 x (conv 3 of stride 2, LeakyReLU 0.2), the mean
    over all places, linear."""

    def __init__(self, channels: int, config: NetworkConfig, dimensions: int) -> None:
        widths = [channels, *(config.filters[0] * 2**k for k in range(4))]
        layers = []
        for width in pairwise(widths):
            layers += [CONV[dimensions](*width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        super().__init__(*layers, MEAN[dimensions](1), nn.Flatten(), nn.Linear(widths[-1], 1))
        initialise(self, config)


def discriminator_loss(discriminator: Discriminator, real: Tensor, fake: Tensor) -> Tensor:
    """-mean log D(real) - mean log(1 - D(fake)), D the sigmoid of the logit; a scalar (Goodfellow et al., 2014)."""
    return F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake)).mean()


def adversarial(work: Work, recipe: AdversarialRecipe) -> Training:
    """The discriminator minimises -log D(x, p) - log(1 - D(x', p')), x labelled, x' not, p and p' their predictions.

    The segmenter minimises L(labelled) + weight log(1 - D(x', p')): only predictions without labels try to deceive.
    As many slices of each. Raises `RequestError` without unlabelled slices.
    """
    segmentation_loss = semi_supervised_loss(work, recipe)
    network, store = work.network, work.store
    discriminator = Discriminator(store.channels + store.num_classes, network.config, store.dimensions).to(work.device)

    def draw(step: int) -> list[Tensor]:
        generator = work.generator("adversarial", step)
        image, label = drawn_batch(work, work.rows, recipe, generator)
        return [image, label, drawn_images(work, work.unlabelled, recipe, generator)]

    def loss(image: Tensor, label: Tensor, other: Tensor) -> Tensor:
        known, guessed = network(image), network(other)
        real = torch.cat([image, known.detach().float().softmax(dim=1)], dim=1)
        fake = torch.cat([other, reverse(guessed, recipe.weight).float().softmax(dim=1)], dim=1)
        return segmentation_loss(known, label) + discriminator_loss(discriminator, real, fake)

    return Training({"network": network, "discriminator": discriminator}, draw, loss)
