"""Volumes as they lie in a folder: adapters that list them cheaply (`scan`) and read them one at a time (`read`).

Every adapter answers with the same `Volume`: image [C, Z, Y, X], label [Z, Y, X] of class indices, slices along Z.
Whatever is wrong with a file is a `RequestError` that names it.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from clseg import paths
from clseg.config import DatasetConfig, RequestError, nearest


@dataclass(frozen=True)
class Volume:
    """One 3-D image on its native grid, with its labels if it has any.

    `image` float32 [C, Z, Y, X], native intensities; `label` uint8 [Z, Y, X], class indices 0..K (0 background), or
    None; `spacing_mm` (z, y, x) or None where the files carry none; `phase` "" where a subject has one volume; `affine`
    4 x 4 of the NIfTI file as stored (axes x, y, z) or None; `flips` the array axes (z, y, x) that were reversed on
    reading, so that every axis runs the same way in all volumes of a data set.
    """

    image: np.ndarray
    label: np.ndarray | None
    spacing_mm: tuple[float, float, float] | None
    subject: str
    phase: str
    affine: np.ndarray | None = None
    flips: tuple[bool, bool, bool] = (False, False, False)


@dataclass(frozen=True)
class VolumeRef:
    """Where one volume lies: enough to read it and to notice that it changed.

    `images` are its image files (one, one per channel, or one per slice); `label` the label file, None without labels
    (h5: the label lies in the image files); `root` the folder that was scanned; `stamp` names what computes it.
    """

    subject: str
    phase: str
    images: tuple[Path, ...]
    label: Path | None
    root: Path
    stamp: str = ""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that decides the volume, once."""
        return tuple(dict.fromkeys([*self.images, *([self.label] if self.label else [])]))


def checked(volume: Volume, source: str | Path) -> Volume:
    """The volume itself if it can be used, else a `RequestError` that names `source` and what is wrong with it."""
    shape = volume.image.shape
    if len(shape) != 4 or 0 in shape:
        raise RequestError(f"{source}: holds no 3-D image (shape {list(shape)}); replace the file")
    if not np.isfinite(volume.image).all():
        raise RequestError(f"{source}: holds intensities that are NaN or infinite; repair or remove the volume")
    for channel, image in enumerate(volume.image):
        if image.min() == image.max():
            raise RequestError(f"{source}: channel {channel} is constant; repair or remove the volume")
    if volume.label is not None and volume.label.shape != shape[1:]:
        raise RequestError(
            f"{source}: the label has shape {list(volume.label.shape)} and the image {list(shape[1:])} (z, y, x); "
            "they must be the same grid"
        )
    spacing = volume.spacing_mm
    if spacing is not None and not (np.isfinite(spacing).all() and min(spacing) > 0):
        raise RequestError(f"{source}: the header gives the voxel spacing {spacing}; it must be positive")
    return volume


def class_indices(label: np.ndarray, classes: Mapping[int, str], source: str | Path) -> np.ndarray:
    """Label values of a file as class indices 0..K, uint8; K follows the order of the declared values."""
    if label.dtype.kind not in "biuf":
        raise RequestError(f"{source}: the label is of type {label.dtype}; numbers are needed")
    values = np.array([0, *sorted(classes)])
    present = np.unique(label)
    undeclared = present[~np.isin(present, values)]
    if undeclared.size:
        shown = ", ".join(f"{float(value):g}" for value in undeclared[:5]) + (", ..." if undeclared.size > 5 else "")
        raise RequestError(
            f"{source}: holds label values {shown}, declared are {', '.join(map(str, values))}; "
            "correct the file or `classes`"
        )
    return np.searchsorted(values, label).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- NIfTI

_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    OverflowError,
    MemoryError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
)
_NIFTI = re.compile(r"(?P<stem>.+)\.nii(\.gz)?")


def _unreadable(path: Path, kind: str, error: Exception) -> RequestError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150] or type(error).__name__
    return RequestError(f"{path}: cannot be read as {kind} ({reason}); replace the file or take it out of the data set")


