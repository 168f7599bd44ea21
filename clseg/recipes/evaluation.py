"""Segmenting whole volumes and scoring them; the same for every recipe."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from clseg.data.prepare import Store
from clseg.metrics import score, volume_dice
from clseg.models import UNet

SLICES_AT_ONCE = 32


@torch.inference_mode()
def probabilities(network: UNet, store: Store, volume: int) -> Tensor:
    """Class probabilities of a volume on the network's grid, [Z, K, H, W] float32 on the CPU."""
    device = next(network.parameters()).device
    network.eval()
    rows = store.volume_rows(volume)
    parts = []
    for start in range(0, len(rows), SLICES_AT_ONCE):
        image = store.batch(rows[start : start + SLICES_AT_ONCE], device).image
        parts.append(network(image.contiguous(memory_format=torch.channels_last)).float().softmax(dim=1).cpu())
    return torch.cat(parts)


def labelled_volumes(store: Store, subjects: Iterable[str]) -> list[int]:
    """The labelled volumes of these subjects."""
    return np.unique(store.slices["volume"].to_numpy()[store.rows(subjects, labelled=True)]).tolist()


def validation_dice(network: UNet, store: Store, subjects: Iterable[str]) -> float:
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


def scores(network: UNet, store: Store, subjects: Iterable[str]) -> list[dict]:
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
