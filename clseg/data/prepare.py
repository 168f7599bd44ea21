"""From volumes to slices the network can see: normalised, resampled and cropped once, then memory-mapped.

A prepared store is a folder under `paths.prepared_root()`, named by the hash of the input files, the preprocessing and
the geometry. It appears by one atomic rename, so it is complete or absent.
"""

import fcntl
import json
import shutil
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from clseg import paths
from clseg.config import DatasetConfig, Geometry, Normalisation, RequestError, digest
from clseg.data.formats import Volume, VolumeRef, class_names, read, scan

STORE_VERSION = 1
_COLUMNS = {
    "subject": str,
    "phase": str,
    "labelled": bool,
    "first_row": int,
    "slices": int,
    "native_y": int,
    "native_x": int,
    "resampled_y": int,
    "resampled_x": int,
    "spacing_z": float,
    "spacing_y": float,
    "spacing_x": float,
    "slice_axis": str,
    "label_offset": int,
    "label_bytes": int,
}


@dataclass
class SliceBatch:
    """Slices and what is known of them: image [B, C, H, W] float32; label [B, H, W] int64, None unless all have one.

    `row` [B] int64 is the slice id; `volume` and `subject` [B] int64 number volumes and subjects of the store;
    `position` [B] float32 in (0, 1] is the place along the volume, m / n for the m-th of n slices.
    """

    image: Tensor
    label: Tensor | None
    row: Tensor
    volume: Tensor
    subject: Tensor
    position: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device | str) -> "SliceBatch":
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


# ------------------------------------------------------------------------------------------------------- preprocessing


def correct_bias(image: np.ndarray, spacing_mm: tuple[float, float, float] | None) -> np.ndarray:
    """N4 bias field correction of one channel [Z, Y, X]: 4 levels of at most 50 iterations, convergence 1e-3, no mask.

    Source: Chaitanya et al., released `N4_bias_correction.py`. Raises `RequestError` without SimpleITK.
    """
    try:
        import SimpleITK as sitk
    except ImportError:
        raise RequestError("normalisation.n4 needs SimpleITK; install the extra: pip install 'clseg[n4]'") from None
    filtered = sitk.GetImageFromArray(image)
    if spacing_mm:
        filtered.SetSpacing(spacing_mm[::-1])
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetConvergenceThreshold(1e-3)
    corrector.SetMaximumNumberOfIterations([50] * 4)
    return sitk.GetArrayFromImage(corrector.Execute(filtered))


def normalise(volume: Volume, setting: Normalisation, source: str | Path) -> np.ndarray:
    """(v - p_low) / (p_high - p_low) per channel of the whole volume, not clipped; float32 [C, Z, Y, X].

    Source: Chaitanya et al., 1st and 99th percentile. Raises `RequestError` if the percentiles coincide.
    """
    channels = []
    for channel, image in enumerate(volume.image):
        image = correct_bias(image, volume.spacing_mm) if setting.n4 else image
        low, high = np.percentile(image, [setting.low, setting.high])
        if not high > low:
            raise RequestError(
                f"{source}: percentiles {setting.low:g} and {setting.high:g} of channel {channel} are both {low:g}; "
                "the image is nearly constant, remove it or widen normalisation.low and .high"
            )
        channels.append((image - np.float32(low)) / np.float32(high - low))
    return np.stack(channels)


def resampled_size(volume: Volume, geometry: Geometry) -> tuple[int, int]:
    """In-plane size (y, x) resampled to `spacing_mm`, or by `step_px` where volume or geometry has none."""
    native = volume.image.shape[2:]
    if volume.spacing_mm and geometry.spacing_mm:
        factors = [mm / geometry.spacing_mm for mm in volume.spacing_mm[1:]]
    else:
        factors = [1 / geometry.step_px] * 2
    y, x = (max(1, round(n * factor)) for n, factor in zip(native, factors, strict=True))
    return y, x


