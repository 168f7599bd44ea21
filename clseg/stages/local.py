"""Local contrast: a region of one view is like the same region of another view and unlike its neighbours.

The encoder is frozen (its batch norm stays in training mode, as released); the first l decoder blocks and the head
learn.
Source: Chaitanya et al., NeurIPS 2020, stage 2, and its released code.
*Deviation*: brightness and contrast are drawn per image, not once per batch.
"""

import torch
from torch import Tensor

from clseg.augment import intensity
from clseg.config import LocalStage, RequestError
from clseg.loop import Training, Work
from clseg.losses import local_contrastive_loss, nearest_neighbours, region_grid
from clseg.models import LocalHead
from clseg.stages.sampling import partition_slices, random_slices


def regions(stage: LocalStage, map_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Corners [R', 2] and neighbours [R, M] on a decoder map of this size; `RequestError` where it is too small."""
    try:
        corners, neighbours = region_grid(map_size, stage.size, stage.regions)
    except ValueError as error:
        raise RequestError(f"stages: {error}; use larger images or more decoder_blocks") from None
    if stage.neighbours == "nearest":
        corners = corners[: stage.regions]
        neighbours = nearest_neighbours(corners, stage.negatives)
    return corners, neighbours[:, : stage.negatives]


def local(work: Work, stage: LocalStage) -> Training:
    """Trains the first decoder blocks and a head."""
    network, store, device = work.network, work.store, work.device
    blocks = network.decoder.blocks
    if stage.decoder_blocks > len(blocks):
        raise RequestError(f"stages: decoder_blocks is {stage.decoder_blocks}, the network has {len(blocks)}")
    scale = 2 ** (len(blocks) - stage.decoder_blocks)
    corners, neighbours = regions(stage, tuple(side // scale for side in store.size))
    corners, neighbours = corners.to(device), neighbours.to(device)
    head = LocalHead(network.config, stage.decoder_blocks, stage.size).to(device)

    def step_loss(step: int) -> Tensor:
        generator = work.generator("local", step)
        image_pairs = None
        if stage.strategy == "lr":
            chosen = random_slices(work.rows, work.slices, generator)
        else:
            chosen, partition = partition_slices(store, work.rows, stage.partitions, work.slices, generator)
            same = partition[:, None] == partition[None, :]
            image_pairs = same.fill_diagonal_(False).to(device)
        image = store.batch(chosen, device).image
        views = torch.cat([intensity(image, generator), intensity(image, generator)])
        with torch.no_grad():
            features = network.encoder(views)
        embedding = head(network.decoder(features, stage.decoder_blocks), corners)  # [2B, R', D]
        first, second = embedding.chunk(2)
        return local_contrastive_loss(first, second, neighbours, stage.temperature, image_pairs)

    learning = {f"decoder.blocks.{k}": blocks[k] for k in range(stage.decoder_blocks)}
    return Training({**learning, "head": head}, step_loss)
