"""Segmenting whole volumes and scoring them; the same for every recipe."""

import math
from collections.abc import Iterable
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from clseg.data.prepare import Store, fit
from clseg.metrics import score, volume_dice

SLICES_AT_ONCE = 32


@torch.inference_mode()
def probabilities(network: nn.Module, store: Store, volume: int) -> Tensor:
    """Class probabilities of a volume on the stored grid, [Z, K, H, W] float32 on the CPU.

    2-D: slice by slice. 3-D: the mean over windows of `store.size` that overlap by half or more, weighted by a Gaussian
    of standard deviation size / 8 around the window's centre, as in nnU-Net (Isensee et al., Nature Methods 2021).
    """
    device = next(network.parameters()).device
    network.eval()
    rows = store.volume_rows(volume)
    if store.dimensions == 3:
        return _sliding_window(network, store, rows, device)
    parts = []
    for start in range(0, len(rows), SLICES_AT_ONCE):
        image = store.batch(rows[start : start + SLICES_AT_ONCE], device).image
        parts.append(network(image.contiguous(memory_format=torch.channels_last)).float().softmax(dim=1).cpu())
    return torch.cat(parts)


def _sliding_window(network: nn.Module, store: Store, rows: np.ndarray, device: torch.device) -> Tensor:
    size, grid = store.size, (len(rows), *store.plane)
    padded = [max(pair) for pair in zip(grid, size, strict=True)]
    image = fit(torch.from_numpy(store.images[rows]).movedim(0, 1), padded)  # [C, Z, H, W]
    places = [(torch.arange(n) - (n - 1) / 2) / (n / 8) for n in size]  # in standard deviations
    weight = torch.exp(-0.5 * sum(axis.square() for axis in torch.meshgrid(*places, indexing="ij")))  # [D, h, w]
    total, weights = torch.zeros(store.num_classes, *padded), torch.zeros(padded)
    starts = []
    for have, want in zip(padded, size, strict=True):
        count = math.ceil((have - want) / (want / 2)) + 1
        starts.append(np.linspace(0, have - want, count).round().astype(int))
    for corner in product(*starts):
        window = tuple(slice(first, first + side) for first, side in zip(corner, size, strict=True))
        probability = network(image[:, *window][None].to(device).float()).float().softmax(dim=1)[0].cpu()
        total[:, *window] += weight * probability
        weights[window] += weight
    return fit(total / weights, grid).movedim(1, 0)


def labelled_volumes(store: Store, subjects: Iterable[str]) -> list[int]:
    """The labelled volumes of these subjects."""
    return np.unique(store.slices["volume"].to_numpy()[store.rows(subjects, labelled=True)]).tolist()


def validation_dice(network: nn.Module, store: Store, subjects: Iterable[str]) -> float:
    """Mean foreground Dice over volumes on the network's grid; chooses checkpoints, is never reported as a result."""
    classes = range(1, store.num_classes)
    dice = [
        volume_dice(
            probabilities(network, store, volume).argmax(dim=1).numpy(),
            store.labels[store.volume_rows(volume)],
            classes,
        )
        for volume in labelled_volumes(store, subjects)
    ]
    return float(np.mean(dice))


def scores(network: nn.Module, store: Store, subjects: Iterable[str]) -> list[dict]:
    """One row per volume and class on the native grid in 3-D (`metrics.score`), with subject and phase."""
    rows = []
    for volume in labelled_volumes(store, subjects):
        about = store.volumes.iloc[volume]
        spacing = tuple(float(about[f"spacing_{axis}"]) for axis in "zyx")
        spacing_mm = None if any(map(math.isnan, spacing)) else spacing
        prediction = store.to_native(volume, probabilities(network, store, volume))
        for row in score(prediction, store.native_label(volume), store.class_names, spacing_mm):
            rows.append({"subject": about["subject"], "phase": about["phase"], **row})
    return rows