def _overlap(have: int, want: int) -> tuple[slice, slice]:
    """Where `have` and `want` pixels with one centre overlap, as a slice of each; the other way round, the inverse."""
    start, length = int((have - want) / 2), min(have, want)  # rounds toward zero, so that a crop and its pad agree
    return slice(max(start, 0), max(start, 0) + length), slice(max(-start, 0), max(-start, 0) + length)


def _fit(image: Tensor, size: tuple[int, int] | list[int]) -> Tensor:
    """Centre crop or zero pad the last two axes to `size`."""
    (y_from, y_to), (x_from, x_to) = (_overlap(have, want) for have, want in zip(image.shape[-2:], size, strict=True))
    fitted = image.new_zeros(*image.shape[:-2], *size)
    fitted[..., y_to, x_to] = image[..., y_from, x_from]
    return fitted


def to_network(
    image: np.ndarray, label: np.ndarray | None, resampled: tuple[int, int], size: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Normalised volume [C, Z, Y, X] and label [Z, Y, X] on the network grid: float16 [Z, C, H, W], uint8 [Z, H, W].

    Image bilinear with antialiasing, label nearest, z untouched, then centre crop or zero pad. No label gives zeros.
    """
    slices = torch.from_numpy(np.ascontiguousarray(image.swapaxes(0, 1)))  # [Z, C, Y, X]
    slices = F.interpolate(slices, resampled, mode="bilinear", antialias=True)
    limit = torch.finfo(torch.float16).max
    slices = _fit(slices, size).clamp(-limit, limit).half()
    if label is None:
        return slices.numpy(), np.zeros((len(slices), *size), np.uint8)
    classes = F.interpolate(torch.from_numpy(label)[:, None], resampled, mode="nearest-exact")[:, 0]  # [Z, H', W']
    return slices.numpy(), _fit(classes, size).numpy()


def to_native(probability: Tensor, resampled: tuple[int, int], native: tuple[int, int]) -> np.ndarray:
    """Class probabilities [Z, K, H, W] of the network grid as class indices uint8 [Z, Y, X] of the native grid.

    Put back where they were cropped (outside: background), resized bilinearly, argmax; slice by slice, to need the
    memory of one. Source: Chaitanya et al., released inference.
    """
    labels = np.empty((len(probability), *native), np.uint8)
    for z, plane in enumerate(probability.detach().float().cpu()):
        outside = torch.zeros(len(plane), 1, 1)
        outside[0] = 1
        # padding with zeros is right for all but the background, so shift it: p - outside is zero there
        canvas = _fit(plane - outside, resampled) + outside  # [K, H', W']
        labels[z] = F.interpolate(canvas[None], native, mode="bilinear")[0].argmax(0).numpy()
    return labels


# --------------------------------------------------------------------------------------------------------------- store


class Store:
    """A prepared data set, memory-mapped.

    `images` [N, C, H, W] float16, `labels` [N, H, W] uint8; `volumes` and `slices` are tables, the row number of
    `slices` is the slice id; `subjects` and `labelled_subjects` are ids, sorted; `class_names` {1..K: name}.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise self._incomplete("index.json") from None
        self.channels: int = index["channels"]
        self.size: tuple[int, int] = tuple(index["size"])
        self.class_names: dict[int, str] = dict(enumerate(index["class_names"], start=1))
        self.num_classes = len(self.class_names) + 1
        self.volumes = pd.DataFrame(index["volumes"]).astype(_COLUMNS)
        axes = self.volumes["slice_axis"].unique()
        self.positions_known: bool = index["positions"] == "known" and len(axes) == 1
        codes, subjects = pd.factorize(self.volumes["subject"], sort=True)
        self.subjects: tuple[str, ...] = tuple(subjects)
        labelled = self.volumes.loc[self.volumes["labelled"], "subject"]
        self.labelled_subjects: tuple[str, ...] = tuple(sorted(labelled.unique()))
        count = self.volumes["slices"].to_numpy()
        volume = np.repeat(np.arange(len(count)), count)
        number = np.arange(len(volume)) - self.volumes["first_row"].to_numpy()[volume]
        self.slices = pd.DataFrame(
            {
                "volume": volume,
                "slice": number,
                "slices_in_volume": count[volume],
                "position": (number + 1) / count[volume],
            }
        )
        self._volume, self._subject = volume, codes[volume]
        self._position = self.slices["position"].to_numpy(np.float32)
        self._labelled = self.volumes["labelled"].to_numpy()[volume]
        self.images = self._mapped("images.f16", np.float16, (len(volume), self.channels, *self.size))
        self.labels = self._mapped("labels.u8", np.uint8, (len(volume), *self.size))

    def _mapped(self, name: str, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
        try:
            mapped = np.memmap(self.folder / name, dtype, mode="r")
            return mapped.reshape(shape)
        except (OSError, ValueError):
            raise self._incomplete(name) from None

    def _incomplete(self, name: str) -> RequestError:
        return RequestError(f"{self.folder / name}: is incomplete; delete {self.folder}, it is made again")

    def rows(self, subjects: Any, labelled: bool | None = None) -> np.ndarray:
        """Slice ids of these subjects, of their labelled (True), unlabelled (False) or all volumes (None), in order."""
        wanted = set(subjects)
        if unknown := sorted(wanted - set(self.subjects)):
            raise ValueError(f"not in the store: {', '.join(unknown)}")
        chosen = self.volumes["subject"].isin(wanted)
        if labelled is not None:
            chosen &= self.volumes["labelled"] == labelled
        return np.flatnonzero(chosen.to_numpy()[self._volume])

    def volume_rows(self, volume: int) -> np.ndarray:
        """Slice ids of one volume, in order of position."""
        first = self.volumes["first_row"][volume]
        return np.arange(first, first + self.volumes["slices"][volume])

    def batch(self, rows: np.ndarray, device: torch.device | str = "cpu") -> SliceBatch:
        """These slices, in this order, on the device."""
        rows = np.asarray(rows, dtype=np.int64)
        labelled = bool(self._labelled[rows].all())
        return SliceBatch(
            image=torch.from_numpy(self.images[rows]).to(device).float(),
            label=torch.from_numpy(self.labels[rows]).to(device).long() if labelled else None,
            row=torch.from_numpy(rows).to(device),
            volume=torch.from_numpy(self._volume[rows]).to(device),
            subject=torch.from_numpy(self._subject[rows]).to(device),
            position=torch.from_numpy(self._position[rows]).to(device),
        )

    def native_label(self, volume: int) -> np.ndarray:
        """Reference label on the native grid, uint8 [Z, Y, X]; `ValueError` if the volume has none."""
        entry = self.volumes.iloc[volume]
        if not entry["labelled"]:
            raise ValueError(f"volume {volume} ({entry['subject']} {entry['phase']}) has no label")
        try:
            with open(self.folder / "native_labels.zlib", "rb") as file:
                file.seek(entry["label_offset"])
                label = zlib.decompress(file.read(entry["label_bytes"]))
        except (OSError, zlib.error):
            raise self._incomplete("native_labels.zlib") from None
        return np.frombuffer(label, np.uint8).reshape(entry["slices"], entry["native_y"], entry["native_x"]).copy()

    def to_native(self, volume: int, probability: Tensor) -> np.ndarray:
        """Class probabilities [Z, K, H, W] of a volume as class indices on its native grid, uint8 [Z, Y, X]."""
        entry = self.volumes.iloc[volume]
        expected = (int(entry["slices"]), self.num_classes, *self.size)
        if tuple(probability.shape) != expected:
            raise ValueError(f"probability has shape {list(probability.shape)}, volume {volume} needs {list(expected)}")
        resampled, native = ((int(entry[f"{grid}_y"]), int(entry[f"{grid}_x"])) for grid in ("resampled", "native"))
        return to_native(probability, resampled, native)


# --------------------------------------------------------------------------------------------------------------- build


def _stamps(refs: list[VolumeRef]) -> list[Any]:
    """Subject, phase and the name, size and modification time of every file of every volume."""
    stamps = []
    for ref in refs:
        try:
            stats = [(file.relative_to(ref.root).as_posix(), file.stat()) for file in ref.files]
        except OSError as error:
            raise RequestError(f"{error.filename}: cannot be read ({error.strerror})") from None
        stamps.append([ref.subject, ref.phase, ref.stamp, *[[name, s.st_size, s.st_mtime_ns] for name, s in stats]])
    return stamps


def prepare(dataset: DatasetConfig, geometry: Geometry, progress: bool = True) -> Store:
    """The prepared store of a data set at a geometry: built the first time, opened afterwards.

    One volume is in memory at a time. Two processes that ask at once build it once. Raises `RequestError` for whatever
    is wrong with the data.
    """
    refs = scan(dataset)
    dataset = dataset.model_copy(update={"classes": class_names(dataset, refs[0].root)})
    deciding = {"name", "adapter", "options", "channels", "classes", "phases", "positions", "normalisation"}
    key = {
        "version": STORE_VERSION,
        "dataset": dataset.model_dump(include=deciding),
        "geometry": geometry.model_dump(),
        "files": _stamps(refs),
    }
    folder = paths.prepared_root() / f"{dataset.name}-{digest(key)}"
    if not folder.is_dir():
        try:
            _build_once(folder, dataset, geometry, refs, progress)
        except OSError as error:
            reason = error.strerror or str(error)
            raise RequestError(f"{folder}: cannot be written ({reason}); free space or choose another --out") from None
    return Store(folder)


def _build_once(
    folder: Path, dataset: DatasetConfig, geometry: Geometry, refs: list[VolumeRef], progress: bool
) -> None:
    """Build in a hidden sibling folder under a lock, then rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with open(folder.with_name(f".{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():  # another process was first
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            _build(partial, dataset, geometry, refs, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _build(folder: Path, dataset: DatasetConfig, geometry: Geometry, refs: list[VolumeRef], progress: bool) -> None:
    entries: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    first_row = 0
    with (
        open(folder / "images.f16", "wb") as images,
        open(folder / "labels.u8", "wb") as labels,
        open(folder / "native_labels.zlib", "wb") as native_labels,
    ):
        for ref in tqdm(refs, desc=f"prepare {dataset.name}", unit="volume", disable=not progress):
            volume = read(ref, dataset)
            source = ref.images[0] if ref.images else ref.subject
            if len(volume.image) != dataset.channels:
                raise RequestError(
                    f"{source}: has {len(volume.image)} channels and data set {dataset.name!r} declares "
                    f"{dataset.channels}; correct `channels`, or choose one by options.channel"
                )
            resampled = resampled_size(volume, geometry)
            image, label = to_network(
                normalise(volume, dataset.normalisation, source), volume.label, resampled, geometry.size
            )
            images.write(image.tobytes())
            labels.write(label.tobytes())
            packed = b"" if volume.label is None else zlib.compress(np.ascontiguousarray(volume.label), level=1)
            native = volume.image.shape[2:]
            spacing = volume.spacing_mm or (None, None, None)
            axis = "" if volume.affine is None else "xyz"[int(nib.io_orientation(volume.affine)[2, 0])]
            row = (
                *(ref.subject, ref.phase, volume.label is not None, first_row, len(image)),
                *(*native, *resampled, *spacing, axis, native_labels.tell(), len(packed)),
            )
            for name, value in zip(_COLUMNS, row, strict=True):
                entries[name].append(value)
            native_labels.write(packed)
            first_row += len(image)
    index = {
        "dataset": dataset.name,
        "channels": dataset.channels,
        "size": geometry.size,
        "class_names": list(dataset.classes.values()),
        "positions": dataset.positions,
        "volumes": entries,
    }
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
