"""Volumes as they lie in a folder: adapters that list them cheaply (`scan`) and read them one at a time (`read`).

Every adapter answers with the same `Volume`. Whatever is wrong with a file is a `RequestError` that names it.
"""

import glob
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from PIL import Image, ImageOps

from clseg import paths
from clseg.data import phantom
from clseg.data.volume import Volume, VolumeRef, checked
from clseg.errors import UNPRINTABLE, RequestError, nearest, reading, repeated
from clseg.settings import DatasetConfig

Classes = Mapping[int, str]  # label value -> name
Options = Mapping[str, Any]  # `DatasetConfig.options`
VOLUMES = (".nii.gz", ".nii", ".mgz", ".mgh", ".hdr", ".img")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
CHOICES = {"undeclared": ["error", "background"], "orient": [True, False], "label_header": ["own", "image"]}
ORIENTATION = 0x0112  # EXIF
MOST_VALUES = 64  # of a mask; more are intensities
HEADER_TEXTS = ("descrip", "aux_file", "db_name", "intent_name")  # fields of NIfTI that may name a patient
BLURRED = 8  # values of a picture between the least and the greatest
ROUNDING = 1e-3  # how far a label value may be from a whole number, and, if it is larger, 1e-5 of its own


def is_volume(path: Path) -> bool:
    """Whether a file is a NIfTI or the like, with a header, by its name."""
    return path.name.lower().endswith(VOLUMES)


def whole_numbers(label: np.ndarray, source: Path, options: Options) -> tuple[np.ndarray, list[str]]:
    """Values of a label file as whole numbers, and a note where they were rounded; `RequestError` if they are not such.

    With `threshold` among the options a value is 1 from there on, else 0.
    """
    if label.dtype.kind == "f" and (unknown := np.count_nonzero(~np.isfinite(label))):
        raise RequestError(f"{source}: the mask holds NaN in {unknown} voxels; write the value of a class there, or 0")
    if "threshold" in options:
        values = np.unique(label) if options["threshold"] <= 1 else ()  # more is of grey values
        if len(values) > 2 and np.array_equal(values, np.arange(len(values))):
            held = f"holds classes 0 to {values[-1]:g}"
            raise RequestError(f"{source}: {held}, and options.threshold merges them; remove it")
        return (label >= options["threshold"]).astype(np.uint8), []
    if label.dtype.kind != "f":
        return label, []
    rounded = np.rint(label)
    apart = np.abs(label - rounded)
    if (between := apart > np.maximum(ROUNDING, 1e-5 * np.abs(rounded))).any():
        values = np.unique(label[between])
        several = f"{values[0]:.4g} to {values[-1]:.4g}" if len(values) > 1 else f"{values[0]:.4g}"
        remedy = "resample it with nearest neighbours"
        remedy += ", or set options.threshold, for a probability 0.5" * bool(label.min() >= 0 and label.max() <= 1)
        raise RequestError(f"{source}: the mask is soft or was resampled: it holds values {several}; {remedy}")
    notes = [f"values of the mask are off by {apart.max():.0e} and were rounded"] if apart.any() else []
    return rounded, notes


def class_indices(label: np.ndarray, classes: Classes, source: Path, undeclared: str = "error") -> np.ndarray:
    """Label values of a file as class indices 0..K, uint8, in their order; others raise `RequestError`, or become 0."""
    values = [0, *sorted(classes)]
    order = np.argsort(values)  # 0 comes first in `values` even if others are negative
    if undeclared == "background":
        label = np.where(np.isin(label, values), label, 0)
    elif unknown := [value for value in np.unique(label).tolist() if value not in values]:
        shown, declared = (", ".join(f"{value:g}" for value in some) for some in (unknown[:5], values))
        remedy = "correct file or `classes`, or set options.undeclared to background"
        raise RequestError(f"{source}: holds label values {shown}, declared are {declared}; {remedy}")
    return order.astype(np.uint8)[np.searchsorted(values, label, sorter=order)]


def _unzipped(data: bytes) -> bytes:
    """What a gzip file holds, its checksums verified; bytes after its end are not looked at."""
    parts = []
    while data[:2] == b"\x1f\x8b":
        stream = zlib.decompressobj(wbits=31)
        parts.append(stream.decompress(data))
        if not stream.eof:
            raise EOFError("the gzip stream has no end")
        data = stream.unused_data
    if not parts:
        raise ValueError("it is no gzip file")
    return b"".join(parts)


