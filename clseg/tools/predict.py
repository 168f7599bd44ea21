"""New images in, label maps out: on the grid, and with the label values, of the files that they come from."""

import gzip
import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from clseg.data.formats import nifti_volume, photograph
from clseg.data.prepare import normalise, resampled_size, to_network
from clseg.data.store import native_slices
from clseg.data.volume import Volume, VolumeRef, checked
from clseg.errors import RequestError, reading, writing
from clseg.loop import device
from clseg.models import UNet
from clseg.recipes.evaluation import segment
from clseg.study.archive import write_atomically, write_json
from clseg.tools.export import Adaptation, read_weights, segments

PHOTOGRAPH, NIFTI = r"()\.(?:png|jpe?g|bmp|tiff?)", r"(_\d{4})?\.nii(?:\.gz)?"


def cases(source: Path, photographs: bool) -> dict[str, list[Path]]:
    """Name -> files of every image in a folder, or of the one image that a file belongs to; raises `RequestError`.

    `a_0000.nii.gz`, `a_0001.nii.gz` and so on are the channels of image `a`, as in nnU-Net.
    """
    groups: dict[str, list[tuple[str, Path]]] = {}
    found: dict[str, list[Path]] = {}
    name = re.compile(r"([^.].*?)" + (PHOTOGRAPH if photographs else NIFTI), re.IGNORECASE | re.DOTALL)
    with reading(source, "folder or file", "check the path"):
        for path in sorted((source if source.is_dir() else source.parent).iterdir()):
            if match := name.fullmatch(path.name):
                groups.setdefault(match[1], []).append((match[2] or "", path))
    for stem, files in groups.items():
        channels = [number for number, _ in files] == [f"_{number:04d}" for number in range(len(files))]
        images = [(stem, [path for _, path in files])] if channels else [(stem + n, [path]) for n, path in files]
        for case, paths in images:
            if source.is_dir() or source.name in [path.name for path in paths]:
                if case in found:
                    raise RequestError(f"{paths[0]}: {found[case][0].name} has the same name; rename one of them")
                found[case] = paths
    if not found:
        kind = "photograph (png, jpg, bmp, tif)" if photographs else "NIfTI file"
        raise RequestError(f"{source}: is or holds no {kind}, which these weights need; name such a file or its folder")
    return found


def read_case(case: str, files: list[Path], adaptation: Adaptation) -> Volume:
    """An image, read as those that the weights were trained on; raises `RequestError`."""
    if adaptation.photograph:
        image = photograph(files[0], adaptation.channels).astype(np.float32)
        return checked(Volume(image, None, None, case, ""), files[0])
    volume = nifti_volume(VolumeRef(case, "", tuple(files), None, files[0].parent), {}, adaptation.orient)
    if adaptation.channel is not None:
        volume = replace(volume, image=volume.image[adaptation.channel :][:1])
    if len(volume.image) != adaptation.channels:
        needs = f"its {len(files)} file(s) do not give the {adaptation.channels} channel(s) that the weights need"
        raise RequestError(f"{files[0]}: {needs}; choose other images")
    return checked(volume, files[0])


def predict_image(
    network: UNet, adaptation: Adaptation, case: str, files: list[Path], keep: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Label map [X, Y, Z] with the values of the training files, of a photograph [Y, X], axes as in the image file.

    With `keep` also the probabilities of background and classes, float16 [K, X, Y, Z] or [K, Y, X], else None.
    """
    volume, geometry = read_case(case, files, adaptation), adaptation.geometry
    normalised, resampled = normalise(volume, adaptation.normalisation, files[0]), resampled_size(volume, geometry)
    images, _ = to_network(normalised, None, resampled, geometry.plane or geometry.size[-2:])
    native = native_slices(segment(network, images, geometry.size), resampled[1:], volume.image.shape[1:])
    values = np.array(adaptation.label_values, np.result_type(*map(np.min_scalar_type, adaptation.label_values)))
    label, probability = [], []
    for plane in native:  # [K, Y, X]
        label.append(values[plane.max(0).indices.numpy()])
        probability += [plane.half().numpy()] * keep
    flipped = [axis - 3 for axis in range(3) if volume.flips[axis]]

    def as_stored(slices: list[np.ndarray]) -> np.ndarray:  # Z x [..., Y, X]
        array = np.flip(np.stack(slices, axis=-3), flipped)
        return array[..., 0, :, :] if adaptation.photograph else array.swapaxes(-3, -1)

    return as_stored(label), as_stored(probability) if keep else None


def _save_label(path: Path, label: np.ndarray, like: Path) -> None:
    """PNG of a mask [Y, X], or .nii.gz of a label map [X, Y, Z] with the affine and units of another file."""
    if label.ndim == 2:
        Image.fromarray(label).save(path, "png")
        return
    file = nib.load(like)
    header = file.header.copy()
    header.set_data_dtype(label.dtype)
    header["cal_min"] = header["cal_max"] = 0  # a window for intensities
    path.write_bytes(gzip.compress(type(file)(label, file.affine, header).to_bytes(), mtime=0))


def _save_probability(path: Path, probability: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(file, probabilities=probability)


def predict(weights: Path, source: Path, output: Path, keep: bool = False) -> tuple[int, int]:
    """Segment every image of a folder, or one, into another folder; returns how many there are, and were there before.

    A result is .nii.gz or .png, with `keep` also .npz (`predict_image`), complete or absent. `prediction.json` says of
    which weights and images they are: `RequestError` with others, or where files that are no results lie in the way.
    """
    tensors, adaptation = read_weights(weights)
    if not segments(tensors):
        raise RequestError(f"{weights}: is of a pre-training, which segments nothing yet; use those of a fine-tuning")
    images, folder = cases(source, adaptation.photograph), source if source.is_dir() else source.parent
    if output.exists() and output.samefile(folder):
        raise RequestError(f"{output}: is the folder of the images; choose another --output")
    endings = [".png" if adaptation.photograph else ".nii.gz", *[".npz"] * keep]
    results = {case: [output / f"{case}{ending}" for ending in endings] for case in images}
    missing = [case for case, paths in results.items() if not all(path.is_file() for path in paths)]
    with open(weights, "rb") as file:
        about = {"run": adaptation.run, "weights_sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    about["images"], record, known = os.path.realpath(folder), output / "prediction.json", None
    if record.exists():
        with suppress(OSError, ValueError):
            known = json.loads(record.read_bytes())
    if known != about and any(path.exists() for path in [record, *chain(*results.values())]):
        raise RequestError(f"{output}: holds files that are not of these weights and images; choose another --output")
    network = adaptation.build()
    network.load_state_dict(tensors)
    network.placed(device())
    done = len(images) - len(missing)
    for case in tqdm(missing, "segment", total=len(images), initial=done, unit="image"):
        label, probability = predict_image(network, adaptation, case, images[case], keep)
        with writing(output, "choose another --output"):
            output.mkdir(parents=True, exist_ok=True)
            write_json(record, about)
            if probability is not None:
                write_atomically(results[case][1], partial(_save_probability, probability=probability))
            write_atomically(results[case][0], partial(_save_label, label=label, like=images[case][0]))
    return len(images), done
