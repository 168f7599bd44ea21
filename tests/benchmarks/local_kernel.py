"""The local kernel, forward and backward: 24 images, 13 regions of the released code, two views, D = 128.

Two plain vectorised forms: one gathers the embeddings of the neighbours and multiplies, as the formula reads; one
computes all similarities of an image at once and masks them. Ours is held against the faster.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import ROUNDS, Row, against, fastest, in_turn, peak_mb, same
from torch import Tensor

from clseg.losses import local_contrastive_loss
from clseg.regions import region_grid

TITLE = "local kernel, forward and backward, 24 images x 13 regions x 2 views, D = 128"
GOAL = "at most 0.7 of the time of a plain vectorised form"
PEERS: list[str] = []
TEMPERATURE = 0.1


def gathered(first: Tensor, second: Tensor, neighbours: Tensor) -> Tensor:
    first, second = F.normalize(first, dim=2), F.normalize(second, dim=2)

    def terms(a: Tensor, b: Tensor) -> Tensor:
        anchor = a[:, : len(neighbours)]  # [B, R, D]
        near = torch.cat([a[:, neighbours], b[:, neighbours]], dim=2)  # [B, R, 2M, D]
        positive = (anchor * b[:, : len(neighbours)]).sum(dim=2, keepdim=True)
        negative = (anchor[:, :, None] * near).sum(dim=3)
        return -F.log_softmax(torch.cat([positive, negative], dim=2) / TEMPERATURE, dim=2)[:, :, 0]

    return torch.cat([terms(first, second), terms(second, first)]).mean()


def masked(first: Tensor, second: Tensor, neighbours: Tensor) -> Tensor:
    regions, anchors = first.shape[1], len(neighbours)
    z = F.normalize(torch.cat([first, second], dim=1), dim=2)  # [B, 2R', D]
    s = z @ z.mT / TEMPERATURE
    s = torch.cat([s[:, :anchors], s[:, regions : regions + anchors]], dim=1)  # [B, 2R, 2R']
    near = torch.zeros(anchors, regions, dtype=torch.bool).scatter_(1, neighbours, True).repeat(2, 2)
    own, none = torch.eye(anchors, regions, dtype=torch.bool), torch.zeros(anchors, regions, dtype=torch.bool)
    positive = torch.cat([torch.cat([none, own], dim=1), torch.cat([own, none], dim=1)])
    log_share = s - s.masked_fill(~(near | positive), -torch.inf).logsumexp(dim=2, keepdim=True)
    return -log_share[:, positive].mean()


def measure(quick: bool) -> list[Row]:
    corners, neighbours = region_grid((48, 48), 3, 13)
    random = torch.Generator().manual_seed(0)
    start = torch.randn(2, 24, len(corners), 128, generator=random)
    losses: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": lambda *about: local_contrastive_loss(*about, TEMPERATURE),
        "plain, gathered": gathered,
        "plain, masked": masked,
    }

    def step(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        first, second = (view.clone().requires_grad_() for view in start)
        value = loss(first, second, neighbours)
        value.backward()
        return torch.stack([value.detach(), first.grad.norm(), second.grad.norm()])

    for number, what in enumerate(("value", "gradient of the first view", "gradient of the second view")):
        same(what, {name: step(loss)[number].item() for name, loss in losses.items()})
    calls = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    samples = in_turn(calls, 2 if quick else ROUNDS)
    memory = {name: [peak_mb(call)] for name, call in calls.items()}
    plain = [name for name in losses if name != "ours"]
    rows = [against("time, faster plain form", samples, fastest(samples, plain), 0.7)]
    rows.append(against("time, formula as it reads", samples, "plain, gathered", None))
    return [*rows, against("peak memory, leaner plain form", memory, fastest(memory, plain), None, unit="MB")]
