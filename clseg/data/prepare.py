"""From volumes to slices the network can see: normalised, resampled and cropped once, then memory-mapped.

A prepared store is a folder under `paths.prepared_root()`, named by the hash of the input files, the preprocessing and
the geometry. It appears by one atomic rename, so it is complete or absent. Its rows are slices; in 3-D a slice stands
for the block around it, so that pairs and sampling are those of 2-D.
"""

import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from tqdm.auto import tqdm

from clseg import paths
from clseg.data.formats import class_names, read, scan, usual_slice_axis
from clseg.data.store import Store, fit, places
from clseg.data.volume import Volume, VolumeRef
from clseg.digest import digest
from clseg.errors import RequestError, once, reading, writing
from clseg.settings import READ, DatasetConfig, Geometry, Normalisation

STORE_VERSION = 4
FILES = ("images.f16", "labels.u8", "native_labels.zlib")
MOST_VOXELS = 2**31  # of one volume


def normalise(volume: Volume, setting: Normalisation, source: str | Path) -> np.ndarray:
    """(v - p_low) / (p_high - p_low) per channel of the whole volume, not clipped; float32 [C, Z, Y, X].

    Kind "z_score": v is clipped to [p_low, p_high], then (v - mean) / sd of the volume.
    Source: Chaitanya et al., 1st and 99th percentile; N4 without a mask, as their `N4_bias_correction.py`; z-scores:
    Zeng et al., who clip the percentiles 1 and 99 (CT, HVSMR) or nothing (ACDC).
    `RequestError` if the percentiles coincide, or without SimpleITK for N4.
    """
    channels = []
    for channel, image in enumerate(volume.image):
        image = _n4(image, volume.spacing_mm) if setting.n4 else image
        low, high = np.percentile(image, [setting.low, setting.high])
        if not low < high < low + np.finfo(np.float32).max:
            percentiles = f"percentiles {setting.low:g} and {setting.high:g} of channel {channel} are both {low:g}"
            raise RequestError(f"{source}: {percentiles}; remove the image or widen normalisation.low and .high")
        if setting.kind == "z_score":
            image = np.clip(image, low, high)
            low, high = image.mean(dtype=np.float64), image.mean(dtype=np.float64) + image.std(dtype=np.float64)
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
        classes = classes[(places(z, len(classes)) + 0.5).long()]
    return slices.clamp(-65504, 65504).half().numpy(), classes.numpy()  # the range of float16