def _volume_file(path: Path) -> nib.spatialimages.SpatialImage:
    """A NIfTI or MGH file, or a pair of header and voxels, in memory; of a compressed one the checksum is verified."""
    name = path.name.lower()
    with nib.imageglobals.LoggingOutputSuppressor():  # what is wrong is an exception, too
        if name.endswith((".hdr", ".img")):
            file = nib.load(path)
        else:
            data = path.read_bytes()
            data = _unzipped(data) if name.endswith(("gz", ".mgz")) else data
            kind = nib.Nifti2Image if nib.Nifti2Header.may_contain_header(data) else nib.Nifti1Image
            file = (nib.MGHImage if name.endswith((".mgz", ".mgh")) else kind).from_bytes(data)
    given = hasattr(file.header, "get_xyzt_units")  # Analyze and MGH give no unit
    if given and (unit := file.header.get_xyzt_units()[0]) in ("meter", "micron"):
        remedy = "write them in mm, or correct the unit (nibabel: header.set_xyzt_units('mm'))"
        raise RequestError(f"{path}: its header gives lengths in {unit}; {remedy}")
    return file


def _spacing_mm(file: nib.spatialimages.SpatialImage) -> tuple[np.ndarray, list[str]]:
    """Size of a voxel along x, y, z as stored, and a note where header and affine do not agree.

    It is that of `pixdim`, as ITK has it: some tools write an affine (sform) without scale. The affine's columns stand
    in for a `pixdim` that is no length.
    """
    columns, zooms = nib.affines.voxel_sizes(file.affine), np.abs(np.array(file.header.get_zooms()[:3], float))
    spacing = np.where(np.isfinite(zooms) & (zooms > 0), zooms, columns)
    if np.allclose(spacing, columns, rtol=0.01, atol=0):
        return columns, []
    pixdim, scale = (" x ".join(f"{mm:.5g}" for mm in three) for three in (spacing, columns))
    return spacing, [f"its affine says voxels of {scale} mm, its pixdim {pixdim} mm: pixdim is taken"]


@dataclass(frozen=True)
class _Order:
    """How stored axes (0 is x) become X, Y and Z: which ones, whether they are reversed, and what Z runs along."""

    axes: tuple[int, ...] = (0, 1, 2)
    flips: tuple[bool, ...] = (False, False, False)
    slice_axis: str = ""

    def array(self, data: np.ndarray) -> np.ndarray:
        """[C, z, y, x] as stored to [C, Z, Y, X]."""
        turned = data.transpose(0, *(3 - axis for axis in reversed(self.axes)))
        return np.flip(turned, [3 - k for k in range(3) if self.flips[k]])

    def affine(self, affine: np.ndarray, shape: list[int]) -> np.ndarray:
        """That of (X, Y, Z), from the stored one and its shape (z, y, x)."""
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for k, axis in enumerate(self.axes):
            turn[axis, k], turn[axis, 3] = (-1, shape[2 - axis] - 1) if self.flips[k] else (1, 0)
        return affine @ turn


def _order(affine: np.ndarray, spacing: np.ndarray, slice_axis: str) -> _Order:
    """Z is the axis nearest to the world axis `slice_axis`, "" for that of thick slices, else of the third stored axis;
    X and Y are the others in the order of the world; each runs to its positive side. Oblique thick slices, as of
    short-axis views of the heart, stay slices whatever `slice_axis` is.
    """
    world = nib.io_orientation(affine)  # of stored axes x, y, z: number and sign of their dominating world axis
    numbers, most = world[:, 0].astype(int).tolist(), int(spacing.argmax())
    thick = spacing[most] > 1.5 * np.sort(spacing)[1]
    oblique = np.abs(affine[:3, most]).max() < 0.9 * np.linalg.norm(affine[:3, most])
    along = "xyz".index(slice_axis) if slice_axis and not (thick and oblique) else numbers[most if thick else 2]
    axes = [numbers.index(number) for number in sorted({0, 1, 2} - {along})] + [numbers.index(along)]
    return _Order(tuple(axes), tuple(bool(world[axis, 1] < 0) for axis in axes), "xyz"[along])


