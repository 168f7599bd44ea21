"""A prepared data set: slices that a network can see, memory-mapped, and the way back to the native grid."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from clseg.errors import RequestError

Device = torch.device | str


@dataclass
class SliceBatch:
    """Slices, or in 3-D the blocks around them, and what is known of them: on the CPU, whatever the images are on."""

    image: Tensor  # float32 [B, C, H, W] or [B, C, D, H, W]
    label: Tensor | None  # int64 [B, H, W] or [B, D, H, W]; None unless all slices have one
    row: Tensor  # int64 [B], the slice id
    volume: Tensor  # int64 [B], numbers the volumes of the store
    subject: Tensor  # int64 [B], numbers its subjects
    position: Tensor  # float32 [B] in (0, 1], place along the volume: m / n for the m-th of n slices


def fit(image: Tensor, size: Sequence[int]) -> Tensor:
    """Centre crop or zero pad the last axes to `size`, one number for each of them."""
    pads = []
    for want, have in zip(reversed(size), reversed(image.shape[-len(size) :]), strict=True):
        before = int((want - have) / 2)  # rounded toward zero, so that a crop and its pad agree
        pads += [before, want - have - before]
    return F.pad(image, pads)


def places(target: int, source: int) -> Tensor:
    """Where the centres of `target` cells lie among the indices of `source` cells over the same length."""
    return (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5


def native_slices(probability: Tensor, resampled: Sequence[int], native: Sequence[int]) -> Iterator[Tensor]:
    """Class probabilities [Z', K, H, W] of the network grid on the native one, a slice [K, Y, X] at a time.

    Put back where they were cropped (outside: background) and resized linearly, as Chaitanya et al. released it.
    """
    last = len(probability) - 1
    outside = torch.eye(probability.shape[1])[0, :, None, None]  # [K, 1, 1], background
    for centre in places(native[0], last + 1).clamp(0, last).tolist():
        near = probability[[int(centre), min(int(centre) + 1, last)]].detach().float().cpu()
        # padding with zeros is right for all but the background, so shift it: p - outside is zero there
        canvas = fit(torch.lerp(*near, centre % 1) - outside, resampled) + outside  # [K, H', W']
        yield F.interpolate(canvas[None], native[1:], mode="bilinear")[0]


def to_native(probability: Tensor, resampled: Sequence[int], native: Sequence[int]) -> np.ndarray:
    """The classes that are most probable on the native grid, uint8 [Z, Y, X]; see `native_slices`."""
    # `argmax` over the first axis takes several times as long as `max`
    return np.stack([plane.max(0).indices.byte().numpy() for plane in native_slices(probability, resampled, native)])


@dataclass(frozen=True)
class _Guarded:
    """An array whose first axis are slices, of which those of `open` volumes can be read."""

    array: np.ndarray
    name: str  # in messages
    volume: np.ndarray  # of each slice
    subject: np.ndarray  # of each volume
    open: np.ndarray  # of each volume, bool

    def require(self, index: Any) -> None:
        volume = np.unique(self.volume[index[0] if isinstance(index, tuple) else index])
        if closed := sorted(set(self.subject[volume[~self.open[volume]]])):
            raise ValueError(f"{self.name} of {', '.join(closed)} must not be seen here")

    def __getitem__(self, index: Any) -> np.ndarray:
        self.require(index)
        return self.array[index]


def resident_bytes(device: torch.device) -> int:
    """How much of a store may be kept on a device: a quarter of what is free of a GPU, nothing on the CPU, where the
    files are mapped."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return 0 if device.type == "cpu" else 2**63


class Store:
    """A prepared data set, memory-mapped, and kept on a GPU once it was read from there.

    `images` [N, C, H, W] float16, `labels` [N, H, W] uint8, H and W those of `plane`; `size` [H, W] or [D, H, W]: what
    the network sees at once; `volumes` and `slices` are tables, the row number of `slices` is the slice id; `subjects`
    and `labelled_subjects` are ids, sorted; `class_names` {1..K: name}; `label_values`: those of the files, of classes
    0..K; `content`: a hash of all that is in it; `asked`: one of the data set's description and the geometry;
    `normalisation`: the kind, percentiles (images are of about 0..1) or z_score.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._resident: dict[tuple[str, torch.device], Tensor | None] = {}  # copies on devices, of all views
        with self._reading("index.json") as path:
            index = json.loads(path.read_text(encoding="utf-8"))
        if not {"content", "asked", "normalisation"} <= index.keys():
            raise RequestError(f"{folder}: was made by an older version; delete it, it is made again")
        self.content, self.asked, self.label_values = index["content"], index["asked"], index["label_values"]
        self.normalisation: str = index["normalisation"]
        self.channels: int = index["channels"]
        self.size: list[int] = index["size"]
        self.dimensions = len(self.size)
        self.plane: list[int] = index["plane"]
        self.class_names: dict[int, str] = dict(enumerate(index["class_names"], start=1))
        self.num_classes = len(self.class_names) + 1
        self.volumes = table = pd.DataFrame(index["volumes"]).astype({f"spacing_{axis}": float for axis in "zyx"})
        self.positions_known: bool = index["positions"] == "known" and table["slice_axis"].nunique() == 1
        self._subject, subjects = pd.factorize(table["subject"], sort=True)  # of each volume
        self.subjects: tuple[str, ...] = tuple(subjects)
        self.labelled_subjects: tuple[str, ...] = tuple(sorted({*table["subject"][table["labelled"]]}))
        for start, size in (("first_row", "slices"), ("label_offset", "label_bytes")):
            table[start] = table[size].cumsum() - table[size]
        self._volume = volume = np.repeat(np.arange(len(table)), table["slices"])  # of each slice
        first, count = table[["first_row", "slices"]].to_numpy()[volume].T
        place = np.arange(len(volume)) - first
        self.slices = pd.DataFrame({"volume": volume, "slice": place, "slices_in_volume": count})
        self.slices["position"] = (place + 1) / count
        with self._reading("images.f16") as path:
            self.images = np.memmap(path, np.float16, "r").reshape(len(volume), self.channels, *self.plane)
        with self._reading("labels.u8") as path:
            self.labels = np.memmap(path, np.uint8, "r").reshape(len(volume), *self.plane)

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        try:
            yield self.folder / name
        except (OSError, ValueError, zlib.error):
            raise RequestError(f"{self.folder}/{name}: is incomplete; delete {self.folder}, it is made again") from None

    def only(self, labelled: Iterable[str] = (), unlabelled: Iterable[str] = ()) -> "Store":
        """A view of the same files that hands over slices of these subjects alone, and no labels of the second ones.

        Slices keep their ids. Asked for anything else it raises a `ValueError` that names the subject.
        """
        labelled, view = set(labelled), copy(self)
        view.subjects = tuple(sorted(labelled.union(unlabelled).intersection(self.subjects)))
        view._subject = pd.Index(view.subjects).get_indexer(self.volumes["subject"])
        shown = self.volumes["labelled"] & self.volumes["subject"].isin(labelled)
        view.volumes = self.volumes.assign(labelled=shown)
        view.labelled_subjects = tuple(sorted({*self.volumes["subject"][shown]}))
        about = self._volume, self.volumes["subject"].to_numpy()
        view.images = _Guarded(self.images, "images", *about, view._subject >= 0)
        view.labels = _Guarded(self.labels, "labels", *about, shown.to_numpy())
        return view

    def rows(self, subjects: Iterable[str], labelled: bool | None = None) -> np.ndarray:
        """Slice ids of these subjects, of their labelled (True), unlabelled (False) or all volumes (None), in order."""
        subjects = set(subjects)
        if unknown := sorted(subjects - set(self.subjects)):
            raise ValueError(f"not in the store, or not to be seen here: {', '.join(unknown)}")
        chosen = self.volumes["subject"].isin(subjects)
        if labelled is not None:
            chosen &= self.volumes["labelled"] == labelled
        return np.flatnonzero(chosen.to_numpy()[self._volume])

    def volume_rows(self, volume: int) -> np.ndarray:
        """Slice ids of one volume, in order of position."""
        return np.flatnonzero(self._volume == volume)

    def batch(self, rows: np.ndarray, device: Device = "cpu", generator: torch.Generator | None = None) -> SliceBatch:
        """These slices, in this order, on the device.

        3-D: the blocks of D slices around them, kept inside the volume (zero padded where it has fewer), and of `plane`
        a patch of `size` at a corner drawn by `generator`, or its centre.
        """
        rows = np.asarray(rows, dtype=np.int64)
        volume, position = self._volume[rows], self.slices["position"].to_numpy(np.float32)[rows]
        windows = [rows] if self.dimensions == 2 else [self._window(row, generator) for row in rows]
        known = self.volumes["labelled"].to_numpy()[volume].all()
        image = [self._read("images", window, device) for window in windows]
        label = [self._read("labels", window, device) for window in windows if known]
        if self.dimensions == 3:
            image = [fit(block.movedim(0, 1), self.size)[None] for block in image]  # [1, C, D, H, W]
            label = [fit(block, self.size)[None] for block in label]
        image = torch.cat([block.float() for block in image])  # under autocast `cat` takes no float16
        label = torch.cat(label).long() if known else None
        return SliceBatch(image, label, *map(torch.from_numpy, (rows, volume, self._subject[volume], position)))

    def _read(self, name: str, window: Any, device: Device) -> Tensor:
        """This part of `images` or `labels` on the device: from a copy that stays there, where one fits."""
        array, where = getattr(self, name), torch.device(device)
        if (name, where) not in self._resident:
            whole = getattr(array, "array", array)
            fits = whole.nbytes <= resident_bytes(where)
            self._resident[name, where] = torch.from_numpy(np.array(whole)).to(where) if fits else None
        if (resident := self._resident[name, where]) is None:
            return torch.from_numpy(np.array(array[window])).to(where)
        if isinstance(array, _Guarded):
            array.require(window)
        return resident[window if isinstance(window, tuple) else torch.from_numpy(window).to(where)]

    def _window(self, row: int, generator: torch.Generator | None) -> tuple:
        """The index of a slice's block in `images` and `labels`."""
        first, count = self.volumes[["first_row", "slices"]].to_numpy()[self._volume[row]]
        start = min(max(row - self.size[0] // 2, first), first + max(count - self.size[0], 0))
        window = [slice(start, min(start + self.size[0], first + count)), ...]
        for room, want in zip(np.subtract(self.plane, self.size[1:]).tolist(), self.size[1:], strict=True):
            corner = room // 2 if generator is None else int(torch.randint(room + 1, (), generator=generator))
            window.append(slice(corner, corner + want))
        return tuple(window)

    def native_label(self, volume: int) -> np.ndarray:
        """Reference label on the native grid, uint8 [Z, Y, X]; `ValueError` if the volume has none."""
        entry = self.volumes.iloc[volume]
        if not entry["labelled"]:
            raise ValueError(f"volume {volume} ({entry['subject']} {entry['phase']}) has no label")
        with self._reading("native_labels.zlib") as path, open(path, "rb") as file:
            file.seek(entry["label_offset"])
            label = zlib.decompress(file.read(entry["label_bytes"]))
        return np.frombuffer(label, np.uint8).reshape([entry[f"native_{axis}"] for axis in "zyx"]).copy()

    def to_native(self, volume: int, probability: Tensor) -> np.ndarray:
        """Class probabilities [Z, K, H, W] of a volume as class indices on its native grid, uint8 [Z, Y, X]."""
        entry = self.volumes.iloc[volume]
        expected = (int(entry["slices"]), self.num_classes, *self.plane)
        if tuple(probability.shape) != expected:
            raise ValueError(f"probability has shape {list(probability.shape)}, volume {volume} needs {list(expected)}")
        resampled, native = ([int(entry[f"{grid}_{axis}"]) for axis in "zyx"] for grid in ("resampled", "native"))
        return to_native(probability, resampled[1:], native)
