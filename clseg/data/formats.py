"""Volumes as they lie in a folder: adapters that list them cheaply (`scan`) and read them one at a time (`read`).

Every adapter answers with the same `Volume`. Whatever is wrong with a file is a `RequestError` that names it.
"""

import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from PIL import Image

from clseg import paths
from clseg.data import phantom
from clseg.data.volume import Volume, VolumeRef, checked
from clseg.errors import UNPRINTABLE, RequestError, nearest, reading
from clseg.settings import DatasetConfig

Classes = Mapping[int, str]  # label value -> name


def class_indices(label: np.ndarray, classes: Classes, source: Path, undeclared: str = "error") -> np.ndarray:
    """Label values of a file as class indices 0..K, uint8, in their order; others raise `RequestError`, or become 0."""
    values = [0, *sorted(classes)]
    order = np.argsort(values)  # 0 comes first in `values` even if others are negative
    if undeclared == "background":
        label = np.where(np.isin(label, values), label, 0)
    elif unknown := [value for value in np.unique(label).tolist() if value not in values]:
        shown, declared = (", ".join(map(str, some)) for some in (unknown[:5], values))
        raise RequestError(f"{source}: holds label values {shown}, declared are {declared}; correct file or `classes`")
    return order.astype(np.uint8)[np.searchsorted(values, label, sorter=order)]