def usual_slice_axis(refs: Iterable[VolumeRef], dataset: DatasetConfig) -> str:
    """The world axis ("x", "y" or "z") along which slices of most volumes run; "" where axes are kept.

    Only headers are read; a file that cannot be read does not count.
    """
    counts: Counter[str] = Counter()
    if dataset.adapter in ("msd", "pairs") and not dataset.photographs and dataset.options.get("orient", True):
        for ref in refs:
            with suppress(Exception), nib.imageglobals.LoggingOutputSuppressor():
                file = nib.load(ref.images[0])
                counts[_order(file.affine, _spacing_mm(file)[0], "").slice_axis] += 1
    return max(counts, key=lambda axis: (counts[axis], axis), default="")


def _apart(shape: list[int], affine: np.ndarray, other_shape: list[int], other: np.ndarray) -> str:
    """In words, how a grid (shape: z, y, x) differs from another one; "" if corners lie within a tenth of a voxel."""
    if shape != other_shape:
        return f"has shape {shape} (z, y, x) and not {other_shape}"
    corners = list(product(*[(0, n) for n in reversed(shape)], [1]))  # (x, y, z, 1)
    size = nib.affines.voxel_sizes(other)
    if np.linalg.norm(corners @ (affine - other).T, axis=1).max() <= 0.1 * size.min():
        return ""
    if np.array_equal(np.abs(affine[:3, :3]), np.eye(3)) and not np.allclose(size, 1):
        return "has the right shape, but its header was lost: the affine is that of a file without one"
    own = nib.affines.voxel_sizes(affine)
    cosines = ((affine[:3, :3] / own) * (other[:3, :3] / size)).sum(0)  # of each axis with its like
    if (np.abs(cosines) < 0.99).any():
        return "has the right shape, but its axes are turned"
    if not np.allclose(own, size, rtol=0.01):
        mine, theirs = (" x ".join(f"{mm:.4g}" for mm in three) for three in (own, size))
        return f"has the right shape, but voxels of {mine} mm and not {theirs} mm"
    if mirrored := [name for name, cosine in zip("xyz", cosines, strict=True) if cosine < 0]:
        return f"has the right shape, but its affine mirrors {' and '.join(mirrored)}"
    shift = np.linalg.norm(affine[:3, 3] - other[:3, 3])
    return f"has the right shape, but is shifted by {shift:.4g} mm" if shift > 0 else "is turned a little"


def nifti_volume(ref: VolumeRef, classes: Classes, options: Options, slice_axis: str = "") -> Volume:
    """One volume from its NIfTI, MGH or header-and-voxels files.

    With `orient` among the options, the default, every axis is turned toward its dominating positive world axis, and
    axes are put in one order: slices run along the world axis `slice_axis` ("": across thick slices, else along the
    third stored axis), rows and columns along the others as the world has them; `Volume.as_stored` is the way back.
    `nan`: what stands for intensities that are none. `label_header: image`: voxels of the mask are those of the image,
    whatever its header says. `undeclared` and `threshold`: of label values.
    """
    arrays, notes = [], []
    order, grid, affine, spacing = _Order(), [], np.eye(4), np.ones(3)  # those of the first file
    names = [*ref.images, *filter(None, [ref.label])]
    for number, path in enumerate(names):
        with reading(path, "NIfTI"):
            file = _volume_file(path)
            shape, kind = list(file.shape), file.get_data_dtype()
            if len(shape) not in (3, 4) or 0 in shape or kind.kind not in "biuf":
                raise RequestError(f"{path}: has shape {shape} of type {kind}; a 3-D image of numbers is needed")
            data = np.asarray(file.dataobj).T
        own, shape = np.asarray(file.affine, dtype=float), list(data.shape[-3:])
        if not np.isfinite(own).all() or np.isnan(nib.io_orientation(own)).any():
            raise RequestError(f"{path}: its affine is not invertible; repair the header")
        if not number:
            grid, affine = shape, own
            spacing, notes = _spacing_mm(file)
            order = _order(own, spacing, slice_axis) if options.get("orient", True) else order
        turn, is_label = order, bool(ref.label) and number == len(ref.images)
        if not (is_label and options.get("label_header") == "image" and shape == grid):
            if (problem := _apart(shape, own, grid, affine)) and options.get("orient", True):
                turn = _order(own, spacing, order.slice_axis)  # the same grid may be stored in another order
                there, here = (one.affine(*about) for one, *about in ((turn, own, shape), (order, affine, grid)))
                sizes = [list(one.array(np.empty((1, *s))).shape[1:]) for one, s in ((turn, shape), (order, grid))]
                problem = _apart(sizes[0], there, sizes[1], here) and problem
            if problem:
                remedy = "resample it to the image's grid"
                if is_label and shape == grid:
                    remedy = "if they lie on each other voxel by voxel, set options.label_header to image"
                    remedy += ", which takes the header of the image" + "; else resample it" * ("lost" not in problem)
                raise RequestError(f"{path}: the grid is not that of {ref.images[0].name}: it {problem}; {remedy}")
        arrays.append(turn.array(data.reshape(-1, *shape)))
    with np.errstate(over="ignore"):  # infinity is refused
        image = np.concatenate(arrays[: len(ref.images)], dtype=np.float32, casting="unsafe")
    if "nan" in options:
        image = np.where(np.isfinite(image), image, np.float32(options["nan"]))
    label = None
    if ref.label:
        label, rounded = whole_numbers(arrays[-1], ref.label, options)
        label, notes = class_indices(label, classes, ref.label, options.get("undeclared", "error")), notes + rounded
        label = label[0] if len(label) == 1 else label
    if order.slice_axis and order.slice_axis != _order(affine, spacing, "").slice_axis:
        notes = [*notes, f"its slices run along another axis than those of most: it is cut anew, along {slice_axis}"]
    axes, flips = tuple(2 - axis for axis in reversed(order.axes)), order.flips[::-1]
    spacing_mm = tuple(spacing[list(order.axes)][::-1].tolist())
    about = {"affine": affine, "axes": axes, "flips": flips, "slice_axis": order.slice_axis, "notes": tuple(notes)}
    return Volume(image, label, spacing_mm, ref.subject, ref.phase, **about)


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


