"""New images in, label maps out: on the grid, and with the label values, of the files that they come from."""

import gzip
import hashlib
import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from clseg.data.formats import HEADER_TEXTS, nifti_volume, photograph, turned
from clseg.data.prepare import normalise, resampled_size, to_network
from clseg.data.store import native_slices
from clseg.data.volume import Volume, VolumeRef, both, checked
from clseg.errors import RequestError, once, reading, writing
from clseg.loop import device
from clseg.models import UNet
from clseg.recipes.evaluation import segment
from clseg.study.archive import write_atomically, write_json
from clseg.tools.export import Adaptation, read_weights, segments

PHOTOGRAPH, NIFTI = r"()\.(?:png|jpe?g|bmp|tiff?)", r"(_\d{4})?\.(?:nii(?:\.gz)?|mg[hz]|hdr)"


def cases(source: Path, adaptation: Adaptation) -> dict[str, list[Path]]:
    """Name -> files of every image in a folder, or of the one image that a file belongs to; raises `RequestError`.

    `a_0000.nii.gz`, `a_0001.nii.gz` and so on are the channels of image `a`, as in nnU-Net, where the weights need
    several; for weights of one channel they are scans of their own.
    """
    groups: dict[str, list[tuple[str, Path]]] = {}
    found: dict[str, list[Path]] = {}
    kind = PHOTOGRAPH if adaptation.photograph else NIFTI
    name = re.compile(r"([^.].*?)" + kind, re.IGNORECASE | re.DOTALL)
    with reading(source, "folder or file", "check the path"):
        for path in sorted((source if source.is_dir() else source.parent).iterdir()):
            if match := name.fullmatch(path.name):
                groups.setdefault(match[1], []).append((match[2] or "", path))
    single = adaptation.channels == 1 and adaptation.channel is None
    for stem, files in groups.items():
        channels = [number for number, _ in files] == [f"_{number:04d}" for number in range(len(files))]
        channels = channels and (len(files) == 1 or not single)
        images = [(stem, [path for _, path in files])] if channels else [(stem + n, [path]) for n, path in files]
        for case, paths in images:
            if source.is_dir() or source.name in [path.name for path in paths]:
                if case in found:
                    raise RequestError(f"{paths[0]}: {found[case][0].name} has the same name; rename one of them")
                found[case] = paths
    if not found:
        needed = "photograph (png, jpg, bmp, tif)" if adaptation.photograph else "NIfTI file"
        raise RequestError(
            f"{source}: is or holds no {needed}, which these weights need; name such a file or its folder"
        )
    return found


def read_case(case: str, files: list[Path], adaptation: Adaptation) -> Volume:
    """An image, read as those that the weights were trained on; raises `RequestError`."""
    if adaptation.photograph:
        image = photograph(files[0], adaptation.channels).astype(np.float32)
        upright = "its camera's orientation turns it, and its mask is of the upright image"
        return checked(Volume(image, None, None, case, "", notes=(upright,) * turned(files[0])), files[0])
    options = {"orient": adaptation.orient} | ({} if adaptation.nan is None else {"nan": adaptation.nan})
    volume = nifti_volume(VolumeRef(case, "", tuple(files), None, files[0].parent), {}, options, adaptation.slice_axis)
    if adaptation.channel is not None:
        volume = replace(volume, image=volume.image[adaptation.channel :][:1])
    if len(volume.image) != adaptation.channels:
        needs = f"its {len(files)} file(s) do not give the {adaptation.channels} channel(s) that the weights need"
        raise RequestError(f"{files[0]}: {needs}; choose other images")
    return checked(volume, files[0])


def segment_field(network: UNet, images: np.ndarray, size: Sequence[int]) -> Tensor:
    """Class probabilities [Z, K, H, W] of slices [Z, C, H, W] of any plane; see `segment`.

    A plane that is larger than the network sees, in 2-D, is covered with windows of `size` that overlap by half or
    more, each weighted by a Gaussian around its centre, as `segment` does in 3-D.
    """
    field = images.shape[2:]
    if len(size) == 3 or tuple(field) == tuple(size):
        return segment(network, images, size)
    steps = [math.ceil((have - want) / (want / 2)) + 1 for have, want in zip(field, size, strict=True)]
    starts = [np.linspace(0, h - w, n).round().astype(int) for h, w, n in zip(field, size, steps, strict=True)]
    axes = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2) / (n / 8)).square()) for n in size]
    weight, total, weights = torch.outer(*axes), None, torch.zeros(field)
    for corner in product(*starts):
        window = tuple(slice(first, first + side) for first, side in zip(corner, size, strict=True))
        probability = segment(network, images[:, :, *window], size)
        total = torch.zeros(*probability.shape[:2], *field) if total is None else total
        total[:, :, *window] += weight * probability
        weights[window] += weight
    return total / weights


