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
from clseg.config import RequestError, SupervisedRecipe
from clseg.data.prepare import Store
from clseg.loop import Training, step_generator
from clseg.losses import SEGMENTATION_LOSSES
from clseg.models import UNet


def one_hot(label: Tensor, classes: int) -> Tensor:
    """Labels int64 [B, ...] as float32 [B, classes, ...]."""
    return F.one_hot(label, classes).movedim(-1, 1).float()


def mixup(image: Tensor, label: Tensor, classes: int, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Every image and its one-hot label mixed with those of another row by one weight of Beta(alpha, alpha) per image.

    image [B, C, ...], label int64 [B, ...] -> image [B, C, ...], label float [B, classes, ...].
    """
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    weight = torch.from_numpy(rng.beta(alpha, alpha, len(image))).to(image)
    weight = weight.reshape(-1, *[1] * (image.ndim - 1))
    other = torch.randperm(len(image), generator=generator).to(image.device)
    label = one_hot(label, classes)
    return weight * image + (1 - weight) * image[other], weight * label + (1 - weight) * label[other]


def labelled_batch(
    store: Store,
    rows: np.ndarray,
    recipe: SupervisedRecipe,
    count: int,
    generator: Generator,
    device: torch.device,
    annotate: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`count` of these slices, drawn with repetition and augmented: images, and labels for `dice_loss`.

    `annotate`: labels int64 [B, ...] of the images before augmentation, in place of those of the store.
    """
    chosen = rows[torch.randint(len(rows), (count,), generator=generator).numpy()]
    batch = store.batch(chosen, device, generator)
    label = annotate(batch.image) if annotate else batch.label
    image, label = FINETUNE_VIEWS[recipe.augmentation](batch.image, label, generator)
    return mixup(image, label, store.num_classes, recipe.mixup, generator) if recipe.mixup else (image, label)


def unlabelled_batch(
    store: Store, rows: np.ndarray, recipe: SupervisedRecipe, count: int, generator: Generator, device: torch.device
) -> Tensor:
    """The images of `count` of these slices, drawn and augmented as those with labels are."""

    def nothing(image: Tensor) -> Tensor:
        return torch.zeros_like(image[:, 0], dtype=torch.long)

    return labelled_batch(store, rows, recipe, count, generator, device, nothing)[0]


def require_unlabelled(rows: np.ndarray, recipe: SupervisedRecipe) -> None:
    """Raise `RequestError` where a semi-supervised recipe has no slices without labels."""
    if not len(rows):
        raise RequestError(f"recipe {recipe.recipe!r}: no slices without labels are left; label fewer subjects")


def supervised(
    network: UNet,
    store: Store,
    rows: np.ndarray,
    _unlabelled: np.ndarray,
    recipe: SupervisedRecipe,
    batch_size: int,
    seed: int,
    _steps: int,
) -> Training:
    """Trains the network on the labelled slices `rows`."""
    device = next(network.parameters()).device
    segmentation_loss = SEGMENTATION_LOSSES[recipe.loss]

    def step_loss(step: int) -> Tensor:
        generator = step_generator(seed, "supervised", step)
        image, label = labelled_batch(store, rows, recipe, batch_size, generator, device)
        return segmentation_loss(network(image), label)

    return Training({"network": network}, step_loss)