def _read_acdc(ref: VolumeRef, dataset: DatasetConfig, classes: Classes, *_: Any) -> Volume:
    if ref.images[0].suffix != ".h5":
        # the headers carry no patient orientation (identity); as stored, the basal slice is first, as in the h5 copy
        return nifti_volume(ref, classes, {"orient": False})
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
        names = [name.replace("\\", "/") if isinstance(name, str) else name for name in names]  # Windows wrote it
        for name in names:
            if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
                raise RequestError(f"{source}: names {name!r}; use a path relative to {folder}")
        image, label = (folder / name for name in names)
        stem, ending = _stem(image.name)
        images = (image,)
        if ending and not image.is_file():  # nnU-Net v1 leaves the number of the channel out
            images = tuple(sorted(image.parent.glob(f"{glob.escape(stem)}_[0-9][0-9][0-9][0-9]{ending}")))
        if not ending or not images or not images[0].is_file():
            raise RequestError(f"{source}: names the image {names[0]!r}; name a NIfTI file in {folder}")
        files = [path for path in (*images, label) if path.is_file()]
        if out := [path for path in files if not Path(os.path.realpath(path)).is_relative_to(root)]:
            raise RequestError(f"{source}: names {out[0]}, a link out of the folder; copy the file there")
        yield VolumeRef(stem, "", images, label if label in files else None, folder)


def _stem(name: str) -> tuple[str, str]:
    """A name without and its ending, "" if it is not that of a volume."""
    ending = next((name[-len(end) :] for end in VOLUMES if name.lower().endswith(end)), "")
    return name.removesuffix(ending), ending


def _scan_nnunet(folder: Path, info: dict[str, Any]) -> Iterator[VolumeRef]:
    if not isinstance(info["channel_names"], dict) or not info["channel_names"]:
        raise RequestError(f"{folder}/dataset.json: 'channel_names' must be a mapping such as {{'0': 'MRI'}}")
    ending, channels = info.get("file_ending", ".nii.gz"), len(info["channel_names"])
    if not isinstance(ending, str) or ending.lower() not in VOLUMES:
        raise RequestError(f"{folder}/dataset.json: file_ending {ending!r} is not supported; convert to .nii.gz")
    tail = f"_[0-9][0-9][0-9][0-9]{ending}"
    for part in ("imagesTr", "imagesTs"):
        named = {*folder.glob(f"{part}/[!.]*{tail}")}
        if odd := sorted({*folder.glob(f"{part}/[!.]*{ending}")} - named):
            like = f"{odd[0].name.removesuffix(ending)}_0000{ending}"
            raise RequestError(f"{odd[0]}: nnU-Net names it {like}, with the number of its channel; rename it")
        for case in sorted({path.name[: -len(ending) - 5] for path in named}):
            images = tuple(folder / part / f"{case}_{channel:04d}{ending}" for channel in range(channels))
            if missing := [image for image in images if not image.is_file()]:
                raise RequestError(f"{missing[0]}: is missing; add it, or correct the {channels} channel_names")
            labels = [folder / "labelsTr" / f"{case}{number}{ending}" for number in ("", "_0000")]  # some have it, too
            label = next((path for path in labels if path.is_file()), None)
            yield VolumeRef(case, "", images, label if part == "imagesTr" else None, folder)


