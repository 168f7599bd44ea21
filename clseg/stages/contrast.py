"""Global contrast: slices that are alike get similar embeddings. The methods differ only in their pairs and views.

| pairs | views of a slice | slices of a batch | source |
|---|---|---|---|
| instance | two copies | random | SimCLR; G^R of Chaitanya et al. |
| partition gd-, gd | itself and two copies; itself and one | one per partition of random volumes | Chaitanya et al. |
| partition gcl | two copies | random | the partition baseline of Zeng et al. |
| position | two copies | random | Zeng et al. |
| cluster | two copies | random | Zhang et al., an interpretation |

*Deviation* from the code of Chaitanya et al.: batches hold only real slices (the released sampler leaves zero images in
them, whose 16 slices of four volumes in two sets are kept); brightness and contrast are drawn per image.
"""

from functools import partial

import torch
from torch import Tensor

from clseg import ranks
from clseg.augment import contrast_view, spatial_view
from clseg.cluster import pseudo_classes
from clseg.errors import RequestError
from clseg.loop import Training, Work
from clseg.losses import contrastive_terms
from clseg.models import GlobalHead
from clseg.pairs import Pairs, cluster_pairs, instance_pairs, partition_pairs, position_pairs
from clseg.ranks import gather
from clseg.settings import ContrastStage
from clseg.stages.sampling import equal_partitions, partition_slices, random_slices

# which views of each slice enter the batch: False the slice itself, True an augmented copy
VIEWS = {"gd-": (False, True, True), "gd": (False, True)}


def draw_batch(
    work: Work, stage: ContrastStage, step: int, cluster: Tensor | None = None
) -> tuple[list[Tensor], Pairs]:
    """The batch of one step: V views of n images [n, C, ...], and who is alike among the V n rows, view after view,
    which the CPU tells.

    cluster: pseudo-class of every row of the store [N] int64, for `cluster` pairs.
    """
    generator, store = work.generator("contrast", step), work.store
    views, partition = VIEWS.get(stage.answer, (True, True)), None
    if stage.answer in VIEWS:
        chosen, partition = partition_slices(store, work.rows, stage.partitions, work.slices, generator)
    else:
        chosen = random_slices(work.rows, work.slices, generator)
    batch = store.batch(chosen, work.device, generator)
    view_of = {"glcl": partial(contrast_view, normalisation=store.normalisation), "pcl": spatial_view}[stage.views]
    image = [view_of(batch.image, generator) if augmented else batch.image for augmented in views]

    def every(values: Tensor) -> Tensor:
        return values.repeat(len(views))  # [n] -> [V n]

    slice_id = every(batch.row)
    if stage.pairs == "instance":
        return image, instance_pairs(slice_id)
    if stage.pairs == "position":
        return image, position_pairs(every(batch.position), stage.threshold)
    if stage.answer in VIEWS:
        view = torch.arange(len(views)).repeat_interleave(len(chosen))
        pairs = partition_pairs(slice_id, every(partition), stage.strategy, view)
        if stage.strategy == "gd" and stage.set_of:
            group = every(torch.arange(len(chosen)) // (stage.set_of * stage.partitions))
            pairs = Pairs(pairs.positive & (group[:, None] == group[None, :]), pairs.negative)
        return image, pairs
    cluster = equal_partitions(store, chosen, stage.partitions) if stage.pairs == "partition" else cluster[chosen]
    pairs = cluster_pairs(slice_id, every(cluster))
    if stage.pairs == "cluster" and stage.positives == "view":
        pairs = Pairs(instance_pairs(slice_id).positive, pairs.negative)
    return image, pairs


def contrast(work: Work, stage: ContrastStage) -> Training:
    """Trains the encoder and a head; with `cluster` pairs the pseudo-classes are among the tables.

    Views pass the network one after the other, so that batch norm cannot tell them by being together; so do those of
    Zeng et al. *Deviation*: in the released code of Chaitanya et al. all views, and its zero images, are one batch.
    """
    store, encoder = work.store, work.network.encoder
    if stage.pairs == "position" and not store.positions_known:
        raise RequestError(f"data set of {store.folder.name}: slices have no known position; choose other pairs")
    head = GlobalHead(work.network.config, store.size, stage.head).to(work.device)
    tables, cluster = {}, None
    if stage.pairs == "cluster":
        tables["clusters"], cluster = pseudo_classes(work, stage)

    def draw(step: int) -> list[Tensor]:
        views, pairs = draw_batch(work, stage, step, cluster)
        return [*(mask.to(work.device, non_blocking=True) for mask in (pairs.positive, pairs.negative)), *views]

    def loss(positive: Tensor, negative: Tensor, *views: Tensor) -> Tensor:
        embedding = torch.cat([gather(head(encoder(ranks.part(view))[-1])) for view in views])  # [V n, E]
        return contrastive_terms(embedding, positive, negative, stage.temperature, stage.denominator)

    return Training({"encoder": encoder, "head": head}, draw, loss, tables=tables)
