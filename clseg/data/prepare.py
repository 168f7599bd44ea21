"""From volumes to slices the network can see: normalised, resampled and cropped once, then memory-mapped.

A prepared store is a folder under `paths.prepared_root()`, named by the hash of the input files, the preprocessing and
the geometry. It appears by one atomic rename, so it is complete or absent. Its rows are slices; in 3-D a slice stands
for the block around it, so that pairs and sampling are those of 2-D.
"""

import hashlib
import json
import shutil
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
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from clseg import paths
from clseg.config import DatasetConfig, Geometry, Normalisation, RequestError, digest, reading, writing
from clseg.data.formats import Volume, VolumeRef, class_names, read, scan

STORE_VERSION = 2
MOST_VOXELS = 2**31  # of one volume
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


def normalise(volume: Volume, setting: Normalisation, source: str | Path) -> np.ndarray:
    """(v - p_low) / (p_high - p_low) per channel of the whole volume, not clipped; float32 [C, Z, Y, X].

    Source: Chaitanya et al., 1st and 99th percentile; N4 without a mask, as their `N4_bias_correction.py`.
    `RequestError` if the percentiles coincide, or without SimpleITK for N4.
    """
    channels = []
    for channel, image in enumerate(volume.image):
        image = _n4(image, volume.spacing_mm) if setting.n4 else image
        low, high = np.percentile(image, [setting.low, setting.high])
        if not low < high < low + np.finfo(np.float32).max:
            percentiles = f"percentiles {setting.low:g} and {setting.high:g} of channel {channel} are both {low:g}"
            raise RequestError(f"{source}: {percentiles}; remove the image or widen normalisation.low and .high")
        channels.append((image - np.float32(low)) / np.float32(high - low))
    return np.stack(channels)


def _n4(image: np.ndarray, spacing_mm: tuple[float, float, float] | None) -> np.ndarray:
    try:
        import SimpleITK as sitk
    except ImportError:
        raise RequestError("normalisation.n4 needs SimpleITK; install the extra: pip install 'clseg[n4]'") from None
    filtered, corrector = sitk.GetImageFromArray(image), sitk.N4BiasFieldCorrectionImageFilter()
    filtered.SetSpacing(spacing_mm[::-1] if spacing_mm else (1.0, 1.0, 1.0))
    corrector.SetConvergenceThreshold(1e-3)
    corrector.SetMaximumNumberOfIterations([50] * 4)
    return sitk.GetArrayFromImage(corrector.Execute(filtered))


def require_new(volume: Volume, ref: VolumeRef, seen: dict[bytes, VolumeRef], twins: Iterable[list[str]] = ()) -> None:
    """Note an image in `seen`; `RequestError` if it is that of a subject who is not known as a twin."""
    twin = seen.setdefault(hashlib.sha256(volume.image.tobytes()).digest(), ref)
    if twin.subject != ref.subject and not any({twin.subject, ref.subject} <= {*known} for known in twins):
        raise RequestError(f"{ref.source}: is the same image as {twin.source}; remove one, or a set may hold both")


def resampled_size(volume: Volume, geometry: Geometry) -> tuple[int, int, int]:
    """Size (z, y, x) resampled to `slice_mm` and `spacing_mm`, or by `step_px` where volume or geometry has none.

    With `resize` every plane has the network's size, whatever its spacing. `RequestError` if that is too large.
    """
    z, *native = volume.image.shape[1:]
    if volume.spacing_mm and geometry.slice_mm:
        z = max(1, round(z * volume.spacing_mm[0] / geometry.slice_mm))
    if geometry.resize:
        return z, *geometry.size[-2:]
    factors = [1 / geometry.step_px] * 2
    if volume.spacing_mm and geometry.spacing_mm:
        factors = [mm / geometry.spacing_mm for mm in volume.spacing_mm[1:]]
    y, x = (max(1, round(n * factor)) for n, factor in zip(native, factors, strict=True))
    if z * y * x > MOST_VOXELS:
        grid = f"{volume.subject}: would be resampled to {z} x {y} x {x} voxels"
        raise RequestError(f"{grid}; correct its header, or geometry.spacing_mm, slice_mm or step_px")
    return z, y, x


def fit(image: Tensor, size: Sequence[int]) -> Tensor:
    """Centre crop or zero pad the last axes to `size`, one number for each of them."""
    pads = []
    for want, have in zip(reversed(size), reversed(image.shape[-len(size) :]), strict=True):
        before = int((want - have) / 2)  # rounded toward zero, so that a crop and its pad agree
        pads += [before, want - have - before]
    return F.pad(image, pads)


def _centres(target: int, source: int) -> Tensor:
    """Where the centres of `target` cells lie among the indices of `source` cells over the same length."""
    return (torch.arange(target, dtype=torch.float64) + 0.5) * source / target - 0.5