def pattern(text: str, exact: bool = False) -> re.Pattern[str]:
    """Of paths that look like a text with {subject} in it, which is the group `subject`, and an ending.

    The ending stands for all of its kind, volumes or pictures, in small or capital letters; if `exact`, for itself.
    """
    ending = next((end for end in (*VOLUMES, *PICTURES) if text.lower().endswith(end)), "")
    kind = [end for end in (VOLUMES if ending in VOLUMES else PICTURES) if end != ".img"]
    ends = "|".join(map(re.escape, [ending] if exact or not ending else kind))
    first, *others = (re.escape(part) for part in text[: len(text) - len(ending)].split("{subject}"))
    body = "(?P<subject>[^/.][^/]*?)" + "(?P=subject)".join(others)
    return re.compile(f"{first}{body}(?P<ending>(?i:{ends}))", re.DOTALL)


def matching(text: str, files: Iterable[str], exact: bool = False) -> dict[str, str]:
    """Subject -> the file that looks like `pattern(text)`; of several, the one whose ending is that of the text."""
    found: dict[str, str] = {}
    expression = pattern(text, exact)
    for name in files:
        if (match := expression.fullmatch(name)) and (match["subject"] not in found or text.endswith(match["ending"])):
            found[match["subject"]] = name
    return found


def _scan_pairs(folder: Path, dataset: DatasetConfig) -> list[VolumeRef]:
    """One image and one mask per subject, or no mask; what looks like a mask is no image."""
    texts = [str(dataset.options.get(option, "")) for option in ("images", "labels")]
    for option, text in zip(("images", "labels"), texts, strict=True):
        if "{subject}" not in text or Path(text).is_absolute() or ".." in text:
            raise RequestError(f"options.{option}: must be a relative path with {{subject}} in it (given: {text!r})")
    files = []
    for text in texts:
        *above, _ = Path(text).parts
        where = "/".join("*" if "{subject}" in part else glob.escape(part) for part in above)
        files.append(sorted(path.relative_to(folder).as_posix() for path in folder.glob(f"{where}/*".lstrip("/"))))
    stems = [text.rpartition(".")[0].removesuffix(".nii") for text in texts]
    exact = stems[0] == stems[1]  # else an image would be its own mask
    images, labels = (matching(text, some, exact) for text, some in zip(texts, files, strict=True))
    masks = set(labels.values())
    return [
        VolumeRef(subject, "", (folder / image,), folder / labels[subject] if subject in labels else None, folder)
        for subject, image in images.items()
        if image not in masks
    ]


def _picture(path: Path) -> tuple[Image.Image, str]:
    """A picture as it is meant to be seen, turned as its camera says, and its format.

    `RequestError` if it cannot be read, or holds several pages.
    """
    with reading(path, "image file"), Image.open(path) as file:
        pages, kind = getattr(file, "n_frames", 1), file.format or ""
        if pages > 1 and kind != "MPO":  # a photograph and its preview
            remedy = "save each as a file of its own, or a volume as NIfTI"
            raise RequestError(f"{path}: holds {pages} pages and one picture is needed; {remedy}")
        return ImageOps.exif_transpose(file), kind


def turned(path: Path) -> bool:
    """Whether its camera's orientation turns a picture."""
    with Image.open(path) as file:
        return file.getexif().get(ORIENTATION, 1) != 1


def photograph(path: Path, channels: int) -> np.ndarray:
    """Any file that Pillow reads, in colour or grey, upright: [C, 1, Y, X], uint8, or as stored where it is deeper."""
    file, _ = _picture(path)
    with reading(path, "image file"):
        deep = file.mode[0] in "IF"  # Pillow would clip them
        data = np.asarray(file if deep else file.convert("RGB" if channels == 3 else "L"))
    data = np.moveaxis(np.atleast_3d(data), 2, 0)[:, None]
    return np.repeat(data, channels, axis=0) if deep else data


