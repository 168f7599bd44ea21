"""Global contrast: slices that are alike get similar embeddings. The strategies differ only in their pairs and views.

Source: Chaitanya et al., NeurIPS 2020, stage 1, and its released code.
*Deviation*: batches hold only real slices (the released sampler leaves zero images in them); brightness and contrast
are drawn per image; the positives of `gd` join all volumes of the batch, not sets of two.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from clseg.augment import contrast_view
from clseg.config import ContrastStage
from clseg.data.prepare import Store
from clseg.loop import step_generator
from clseg.losses import contrastive_loss
from clseg.models import UNet
from clseg.pairs import Pairs, instance_pairs, partition_pairs
from clseg.stages.sampling import partition_slices, random_slices

# which views of each slice enter the batch: False the slice itself, True an augmented copy
VIEWS = {"instance": (True, True), "gd-": (False, True, True), "gd": (False, True)}


def draw_batch(
    store: Store, rows: np.ndarray, stage: ContrastStage, slices: int, seed: int, step: int, device: torch.device
) -> tuple[Tensor, Pairs]:
    """The batch of one step: images [V n, C, H, W], view after view, and who is alike among them."""
    generator = step_generator(seed, "contrast", step)
    if stage.pairs == "instance":
        views, partition = VIEWS["instance"], None
        chosen = random_slices(rows, slices, generator)
    else:
        views = VIEWS[stage.strategy]
        chosen, partition = partition_slices(store, rows, stage.partitions, slices, generator)
    batch = store.batch(chosen, device)
    image = torch.cat([contrast_view(batch.image, generator) if augmented else batch.image for augmented in views])
    slice_id = batch.row.repeat(len(views))
    if partition is None:
        return image, instance_pairs(slice_id)
    view = torch.arange(len(views), device=device).repeat_interleave(len(chosen))
    return image, partition_pairs(slice_id, partition.to(device).repeat(len(views)), stage.strategy, view)


def contrast(
    network: UNet, head: nn.Module, store: Store, rows: np.ndarray, stage: ContrastStage, slices: int, seed: int
) -> Callable[[int], Tensor]:
    """The loss of one step as a function of the step, for `loop.fit`; trains `network.encoder` and `head`."""
    device = next(network.parameters()).device

    def step_loss(step: int) -> Tensor:
        image, pairs = draw_batch(store, rows, stage, slices, seed, step, device)
        embedding = head(network.encoder(image.contiguous(memory_format=torch.channels_last))[-1])
        return contrastive_loss(embedding, pairs, stage.temperature, stage.denominator)

    return step_loss