def predict_image(
    network: UNet, adaptation: Adaptation, case: str, files: list[Path], keep: bool = False
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Label map [X, Y, Z] with the values of the training files, of a photograph [Y, X], axes as in the image file.

    With `keep` also the probabilities of background and classes, float16 [K, X, Y, Z] or [K, Y, X], else None. Last,
    what a user should know of how the image was read. All of the image is segmented, however large its field is.
    """
    volume, geometry = read_case(case, files, adaptation), adaptation.geometry
    normalised, resampled = normalise(volume, adaptation.normalisation, files[0]), resampled_size(volume, geometry)
    plane = list(map(max, resampled[1:], geometry.size[-2:]))
    images, _ = to_network(normalised, None, resampled, plane)
    native = native_slices(segment_field(network, images, geometry.size), resampled[1:], volume.image.shape[1:])
    values = np.array(adaptation.label_values, np.result_type(*map(np.min_scalar_type, adaptation.label_values)))
    label, probability, notes = [], [], list(volume.notes)
    if geometry.dimensions == 3 and resampled[0] < geometry.size[0]:
        few = f"has {resampled[0]} slices and the weights see {geometry.size[0]} at once: the rest is empty to them"
        notes.append(f"{few}, and masks may be worse than those of thicker volumes")
    for slices in native:  # [K, Y, X]
        label.append(values[slices.max(0).indices.numpy()])
        probability += [slices.half().numpy()] * keep

    def as_stored(slices: list[np.ndarray]) -> np.ndarray:  # Z x [..., Y, X]
        array = volume.as_stored(np.stack(slices, axis=-3))
        return array[..., 0, :, :] if adaptation.photograph else array.swapaxes(-3, -1)

    return as_stored(label), as_stored(probability) if keep else None, notes


def _save_label(path: Path, label: np.ndarray, like: Path) -> None:
    """PNG of a mask [Y, X], or .nii.gz of a label map [X, Y, Z] with the affine, spacing and units of another file.

    Texts of its header are left behind: they may name a patient.
    """
    if label.ndim == 2:
        Image.fromarray(label).save(path, "png")
        return
    file = nib.load(like)
    kind = type(file) if isinstance(file, nib.Nifti1Image | nib.Nifti2Image) else nib.Nifti1Image
    image = kind(label, file.affine, file.header if kind is type(file) else None)
    header = image.header
    header.extensions.clear()
    for name in HEADER_TEXTS:
        if name in header:
            header[name] = b""
    header.set_data_dtype(label.dtype)
    header["cal_min"] = header["cal_max"] = 0  # a window for intensities
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def _save_probability(path: Path, probability: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, probabilities=probability)


def _stamp(files: list[Path], known: list[Any]) -> list[list[Any]]:
    """Name, size, modification time and SHA-256 of files; that of one known by its size and time is not taken again."""
    before, stamps = {tuple(entry[:3]): entry[3] for entry in known}, []
    for path in (file for image in files for file in both(image)):
        with reading(path, "file"):
            about = path.name, (stat := path.stat()).st_size, stat.st_mtime_ns
            if (content := before.get(about)) is None:
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
        stamps.append([*about, content])
    return stamps


def _known(record: Path, about: dict[str, str]) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The images that results in a folder are of, as `_stamp` has them, and the folders in which they lay; raises
    `RequestError` if of other weights."""
    if not record.exists():
        return {}, {}
    with suppress(OSError, ValueError, KeyError, AttributeError):
        known = json.loads(record.read_bytes())
        images, folders = known.pop("images"), known.pop("folders", {})
        if isinstance(images, dict) and isinstance(folders, dict) and known == about:
            return images, folders
    raise RequestError(f"{record.parent}: holds files that are not of these weights; choose another --output")


def weights_of(place: Path) -> Path:
    """The weight file of a run: the file, its folder, or the folder's name without the hash at its end."""
    if place.is_file() or place.suffix == ".safetensors":
        return place
    whole = re.compile(re.escape(place.name) + r"(-[0-9a-f]{10})?")
    folders = sorted(path for path in place.parent.glob("*") if whole.fullmatch(path.name))
    found = [folder / "weights.safetensors" for folder in folders if (folder / "weights.safetensors").is_file()]
    if len(found) != 1:
        names = ", ".join(path.parent.name for path in found[:4]) or "none"
        wanted = "one finished run was wanted; name it, or its weights.safetensors"
        raise RequestError(f"{place}: {len(found)} runs have this name ({names}), {wanted}")
    return found[0]


def predict(weights: Path, source: Path, output: Path, keep: bool = False) -> tuple[int, int]:
    """Segment every image of a folder, or one, into another folder; returns how many there are, and were there before.

    A result is .nii.gz or .png, with `keep` also .npz (`predict_image`), complete or absent. `prediction.json` knows
    the content of the weights and of every image: the mask of an image that has changed is made again. `RequestError`
    with other weights, or where files that are no results lie in the way; and, once the others are segmented, of images
    that cannot be used.
    """
    tensors, adaptation = read_weights(weights)
    if not segments(tensors):
        raise RequestError(f"{weights}: is of a pre-training, which segments nothing yet; use those of a fine-tuning")
    images, folder = cases(source, adaptation), source if source.is_dir() else source.parent
    if output.exists() and output.samefile(folder):
        raise RequestError(f"{output}: is the folder of the images; choose another --output")
    endings = [".png" if adaptation.photograph else ".nii.gz", *[".npz"] * keep]
    results = {case: [output / f"{case}{ending}" for ending in endings] for case in images}
    with open(weights, "rb") as file:
        about = {"run": adaptation.run, "weights_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    known, lay = _known(output / "prediction.json", about)
    record, here = {}, str(folder.resolve())
    if any(path.exists() for case in images if case not in known for path in results[case]):
        raise RequestError(f"{output}: holds files that are not of these weights and images; choose another --output")
    faults, notes, done = [], [], []
    for case, files in images.items():
        try:
            record[case] = _stamp(files, known.get(case, []))
        except RequestError as error:
            faults.append((str(error), map(str, files)))
            continue
        same = [entry[3] for entry in record[case]] == [entry[3] for entry in known.get(case, [])]
        done += [case] if same and all(path.is_file() for path in results[case]) else []
        if not same and lay.get(case, here) != here:
            raise RequestError(f"{output}: has the mask of another {case}, of {lay[case]}; choose another --output")
    network = adaptation.build()
    network.load_state_dict(tensors)
    network.placed(device())
    missing = [case for case in record if case not in done]
    for case in tqdm(missing, "segment", total=len(images), initial=len(done), unit="image"):
        files = images[case]
        try:
            label, probability, told = predict_image(network, adaptation, case, files, keep)
        except RequestError as error:
            faults.append((str(error), map(str, files)))
            continue
        notes += [(f"{files[0].name}: {note}", [files[0].name]) for note in told]
        with writing(output, "choose another --output"):
            output.mkdir(parents=True, exist_ok=True)
            if known.get(case) != record[case]:
                for ending in (".png", ".nii.gz", ".npz"):  # of another image
                    (output / f"{case}{ending}").unlink(missing_ok=True)
            known[case] = record[case]
            lay[case] = here
            write_json(output / "prediction.json", about | {"images": known, "folders": lay})
            if probability is not None:
                write_atomically(results[case][1], partial(_save_probability, probability=probability))
            write_atomically(results[case][0], partial(_save_label, label=label, like=files[0]))
    for note in once(notes):
        print(f"note: {note}", file=sys.stderr)
    if faults:
        first, *others = once(faults)
        several = f"; and {len(others)} other faults: {others[0]}" if others else ""
        rest = f"; the other {len(images) - len(faults)} of {len(images)} images are segmented"
        raise RequestError(first + several + rest * (len(images) > len(faults)))
    return len(images), len(done)