def cut_voxels(label: np.ndarray, resampled: Sequence[int], size: Sequence[int]) -> int:
    """How many of the labelled voxels [Z, Y, X] lie outside of the centre that `to_network` keeps of a plane."""
    inside = []
    for native, have, want in zip(label.shape[1:], resampled[1:], size, strict=True):
        place, first = (np.arange(native) + 0.5) * have / native, int((have - want) / 2)
        inside.append((place >= first) & (place < first + want))
    return np.count_nonzero(label) - np.count_nonzero(label[:, inside[0]][:, :, inside[1]])


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

    Where the data set's folder is absent, a store that was made of it elsewhere will do. One volume is in memory at a
    time; processes that ask at once build it once. `RequestError` if the data are wrong. With `progress` it is told
    that a store was made elsewhere, what was decided about files and what the grid cuts off.
    """
    asked = {"version": STORE_VERSION, "geometry": geometry.model_dump()}
    asked |= {"dataset": dataset.model_dump(include=READ | {"positions"})}
    absent = dataset.folder and not (paths.data_root() / dataset.folder).exists()
    if absent and (made := _made_elsewhere(dataset.name, digest(asked))):
        if progress:
            folder = paths.data_root() / dataset.folder
            print(
                f"{dataset.name}: {folder} is not here; {made.folder}, which was made of it, is used", file=sys.stderr
            )
        return made
    refs = scan(dataset)
    dataset = dataset.model_copy(update={"classes": class_names(dataset, refs[0].root)})
    key = asked | {"files": _stamps(refs), "classes": list(dataset.classes.items())}
    folder = paths.prepared_root() / f"{dataset.name}-{digest(key)}"
    if not folder.is_dir():
        with writing(folder, "set CLSEG_OUT or --out to a folder that can be written"):
            _build(folder, dataset, geometry, refs, progress, digest(asked))
    store = Store(folder)
    for note in json.loads((folder / "notes.json").read_text(encoding="utf-8")) if progress else ():
        print(f"{dataset.name}: {note}", file=sys.stderr)
    return store


def _made_elsewhere(name: str, asked: str) -> Store | None:
    """The store whose description is the one asked for, whatever files it was made of; None where there is none."""
    stores = map(Store, sorted(path.parent for path in paths.prepared_root().glob(f"{name}-*/index.json")))
    found = {store.content: store for store in stores if store.asked == asked}
    if len(found) > 1:
        folders = " and ".join(str(store.folder) for store in found.values())
        raise RequestError(f"{folders}: are made of unlike files of data set {name}; remove one, or add its folder")
    return next(iter(found.values()), None)


def _build(
    folder: Path, dataset: DatasetConfig, geometry: Geometry, refs: list[VolumeRef], progress: bool, asked: str
) -> None:
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
            _write(partial, dataset, geometry, bar, asked, usual_slice_axis(refs, dataset))
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write(
    folder: Path, dataset: DatasetConfig, geometry: Geometry, refs: Iterable[VolumeRef], asked: str, slice_axis: str
) -> None:
    volumes, plane, declared, seen = [], geometry.plane or geometry.size[-2:], dataset.channels, {}
    content, notes, cut = {name: hashlib.sha256() for name in FILES}, [], []
    for ref in refs:
        volume = read(ref, dataset, slice_axis)
        require_new(volume, ref, seen, dataset.twins)
        channels, *native = volume.image.shape
        if channels != declared:
            problem = f"has {channels} channels and data set {dataset.name!r} declares {declared}"
            raise RequestError(f"{ref.source}: {problem}; correct `channels`, or choose one by options.channel")
        resampled, labelled = resampled_size(volume, geometry), volume.label is not None
        normalised = normalise(volume, dataset.normalisation, ref.source)
        image, label = to_network(normalised, volume.label, resampled, plane)
        name = ref.images[0].relative_to(ref.root).as_posix() if ref.images else ref.subject
        notes += [(f"{name}: {note}", [name]) for note in volume.notes]
        if labelled:
            cut.append((cut_voxels(volume.label, resampled, plane), np.count_nonzero(volume.label), name))
        native_label = zlib.compress(volume.label.tobytes(), level=1) if labelled else b""
        for name, data in zip(FILES, (image.tobytes(), label.tobytes(), native_label), strict=True):
            with open(folder / name, "ab") as file:
                file.write(data)
            content[name].update(data)
        about = {"subject": ref.subject, "phase": ref.phase, "labelled": labelled}
        about |= {"slice_axis": volume.slice_axis, "slices": len(image), "label_bytes": len(native_label)}
        grids = {"native": native, "resampled": resampled, "spacing": volume.spacing_mm or [None] * 3}
        columns = {f"{name}_{axis}": n for name, grid in grids.items() for axis, n in zip("zyx", grid, strict=True)}
        volumes.append(about | columns)
    index = {"channels": declared, "size": geometry.size, "plane": plane, "positions": dataset.positions}
    index |= {"class_names": list(dataset.classes.values()), "volumes": volumes}
    index |= {"label_values": [0, *dataset.classes]}
    index["content"] = digest([index, {name: of_file.hexdigest() for name, of_file in content.items()}])
    index |= {"asked": asked, "normalisation": dataset.normalisation.kind}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    told = once(notes)
    if lost := [(gone / whole, name) for gone, whole, name in cut if gone]:
        share, (most, worst) = sum(gone for gone, _, _ in cut) / sum(whole for _, whole, _ in cut), max(lost)
        where = f"in {len(lost)} of {len(cut)} volumes, most in {worst}: {100 * most:.2g} %"
        remedy = "they count as missed; enlarge geometry.size or spacing_mm"
        told.append(f"the grid {plane} cuts off {100 * share:.2g} % of the labelled voxels ({where}); {remedy}")
    (folder / "notes.json").write_text(json.dumps(told), encoding="utf-8")
