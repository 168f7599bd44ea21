"""Supervised fine-tuning of the whole network on the labelled slices; mixup is an option of it.

Source: Chaitanya et al., NeurIPS 2020, stage 3 and baseline, and the released code; Zeng et al. (cross-entropy); mixup:
Zhang et al., ICLR 2018, with Beta(0.1, 0.1) in the code of Chaitanya et al.
"""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clseg.augment import FINETUNE_GRIDS, warp, warp_label
from clseg.data.store import SliceBatch
from clseg.errors import RequestError
from clseg.loop import Training, Work
from clseg.losses import SEGMENTATION_LOSSES
from clseg.recipes.average import follow
from clseg.settings import SupervisedRecipe

Annotate = Callable[[Tensor], Tensor]


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Labels int64 [B, ...] as float32 [B, classes, ...]."""
    return F.one_hot(label, classes).movedim(-1, 1).float()


def mixup(image: Tensor, label: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every image and its label mixed with those of another row by one weight of Beta(alpha, alpha) per image.

    image [B, C, ...], label float [B, classes, ...]; returns the like.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    weight = torch.from_numpy(rng.beta(alpha, alpha, len(image))).to(image).reshape(-1, *[1] * (image.ndim - 1))
    other = torch.randperm(len(image), generator=generator).to(image.device)
    return weight * image + (1 - weight) * image[other], weight * label + (1 - weight) * label[other]


def _drawn(
    work: Work, rows: np.ndarray, recipe: SupervisedRecipe, generator: Generator
) -> tuple[SliceBatch, Tensor | None]:
    """Slices of `rows`, drawn with repetition, and the sampling grid of their augmentation, None without one."""
    chosen = rows[torch.randint(len(rows), (work.slices,), generator=generator).numpy()]
    batch = work.store.batch(chosen, work.device, generator)
    if recipe.augmentation == "none":
        return batch, None
    return batch, FINETUNE_GRIDS[recipe.augmentation](batch.image, generator)


def drawn_batch(
    work: Work, rows: np.ndarray, recipe: SupervisedRecipe, generator: Generator, annotate: Annotate | None = None
) -> tuple[Tensor, Tensor]:
    """Slices of `rows`, drawn with repetition and augmented: images, and labels float [B, classes, ...].

    `annotate`: labels int64 [B, ...] of images before their augmentation; None: those of the store.
    Recipes pass slices without labels through the network apart from those with labels: in one batch, batch norm leaves
    the segmenter a way to tell the few labelled subjects from the others, and what it learns fails on the others.
    """
    batch, grid = _drawn(work, rows, recipe, generator)
    image = batch.image
    label = one_hot(annotate(image) if annotate else batch.label, work.store.num_classes).to(work.device)
    if grid is not None:
        image, label = warp(image, grid), warp_label(label, grid)
    return mixup(image, label, recipe.mixup, generator) if recipe.mixup else (image, label)


def drawn_images(work: Work, rows: np.ndarray, recipe: SupervisedRecipe, generator: Generator) -> Tensor:
    """As `drawn_batch`, of slices without labels: the images alone."""
    batch, grid = _drawn(work, rows, recipe, generator)
    return batch.image if grid is None else warp(batch.image, grid)


def semi_supervised_loss(work: Work, recipe: SupervisedRecipe) -> Callable[[Tensor, Tensor], Tensor]:
    """The segmentation loss of a recipe that needs slices without labels; `RequestError` where there are none."""
    if not len(work.unlabelled):
        raise RequestError(f"recipe {recipe.recipe!r}: no slices without labels are left; label fewer subjects")
    return SEGMENTATION_LOSSES[recipe.loss]


def supervised(work: Work, recipe: SupervisedRecipe) -> Training:
    """Trains the network on the labelled slices; with `average` it is a running average of what is trained."""
    segmentation_loss, network = SEGMENTATION_LOSSES[recipe.loss], work.network
    student = deepcopy(network) if recipe.average else network

    def draw(step: int) -> tuple[Tensor, Tensor]:
        if recipe.average:
            follow(network, student, recipe.average, step)
        return drawn_batch(work, work.rows, recipe, work.generator("supervised", step))

    def loss(image: Tensor, label: Tensor) -> Tensor:
        return segmentation_loss(student(image), label)

    return Training({"network": student}, draw, loss)
