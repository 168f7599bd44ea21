"""A running average of a model's weights: the teacher of semi-supervised recipes, or the segmenter itself."""

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