def _nifti(path: Path) -> nib.Nifti1Image:
    """A NIfTI file in memory; of a compressed one the checksum is verified."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    with nib.imageglobals.LoggingOutputSuppressor():  # what is wrong is an exception, too
        return (nib.Nifti2Image if nib.Nifti2Header.may_contain_header(data) else nib.Nifti1Image).from_bytes(data)


def nifti_volume(ref: VolumeRef, classes: Classes, orient: bool, undeclared: str = "error") -> Volume:
    """One volume from its NIfTI files; with `orient` every axis is turned toward its dominating positive world axis."""
    arrays, affines = [], []  # [C, Z, Y, X] as stored
    for path in ref.files:
        with reading(path, "NIfTI"):
            file = _nifti(path)
            shape, kind = list(file.shape), file.get_data_dtype()
            if len(shape) not in (3, 4) or 0 in shape or kind.kind not in "biuf":
                raise RequestError(f"{path}: has shape {shape} of type {kind}; a 3-D image of numbers is needed")
            data = np.asarray(file.dataobj).T
        arrays.append(data.reshape(-1, *data.shape[-3:]))
        affines.append(own := np.asarray(file.affine, dtype=float))
        if not np.isfinite(own).all() or np.linalg.matrix_rank(own[:3, :3]) < 3:
            raise RequestError(f"{path}: its affine is not invertible; repair the header")
        affine, grid, shape = affines[0], list(arrays[0].shape[1:]), list(data.shape[-3:])
        corners = list(product(*[(0, n) for n in reversed(grid)], [1]))  # (x, y, z, 1)
        apart_mm = np.linalg.norm(corners @ (own - affine).T, axis=1).max()
        if shape != grid or apart_mm > 0.1 * nib.affines.voxel_sizes(affine).min():
            name = ref.images[0].name
            raise RequestError(f"{path}: grid {shape} or affine is not that of {name} {grid}; resample it")
    world = nib.io_orientation(affine)  # of array axes x, y, z: number and sign of their dominating world axis
    flips = tuple(orient and sign < 0 for sign in world[::-1, 1].tolist())
    arrays = [np.flip(array, [axis + 1 for axis in range(3) if flips[axis]]) for array in arrays]
    with np.errstate(over="ignore"):  # infinity is refused
        image = np.concatenate(arrays[: len(ref.images)], dtype=np.float32, casting="unsafe")
    label = class_indices(arrays[-1], classes, ref.label, undeclared) if ref.label else None
    label = label[0] if label is not None and len(label) == 1 else label
    spacing_mm, axis = tuple(nib.affines.voxel_sizes(affine)[::-1].tolist()), "xyz"[int(world[2, 0])]
    return Volume(image, label, spacing_mm, ref.subject, ref.phase, affine, flips, axis if orient else "")


def _scan_acdc(folder: Path, dataset: DatasetConfig) -> Iterator[VolumeRef]:
    """The h5 copy, or ED and ES of the official release, whose other files (the whole cycle, `_4d`) are left alone."""
    if (folder / "data").is_dir():
        yield from _scan_acdc_h5(folder)
        return
    parts = ("", "training", "testing", "database/training", "database/testing")
    for patient in [path for part in parts for path in (folder / part).glob("patient[0-9]*/")]:
        with reading(info := patient / "Info.cfg", "text"):
            text = info.read_text(encoding="utf-8")
        for phase in ("ED", "ES"):
            if not (line := re.search(rf"^\s*{phase}\s*:\s*(\d+)\s*$", text, re.MULTILINE)):
                raise RequestError(f"{info}: names no {phase} frame; a line like '{phase}: 1' is needed")
            stem = f"{patient.name}_frame{int(line[1]):02d}"
            image, label = (min(patient.glob(f"{name}.nii*"), default=None) for name in (stem, f"{stem}_gt"))
            if not image:
                raise RequestError(f"{patient}: frame {line[1]} ({phase} in Info.cfg) is missing; download it again")
            yield VolumeRef(patient.name, phase, (image,), label, folder)


def _scan_acdc_h5(folder: Path) -> Iterator[VolumeRef]:
    """Whole volumes and slices, mixed; a volume that is there both ways is taken whole."""
    found: dict[str, dict[int, dict[int, Path]]] = {}  # subject, frame, slice; slice -1 is the whole volume
    for path in [*folder.glob("data/*.h5"), *folder.glob("data/slices/*.h5")]:
        if match := re.fullmatch(r"(patient\d+)_frame(\d+)(?:_slice_(\d+))?\.h5", path.name):
            subject, frame, number = match.groups(default=-1)
            found.setdefault(subject, {}).setdefault(int(frame), {})[int(number)] = path
    for subject, frames in found.items():
        if len(frames) > 2:
            raise RequestError(f"{folder}: {subject} has {len(frames)} frames; keep at most two, ED and ES")
        for frame, files in frames.items():
            numbers = [-1] if -1 in files else sorted(files)
            if gaps := sorted(set(range(1, numbers[-1])) - set(numbers)):
                raise RequestError(f"{folder}: slice {gaps[0]} of {subject}_frame{frame:02d} is missing; add it")
            images = tuple(files[number] for number in numbers)
            phase = "ED" if frame == (min(frames) if len(frames) == 2 else 1) else "ES"  # 1 and 2, ED is the lower
            yield VolumeRef(subject, phase, images, images[0], folder)


def _read_acdc(ref: VolumeRef, dataset: DatasetConfig, classes: Classes) -> Volume:
    if ref.images[0].suffix != ".h5":
        # the headers carry no patient orientation (identity); as stored, the basal slice is first, as in the h5 copy
        return nifti_volume(ref, classes, orient=False)
    images, labels = [], []
    for path in ref.images:
        with reading(path, "HDF5"), h5py.File(path) as file:
            if "image" not in file:
                raise RequestError(f"{path}: holds no data set 'image'; it holds {', '.join(file) or 'nothing'}")
            arrays = {"image": np.array(file["image"], np.float32, ndmin=3)}  # [Z, Y, X]; a slice is [1, Y, X]
            arrays |= {"label": np.array(file["label"], ndmin=3)} if "label" in file else {}
        images.append(arrays["image"])
        expected = images[0].shape[:3] if len(ref.images) == 1 else (1, *images[0].shape[1:])
        for name, array in arrays.items():
            if array.shape != expected:
                raise RequestError(
                    f"{path}: its {name} has shape {list(array.shape)}, expected is {list(expected)}; replace it"
                )
        labels += [class_indices(arrays["label"], classes, path)] if "label" in arrays else []
    if 0 < len(labels) < len(images):
        few = f"only {len(labels)} of the {len(images)} slices of its volume have a label"
        raise RequestError(f"{ref.source}: {few}; add the others or remove these")
    label = np.concatenate(labels) if labels else None
    return Volume(np.concatenate(images)[None], label, None, ref.subject, ref.phase)


def _dataset_json(folder: Path) -> tuple[Path, dict[str, Any]]:
    with reading(path := folder / "dataset.json", "JSON"):
        info = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(info, dict):
        raise RequestError(f"{path}: must be a JSON object")
    return path, info


def _scan_msd(folder: Path, dataset: DatasetConfig) -> Iterator[VolumeRef]:
    """Decathlon or nnU-Net v2; volumes without a label file, and all of `imagesTs`, are unlabelled."""
    source, info = _dataset_json(folder)
    if "channel_names" in info:
        yield from _scan_nnunet(folder, info)
        return
    listed = info.get("training"), info.get("test") or []
    if not all(isinstance(entries, list) for entries in listed):
        raise RequestError(f"{source}: needs lists 'training' and 'test' (Decathlon), or 'channel_names' (nnU-Net v2)")
    root = os.path.realpath(folder)
    for entry in [*listed[0], *listed[1]]:
        entry = entry if isinstance(entry, dict) else {"image": entry}
        names = [entry.get("image"), entry.get("label") or ""]
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise RequestError(f"{source}: names {name!r}; use a path relative to {folder}")
        image, label = (folder / name for name in names)
        stem = re.fullmatch(r"(.+)\.nii(\.gz)?", image.name, re.DOTALL)
        if not stem or not image.is_file():
            raise RequestError(f"{source}: names the image {names[0]!r}; name a NIfTI file in {folder}")
        files = [path for path in (image, label) if path.is_file()]
        if out := [path for path in files if not Path(os.path.realpath(path)).is_relative_to(root)]:
            raise RequestError(f"{source}: names {out[0]}, a link out of the folder; copy the file there")
        yield VolumeRef(stem[1], "", (image,), label if label in files else None, folder)


def _scan_nnunet(folder: Path, info: dict[str, Any]) -> Iterator[VolumeRef]:
    if not isinstance(info["channel_names"], dict) or not info["channel_names"]:
        raise RequestError(f"{folder}/dataset.json: 'channel_names' must be a mapping such as {{'0': 'MRI'}}")
    ending, channels = info.get("file_ending", ".nii.gz"), len(info["channel_names"])
    if ending not in (".nii.gz", ".nii"):
        raise RequestError(f"{folder}/dataset.json: file_ending {ending!r} is not supported; convert to .nii.gz")
    tail = f"_[0-9][0-9][0-9][0-9]{ending}"
    for part in ("imagesTr", "imagesTs"):
        for case in sorted({path.name[: -len(ending) - 5] for path in folder.glob(f"{part}/[!.]*{tail}")}):
            images = tuple(folder / part / f"{case}_{channel:04d}{ending}" for channel in range(channels))
            if missing := [image for image in images if not image.is_file()]:
                raise RequestError(f"{missing[0]}: is missing; add it, or correct the {channels} channel_names")
            label = folder / "labelsTr" / f"{case}{ending}"
            yield VolumeRef(case, "", images, label if part == "imagesTr" and label.is_file() else None, folder)


def _matching(folder: Path, dataset: DatasetConfig, option: str) -> dict[str, Path]:
    """Subject -> path of the files below the folder that look like the option."""
    text = str(dataset.options.get(option, ""))
    if text.count("{subject}") != 1 or Path(text).is_absolute() or ".." in text:
        raise RequestError(f"options.{option}: must be a relative path with {{subject}} in it once (given: {text!r})")
    expression = re.compile(r"([^/.][^/]*)".join(map(re.escape, text.split("{subject}"))))
    found = {path.relative_to(folder).as_posix(): path for path in folder.glob(text.replace("{subject}", "*"))}
    return {match[1]: path for name, path in found.items() if (match := expression.fullmatch(name))}


def _scan_pairs(folder: Path, dataset: DatasetConfig) -> list[VolumeRef]:
    """One image and one mask per subject, or no mask; what looks like a mask is no image."""
    images, labels = (_matching(folder, dataset, option) for option in ("images", "labels"))
    masks = set(labels.values())
    found = {subject: image for subject, image in images.items() if image not in masks}
    return [VolumeRef(subject, "", (image,), labels.get(subject), folder) for subject, image in found.items()]


def photograph(path: Path, channels: int) -> np.ndarray:
    """Any file that Pillow reads, in colour or grey, as uint8 [C, 1, Y, X]."""
    with reading(path, "image file"), Image.open(path) as file:
        if file.mode[0] in "IF":  # Pillow would clip them
            raise RequestError(f"{path}: has pixels of type {file.mode}; convert it to 8 bits")
        data = np.asarray(file.convert("RGB" if channels == 3 else "L"))
    return np.moveaxis(np.atleast_3d(data), 2, 0)[:, None]


def _read_files(ref: VolumeRef, dataset: DatasetConfig, classes: Classes) -> Volume:
    """A volume from NIfTI files or photographs, by the options of `msd` and `pairs`."""
    undeclared, channel = dataset.options.get("undeclared", "error"), dataset.options.get("channel")
    if undeclared not in ("error", "background"):
        raise RequestError(f"options.undeclared: must be error or background (given: {undeclared!r})")
    if ".nii" not in ref.images[0].suffixes:
        image = photograph(ref.images[0], dataset.channels).astype(np.float32)
        label = class_indices(photograph(ref.label, 1)[0], classes, ref.label, undeclared) if ref.label else None
        return Volume(image, label, None, ref.subject, ref.phase)
    volume = nifti_volume(ref, classes, dataset.options.get("orient", True) is True, undeclared)
    last = len(volume.image) - 1
    if channel is not None and (type(channel) is not int or not 0 <= channel <= last):
        raise RequestError(f"{ref.source}: has channels 0 to {last}; options.channel is {channel!r}")
    return volume if channel is None else replace(volume, image=volume.image[[channel]])


def _scan_phantom(folder: Path, dataset: DatasetConfig) -> list[VolumeRef]:
    count = dataset.options.get("subjects")
    if type(count) is not int or count < 1:
        raise RequestError(f"data set {dataset.name!r}: options.subjects must be a positive number (given: {count!r})")
    frames, stamp = product(range(count), ("ED", "ES")), f"phantom {phantom.VERSION}"
    return [VolumeRef(f"phantom{number:03d}", phase, (), None, folder, stamp) for number, phase in frames]


ADAPTERS = {  # what lists volumes without opening them, what reads one, and its options
    "phantom": (_scan_phantom, lambda ref, *_: phantom.phantom_volume(ref.subject, ref.phase), ["subjects"]),
    "acdc": (_scan_acdc, _read_acdc, []),
    "msd": (_scan_msd, _read_files, ["channel"]),
    "pairs": (_scan_pairs, _read_files, ["images", "labels", "undeclared", "orient"]),
}


def class_names(dataset: DatasetConfig, folder: Path) -> dict[int, str]:
    """Label value -> name, in the order of class indices 1..K; from `dataset.json` where the data set names none."""
    classes = dict(dataset.classes)
    if not classes and dataset.adapter != "msd":
        raise RequestError(f"data set {dataset.name!r}: its files name no classes; declare `classes` as value and name")
    path, info = (folder, {"labels": {}}) if classes else _dataset_json(folder)
    if not isinstance(info.get("labels"), dict):
        raise RequestError(f"{path}: has no 'labels'; declare them as label value and name")
    for key, value in info["labels"].items():
        number, name = (value, key) if "channel_names" in info else (key, value)  # nnU-Net: {name: 1}
        if name == "ignore" or not re.fullmatch(r"\d{1,9}", str(number)):
            raise RequestError(f"{path}: label {name!r} ({number!r}) is no plain class; give each one whole number")
        classes[int(number)] = str(name)
    if len(classes) > 255:
        raise RequestError(f"{path}: declares {len(classes)} classes, at most 255 are supported; merge or remove some")
    return {value: name for value, name in sorted(classes.items()) if value != 0}


def how_to_get(dataset: DatasetConfig) -> str:
    """Where a data set comes from, under which terms, how large it is and which folder tree is expected."""
    if not dataset.folder:
        return f"{dataset.source}; nothing to download (terms: {dataset.licence})"
    about = f"terms: {dataset.licence or 'unknown'}; size: {dataset.download_size or 'see there'}"
    source, tree = dataset.source or "its owner", dataset.tree or dataset.folder
    return f"get it from {source} ({about}) and put below CLSEG_DATA or --data: {tree}"


def scan(dataset: DatasetConfig) -> list[VolumeRef]:
    """Every volume of a data set in its phases, sorted, none opened; `RequestError` if the folder cannot be used."""
    about, folder = f"data set {dataset.name!r}", paths.data_root() / dataset.folder
    if dataset.adapter not in ADAPTERS:
        raise RequestError(f"{about}: unknown adapter {dataset.adapter!r}, {nearest(dataset.adapter, ADAPTERS)}")
    list_volumes, _, options = ADAPTERS[dataset.adapter]
    if wrong := sorted(set(dataset.options) - set(options)):
        raise RequestError(f"{about}: unknown option {wrong[0]!r}, {nearest(wrong[0], options or ['none'])}")
    if dataset.folder and not folder.is_dir():
        raise RequestError(f"{folder}: {about} is not there; {how_to_get(dataset)}")
    with reading(folder, f"folder of {about}", "correct it"):
        refs = sorted(list_volumes(folder, dataset), key=lambda ref: (ref.subject, ref.phase))
    if not refs:
        raise RequestError(f"{folder}: holds no volume of {about}; {how_to_get(dataset)}")
    if broken := [ref for ref in refs if UNPRINTABLE.search(ref.subject)]:
        raise RequestError(f"{broken[0].source}: has a line break or a broken character in its name; rename it")
    for first, second in pairwise(refs):
        if (first.subject, first.phase) == (second.subject, second.phase):
            raise RequestError(f"{second.source}: {second.subject} is there twice; remove one copy")
    present = {ref.phase for ref in refs}
    if absent := sorted(set(dataset.phases) - present):
        raise RequestError(f"{about}: has no volume of phase {absent[0]!r}, {nearest(absent[0], present)}")
    return [ref for ref in refs if not dataset.phases or ref.phase in dataset.phases]


@dataclass(frozen=True)
class Subjects:
    """The ids of a data set as far as they are known before a volume is opened."""

    subjects: tuple[str, ...]
    labelled_subjects: tuple[str, ...]  # h5: all, as labels lie inside of the files


def listed(dataset: DatasetConfig) -> Subjects:
    """Who is in a data set, and who has labels; raises `RequestError`."""
    refs = scan(dataset)
    labelled = {ref.subject for ref in refs if ref.label or not ref.images}
    return Subjects(tuple(sorted({ref.subject for ref in refs})), tuple(sorted(labelled)))


def read(ref: VolumeRef, dataset: DatasetConfig) -> Volume:
    """One checked volume; `RequestError` names the file that cannot be used."""
    return checked(ADAPTERS[dataset.adapter][1](ref, dataset, class_names(dataset, ref.root)), ref.source, ref.label)