def mask_picture(path: Path, options: Options, classes: Iterable[int] = ()) -> np.ndarray:
    """The label values [1, Y, X] of a picture: those of its palette, of grey, or of its transparency.

    With `threshold` among the options they are 1 from there on, else 0. `RequestError` where values are not classes:
    in colour, blurred at the borders, or changed by JPEG.
    """
    file, kind = _picture(path)
    with reading(path, "image file"):
        if kind in ("JPEG", "MPO"):
            file = file.convert("L")
        data = np.asarray(file.convert("L") if file.mode == "1" else file)
    data = np.moveaxis(np.atleast_3d(data), 2, 0)  # [C, Y, X]
    if file.mode in ("LA", "RGBA") and data[-1].min() == data[-1].max():
        data = data[:-1]
    elif file.mode in ("LA", "RGBA") and (data[:-1] == data[:-1, :1, :1]).all():
        data = data[-1:]
    if len(data) > 1 and (data != data[:1]).any():
        remedy = "save classes as grey values"
        raise RequestError(f"{path}: the mask is in colour; {remedy}")
    palette = np.reshape((file.getpalette() or []) if file.mode == "P" else [], (-1, 3))
    black = np.flatnonzero(~palette.any(axis=1))
    if len(black) and palette[0].any() and not (palette[0] == 255).all() and np.isin(data, black).any():
        wrong = f"class 0 of its palette is a colour and {black[0]} is black, as if numbered by their frequency"
        raise RequestError(f"{path}: {wrong}; save classes as grey values")
    data, _ = whole_numbers(data[:1], path, options)
    values = np.unique(data)
    inner = values[(values != 0) & (values != values[-1])]
    blurred = len(inner) >= BLURRED and (values[-2] > 2 * len(inner) or len(inner) > MOST_VALUES)
    if not {*inner.tolist()} <= {*classes} and (blurred or (inner.size and kind in ("JPEG", "MPO"))):
        why = "JPEG, which is lossy" if kind in ("JPEG", "MPO") else "blurred or interpolated"
        remedy = f"save plain classes as PNG, or set options.threshold, such as {values[-1] // 2 + 1}"
        raise RequestError(f"{path}: the mask is {why}: it holds {len(values)} values; {remedy}")
    return data


def label_values(ref: VolumeRef, options: Options) -> np.ndarray:
    """The whole numbers that a volume's label file holds, whatever is declared; `RequestError` if it holds others."""
    if is_volume(ref.label):
        with reading(ref.label, "NIfTI"):
            data = np.asarray(_volume_file(ref.label).dataobj)
        return np.unique(whole_numbers(data, ref.label, options)[0])
    return np.unique(mask_picture(ref.label, options))


def _read_files(ref: VolumeRef, dataset: DatasetConfig, classes: Classes, slice_axis: str = "") -> Volume:
    """A volume from NIfTI files or photographs, by the options of `msd` and `pairs`."""
    options = dataset.options
    for name, valid in CHOICES.items():
        if (given := options.get(name, valid[0])) not in valid:
            raise RequestError(f"options.{name}: must be {' or '.join(map(str, valid))} (given: {given!r})")
    for name in ("nan", "threshold"):
        if isinstance(options.get(name, 0), str | bool):
            raise RequestError(f"options.{name}: must be a number (given: {options[name]!r})")
    undeclared, channel = options.get("undeclared", "error"), options.get("channel")
    if not is_volume(ref.images[0]):
        image = photograph(ref.images[0], dataset.channels).astype(np.float32)
        label = mask_picture(ref.label, options, classes) if ref.label else None
        label = class_indices(label, classes, ref.label, undeclared) if ref.label else None
        notes = ("is turned upright, as its camera's orientation (EXIF) says; its mask must lie so, too",)
        notes = notes if turned(ref.images[0]) else ()
        return Volume(image, label, None, ref.subject, ref.phase, notes=notes)
    volume = nifti_volume(ref, classes, options, slice_axis)
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