def _read_nifti(path: Path, dtype: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Voxels as [Z, Y, X] or [C, Z, Y, X] as stored, and the affine."""
    try:
        file = nib.load(path)
        if len(file.shape) not in (3, 4) or 0 in file.shape or file.get_data_dtype().kind not in "biuf":
            shape, kind = list(file.shape), file.get_data_dtype()
            raise RequestError(f"{path}: has shape {shape} of type {kind}; a 3-D image of numbers is needed")
        data = np.asarray(file.dataobj, dtype=dtype)
        affine = np.asarray(file.affine, dtype=float)
    except _UNREADABLE as error:
        raise _unreadable(path, "NIfTI", error) from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) == 0:
        raise RequestError(f"{path}: its affine is not invertible; repair the header")
    return data.T, affine  # [(C,) Z, Y, X]


def _same_grid(shape: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> bool:
    """Whether the corners of a [Z, Y, X] grid lie at the same place, to a tenth of a voxel, under two affines."""
    corners = np.stack(np.meshgrid(*[(0, n) for n in reversed(shape)], [1], indexing="ij"), -1).reshape(-1, 4)
    distance_mm = np.linalg.norm(corners @ (first - second).T, axis=1).max()
    return bool(distance_mm <= 0.1 * nib.affines.voxel_sizes(first).min())


def _nifti_volume(ref: VolumeRef, classes: Mapping[int, str], orient: bool) -> Volume:
    """One volume from its NIfTI files; with `orient` every axis is turned toward its dominating positive world axis."""
    source = ref.images[0]
    channels, affine = [], None
    for path in ref.images:
        data, own = _read_nifti(path, np.float32)
        affine = own if affine is None else affine
        data = data.reshape(-1, *data.shape[-3:])  # [C, Z, Y, X]
        if channels and (data.shape[1:] != channels[0].shape[1:] or not _same_grid(data.shape[1:], affine, own)):
            raise RequestError(f"{path}: lies on another grid than {source.name}; all channels must share one grid")
        channels.append(data)
    image = np.concatenate(channels)
    label = None
    if ref.label:
        label, own = _read_nifti(ref.label)
        label = label.reshape(label.shape[-3:]) if label.ndim == 4 and len(label) == 1 else label
        if label.shape != image.shape[1:]:
            raise RequestError(
                f"{ref.label}: has shape {list(label.shape)} and its image {list(image.shape[1:])} (z, y, x); "
                "image and label must be the same grid"
            )
        if not _same_grid(label.shape, affine, own):
            raise RequestError(
                f"{ref.label}: its affine is not that of {source.name}; image and label must be the same grid"
            )
        label = class_indices(label, classes, ref.label)
    flips = tuple(bool(sign < 0) for sign in nib.io_orientation(affine)[::-1, 1]) if orient else (False, False, False)
    axes = [axis for axis in range(3) if flips[axis]]
    return Volume(
        image=np.ascontiguousarray(np.flip(image, [axis + 1 for axis in axes])),
        label=None if label is None else np.ascontiguousarray(np.flip(label, axes)),
        spacing_mm=tuple(float(mm) for mm in nib.affines.voxel_sizes(affine)[::-1]),
        subject=ref.subject,
        phase=ref.phase,
        affine=affine,
        flips=flips,
    )


# ------------------------------------------------------------------------------------------------------------ phantom


def _scan_phantom(folder: Path, dataset: DatasetConfig) -> list[VolumeRef]:
    from clseg.data import phantom  # it imports Volume from here

    count = dataset.options.get("subjects")
    if type(count) is not int or count < 1:
        raise RequestError(
            f"data set {dataset.name!r}: options.subjects must be a positive whole number (given: {count!r})"
        )
    stamp = f"phantom {phantom.VERSION}"
    phases = ("ED", "ES")
    return [VolumeRef(f"phantom{i:03d}", phase, (), None, folder, stamp) for i in range(count) for phase in phases]


def _read_phantom(ref: VolumeRef, dataset: DatasetConfig) -> Volume:
    from clseg.data import phantom

    return phantom.phantom_volume(ref.subject, ref.phase)


# --------------------------------------------------------------------------------------------------------------- ACDC
# Both layouts store the basal slice first. The NIfTI headers carry no patient orientation (identity rotation), so
# nothing is turned: that keeps base to apex, and makes the two layouts agree.

_ACDC_H5 = re.compile(r"(?P<subject>patient\d+)_frame(?P<frame>\d+)(_slice_(?P<slice>\d+))?\.h5")
_ACDC_NIFTI = re.compile(r"(?P<subject>patient\d+)_frame(?P<frame>\d+)(?P<label>_gt)?\.nii(\.gz)?")


def _scan_acdc(folder: Path, dataset: DatasetConfig) -> list[VolumeRef]:
    h5_folders = [sub for sub in (folder / "data", folder / "data" / "slices") if sub.is_dir()]
    if h5_folders:
        return _scan_acdc_h5(folder, h5_folders)
    roots = [folder / part for part in ("", "training", "testing", "database/training", "database/testing")]
    patients = [
        Path(entry.path)
        for root in roots
        if root.is_dir()
        for entry in os.scandir(root)
        if re.fullmatch(r"patient\d+", entry.name) and entry.is_dir()
    ]
    return [ref for patient in patients for ref in _scan_acdc_patient(folder, patient)]


def _scan_acdc_patient(folder: Path, patient: Path) -> list[VolumeRef]:
    """ED and ES of one patient of the official release; the other files (the whole cycle, `_4d`) are left alone."""
    info = patient / "Info.cfg"
    try:
        text = info.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(info, "text", error) from None
    found: dict[tuple[int, bool], Path] = {}
    for entry in os.scandir(patient):
        if (match := _ACDC_NIFTI.fullmatch(entry.name)) and match["subject"] == patient.name:
            found[int(match["frame"]), bool(match["label"])] = Path(entry.path)
    refs = []
    for phase in ("ED", "ES"):
        line = re.search(rf"^\s*{phase}\s*:\s*(\d+)\s*$", text, re.MULTILINE)
        if not line:
            raise RequestError(f"{info}: names no {phase} frame; a line like '{phase}: 1' is needed")
        frame = int(line[1])
        if (frame, False) not in found:
            raise RequestError(
                f"{patient}: the image of frame {frame} ({phase} in Info.cfg) is missing; complete the download"
            )
        refs.append(VolumeRef(patient.name, phase, (found[frame, False],), found.get((frame, True)), folder))
    return refs


def _scan_acdc_h5(folder: Path, h5_folders: list[Path]) -> list[VolumeRef]:
    """Whole volumes and slices, mixed; a volume that is there both ways is taken whole."""
    whole: dict[tuple[str, int], Path] = {}
    slices: dict[tuple[str, int], dict[int, Path]] = {}
    for entry in (entry for sub in h5_folders for entry in os.scandir(sub)):
        if match := _ACDC_H5.fullmatch(entry.name):
            key = match["subject"], int(match["frame"])
            if match["slice"]:
                slices.setdefault(key, {})[int(match["slice"])] = Path(entry.path)
            else:
                whole[key] = Path(entry.path)
    frames: dict[str, list[int]] = {}
    for subject, frame in sorted(whole.keys() | slices.keys()):
        frames.setdefault(subject, []).append(frame)
    refs = []
    for subject, own in frames.items():
        if len(own) > 2:
            raise RequestError(
                f"{h5_folders[0]}: {subject} has {len(own)} frames; at most two (ED and ES) are expected"
            )
        for frame in own:
            key = subject, frame
            numbered = slices.get(key, {})
            gaps = sorted(set(range(1, max(numbered, default=0) + 1)) - set(numbered))
            if gaps and key not in whole:
                raise RequestError(f"{h5_folders[0]}: slice {gaps[0]} of {subject}_frame{frame:02d} is missing")
            images = (whole[key],) if key in whole else tuple(numbered[number] for number in sorted(numbered))
            # the frames of this copy are numbered 1 and 2; the lower is end-diastole
            phase = "ED" if frame == (min(own) if len(own) == 2 else 1) else "ES"
            refs.append(VolumeRef(subject, phase, images, images[0], folder))
    return refs


def _read_h5(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with h5py.File(path, "r") as file:
            if "image" not in file:
                raise RequestError(f"{path}: holds no data set 'image'; it holds {', '.join(file) or 'nothing'}")
            image = np.asarray(file["image"], dtype=np.float32)
            return image, np.asarray(file["label"]) if "label" in file else None
    except _UNREADABLE as error:
        raise _unreadable(path, "HDF5", error) from None


def _read_acdc(ref: VolumeRef, dataset: DatasetConfig) -> Volume:
    classes = class_names(dataset, ref.root)
    if ref.images[0].suffix != ".h5":
        return _nifti_volume(ref, classes, orient=False)
    images, labels = [], []
    for path in ref.images:
        image, label = _read_h5(path)
        image = image[None] if len(ref.images) > 1 or image.ndim == 2 else image  # [Z, Y, X]
        label = label[None] if label is not None and label.ndim == image.ndim - 1 else label
        if image.ndim != 3 or (images and image.shape[1:] != images[0].shape[1:]):
            raise RequestError(
                f"{path}: has shape {list(image.shape)}, which does not fit the other slices of its volume"
            )
        if label is not None and label.shape != image.shape:
            raise RequestError(f"{path}: the label has shape {list(label.shape)} and the image {list(image.shape)}")
        images.append(image)
        if label is not None:
            labels.append(class_indices(label, classes, path))
    if labels and len(labels) != len(images):
        raise RequestError(
            f"{ref.images[0]}: only {len(labels)} of the {len(images)} slices of its volume have a label"
        )
    label = np.concatenate(labels) if labels else None
    return Volume(np.concatenate(images)[None], label, None, ref.subject, ref.phase)


# ------------------------------------------------------------------------ Medical Segmentation Decathlon and nnU-Net v2


def _dataset_json(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "dataset.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); a data set folder holds one") from None
    except ValueError as error:
        raise RequestError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(info, dict):
        raise RequestError(f"{path}: must be a JSON object")
    return path, info


def _msd_class_names(folder: Path) -> dict[int, str]:
    """Label value -> name, from MSD's {"1": name} or nnU-Net's {name: 1}."""
    path, info = _dataset_json(folder)
    labels = info.get("labels")
    if not isinstance(labels, dict):
        raise RequestError(f"{path}: has no 'labels'; declare them as label value and name")
    named = {}
    for key, value in labels.items():
        number, name = (value, key) if "channel_names" in info else (key, value)
        if name == "ignore" or not re.fullmatch(r"\d+", str(number)):
            raise RequestError(
                f"{path}: label {name!r} ({number!r}) is not a plain class; give each class one whole number"
            )
        named[int(number)] = str(name)
    named.pop(0, None)
    return dict(sorted(named.items()))


def _inside(folder: Path, name: Any, source: Path) -> Path:
    """The path of a file that `dataset.json` names; it must lie in the folder."""
    path = Path(os.path.normpath(folder / str(name)))
    if not isinstance(name, str) or not path.is_relative_to(os.path.normpath(folder)):
        raise RequestError(
            f"{source}: names {name!r}, which is not a file in {folder}; use paths relative to the folder"
        )
    return path


def _scan_msd(folder: Path, dataset: DatasetConfig) -> list[VolumeRef]:
    """`training` and `test` of `dataset.json`; volumes without a label file, and all of `imagesTs`, are unlabelled."""
    source, info = _dataset_json(folder)
    if "channel_names" in info:
        return _scan_nnunet(folder, source, info)
    if not isinstance(info.get("training"), list):
        raise RequestError(f"{source}: has neither 'training' (Decathlon) nor 'channel_names' (nnU-Net v2)")
    refs = []
    for entry in [*info["training"], *(info.get("test") or [])]:
        entry = entry if isinstance(entry, dict) else {"image": entry}
        image = _inside(folder, entry.get("image"), source)
        label = _inside(folder, entry["label"], source) if entry.get("label") else None
        name = _NIFTI.fullmatch(image.name)
        if not name or not image.is_file():
            raise RequestError(f"{source}: names the image {entry['image']!r}, which is not a NIfTI file in {folder}")
        refs.append(VolumeRef(name["stem"], "", (image,), label if label and label.is_file() else None, folder))
    return refs


def _scan_nnunet(folder: Path, source: Path, info: dict[str, Any]) -> list[VolumeRef]:
    ending, channels = info.get("file_ending", ".nii.gz"), len(info["channel_names"])
    if ending not in (".nii.gz", ".nii"):
        raise RequestError(f"{source}: file_ending {ending!r} is not supported; convert the volumes to .nii.gz")
    refs = []
    for images, labels in (("imagesTr", "labelsTr"), ("imagesTs", "")):
        names = set(os.listdir(folder / images)) if (folder / images).is_dir() else set()
        pattern = re.compile(rf"(?P<case>[^.].*)_\d{{4}}{re.escape(ending)}")
        for case in sorted({match["case"] for name in names if (match := pattern.fullmatch(name))}):
            files = [f"{case}_{channel:04d}{ending}" for channel in range(channels)]
            for name in files:
                if name not in names:
                    raise RequestError(
                        f"{folder / images / name}: is missing; {source.name} declares {channels} channels"
                    )
            label = folder / labels / f"{case}{ending}"
            paths_of = tuple(folder / images / name for name in files)
            refs.append(VolumeRef(case, "", paths_of, label if labels and label.is_file() else None, folder))
    return refs


def _read_msd(ref: VolumeRef, dataset: DatasetConfig) -> Volume:
    volume = _nifti_volume(ref, class_names(dataset, ref.root), orient=True)
    if "channel" not in dataset.options:
        return volume
    channel, count = dataset.options["channel"], len(volume.image)
    if type(channel) is not int or not 0 <= channel < count:
        raise RequestError(f"{ref.images[0]}: has channels 0 to {count - 1}; options.channel is {channel!r}")
    return replace(volume, image=volume.image[[channel]])


# ---------------------------------------------------------------------------------------------------------- all of them


class Adapter(NamedTuple):
    """`scan(folder, dataset)` lists volumes without opening them, `read(ref, dataset)` reads one; `options` it has."""

    scan: Callable[[Path, DatasetConfig], list[VolumeRef]]
    read: Callable[[VolumeRef, DatasetConfig], Volume]
    options: tuple[str, ...] = ()
    computed: bool = False


ADAPTERS = {
    "phantom": Adapter(_scan_phantom, _read_phantom, ("subjects",), computed=True),
    "acdc": Adapter(_scan_acdc, _read_acdc),
    "msd": Adapter(_scan_msd, _read_msd, ("channel",)),
}


def class_names(dataset: DatasetConfig, folder: Path) -> dict[int, str]:
    """Label value -> name, in the order of class indices 1..K; from `dataset.json` where the data set names none."""
    if dataset.classes:
        return {value: name for value, name in sorted(dataset.classes.items()) if value != 0}
    if dataset.adapter == "msd":
        return _msd_class_names(folder)
    raise RequestError(
        f"data set {dataset.name!r}: its files name no classes; declare `classes` as label value and name"
    )


def scan(dataset: DatasetConfig) -> list[VolumeRef]:
    """Every volume of a data set in its phases, sorted by subject and phase, without opening one.

    Raises `RequestError` if the folder is absent (with source, terms and expected files), empty or inconsistent.
    """
    if dataset.adapter not in ADAPTERS:
        raise RequestError(
            f"data set {dataset.name!r}: unknown adapter {dataset.adapter!r}, {nearest(dataset.adapter, ADAPTERS)}"
        )
    adapter = ADAPTERS[dataset.adapter]
    for option in dataset.options:
        if option not in adapter.options:
            known = nearest(option, adapter.options) if adapter.options else f"adapter {dataset.adapter!r} has none"
            raise RequestError(f"data set {dataset.name!r}: unknown option {option!r}, {known}")
    folder = paths.data_root() / dataset.folder
    expected = dataset.tree or f"{dataset.folder} in the layout of adapter {dataset.adapter!r}"
    if not adapter.computed and not folder.is_dir():
        raise RequestError(
            f"{folder}: data set {dataset.name!r} is not there; get it from {dataset.source or 'its owner'} "
            f"(terms: {dataset.licence or 'unknown'}) and put below CLSEG_DATA or --data: {expected}"
        )
    try:
        refs = sorted(adapter.scan(folder, dataset), key=lambda ref: (ref.subject, ref.phase))
    except OSError as error:
        raise RequestError(f"{error.filename}: cannot be read ({error.strerror})") from None
    if not refs:
        raise RequestError(f"{folder}: holds no volume of data set {dataset.name!r}; expected is {expected}")
    for first, second in pairwise(refs):
        if (first.subject, first.phase) == (second.subject, second.phase):
            raise RequestError(f"{second.images[0]}: {second.subject} is there twice; remove one copy")
    present = sorted({ref.phase for ref in refs})
    for phase in dataset.phases:
        if phase not in present:
            raise RequestError(
                f"data set {dataset.name!r}: has no volume of phase {phase!r}, {nearest(phase, present)}"
            )
    return [ref for ref in refs if not dataset.phases or ref.phase in dataset.phases]


def read(ref: VolumeRef, dataset: DatasetConfig) -> Volume:
    """One checked volume; `RequestError` names the file that cannot be used."""
    volume = ADAPTERS[dataset.adapter].read(ref, dataset)
    return checked(volume, ref.images[0] if ref.images else ref.subject)
