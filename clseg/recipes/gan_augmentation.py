"""Learned augmentation: deformations and intensity changes of the labelled slices that look like unlabelled slices.

Source: Chaitanya et al., IPMI 2019 and Medical Image Analysis 2021, and the released code (adversarial weight 1, size
weight 0.001, 400 of 10,000 steps for the segmenter alone); the "cGAN" of Chaitanya et al., NeurIPS 2020.
*Deviation*: both generators and the segmenter are trained together, not the generators one by one before a last
segmenter; one discriminator of deformed and changed images, by gradient reversal in the same step; smaller networks;
displacements are in 1/192 of the side, pixels at the published size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clseg.augment import REFERENCE_PX, sampling_grid, warp, warp_label
from clseg.loop import Training, Work
from clseg.models import CONV, initialise
from clseg.recipes.adversarial import Discriminator, discriminator_loss, reverse
from clseg.recipes.supervised import drawn_batch, drawn_images, semi_supervised_loss
from clseg.settings import GanAugmentationRecipe, NetworkConfig

RANDOM = 100  # length of the random vector
NODES = 6  # per side, of the map that is made of it: 192 / 32


class Change(nn.Module):
    """An image [B, C, ...] and a random vector [B, 100] to a map [B, outputs, ...] of the same sides: of the vector
    comes a coarse map, which is upsampled and joined to features of the image; conv 3 and ReLU in between."""

    def __init__(self, channels: int, outputs: int, config: NetworkConfig, dimensions: int) -> None:
        super().__init__()
        conv, self.width = CONV[dimensions], config.filters[0]
        self.coarse = nn.Linear(RANDOM, self.width * NODES**dimensions)
        self.image = nn.Sequential(conv(channels, self.width, 3, padding=1), nn.ReLU())
        layers = conv(2 * self.width, self.width, 3, padding=1), nn.ReLU(), conv(self.width, outputs, 3, padding=1)
        self.both = nn.Sequential(*layers)
        initialise(self, config)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        sides = image.shape[2:]
        coarse = self.coarse(vector).relu().reshape(-1, self.width, *[NODES] * len(sides))
        coarse = F.interpolate(coarse, size=sides, mode="bilinear" if len(sides) == 2 else "trilinear")
        return self.both(torch.cat([self.image(image), coarse], dim=1))


def deform(image: Tensor, label: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Image [B, C, ...] and label, float [B, K, ...], moved alike by [B, dimensions, ...] in 1/192 of the side, first
    along the last axis, as in `warp`; what comes from outside is 0 and background."""
    grid = sampling_grid(image, torch.eye(2, 3).expand(len(image), -1, -1))
    grid = grid + 2 / REFERENCE_PX * displacement.movedim(1, -1)
    return warp(image, grid), warp_label(label, grid)


def gan_augmentation(work: Work, recipe: GanAugmentationRecipe) -> Training:
    """L(labelled and changed ones) + adversarial_weight log(1 - D(changed)) - size_weight (mean |v| + mean |Δ|).

    v the displacements, Δ in (-1, 1) what is added to the deformed image; D(x) in (0, 1) is trained to be 1 for
    unlabelled slices, 0 for changed ones. Segmenter and generators minimise the loss above; for `warm_up` of the steps
    there is the segmenter alone, on labelled slices. Raises `RequestError` without unlabelled slices.
    """
    segmentation_loss = semi_supervised_loss(work, recipe)
    network, store, channels = work.network, work.store, work.store.channels
    about = network.config, store.dimensions
    deformation, intensity = (Change(channels, n, *about).to(work.device) for n in (store.dimensions, channels))
    discriminator = Discriminator(channels, *about).to(work.device)

    warm_up = round(recipe.warm_up * work.steps)

    def draw(step: int) -> list[Tensor]:
        generator = work.generator("gan_augmentation", step)
        image, label = drawn_batch(work, work.rows, recipe, generator)
        if step < warm_up:
            return [image, label]
        vectors = torch.randn((2, work.slices, RANDOM), generator=generator).to(work.device)
        return [image, label, vectors, drawn_images(work, work.unlabelled, recipe, generator)]

    def loss(image: Tensor, label: Tensor, vectors: Tensor | None = None, real: Tensor | None = None) -> Tensor:
        if vectors is None:
            return segmentation_loss(network(image), label)
        displacement = deformation(image, vectors[0]).float()
        moved, moved_label = deform(image, label, displacement)
        added = intensity(moved, vectors[1]).float().tanh()
        changed = moved + added
        known = segmentation_loss(network(torch.cat([image, changed])), torch.cat([label, moved_label]))
        contest = discriminator_loss(discriminator, real, reverse(changed, recipe.adversarial_weight))
        return known + contest - recipe.size_weight * (displacement.abs().mean() + added.abs().mean())

    learning = {"network": network, "deformation": deformation, "intensity": intensity, "discriminator": discriminator}
    return Training(learning, draw, loss, steady=warm_up)