COMMON = ["undeclared", "nan", "label_header", "threshold"]
ADAPTERS = {  # what lists volumes without opening them, what reads one, and its options
    "phantom": (_scan_phantom, lambda ref, *_: phantom.phantom_volume(ref.subject, ref.phase), ["subjects"]),
    "acdc": (_scan_acdc, _read_acdc, []),
    "msd": (_scan_msd, _read_files, ["channel", *COMMON]),
    "pairs": (_scan_pairs, _read_files, ["images", "labels", "orient", *COMMON]),
}


def class_names(dataset: DatasetConfig, folder: Path) -> dict[int, str]:
    """Label value -> name, in the order of class indices 1..K; from `dataset.json` where the data set names none."""
    classes = dict(dataset.classes)
    if not classes and dataset.adapter != "msd":
        raise RequestError(f"data set {dataset.name!r}: its files name no classes; declare `classes` as value and name")
    path, info = (folder, {"labels": {}}) if classes else _dataset_json(folder)
    if not isinstance(info.get("labels"), dict):
        raise RequestError(f"{path}: has no 'labels'; declare them as label value and name")
    regions: dict[str, list[int]] = {}
    for key, value in info["labels"].items():
        number, name = (value, key) if "channel_names" in info else (key, value)  # nnU-Net: {name: 1}
        if name == "ignore":
            if dataset.options.get("undeclared") == "background":
                continue
            remedy = "set options.undeclared to background, which makes them background"
            raise RequestError(f"{path}: has a label 'ignore' ({number!r}), voxels to leave out; {remedy}")
        values = re.findall(r"\d{1,9}", str(number)) if isinstance(number, list) or "," in str(number) else []
        if values:
            regions[str(name)] = [int(one) for one in values]
        elif not re.fullmatch(r"\d{1,9}", str(number)):
            raise RequestError(f"{path}: label {name!r} ({number!r}) is no plain class; give each one whole number")
        elif int(number) in classes:
            both = f"{classes[int(number)]!r} and {name!r}"
            raise RequestError(f"{path}: gives labels {both} one number ({number}); give each class its own")
        else:
            classes[int(number)] = str(name)
    if regions:
        plain = dict.fromkeys(value for values in regions.values() for value in values)
        plain = {value: classes.get(value, f"class {value}") for value in sorted({*classes, *plain})}
        nnunet = {name: value for value, name in plain.items()}
        about = json.dumps({"labels": nnunet if "channel_names" in info else plain}, ensure_ascii=False)
        told = f"{path}: gives classes as regions ({', '.join(regions)}), and each voxel needs one class"
        raise RequestError(f"{told}; declare plain ones instead: {about[1:-1]}")
    if len(classes) > 255:
        raise RequestError(f"{path}: declares {len(classes)} classes, at most 255 are supported; merge or remove some")
    classes = {value: name for value, name in sorted(classes.items()) if value != 0}
    if twice := repeated(classes.values()):
        raise RequestError(f"{path}: gives {twice[0]!r} to two label values; give each a name of its own")
    return classes


def how_to_get(dataset: DatasetConfig) -> str:
    """Where a data set comes from, under which terms, how large it is and which folder tree is expected."""
    if not dataset.folder:
        return f"{dataset.source}; nothing to download (terms: {dataset.licence})"
    cite = f"; cite: {dataset.citation}" * bool(dataset.citation)
    about = f"terms: {dataset.licence or 'unknown'}; size: {dataset.download_size or 'see there'}"
    source, tree = dataset.source or "its owner", dataset.tree or dataset.folder
    return f"get it from {source} ({about}) and put below CLSEG_DATA or --data: {tree}{cite}"


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
    tests = [ref.images and ref.images[0].parent.name == "imagesTs" for ref in refs]
    taken = {ref.subject for ref, test in zip(refs, tests, strict=True) if not test}
    refs = [  # those for testing may be numbered anew, as in nnU-Net: they are other patients
        replace(ref, subject=f"{ref.subject}-Ts") if test and ref.subject in taken else ref
        for ref, test in zip(refs, tests, strict=True)
    ]
    refs.sort(key=lambda ref: (ref.subject, ref.phase))
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


def read(ref: VolumeRef, dataset: DatasetConfig, slice_axis: str = "") -> Volume:
    """One checked volume; `RequestError` names the file that cannot be used.

    slice_axis: the world axis that slices of NIfTI files run along, as `usual_slice_axis` finds it for a data set.
    """
    _, read_one, _ = ADAPTERS[dataset.adapter]
    return checked(read_one(ref, dataset, class_names(dataset, ref.root), slice_axis), ref.source, ref.label)
