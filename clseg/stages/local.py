"""Local contrast: a region of one view is like the same region of another view and unlike its neighbours.

The encoder is frozen (its batch norm stays in training mode, as released), the first decoder blocks and the head learn.
Source: Chaitanya et al., NeurIPS 2020, stage 2, and the released code. *Deviation*: both views are one batch there;
here they pass the network one after the other, as in the stage before.
"""

import torch
from torch import Tensor

from clseg import ranks
from clseg.augment import intensity
from clseg.errors import RequestError
from clseg.loop import Training, Work
from clseg.losses import local_contrastive_loss
from clseg.models import LocalHead
from clseg.ranks import gather
from clseg.regions import nearest_neighbours, region_grid
from clseg.settings import LocalStage
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
    """Trains the first `decoder_blocks` and a head."""
    network, store, device = work.network, work.store, work.device
    blocks, count = network.decoder.blocks, stage.decoder_blocks
    if count > len(blocks):
        raise RequestError(f"stages: decoder_blocks is {count}, the network has {len(blocks)}")
    map_size = tuple(side // 2 ** (len(blocks) - count) for side in store.size)
    corners, neighbours = regions(stage, map_size)
    head = LocalHead(network.config, count, stage.size).to(device)

    def draw(step: int) -> list[Tensor]:
        generator = work.generator("local", step)
        image_pairs = []
        if stage.strategy == "lr":
            chosen = random_slices(work.rows, work.slices, generator)
        else:
            chosen, partition = partition_slices(store, work.rows, stage.partitions, work.slices, generator)
            image_pairs = [(partition[:, None] == partition[None, :]).fill_diagonal_(False)]
        image = store.batch(chosen, device).image
        return [*(intensity(image, generator, store.normalisation) for _ in range(2)), *image_pairs]

    def loss(first: Tensor, second: Tensor, image_pairs: Tensor | None = None) -> Tensor:
        maps = []  # of each view, which pass the network one after the other: [B, R', D]
        for view in (first, second):
            with torch.no_grad():
                features = network.encoder(ranks.part(view))
            maps.append(gather(head(network.decoder(features, count), corners)))
        return local_contrastive_loss(*maps, neighbours, stage.temperature, image_pairs)

    return Training({**{f"decoder.blocks.{k}": blocks[k] for k in range(count)}, "head": head}, draw, loss, steady=None)
