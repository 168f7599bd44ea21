"""A running average of a model's weights: the teacher of semi-supervised recipes, or the segmenter itself."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, step: int, statistics: bool = True) -> None:
    """Before step s = 0, 1, ... the average w' of a model's weights w becomes a w' + (1 - a) w.

    a = min(1 - 1 / (s + 1), decay); with `statistics` the running averages of batch norm are averaged likewise.
    Source: Tarvainen and Valpola, NeurIPS 2017.
    """
    pairs = [(average.parameters(), model.parameters())]
    if statistics:
        pairs.append([(b for b in each.buffers() if b.is_floating_point()) for each in (average, model)])
    for mine, theirs in pairs:
        get_ema_multi_avg_fn(min(1 - 1 / (step + 1), decay))(list(mine), list(theirs), None)


def ramp_up(step: int, steps: float) -> float:
    """The weight of a teacher's lesson: exp(-5 (1 - t)²) with t = step / steps up to 1, then 1; 1 where steps is 0.

    Source: Laine and Aila, ICLR 2017.
    """
    return math.exp(-5 * (1 - min(step / steps, 1)) ** 2) if steps else 1.0
