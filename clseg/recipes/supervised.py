"""Supervised fine-tuning of the whole network on the labelled slices; mixup is an option of it.

Source: Chaitanya et al., NeurIPS 2020, stage 3 and baseline, and the released code; Zeng et al. (cross-entropy); mixup:
Zhang et al., ICLR 2018, with Beta(0.1, 0.1) in the code of Chaitanya et al.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clseg.augment import FINETUNE_VIEWS
from clseg.errors import RequestError
from clseg.loop import Training, Work
from clseg.losses import SEGMENTATION_LOSSES
from clseg.settings import SupervisedRecipe

Annotate = Callable[[Tensor], Tensor]


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Labels int64 [B, ...] as float32 [B, classes, ...]."""
    return F.one_hot(label, classes).movedim(-1, 1).float()


def mixup(image: Tensor, label: Tensor, classes: int, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every image and its one-hot label mixed with those of another row by one weight of Beta(alpha, alpha) per image.

    image [B, C, ...], label int64 [B, ...] -> image [B, C, ...], label float [B, classes, ...].
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    weight = torch.from_numpy(rng.beta(alpha, alpha, len(image))).to(image).reshape(-1, *[1] * (image.ndim - 1))
    other = torch.randperm(len(image), generator=generator).to(image.device)
    label = one_hot(label, classes)
    return weight * image + (1 - weight) * image[other], weight * label + (1 - weight) * label[other]


def background(image: Tensor) -> Tensor:
    """The labels [B, ...] of slices that have none."""
    return torch.zeros_like(image[:, 0], dtype=torch.long)


def drawn_batch(
    work: Work, rows: np.ndarray, recipe: SupervisedRecipe, generator: Generator, annotate: Annotate | None = None
) -> tuple[Tensor, Tensor]:
    """Slices of `rows`, drawn with repetition and augmented: images, and labels for `dice_loss`.

    `annotate`: labels int64 [B, ...] of images before their augmentation; None: those of the store.
    Recipes pass slices without labels through the network apart from those with labels: in one batch, batch norm leaves
    the segmenter a way to tell the few labelled subjects from the others, and what it learns fails on the others.
    """
    chosen = rows[torch.randint(len(rows), (work.slices,), generator=generator).numpy()]
    batch, classes = work.store.batch(chosen, work.device, generator), work.store.num_classes
    label = annotate(batch.image) if annotate else batch.label
    image, label = FINETUNE_VIEWS[recipe.augmentation](batch.image, label, generator)
    return mixup(image, label, classes, recipe.mixup, generator) if recipe.mixup else (image, label)


def semi_supervised_loss(work: Work, recipe: SupervisedRecipe) -> Callable[[Tensor, Tensor], Tensor]:
    """The segmentation loss of a recipe that needs slices without labels; `RequestError` where there are none."""
    if not len(work.unlabelled):
        raise RequestError(f"recipe {recipe.recipe!r}: no slices without labels are left; label fewer subjects")
    return SEGMENTATION_LOSSES[recipe.loss]


def supervised(work: Work, recipe: SupervisedRecipe) -> Training:
    """Trains the network on the labelled slices."""
    segmentation_loss = SEGMENTATION_LOSSES[recipe.loss]

    def step_loss(step: int) -> Tensor:
        image, label = drawn_batch(work, work.rows, recipe, work.generator("supervised", step))
        return segmentation_loss(work.network(image), label)

    return Training({"network": work.network}, step_loss)
