"""Segmenting whole volumes and scoring them; the same for every recipe."""

import math
from collections.abc import Iterable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from clseg.data.store import Store, fit
from clseg.metrics import score, volume_dice


@torch.inference_mode()
def segment(network: nn.Module, images: np.ndarray, size: Sequence[int]) -> Tensor:
    """Class probabilities [Z, K, H, W] float32 on the CPU of a volume's slices [Z, C, H, W], as `to_network` made them.

    2-D: slice by slice. 3-D: the mean over windows of `size` that overlap by half or more, weighted by a Gaussian of
    standard deviation size / 8 around the window's centre, as in nnU-Net (Isensee et al., Nature Methods 2021).
    """
    network.eval()
    device, slices = next(network.parameters()).device, torch.from_numpy(np.array(images))
    if len(size) == 2:
        batches = (batch.to(device).float() for batch in slices.split(32))
        return torch.cat([network(image).float().softmax(dim=1).cpu() for image in batches])
    grid = (len(slices), *slices.shape[2:])
    padded = list(map(max, grid, size))
    image = fit(slices.movedim(0, 1), padded)  # [C, Z, H, W]
    places = [(torch.arange(n) - (n - 1) / 2) / (n / 8) for n in size]  # in standard deviations
    weight = torch.exp(-0.5 * sum(axis.square() for axis in torch.meshgrid(*places, indexing="ij")))  # [D, h, w]
    total, weights = None, torch.zeros(padded)  # [K, *padded], [*padded]
    counts = [math.ceil((have - want) / (want / 2)) + 1 for have, want in zip(padded, size, strict=True)]
    starts = [np.linspace(0, h - w, n).round().astype(int) for h, w, n in zip(padded, size, counts, strict=True)]
    for corner in product(*starts):
        window = tuple(slice(first, first + side) for first, side in zip(corner, size, strict=True))
        probability = network(image[:, *window][None].to(device).float()).float().softmax(dim=1)[0].cpu()
        total = torch.zeros(len(probability), *padded) if total is None else total
        total[:, *window] += weight * probability
        weights[window] += weight
    return fit(total / weights, grid).movedim(1, 0)


def probabilities(network: nn.Module, store: Store, volume: int) -> Tensor:
    """Class probabilities of a volume of the store, on the stored grid; see `segment`."""
    return segment(network, store.images[store.volume_rows(volume)], store.size)


def labelled_volumes(store: Store, subjects: Iterable[str]) -> list[int]:
    """The labelled volumes of these subjects."""
    return np.unique(store.slices["volume"].to_numpy()[store.rows(subjects, labelled=True)]).tolist()


def validation_dice(network: nn.Module, store: Store, subjects: Iterable[str]) -> float:
    """Mean foreground Dice over volumes on the network's grid; chooses checkpoints, is never reported as a result.

    Volumes without a structure in which none is found have no Dice and are left out; NaN where no volume is left.
    """
    dice = []
    for volume in labelled_volumes(store, subjects):
        prediction = probabilities(network, store, volume).max(dim=1).indices.numpy()
        dice.append(volume_dice(prediction, store.labels[store.volume_rows(volume)], store.class_names))
    defined = [value for value in dice if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def scores(network: nn.Module, store: Store, subjects: Iterable[str]) -> list[dict]:
    """One row per volume and class on the native grid in 3-D (`metrics.score`), with subject and phase."""
    rows = []
    for volume in labelled_volumes(store, subjects):
        about = store.volumes.iloc[volume]
        spacing_mm = [float(about[f"spacing_{axis}"]) for axis in "zyx"]
        prediction = store.to_native(volume, probabilities(network, store, volume))
        known_mm = None if any(map(math.isnan, spacing_mm)) else spacing_mm
        for row in score(prediction, store.native_label(volume), store.class_names, known_mm):
            rows.append({"subject": about["subject"], "phase": about["phase"], **row})
    return rows
