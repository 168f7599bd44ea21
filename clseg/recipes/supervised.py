"""Supervised fine-tuning of the whole network on the labelled slices.

Source: Chaitanya et al., NeurIPS 2020, stage 3 and baseline, and the released code.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clseg.augment import finetune_views
from clseg.config import SupervisedRecipe
from clseg.data.prepare import Store
from clseg.loop import step_generator
from clseg.losses import SEGMENTATION_LOSSES
from clseg.models import UNet


def supervised(
    network: UNet, store: Store, rows: np.ndarray, recipe: SupervisedRecipe, batch_size: int, seed: int
) -> Callable[[int], Tensor]:
    """The loss of one step as a function of the step, for `loop.fit`; `rows`: labelled slices, drawn repeatedly."""
    device = next(network.parameters()).device
    segmentation_loss = SEGMENTATION_LOSSES[recipe.loss]

    def step_loss(step: int) -> Tensor:
        generator = step_generator(seed, "supervised", step)
        chosen = rows[torch.randint(len(rows), (batch_size,), generator=generator).numpy()]
        batch = store.batch(chosen, device)
        image, label = batch.image, batch.label
        if recipe.augmentation == "published":
            image, label = finetune_views(image, label, generator)
        logits = network(image.contiguous(memory_format=torch.channels_last))
        return segmentation_loss(logits, label)

    return step_loss
