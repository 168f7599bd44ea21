"""The contrastive loss, forward and backward, from embeddings and ids of slices or classes to the gradient.

Making the pairs is part of ours, as making masks is part of the others. One positive: two views of each slice; there
MONAI, lightly and pytorch-metric-learning compute the same value. Many: the slices of four classes; there only the
latter does. Peak memory is that of tensors, as the allocator saw it; it is the same in every call. A library more than
thirty times slower than ours is left out at larger sizes.
"""

import statistics
from collections.abc import Callable

import torch
from common import ROUNDS, Row, against, fastest, import_peer, in_turn, peak_mb, same
from torch import Tensor

from clseg.losses import contrastive_loss
from clseg.pairs import cluster_pairs, instance_pairs

TITLE = "contrastive loss, forward and backward, D = 128"
GOAL = (
    "from 24 to 1,024 rows at most 1.0 of the time of the fastest of lightly, pytorch-metric-learning and MONAI that "
    "computes the same value"
)
PEERS = ["lightly", "pytorch-metric-learning", "monai"]
NOTES: list[str] = []
SIZES, GOAL_UP_TO, TEMPERATURE, CLASSES, DROPPED_FROM = (24, 48, 64, 128, 256, 1024, 4096), 1024, 0.1, 4, 30


def contenders(rows: int, many: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Losses of embeddings [rows, D]: the two views of slice k are rows k and k + rows / 2."""
    slice_id = torch.arange(rows // 2).repeat(2)
    label = slice_id % CLASSES if many else slice_id
    make_pairs = cluster_pairs if many else lambda slice_id, _: instance_pairs(slice_id)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda z: contrastive_loss(z, make_pairs(slice_id, label), TEMPERATURE, "all")
    }
    if metric_learning := import_peer("pytorch_metric_learning.losses"):
        of_labels = metric_learning.SupConLoss(TEMPERATURE)
        found["pytorch-metric-learning"] = lambda z: of_labels(z, label)
    if not many:
        for name, module, loss in (
            ("lightly", "lightly.loss", "NTXentLoss"),
            ("monai", "monai.losses", "ContrastiveLoss"),
        ):
            if peer := import_peer(module):
                of_views = getattr(peer, loss)(TEMPERATURE)
                found[name] = lambda z, of_views=of_views: of_views(*z.chunk(2))
    return found


def measure(quick: bool) -> list[Row]:
    rows: list[Row] = []
    for many in (False, True):
        dropped: set[str] = set()
        for size in (64, 256) if quick else SIZES:
            case = f"{size} rows, {'many positives' if many else 'one positive'}"
            start = torch.randn(size, 128, generator=torch.Generator().manual_seed(size))
            losses = {name: loss for name, loss in contenders(size, many).items() if name not in dropped}

            def step(loss: Callable[[Tensor], Tensor], start: Tensor = start) -> Tensor:
                z = start.clone().requires_grad_()
                value = loss(z)
                value.backward()
                return torch.stack([value.detach(), z.grad.norm()])

            found = {name: step(loss) for name, loss in losses.items()}
            same(case, {name: value[0].item() for name, value in found.items()})
            same(f"{case}, gradient", {name: value[1].item() for name, value in found.items()}, 1e-3)
            calls = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
            samples = in_turn(calls, 2 if quick else ROUNDS)
            memory = {name: [peak_mb(call)] for name, call in calls.items()}
            peers = [name for name in losses if name != "ours"]
            if peers:
                peer, goal = fastest(samples, peers), 1.0 if size <= GOAL_UP_TO else None
                rows.append(against(f"{case}: time", samples, peer, goal))
                rows.append(against(f"{case}: peak memory", memory, fastest(memory, peers), None, unit="MB"))
            ours = statistics.median(samples["ours"])
            for name in peers:
                if name not in dropped and statistics.median(samples[name]) > DROPPED_FROM * ours:
                    dropped.add(name)
                    NOTES.append(f"{name} is left out above {case}: {statistics.median(samples[name]) / ours:.0f} x")
    return rows