def to_network(
    image: np.ndarray, label: np.ndarray | None, resampled: tuple[int, int, int], size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Volume [C, Z, Y, X] and label [Z, Y, X] on the network grid: float16 [Z', C, H, W] and uint8 [Z', H, W].

    Image linear with antialiasing, label nearest, then centre crop or zero pad in the plane. No label gives zeros.
    """
    z, *plane = resampled
    slices = torch.from_numpy(np.ascontiguousarray(image.swapaxes(0, 1)))  # [Z, C, Y, X]
    slices = fit(F.interpolate(slices, plane, mode="bilinear", antialias=True), size)
    classes = torch.from_numpy(np.zeros(image.shape[1:], np.uint8) if label is None else label)[:, None]
    classes = fit(F.interpolate(classes, plane, mode="nearest-exact")[:, 0], size)  # [Z, H, W]
    if z != len(slices):
        columns = F.interpolate(slices.flatten(1)[None, None], (z, slices[0].numel()), mode="bilinear", antialias=True)
        slices = columns.reshape(z, *slices.shape[1:])
        classes = classes[(_centres(z, len(classes)) + 0.5).long()]
    return slices.clamp(-65504, 65504).half().numpy(), classes.numpy()  # the range of float16


def native_slices(probability: Tensor, resampled: Sequence[int], native: Sequence[int]) -> Iterator[Tensor]:
    """Class probabilities [Z', K, H, W] of the network grid on the native one, a slice [K, Y, X] at a time.

    Put back where they were cropped (outside: background) and resized linearly, as Chaitanya et al. released it.
    """
    last = len(probability) - 1
    outside = torch.eye(probability.shape[1])[0, :, None, None]  # [K, 1, 1], background
    for centre in _centres(native[0], last + 1).clamp(0, last).tolist():
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
    and `labelled_subjects` are ids, sorted; `class_names` {1..K: name}; `files`: a hash of the names and sizes of what
    was read, which a copy of the data set shares.
    """

    def __init__(self, folder: Path, files: str = ""):
        self.folder, self.files = folder, files
        self._resident: dict[tuple[str, torch.device], Tensor | None] = {}  # copies on devices, of all views
        with self._reading("index.json") as path:
            index = json.loads(path.read_text(encoding="utf-8"))
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


def _stamps(refs: list[VolumeRef]) -> list[list]:
    """Subject, phase and the name, size and modification time of every file of every volume."""
    stamps = []
    for ref in refs:
        with reading(ref.source, "file"):
            stats = [(file.relative_to(ref.root).as_posix(), file.stat()) for file in ref.files]
        files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        stamps.append([ref.subject, ref.phase, ref.stamp, files])
    return stamps


def prepare(dataset: DatasetConfig, geometry: Geometry, progress: bool = True) -> Store:
    """The prepared store of a data set at a geometry: built the first time, opened afterwards.

    One volume is in memory at a time; processes that ask at once build it once. `RequestError` if the data are wrong.
    """
    refs = scan(dataset)
    dataset = dataset.model_copy(update={"classes": class_names(dataset, refs[0].root)})
    deciding = {"name", "adapter", "options", "channels", "classes", "phases", "positions", "normalisation"}
    stamps = _stamps(refs)
    key = {"version": STORE_VERSION, "geometry": geometry.model_dump(), "files": stamps}
    key["dataset"] = dataset.model_dump(include=deciding)
    folder = paths.prepared_root() / f"{dataset.name}-{digest(key)}"
    if not folder.is_dir():
        with writing(folder, "choose another --out"):
            _build(folder, dataset, geometry, refs, progress)
    return Store(folder, digest([[*who, *(file[:2] for file in files)] for *who, files in stamps]))


def _build(folder: Path, dataset: DatasetConfig, geometry: Geometry, refs: list[VolumeRef], progress: bool) -> None:
    """Write a hidden sibling folder under a lock, then rename it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process was first
            return
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        try:
            bar = tqdm(refs, f"prepare {dataset.name}", unit="volume", disable=not progress)
            _write(partial, dataset, geometry, bar)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, dataset: DatasetConfig, geometry: Geometry, refs: Iterable[VolumeRef]) -> None:
    volumes, plane, declared, seen = [], geometry.plane or geometry.size[-2:], dataset.channels, {}
    for ref in refs:
        volume = read(ref, dataset)
        require_new(volume, ref, seen, dataset.twins)
        channels, *native = volume.image.shape
        if channels != declared:
            problem = f"has {channels} channels and data set {dataset.name!r} declares {declared}"
            raise RequestError(f"{ref.source}: {problem}; correct `channels`, or choose one by options.channel")
        resampled, labelled = resampled_size(volume, geometry), volume.label is not None
        normalised = normalise(volume, dataset.normalisation, ref.source)
        image, label = to_network(normalised, volume.label, resampled, plane)
        native_label = zlib.compress(volume.label.tobytes(), level=1) if labelled else b""
        for name, data in {"images.f16": image, "labels.u8": label, "native_labels.zlib": native_label}.items():
            with open(folder / name, "ab") as file:
                file.write(data)
        about = {"subject": ref.subject, "phase": ref.phase, "labelled": labelled}
        about |= {"slice_axis": volume.slice_axis, "slices": len(image), "label_bytes": len(native_label)}
        grids = {"native": native, "resampled": resampled, "spacing": volume.spacing_mm or [None] * 3}
        columns = {f"{name}_{axis}": n for name, grid in grids.items() for axis, n in zip("zyx", grid, strict=True)}
        volumes.append(about | columns)
    index = {"channels": declared, "size": geometry.size, "plane": plane, "positions": dataset.positions}
    index |= {"class_names": list(dataset.classes.values()), "volumes": volumes}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
