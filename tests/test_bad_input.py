"""Bad input: one sentence that names the file or key and the remedy, exit status 2, no traceback, nothing written.

A row of `ROWS` is what is broken, by which commands it is met, and what their answer must hold. Strategies extend the
table where values are open. Last, what the package never does: execute what it reads, and write beside its output root.
"""

import ast
import gzip
import io
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import matplotlib.font_manager  # noqa: F401 - its cache is written when it is first imported
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import clseg
from clseg import paths
from clseg.data.formats import class_names, nifti_volume, photograph, read, scan
from clseg.data.prepare import normalise, prepare, resampled_size, to_network
from clseg.data.volume import VolumeRef
from clseg.errors import RequestError
from clseg.settings import DatasetConfig
from clseg.study import archive, grid
from clseg.study.files import read_dataset, read_profile, read_study
from clseg.study.parameters import resolve
from clseg.tools import cli
from clseg.tools.check import check
from clseg.tools.export import read_weights
from clseg.tools.predict import predict

AFFINE = np.diag([1.5, 1.5, 4.0, 1.0])
DATASET = {
    "name": "mine",
    "title": "mine",
    "description": "",
    "adapter": "msd",
    "folder": "Task",
    "geometry": {"smoke": {"size": [32, 32], "spacing_mm": 1.5}},
    "protocols": {"seeded": {"kind": "seeded", "test": 1, "validation": 1}},
}
STUDY = {"name": "tiny", "title": "tiny", "notebook": "00_start_here", "datasets": ["mine.yaml"]}
STUDY |= {"methods": ["random"], "labelled": [1], "draws": [1]}


def save_nifti(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def volume(seed, shape=(12, 10, 4)):
    """Image and mask with axes x, y, z, different in every subject."""
    mask = np.zeros(shape, np.uint8)
    mask[2:8, 2:8], mask[4:6, 4:6] = 1, 2
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16), mask


class World:
    """A valid data set of four labelled subjects and one without, its data set and study files, and valid weights."""

    def __init__(self, root: Path, save_weights=None, monkeypatch=None):
        self.root, self.task, self.out = root, root / "data" / "Task", root / "out"
        self.dataset, self.study, self.weights = (root / name for name in ("mine.yaml", "study.yaml", "a.safetensors"))
        self.image, self.label, self.json = (
            self.task / name for name in ("imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "dataset.json")
        )
        self.save_weights, self.monkeypatch = save_weights, monkeypatch
        self.extra: list[str] = []  # words of the command
        self.asking = False  # while a command runs

    def make(self):
        for seed, case in enumerate("abcde"):
            image, mask = volume(seed)
            save_nifti(self.task / ("imagesTs" if case == "e" else "imagesTr") / f"{case}.nii.gz", image)
            if case != "e":
                save_nifti(self.task / "labelsTr" / f"{case}.nii.gz", mask)
        listed = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in "abcd"]
        labels = {"0": "background", "1": "rim", "2": "core"}
        self.json.write_text(json.dumps({"labels": labels, "training": listed, "test": ["./imagesTs/e.nii.gz"]}))
        self.dataset.write_text(yaml.safe_dump(DATASET, sort_keys=False))
        self.study.write_text(yaml.safe_dump(STUDY, sort_keys=False))
        (self.root / "cwd").mkdir()
        (self.root / "home").mkdir()

    def words(self, command):
        return {
            "run": ["run", self.study, "--dataset", self.dataset, "--out", self.out, "--jobs", "1"],
            "check": ["check", self.task],
            "predict": ["predict", "--weights", self.weights, "--input", self.image, "--output", self.out / "labels"],
            "export": [
                "export",
                "--weights",
                self.weights,
                "--format",
                "safetensors",
                "--output",
                self.out / "b.safetensors",
            ],
            "table": ["table", self.root / "runs", "--out", self.out / "table.csv"],
        }[command]

    def nnunet(self):
        """The same as nnU-Net v2 lays it out."""
        for path in self.task.glob("images*/*.nii.gz"):
            path.rename(path.with_name(path.name.replace(".nii", "_0000.nii")))
        labels = {"background": 0, "rim": 1, "core": 2}
        self.json.write_text(json.dumps({"labels": labels, "channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}))
        self.image = self.task / "imagesTr" / "a_0000.nii.gz"

    def photographs(self, **photo_options):
        """Photographs and masks by name in place of the volumes, and weights for such."""
        shutil.rmtree(self.task)
        for seed, name in enumerate("abcd"):
            image, mask = volume(seed, (20, 24, 3))
            for part, pixels in (("images", image.astype(np.uint8)), ("masks", 255 * (mask[..., 0] > 0))):
                (self.task / part).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(self.task / part / f"{name}.png")
        self.image, self.label = self.task / "images" / "a.png", self.task / "masks" / "a.png"
        options = {"images": "images/{subject}.png", "labels": "masks/{subject}.png"} | photo_options
        geometry = {"smoke": {"size": [32, 32], "resize": True}}
        self.describe(adapter="pairs", options=options, channels=3, classes={255: "lesion"}, geometry=geometry)
        self.save_weights(self.weights, channels=3, photograph=True, resize=True, values=(0, 255))

    def h5(self, **files):
        """The h5 copy of ACDC with these files of patient 1, and patients 2 to 4 whole."""
        for seed in (2, 3, 4):
            image, mask = volume(seed)
            files[f"patient00{seed}_frame01"] = {"image": image.T, "label": mask.T}
        (self.task / "data").mkdir()
        for name, arrays in files.items():
            with h5py.File(self.task / "data" / f"{name}.h5", "w") as file:
                file.update(arrays)
        self.describe(adapter="acdc", classes={1: "rim", 2: "core"})

    def acdc(self, info):
        """One patient of ACDC's official release."""
        folder = self.task / "training" / "patient001"
        for number in (1, 12):
            for name, data in zip(("", "_gt"), volume(number), strict=True):
                save_nifti(folder / f"patient001_frame{number:02d}{name}.nii.gz", data)
        if info is not None:
            (folder / "Info.cfg").write_text(info)
        self.describe(adapter="acdc", classes={1: "rim", 2: "core"})

    def describe(self, **changes):
        self.dataset.write_text(yaml.safe_dump(DATASET | changes, sort_keys=False))

    def lists(self, pretrain, **changes):
        """Sets of subjects by their names."""
        sets = {"pretrain": pretrain, "test": ["a"], "validation": ["c"], "labelled": {1: {1: ["d"]}}}
        sets |= {name: changes.pop(name) for name in set(changes) & set(sets)}
        self.describe(protocols={"lists": {"kind": "lists"} | sets}, **changes)

    def ask(self, **changes):
        self.study.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))

    def tell(self, **changes):
        """Change `dataset.json`."""
        self.json.write_text(json.dumps(json.loads(self.json.read_text()) | changes))

    def array(self, path, change, affine=AFFINE):
        """Change the array of a NIfTI file, with axes x, y, z."""
        save_nifti(path, change(np.asarray(nib.load(path).dataobj)), affine)

    def header(self, path, **fields):
        """Change fields of a NIfTI header, whatever they mean."""
        raw = bytearray(gzip.decompress(path.read_bytes()))
        header = nib.Nifti1Header(bytes(raw[:348]), check=False)
        for name, value in fields.items():
            header[name] = value
        raw[:348] = header.binaryblock
        path.write_bytes(gzip.compress(bytes(raw)))

    def deny(self, path):
        """As if the user had no permission; a test may be run by root, who has every one."""
        real = io.open

        def denied(file, *args, **kwargs):
            if self.asking and not isinstance(file, int) and os.fspath(file) == os.fspath(path):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return real(file, *args, **kwargs)

        for module in ("io", "builtins"):
            self.monkeypatch.setattr(f"{module}.open", denied)


def files_below(root: Path) -> dict[str, bytes | str]:
    """Path -> content of every file, or where a link leads."""
    found = {}
    for folder, folders, names in os.walk(root):
        for path in (Path(folder, name) for name in [*folders, *names]):
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            elif path.is_file():
                found[str(path)] = path.read_bytes()
    return found


# ------------------------------------------------------------------------------------------------------- one by one


def write(name, content):
    """Replace a file of the world: `image`, `label`, `json`, `dataset`, `study` or `weights`."""

    def build(world):
        data = content(getattr(world, name).read_bytes()) if callable(content) else content
        getattr(world, name).write_bytes(data.encode() if isinstance(data, str) else data)

    return build


def array(name, change, affine=AFFINE):
    return lambda world: world.array(getattr(world, name), change, affine)


def at(value, kind=None):
    """One voxel with another value."""

    def change(data):
        data = data.astype(kind or data.dtype)
        data[3, 4, 1] = value
        return data

    return change


def moved(change):
    """The label file with another affine."""
    return lambda world: world.array(world.label, lambda mask: mask, change @ AFFINE)


def link(name, target):
    def build(world):
        path = getattr(world, name)
        path.unlink()
        path.symlink_to(target(world) if callable(target) else target)

    return build


def renamed(name, new):
    def build(world):
        path = getattr(world, name)
        path.rename(path.with_name(new))
        setattr(world, name, path.with_name(new))

    return build


def then(*builds):
    def build(world):
        for step in builds:
            step(world)

    return build


def listing(*names):
    """`dataset.json` that lists other files."""
    return lambda world: world.tell(training=list(names), test=[])


def copied(world, source, target):
    shutil.copyfile(world.task / source, world.task / target)


def unlabelled(world, keep=0):
    for path in sorted((world.task / "labelsTr").iterdir())[keep:]:
        path.unlink()


def asked(*words):
    return lambda world: world.extra.extend(words)


def called(name, /, **changes):
    return lambda world: getattr(world, name)(**changes)


def flipped_bit(data):
    """One bit of a scan is another one, which nothing but the checksum tells."""
    stored = bytearray(gzip.compress(gzip.decompress(data), compresslevel=0))
    stored[len(stored) // 2] ^= 4
    return stored


def laughs(depth=40):
    lines = ["a0: &a0 [ha, ha]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth))]
    return "\n".join(lines) + f"\nname: *a{depth - 1}\n"


def notebook(*cells):
    """The study's notebook is one with such cells, in a folder in which the workers' notebooks are, too."""

    def build(world):
        folder = world.root / "notebooks"
        shutil.copytree(paths.NOTEBOOKS, folder, ignore=shutil.ignore_patterns("scripts", "[013-9]*", "solutions"))
        content = {"cells": [{"cell_type": "code", "metadata": {"tags": [tag]}, "source": ""} for tag in cells]}
        (folder / "mine.ipynb").write_text(json.dumps(content | {"metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
        world.monkeypatch.setattr(paths, "NOTEBOOKS", folder)
        world.ask(notebook="mine")

    return build


def finished_run(**changes):
    """The folder of a finished fine-tuning, in which files are changed afterwards."""

    def build(world):
        folder = world.root / "runs" / "finetune-random"
        folder.mkdir(parents=True)
        table = ",".join(archive.TABLE_COLUMNS[1:]) + "\n" + ",".join(["1"] * (len(archive.TABLE_COLUMNS) - 1)) + "\n"
        files = {
            "metrics.csv": table,
            "parameters.json": json.dumps({"parameters": {"study": "tiny", "overrides": []}}),
        }
        for name, text in files.items():
            (folder / name).write_text(text)
        record = {"files": {name: len(text) for name, text in files.items()}}
        (folder / "record.json").write_text(json.dumps(record))
        archive.seal(folder)
        for name, change in changes.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(change(path.read_bytes()))

    return build


class Harmful:
    """What a pickle could do."""

    ran = False

    def __reduce__(self):
        return setattr, (Harmful, "ran", True)


FIRST = "encoder.levels.0.0.0.weight"


def tensors(path):
    """Copies: the file that they are mapped from is to be written."""
    return {name: value.clone() for name, value in load_file(path).items()}


def weights(change=None, **record):
    """The weight file with other tensors or another record."""

    def build(world):
        with safe_open(world.weights, framework="pt") as file:
            about = json.loads(file.metadata()["clseg"])
        about |= {key: about[key] | value if isinstance(value, dict) else value for key, value in record.items()}
        own = tensors(world.weights)
        save_file(change(own) if change else own, world.weights, {"clseg": json.dumps(about)})

    return build


def unrecorded(metadata):
    return lambda world: save_file(tensors(world.weights), world.weights, metadata)


def checkpoint(world):
    torch.save(tensors(world.weights), world.weights)


A, B, JSON = "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "dataset.json"
IMAGE, LABEL, YAML, WEIGHTS = "run check predict", "run check", "run", "predict export"
RECORD = "adaptation record"
BAD_IMAGES = {
    "truncated": (write("image", lambda data: data[: len(data) // 2]), ["NIfTI", "replace the file"]),
    "empty": (write("image", ""), ["NIfTI"]),
    "text": (write("image", "no image"), ["NIfTI"]),
    "not gzipped": (write("image", gzip.decompress), ["NIfTI", "gzip"]),
    "gzipped garbage": (write("image", gzip.compress(b"garbage" * 100)), ["NIfTI"]),
    "gzipped half": (write("image", lambda data: gzip.compress(gzip.decompress(data)[:700])), ["NIfTI"]),
    "gzipped twice": (write("image", gzip.compress), ["NIfTI"]),
    "one bit is wrong": (write("image", flipped_bit), ["NIfTI"]),
    "more voxels than there are": (lambda world: world.header(world.image, dim=[3] + [30000] * 3 + [1] * 4), ["NIfTI"]),
    "unknown voxel type": (lambda world: world.header(world.image, datatype=7), ["NIfTI"]),
    "NaN": (array("image", at(np.nan, np.float32)), ["NaN", "repair or remove"]),
    "infinite": (array("image", at(-np.inf, np.float32)), ["infinite"]),
    "too large for float32": (array("image", at(1e300, np.float64)), ["infinite"]),
    "constant": (array("image", np.zeros_like), ["channel 0 is constant"]),
    "nearly constant": (array("image", lambda data: (data == data[0, 0, 0]).astype(np.uint8)), ["percentiles"]),
    "no finite range": (
        array("image", lambda data: np.where(data > 450, 3e38, -3e38).astype(np.float32)),
        ["percentiles"],
    ),
    "2-D": (array("image", lambda data: data[..., 0]), ["3-D image"]),
    "4-D": (array("image", lambda data: np.stack([data, data + 1], -1)), ["channel"]),
    "5-D": (array("image", lambda data: np.stack([data, data], -1)[..., None, :]), ["3-D image"]),
    "zero size": (array("image", lambda data: data[:0]), ["3-D image"]),
    "complex": (array("image", lambda data: data.astype(np.complex64)), ["complex64"]),
    "singular affine": (lambda world: world.header(world.image, sform_code=1, srow_y=0), ["affine"]),
    "NaN in the affine": (lambda world: world.header(world.image, sform_code=1, srow_x=np.nan), ["affine"]),
    "spacing that cannot be": (
        then(*(array(name, lambda data: data, np.diag([1e-9, 1, 1, 1])) for name in ("image", "label"))),
        ["spacing"],
    ),
    "no permission": (lambda world: world.deny(world.image), ["Permission denied"]),
    "link to itself": (link("image", lambda world: world.image), []),
    "link to nothing": (link("image", "nothing.nii.gz"), []),
    "a folder": (lambda world: (world.image.unlink(), world.image.mkdir()), []),
}
BAD_LABELS = {
    "of another shape": (array("label", lambda mask: mask[1:]), ["[4, 10, 11]", "[4, 10, 12]", "resample it"]),
    "of another spacing": (moved(np.diag([1.2, 1, 1, 1])), ["a.nii.gz", "resample it"]),
    "of another affine": (moved(np.eye(4) + np.eye(4, k=3)), ["a.nii.gz", "resample it"]),
    "turned": (moved(np.array([[0, 1.0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])), ["resample it"]),
    "truncated": (write("label", lambda data: data[:60]), ["NIfTI", "replace the file"]),
    "4-D": (array("label", lambda mask: np.stack([mask, mask], -1)), ["label", "[2, 4, 10, 12]"]),
    "with an undeclared class": (array("label", at(7)), ["values 7", "0, 1, 2", "`classes`"]),
    "with another negative class": (array("label", at(-2, np.int16)), ["values -2"]),
    "with a fraction": (array("label", at(0.5, np.float32)), ["values 0.5"]),
    "with NaN": (array("label", at(np.nan, np.float32)), ["NaN in 1 voxels"]),
    "no permission": (lambda world: world.deny(world.label), ["Permission denied"]),
}
BAD_JSON = {
    "no JSON": (write("json", "{"), ["not valid JSON"]),
    "not UTF-8": (write("json", b'{"a": "\xff"}'), ["not valid JSON"]),
    "a list": (write("json", "[]"), ["object"]),
    "nested too deep": (write("json", "[" * 100_000), ["not valid JSON"]),
    "of something else": (write("json", "{}"), ["training", "channel_names"]),
    "training a table": (called("tell", training={"a": 1}), ["'training'"]),
    "test a number": (called("tell", test=5), ["'test'"]),
    "labels absent": (called("tell", labels=None), ["'labels'"]),
    "labels of regions": (called("tell", labels={"0": "background", "1,2": "whole"}), ["whole"]),
    "label without end": (called("tell", labels={"9" * 5000: "rim"}), ["rim"]),
    "300 classes": (called("tell", labels={str(n): f"class {n}" for n in range(300)}), ["255"]),
    "path upward": (listing({"image": "imagesTr/../../a.nii.gz"}), ["../../a.nii.gz", "relative"]),
    "absolute path": (listing("/etc/a.nii.gz"), ["/etc/a.nii.gz", "relative"]),
    "label upward": (listing({"image": A, "label": "../x.nii.gz"}), ["../x.nii.gz", "relative"]),
    "link out of the folder": (
        lambda world: (world.image.rename(world.root / "a.nii.gz"), world.image.symlink_to(world.root / "a.nii.gz")),
        [A, "link", "copy"],
    ),
    "image that is not there": (listing("imagesTr/z.nii.gz"), ["imagesTr/z.nii.gz"]),
    "entry without image": (listing({"label": B}), ["None"]),
    "entry that is a number": (listing(5), ["5"]),
    "image with NUL in its name": (listing("imagesTr/a\0.nii.gz"), ["imagesTr/a"]),
    "image of another format": (listing(JSON), ["NIfTI"]),
}
NNUNET = called("nnunet")
BAD_NNUNET = {
    "channel missing": (called("tell", channel_names={"0": "T1", "1": "T2"}), ["a_0001.nii.gz", "channel_names"]),
    "channels a number": (called("tell", channel_names=3), [JSON, "channel_names"]),
    "no channels": (called("tell", channel_names={}), [JSON, "channel_names"]),
    "another format": (called("tell", file_ending=".mha"), [JSON, ".mha"]),
    "label regions": (
        called("tell", labels={"background": 0, "whole": [1, 2], "core": 2}),
        [JSON, "regions (whole)", '"labels": {"background": 0, "class 1": 1, "core": 2}'],
    ),
    "channel on another grid": (
        lambda world: (
            world.tell(channel_names={"0": "T1", "1": "T2"}),
            [
                copied(world, f"{p}/{c}_0000.nii.gz", f"{p}/{c}_0001.nii.gz")
                for p, c in zip(["imagesTr"] * 4 + ["imagesTs"], "abcde", strict=True)
            ],
            world.describe(channels=2),
            world.array(world.task / "imagesTr/a_0001.nii.gz", lambda data: data[1:]),
        ),
        ["a_0001.nii.gz", "grid"],
    ),
}
BAD_FOLDERS = {  # commands, what is broken, words
    "not there": (LABEL, lambda world: shutil.rmtree(world.task), ["data/Task"]),
    "empty": (LABEL, lambda world: (shutil.rmtree(world.task), world.task.mkdir()), ["data/Task"]),
    "a file": (LABEL, lambda world: (shutil.rmtree(world.task), world.task.touch()), ["data/Task"]),
    "without dataset.json": ("run", lambda world: world.json.unlink(), [JSON]),
    "nothing listed": (LABEL, listing(), ["no volume"]),
    "no labelled subject": (LABEL, unlabelled, ["0 ", "label"]),
    "two labelled subjects": (LABEL, lambda world: unlabelled(world, 2), ["2 ", "label"]),
    "fewer subjects than the draw asks for": (
        "run",
        called("ask", labelled=[3]),
        ["3 labelled", "4 have labels", "lower"],
    ),
    "fewer subjects than unlabelled asks for": ("run", asked("--set", "unlabelled=4"), ["unlabelled=4", "3 subjects"]),
    "one subject under two names": (
        LABEL,
        lambda world: copied(world, A, "imagesTr/b.nii.gz"),
        [A, "b.nii.gz", "same image"],
    ),
    "one subject twice": (LABEL, listing(A, A), ["is there twice", "remove"]),
    "one subject compressed and not": (
        LABEL,
        then(
            lambda world: (world.task / "imagesTr/a.nii").write_bytes(gzip.decompress(world.image.read_bytes())),
            listing(A, "imagesTr/a.nii"),
        ),
        ["a is there twice"],
    ),
    "mask of no image": (
        "check",
        lambda world: copied(world, B, "labelsTr/z.nii.gz"),
        ["labelsTr/z.nii.gz", "no image"],
    ),
    "class that no mask has": (
        "check",
        lambda world: [
            world.array(path, lambda mask: (mask > 0).astype(np.uint8)) for path in (world.task / "labelsTr").iterdir()
        ],
        ["'core' (2)", "correct"],
    ),
    "line break in a name": (
        LABEL,
        then(renamed("image", "a\nb.nii.gz"), listing("imagesTr/a\nb.nii.gz")),
        ["a\\nb.nii.gz", "rename"],
    ),
    "undecodable name": (
        LABEL,
        then(NNUNET, renamed("image", os.fsdecode(b"\xff_0000.nii.gz"))),
        ["\\udcff_0000.nii.gz", "rename"],
    ),
    "channels differ": ("check", array("image", lambda data: np.stack([data, data + 1], -1)), [A, "2 channels"]),
}
BAD_H5 = {
    "text": (
        {},
        lambda world: (world.task / "data/patient002_frame01.h5").write_text("no"),
        ["002_frame01.h5", "HDF5"],
    ),
    "truncated": (
        {},
        lambda world: [path.write_bytes(path.read_bytes()[:900]) for path in world.task.glob("data/*002*")],
        ["002_frame01.h5", "HDF5"],
    ),
    "without image": ({"frame01": {"picture": np.eye(3)[None]}}, None, ["frame01.h5", "'image'", "picture"]),
    "image of words": ({"frame01": {"image": np.array([b"a", b"b"])}}, None, ["frame01.h5", "HDF5"]),
    "4-D image": ({"frame01": {"image": np.ones((2, 2, 2, 2))}}, None, ["frame01.h5", "image has shape"]),
    "label of another shape": (
        {"frame01": {"image": np.eye(3)[None], "label": np.eye(4)[None]}},
        None,
        ["frame01.h5", "label"],
    ),
    "undeclared label": ({"frame01": {"image": np.eye(3)[None], "label": 9 * np.eye(3)[None]}}, None, ["values 9"]),
    "slice missing": (
        {f"frame01_slice_{z}": {"image": np.eye(3)} for z in (1, 3)},
        None,
        ["slice 2", "patient001_frame01"],
    ),
    "slices differ": (
        {f"frame01_slice_{z}": {"image": np.eye(2 + z)} for z in (1, 2)},
        None,
        ["frame01_slice_2.h5", "[1, 4, 4]"],
    ),
    "slices without labels": (
        {"frame01_slice_1": {"image": np.eye(3), "label": np.eye(3)}, "frame01_slice_2": {"image": np.eye(3)}},
        None,
        ["1 of the 2 slices"],
    ),
    "three frames": (
        {f"frame{n:02d}": {"image": np.eye(3)[None] * n} for n in (1, 2, 3)},
        None,
        ["patient001", "3 frames"],
    ),
}
BAD_ACDC = {
    "without Info.cfg": (called("acdc", info=None), ["Info.cfg", "No such file"]),
    "without ED in Info.cfg": (called("acdc", info="ES: 12\n"), ["Info.cfg", "no ED frame"]),
    "without a frame of Info.cfg": (called("acdc", info="ED: 1\nES: 13\n"), ["patient001", "frame 13", "ES"]),
    "without names of classes": (
        then(called("h5"), lambda world: world.describe(adapter="acdc")),
        ["'mine'", "declare `classes`"],
    ),
}
BAD_PHOTOGRAPHS = {  # commands, options of the data set, what is broken, words
    "broken": ("run check predict", {}, write("image", lambda data: data[:60]), ["images/a.png", "image file"]),
    "empty": ("run check predict", {}, write("image", ""), ["images/a.png", "image file"]),
    "constant": (
        "run check predict",
        {},
        lambda world: Image.new("RGB", (24, 20)).save(world.image),
        ["images/a.png", "constant"],
    ),
    "mask of another shape": (
        LABEL,
        {},
        lambda world: Image.new("L", (9, 20)).save(world.label),
        ["a.png", "[1, 20, 9]"],
    ),
    "mask with another value": (
        "run",
        {},
        lambda world: Image.new("L", (24, 20), 9).save(world.label),
        ["masks/a.png", "values 9"],
    ),
    "blurred mask": (
        "run",
        {"undeclared": "background"},
        lambda world: Image.fromarray(np.arange(480).astype(np.uint8).reshape(20, 24)).save(world.label),
        ["masks/a.png", "blurred or interpolated"],
    ),
    "pattern without subject": ("run", {"images": "images/a.png"}, None, ["options.images", "{subject}"]),
    "pattern upward": ("run", {"labels": "../{subject}.png"}, None, ["options.labels", "../{subject}.png"]),
    "pattern from the root": ("run", {"images": "/{subject}.png"}, None, ["options.images"]),
    "pattern that is none": ("run", {"images": "images/**{subject}.png"}, None, ["data/Task"]),
    "pattern that nothing matches": ("run", {"images": "{subject}.tif"}, None, ["no volume"]),
    "undeclared values kept": ("run", {"undeclared": "ignore"}, None, ["options.undeclared", "ignore"]),
}
BAD_DATASETS = {
    "not YAML": (write("dataset", "name: ["), ["mine.yaml", "not valid YAML"]),
    "not UTF-8": (write("dataset", b"name: \xff"), ["mine.yaml", "not valid YAML"]),
    "empty": (write("dataset", ""), ["mine.yaml"]),
    "a list": (write("dataset", "- name\n"), ["mine.yaml"]),
    "python tag": (write("dataset", "!!python/object/apply:os.getcwd []"), ["mine.yaml", "not valid YAML"]),
    "exploding aliases": (write("dataset", laughs()), ["mine.yaml", "aliases"]),
    "alias of itself": (write("dataset", "name: &a [*a]"), ["mine.yaml", "aliases"]),
    "key twice": (write("dataset", lambda data: data + b"name: other\n"), ["mine.yaml", "'name'", "twice"]),
    "nested too deep": (write("dataset", "[" * 5000), ["mine.yaml", "not valid YAML"]),
    "date that is none": (write("dataset", "name: 2024-99-99"), ["mine.yaml", "not valid YAML"]),
    "unknown key": (called("describe", clases={1: "rim"}), ["mine.yaml", "clases", "did you mean 'classes'"]),
    "wrong type": (called("describe", channels="one"), ["mine.yaml", "channels", "integer"]),
    "number that YAML takes for a word": (
        write("dataset", lambda data: data + b"threshold: 2e-1\n"),
        ["threshold", "valid number", "in YAML write 0.2"],
    ),
    "out of range": (called("describe", channels=0), ["mine.yaml", "channels", "greater than"]),
    "list for a mapping": (called("describe", geometry=[32, 32]), ["mine.yaml", "geometry"]),
    "infinite spacing": (
        called("describe", geometry={"smoke": {"size": [32, 32], "spacing_mm": np.inf}}),
        ["spacing_mm", "finite"],
    ),
    "grid without end": (called("describe", geometry={"smoke": {"size": [2**20, 32]}}), ["size", "less than"]),
    "spacing that needs a volume without end": (
        called("describe", geometry={"smoke": {"size": [32, 32], "spacing_mm": 1e-5}}),
        ["a: ", "geometry.spacing_mm", "voxels"],
    ),
    "side that the levels do not halve": (
        called("describe", geometry={"smoke": {"size": [32, 33]}}),
        ["geometry.size", "33", "32"],
    ),
    "name that leads elsewhere": (called("describe", name="../../elsewhere"), ["mine.yaml", "name", "should match"]),
    "negative seed": (
        called("describe", protocols={"seeded": {"kind": "seeded", "test": 1, "validation": 1, "seed": -1}}),
        ["protocols", "seed", "greater than"],
    ),
    "no protocol": (called("describe", protocols={}), ["data set mine", "protocols"]),
    "unknown adapter": (called("describe", adapter="mds"), ["mds", "did you mean 'msd'"]),
    "unknown option": (called("describe", options={"chanel": 0}), ["chanel", "did you mean 'channel'"]),
    "channel that is not there": (called("describe", options={"channel": 1}), ["options.channel", "0 to 0"]),
    "unknown phase": (called("describe", phases=["ED"]), ["phase 'ED'"]),
    "adapter of another layout": (called("describe", adapter="acdc"), ["data/Task", "no volume"]),
    "no phantoms": (called("describe", adapter="phantom", options={"subjects": 0}), ["options.subjects"]),
    "a subject of the protocol that is not there": (called("lists", pretrain=["z"]), ["protocol", "lacks", "z"]),
    "splits that are not there": (
        called("describe", protocols={"nnunet": {"kind": "splits_file"}}),
        ["splits_final.json"],
    ),
    "a list that is shorter than it says": (
        called("lists", pretrain=["b"], labelled={2: {1: ["d"]}}),
        ["labelled.2.1", "names 1 subjects, and 2 are to be labelled"],
    ),
    "a list with a subject twice": (called("lists", pretrain=["b", "b"]), ["pretrain: names b twice"]),
    "name of a data set of the project": (called("describe", name="acdc"), ["mine.yaml", "'acdc' is taken"]),
    "threshold in percent": (called("describe", threshold=35.0), ["threshold", "less than 1"]),
    "known twins of whom one is tested": (
        called("lists", pretrain=["b", "d"], twins=[["a", "b"]]),
        ["protocol lists", "a and b", "same images", "remove one"],
    ),
}
BAD_STUDIES = {
    "not there": (lambda world: world.study.unlink(), ["study.yaml"]),
    "not YAML": (write("study", "name: ["), ["study.yaml", "not valid YAML"]),
    "a list": (write("study", "- a list"), ["study.yaml"]),
    "unknown key": (called("ask", method=["gd"]), ["study.yaml", "did you mean 'methods'"]),
    "wrong type": (called("ask", labelled=["1"]), ["study.yaml", "labelled.0"]),
    "out of range": (called("ask", labelled=[0]), ["study.yaml", "labelled.0"]),
    "a word for a list": (called("ask", methods="random"), ["study.yaml", "methods"]),
    "unknown method": (called("ask", methods=["randm"]), ["'randm'", "did you mean 'random'"]),
    "contrast of an unknown method": (called("ask", contrasts=[["randm", "gd"]]), ["'randm'", "did you mean 'random'"]),
    "contrast with itself": (called("ask", contrasts=[["gd", "gd"]]), ["contrasts", "gd minus itself"]),
    "all labels of an unknown method": (called("ask", all_labels=["gdd"]), ["'gdd'", "did you mean 'gd'"]),
    "set of an unknown profile": (called("ask", set={"smoek": []}), ["set", "'smoek'", "did you mean 'smoke'"]),
    "name of a study of the project": (called("ask", name="acdc"), ["study.yaml", "'acdc' is taken"]),
    "axis without effect": (
        called("ask", axes=[{"name": "t", "key": "stages.0.threshold", "values": [0.1], "methods": ["gr"]}]),
        ["stages.0", "threshold has no effect with pairs instance"],
    ),
    "date as a value": (
        write(
            "study",
            lambda data: data + b"axes: [{name: a, key: recipe.weight_decay, values: [2024-01-01], methods: [random]}]",
        ),
        ["axes", "values"],
    ),
    "name that leads elsewhere": (called("ask", name="a/../../b"), ["study.yaml", "name"]),
    "notebook that leads elsewhere": (called("ask", notebook="../20_pretrain"), ["study.yaml", "notebook"]),
    "notebook that is not there": (called("ask", notebook="99_nothing"), ["99_nothing.ipynb"]),
    "notebook without a parameters cell": (notebook("setup"), ["mine.ipynb", "parameters", "tag"]),
    "notebook that is none": (
        then(notebook("setup"), lambda world: (paths.NOTEBOOKS / "mine.ipynb").write_text("cells")),
        ["mine.ipynb", "not valid notebook"],
    ),
    "profile that is none": (asked("--profile", "mine.yaml"), ["profile", "mine.yaml"]),
    "profile with an unknown method": (
        then(
            lambda world: (world.root / "p.yaml").write_text(
                (paths.PARAMS / "profiles/smoke.yaml").read_text().replace("name: smoke", "name: p\nset: {gdd: []}")
            ),
            asked("--profile", "../p.yaml"),
        ),
        ["profile p: set", "'gdd'", "did you mean 'gd'"],
    ),
    "profile with a wrong key": (
        then(lambda world: (world.root / "p.yaml").write_text("name: p\nsteps: 3"), asked("--profile", "../p.yaml")),
        ["p.yaml", "steps"],
    ),
    "plane that holds no patch": (
        asked("--set", "geometry.plane=[64, 64]"),
        ["geometry", "plane", "enlarge or remove"],
    ),
    "set to no stages": (asked("--set", "recipe=5"), ["recipe"]),
    "set to an unknown protocol": (
        asked("--set", "protocol=folds"),
        ["protocol of data set mine 'folds'", "valid are seeded"],
    ),
    "set to a key given twice": (asked("--set", "recipe={recipe: supervised, recipe: mixup}"), ["--set", "twice"]),
    "output a file": (lambda world: world.out.touch(), ["out/runs/prepared", "set CLSEG_OUT or --out to a folder"]),
}
BAD_WEIGHTS = {
    "not there": (lambda world: world.weights.unlink(), ["safetensors"]),
    "a folder": (lambda world: (world.weights.unlink(), world.weights.mkdir()), ["safetensors"]),
    "empty": (write("weights", ""), ["safetensors"]),
    "truncated": (write("weights", lambda data: data[:-100]), ["safetensors"]),
    "only a header": (write("weights", lambda data: data[:50]), ["safetensors"]),
    "header without end": (write("weights", lambda data: b"\xff" * 8 + data[8:]), ["safetensors"]),
    "pickle": (write("weights", pickle.dumps(Harmful())), ["safetensors"]),
    "checkpoint": (checkpoint, ["safetensors"]),
    "no metadata": (unrecorded(None), [RECORD]),
    "record that is no JSON": (unrecorded({"clseg": "{"}), [RECORD]),
    "record that is a list": (unrecorded({"clseg": "[]"}), [RECORD]),
    "record without a key": (unrecorded({"clseg": '{"run": "a"}'}), [RECORD, "dataset"]),
    "record with an unknown key": (weights(colour="blue"), [RECORD, "colour"]),
    "unknown architecture": (weights(network={"architecture": "resnet"}), [RECORD, "network.architecture"]),
    "another architecture": (weights(network={"architecture": "pcl"}), ["decoder.blocks.0.up", "'pcl'"]),
    "other filters": (weights(network={"filters": [8, 16, 16, 64]}), ["encoder.levels.3"]),
    "levels without end": (weights(network={"filters": [1] * 10**6}), [RECORD, "network.filters"]),
    "other channels": (weights(channels=2), [FIRST]),
    "channels without end": (weights(channels=2**31 - 1), [FIRST]),
    "other classes": (weights(label_values=[0, 1]), ["output."]),
    "other dimensions": (weights(geometry={"size": [8, 32, 32]}), [FIRST]),
    "side that the levels do not halve": (weights(geometry={"size": [30, 32]}), [RECORD, "geometry.size", "30"]),
    "key missing": (weights(lambda own: {name: own[name] for name in own if name != FIRST}), [FIRST, "absent"]),
    "unknown key": (weights(lambda own: own | {"decoder.more": torch.ones(1)}), ["decoder.more"]),
    "another type": (weights(lambda own: own | {FIRST: own[FIRST].half()}), [FIRST, "float16"]),
    "NaN": (weights(lambda own: own | {FIRST: torch.full_like(own[FIRST], torch.nan)}), [FIRST, "NaN"]),
    "infinite": (weights(lambda own: own | {FIRST: torch.full_like(own[FIRST], torch.inf)}), [FIRST, "infinite"]),
}


def inputs(change):
    """A command with other words."""
    return lambda world: setattr(world, "words", lambda command: list(change(World.words(world, command), world)))


def instead(position, value):
    def change(words, world):
        words[position] = value(world) if callable(value) else value
        return words

    return inputs(change)


BAD_REQUESTS = {  # command, what is asked, words
    "predict: a folder that is not there": ("predict", instead(4, lambda world: world.root / "nowhere"), ["nowhere"]),
    "predict: an empty folder": ("predict", instead(4, lambda world: world.root / "cwd"), ["cwd", "NIfTI"]),
    "predict: a text": ("predict", instead(4, lambda world: world.study), ["study.yaml", "NIfTI"]),
    "predict: photographs, where volumes are needed": (
        "predict",
        then(called("photographs"), lambda world: world.save_weights(world.weights)),
        ["images/a.png", "NIfTI"],
    ),
    "predict: two files of one name": (
        "predict",
        then(lambda world: copied(world, A, "imagesTr/a.nii"), instead(4, lambda world: world.task / "imagesTr")),
        ["a.nii", "rename"],
    ),
    "predict: into the folder of the images": (
        "predict",
        instead(6, lambda world: world.task / "imagesTr"),
        ["imagesTr", "another --output"],
    ),
    "predict: into a folder of other files": (
        "predict",
        lambda world: ((world.out / "labels").mkdir(parents=True), (world.out / "labels/a.nii.gz").touch()),
        ["out/labels", "another --output"],
    ),
    "predict: into a file": ("predict", instead(6, lambda world: world.json), [JSON, "another --output"]),
    "predict: with weights of a pre-training": (
        "predict",
        lambda world: world.save_weights(world.weights, parts="encoder."),
        ["a.safetensors", "fine-tuning"],
    ),
    "predict: two channels, of which there is one": (
        "predict",
        lambda world: world.save_weights(world.weights, channels=2),
        ["a.nii.gz", "2 channel"],
    ),
    "predict: the second channel, of which there is one": (
        "predict",
        lambda world: world.save_weights(world.weights, channel=1),
        ["a.nii.gz", "1 channel"],
    ),
    "export: to another ending": ("export", instead(6, lambda world: world.out / "b.pt"), ["b.pt", "change --output"]),
    "export: over itself": ("export", instead(6, lambda world: world.weights), ["a.safetensors", "change --output"]),
    "export: into a file": (
        "export",
        instead(6, lambda world: world.json / "b.safetensors"),
        [JSON, "another --output"],
    ),
    "table: nowhere": ("table", None, ["runs", "is not a folder"]),
    "table: of nothing": ("table", lambda world: (world.root / "runs").mkdir(), ["runs", "no finished"]),
    "table: of a file": ("table", lambda world: (world.root / "runs").touch(), ["runs", "is not a folder"]),
    "table: status of garbage": ("table", finished_run(status__json=lambda data: b"\xff"), ["runs", "no finished"]),
    "table: status of a number": ("table", finished_run(status__json=lambda data: b"5"), ["runs", "no finished"]),
    "table: metrics truncated": ("table", finished_run(metrics__csv=lambda data: data[:20]), ["runs", "no finished"]),
    "table: metrics garbled": (
        "table",
        finished_run(metrics__csv=lambda data: b"x" * len(data)),
        ["finetune-random", "made again"],
    ),
    "table: into a folder that is not there": ("table", finished_run(), ["table.csv", "another --out"]),
    "check: data set file that is there": (
        "check",
        asked("--write", "../mine.yaml"),
        ["mine.yaml", "another name"],
    ),
}

ROWS = {f"image: {name}": (IMAGE, *row) for name, row in BAD_IMAGES.items()}
ROWS |= {f"label: {name}": (LABEL, *row) for name, row in BAD_LABELS.items()}
ROWS |= {f"dataset.json: {name}": (LABEL, build, [JSON, *words]) for name, (build, words) in BAD_JSON.items()}
ROWS |= {f"nnU-Net: {name}": (LABEL, then(NNUNET, build), words) for name, (build, words) in BAD_NNUNET.items()}
ROWS |= {f"folder: {name}": row for name, row in BAD_FOLDERS.items()}
ROWS |= {
    f"h5: {name}": (
        YAML,
        then(called("h5", **{f"patient001_{file}": arrays for file, arrays in files.items()}), *[build] * bool(build)),
        words,
    )
    for name, (files, build, words) in BAD_H5.items()
}
ROWS |= {
    f"photograph: {name}": (commands, then(called("photographs", **options), *[build] * bool(build)), words)
    for name, (commands, options, build, words) in BAD_PHOTOGRAPHS.items()
}
ROWS |= {f"ACDC: {name}": (YAML, *row) for name, row in BAD_ACDC.items()}
ROWS |= {f"data set: {name}": (YAML, *row) for name, row in BAD_DATASETS.items()}
ROWS |= {f"study: {name}": (YAML, *row) for name, row in BAD_STUDIES.items()}
ROWS |= {
    f"weights: {name}": (WEIGHTS, build, ["a.safetensors: ", *words, "; use the weights.safetensors of a finished run"])
    for name, (build, words) in BAD_WEIGHTS.items()
}
ROWS |= BAD_REQUESTS
BAR = re.compile(r"\d+%\|.*\|")  # of progress
REMEDY = re.compile(r"; \w|did you mean|valid are|[Ss]hould |must |needs |not a valid")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("template"))
    world.make()
    return world.root


@pytest.fixture
def world(template, tmp_path, save_weights, monkeypatch):
    root = tmp_path / "world"
    shutil.copytree(template, root)
    monkeypatch.setenv("CLSEG_DATA", str(root / "data"))
    monkeypatch.setenv("CLSEG_OUT", str(root / "out"))
    monkeypatch.setenv("HOME", str(root / "home"))
    monkeypatch.chdir(root / "cwd")
    world = World(root, save_weights, monkeypatch)
    save_weights(world.weights)
    return world


@pytest.mark.filterwarnings("error")  # a user would see a warning as well
@pytest.mark.parametrize("row", ROWS)
def test_bad_input_is_answered_in_a_sentence(row, world, capfd):
    commands, build, words = ROWS[row]
    if build:
        build(world)
    before = files_below(world.root)
    for command in commands.split():
        world.asking = True
        status = cli.main([*map(str, world.words(command)), *world.extra])
        world.asking = False
        lines = [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line and not BAR.search(line)]
        assert (status, len(lines)) == (2, 1), (command, lines)
        assert lines[0].startswith("clseg: "), lines
        assert REMEDY.search(lines[0]), lines
        assert len(lines[0]) < 1000
        needed = [str(world.image.relative_to(world.task)), *words] if row.startswith("image: ") else words
        needed = [B, *words] if row.startswith("label: ") else needed
        assert [word for word in needed if word not in lines[0]] == [], lines
        after = files_below(world.root)
        new = {
            path for path, content in after.items() if before.get(path) != content and (content or ".lock" not in path)
        }
        assert (new, before.keys() - after.keys()) == (set(), set()), command
    assert not Harmful.ran


# ------------------------------------------------------------------------------------------------ what is not bad


def oriented(order, signs):
    """The index of an array whose axes are turned and reordered -> index of the upright one of `volume`, 4 x 4."""
    turn, shape = np.zeros((4, 4)), (12, 10, 4)
    turn[3, 3] = 1
    for stored, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        turn[axis, stored], turn[axis, 3] = sign, 0 if sign > 0 else shape[axis] - 1
    return turn


def test_a_scan_may_be_stored_in_any_of_48_orders(world):
    image, mask = volume(0)
    angle = np.deg2rad(30)
    oblique = AFFINE.copy()
    oblique[:2, :2] = 1.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    ref, classes = VolumeRef("a", "", (world.image,), world.label, world.task), {1: "rim", 2: "core"}
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product([1, -1], repeat=3)):
        for path, upright in ((world.image, image), (world.label, mask)):
            turned = np.flip(upright.transpose(order), [axis for axis in range(3) if signs[axis] < 0])
            save_nifti(path, turned, oblique @ oriented(order, signs))
        found = nifti_volume(ref, classes, {})
        np.testing.assert_array_equal(found.image[0], image.T)
        np.testing.assert_array_equal(found.label, mask.T)
        assert found.slice_axis == "z"
        np.testing.assert_allclose(found.spacing_mm, (4, 1.5, 1.5), rtol=1e-5)
        stored = np.flip(mask.transpose(order), [axis for axis in range(3) if signs[axis] < 0])
        np.testing.assert_array_equal(found.as_stored(found.label), stored.T)
    # kept as they are stored, if one says so
    np.testing.assert_array_equal(nifti_volume(ref, classes, {"orient": False}).label, stored.T)


@pytest.mark.parametrize("name", ["with spaces", "Häuser und Straßen", "心臓 ✓", "a%20[b]{c}'d\"", "-rf"])
def test_names_with_spaces_and_of_any_language_are_taken(name, world, capfd):
    world.task = world.task.rename(world.task.with_name(name))
    for part in ("imagesTr", "labelsTr"):
        path = world.task / part / "a.nii.gz"
        path.rename(path.with_name(f"{name}.nii.gz"))
    info = json.loads((world.task / "dataset.json").read_text())
    info["training"][0] = {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"}
    (world.task / "dataset.json").write_text("\ufeff" + json.dumps(info), encoding="utf-8")  # as Windows writes it
    target = world.root / f"{name}.yaml"
    assert cli.main(["check", str(world.task), f"--write={target}"]) == 0
    assert capfd.readouterr().err == ""
    dataset = read_dataset(str(target))
    assert name in prepare(dataset, dataset.geometry["smoke"], progress=False).subjects
    assert cli.main(["run", str(world.study), f"--dataset={target}", "--dry-run"]) == 0
    image = world.task / "imagesTr" / f"{name}.nii.gz"
    assert predict(world.weights, image, world.out / name) == (1, 0)
    assert (world.out / name / image.name).is_file()


def test_known_twins_are_prepared(world):
    copied(world, A, "imagesTr/b.nii.gz")
    world.describe(twins=[["a", "b"]])
    dataset = read_dataset(str(world.dataset))
    assert len(prepare(dataset, dataset.geometry["smoke"], progress=False).subjects) == 5


def test_a_line_break_in_the_name_of_an_image_to_segment_stays(world):
    image = world.image.rename(world.image.with_name("a\nb.nii.gz"))
    assert predict(world.weights, image, world.out) == (1, 0)
    assert (world.out / "a\nb.nii.gz").is_file()


def test_links_to_scans_elsewhere_are_followed_in_nnunet_folders_and_loops_of_folders_are_not(world):
    world.nnunet()
    world.image.rename(world.root / "elsewhere.nii.gz")
    world.image.symlink_to(world.root / "elsewhere.nii.gz")
    for folder in (world.task, world.task / "imagesTr"):
        (folder / "loop").symlink_to(world.task)
    assert check(world.task).problems == []
    (world.root / "runs").mkdir()
    (world.root / "runs" / "loop").symlink_to(world.root / "runs")
    assert cli.main(["table", str(world.root / "runs")]) == 2


def test_a_notebook_without_parameters_is_not_executed(world):
    notebook()(world)
    with pytest.raises(RequestError, match=r"mine\.ipynb: has no cell with the tag"):
        grid.execute_notebook(paths.NOTEBOOKS / "mine.ipynb", world.out / "done.ipynb", {"labelled": 1})
    assert not world.out.exists()


def test_a_notebook_is_executed_that_does_not_say_its_language(world):
    """As some programs save them."""
    notebook("parameters")(world)
    content = json.loads((paths.NOTEBOOKS / "mine.ipynb").read_text())
    content["cells"] = [{**cell, "outputs": [], "execution_count": None, "id": "a"} for cell in content["cells"]]
    assert content["metadata"] == {}
    (paths.NOTEBOOKS / "mine.ipynb").write_text(json.dumps(content))
    world.out.mkdir()
    grid.execute_notebook(paths.NOTEBOOKS / "mine.ipynb", world.out / "done.ipynb", {"labelled": 1})
    cells = json.loads((world.out / "done.ipynb").read_text())["cells"]
    assert ("labelled = 1" in "".join(cells[1]["source"]), cells[1]["execution_count"]) == (True, 1)


# ------------------------------------------------------------------------------------------------- open values

some = settings(deadline=None, derandomize=True, max_examples=60)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 32, 33, 64, 255, 2**31, 2**64, 10**30, 10**400])
FLOATS = st.sampled_from([-1.0, 0.0, 1e-320, 1e-30, 0.1, 1.5, 1e30, 1e308, float("inf"), float("nan")])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "..", "../x", "/x", "{subject}", "a\0b", "1e5", "**", "~", "gd", "msd"]
)
SCALARS = st.none() | st.booleans() | NUMBERS | FLOATS | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=5
)
YAML_VALUES = VALUES | st.dates() | st.binary(max_size=4) | st.sets(st.integers(), max_size=2)


def accepted(call):
    """What a call returns, or None where it refuses in one sentence; anything else is an error."""
    try:
        return call()
    except RequestError as error:
        sentence = str(error)
    assert len(sentence.splitlines()) == 1
    assert len(sentence) < 1000
    return None


def damaged(valid: bytes):
    """Bytes at random, and those of a valid file of which some are changed, removed or added."""

    def change(edits, cut, more):
        data = bytearray(valid)
        for place, byte in edits:
            data[place] = byte
        return bytes(data[:cut]) + more

    place = st.integers(0, len(valid) - 1) | st.integers(0, min(len(valid) - 1, 400))  # headers are short
    edits = st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)
    return st.binary(max_size=500) | st.builds(change, edits, st.just(len(valid)) | place, st.binary(max_size=4))


@pytest.fixture(scope="module")
def open_world(template, tmp_path_factory):
    """A world that all examples of a strategy share; its data set file names the folder whole."""
    root = tmp_path_factory.mktemp("open") / "world"
    shutil.copytree(template, root)
    return World(root)


def used(volume, dataset):
    """What preparing does with a volume."""
    geometry = dataset.geometry["smoke"]
    normalised = normalise(volume, dataset.normalisation, volume.subject)
    image, label = to_network(normalised, volume.label, resampled_size(volume, geometry), geometry.size)
    assert np.isfinite(image).all()
    assert image.shape[2:] == label.shape[1:] == tuple(geometry.size)


def described(world, **changes):
    return DatasetConfig.model_validate(DATASET | {"folder": str(world.task)} | changes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("compressed", [False, True])
@some
@given(data=st.data())
def test_any_bytes_as_a_scan(compressed, data, open_world, template):
    valid = gzip.decompress((template / "data" / "Task" / A).read_bytes())[:2000]
    path = open_world.root / ("x.nii.gz" if compressed else "x.nii")
    content = data.draw(damaged(valid))
    path.write_bytes(gzip.compress(content, 1) if compressed else content)
    dataset = described(open_world, adapter="pairs", options={"images": "{subject}.nii*"}, classes={1: "rim"})
    ref = VolumeRef("x", "", (path,), None, open_world.root)
    if (found := accepted(lambda: read(ref, dataset))) is not None:
        accepted(lambda: used(found, dataset))


@pytest.mark.filterwarnings("error")
@some
@given(data=st.data())
def test_any_bytes_as_h5(data, open_world):
    path = open_world.root / "data" / "h5" / "data" / "patient001_frame01.h5"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.update({"image": np.eye(3)[None], "label": np.ones((1, 3, 3), np.uint8)})
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    dataset = described(open_world, adapter="acdc", folder=str(path.parent.parent), classes={1: "rim"})
    if (found := accepted(lambda: read(scan(dataset)[0], dataset))) is not None:
        accepted(lambda: used(found, dataset))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff", "bmp"])
@some
@given(data=st.data())
def test_any_bytes_as_a_photograph(kind, data, open_world):
    valid = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(valid, kind)
    path = open_world.root / f"photograph.{kind}"
    path.write_bytes(data.draw(damaged(valid.getvalue())))
    for channels in (1, 3):
        found = accepted(lambda count=channels: photograph(path, count))
        assert found is None or (found.dtype == np.uint8 and found.shape[:2] == (channels, 1))


@settings(some, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_as_weights(data, open_world, save_weights):
    path = open_world.root / "valid.safetensors"
    valid = save_weights(path).read_bytes()
    size = 8 + int.from_bytes(valid[:8], "little")  # the header is where things can go wrong
    path.write_bytes(data.draw(damaged(valid[:size])) + data.draw(st.just(valid[size:]) | st.just(b"")))
    if (found := accepted(lambda: read_weights(path))) is not None:
        assert {name for name, value in found[0].items() if not value.isfinite().all()} == set()


FILES = {  # kind: what reads it, a valid tree
    "dataset": (read_dataset, DATASET),
    "profile": (read_profile, yaml.safe_load((paths.PARAMS / "profiles" / "smoke.yaml").read_text())),
    "study": (read_study, STUDY | {"axes": [{"name": "a", "key": "k", "values": [1], "methods": ["gd"]}]}),
}
NUMBERED = itertools.count()  # a file is read again only where its time has changed


def places(tree, before=()):
    """The keys that lead to every value of a nested tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [before] * bool(before) + [place for key, value in inner for place in places(value, (*before, key))]


def replaced(tree, place, value):
    """A copy of a nested tree with another value at a place."""
    if not place:
        return value
    copy = list(tree) if isinstance(tree, list) else dict(tree)
    copy[place[0]] = replaced(tree[place[0]], place[1:], value)
    return copy


@pytest.mark.parametrize("kind", FILES)
@some
@given(text=st.text(max_size=60) | st.text("[]{}:,&*!|>-?'\"# \nab0%@`<", max_size=40))
def test_any_text_as_yaml(kind, text, open_world):
    path = open_world.root / f"{next(NUMBERED)}.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert accepted(lambda: FILES[kind][0](str(path))) is None


@pytest.mark.parametrize("kind", FILES)
@some
@given(data=st.data())
def test_any_value_of_a_parameter(kind, data, open_world):
    """Whatever is accepted can be resolved and prepared."""
    trees, path = {name: tree for name, (_, tree) in FILES.items()}, open_world.root / f"{next(NUMBERED)}.yaml"
    changed = trees[kind]
    for place in data.draw(st.lists(st.sampled_from(places(changed)), min_size=1, max_size=2, unique=True)):
        assume(place in places(changed))
        changed = replaced(changed, place, data.draw(YAML_VALUES))
    try:
        path.write_text(yaml.safe_dump(changed, allow_unicode=True), encoding="utf-8")
    except (UnicodeEncodeError, yaml.YAMLError, ValueError, TypeError):
        assume(False)
    names = {"dataset": str(open_world.dataset), "profile": "smoke", "study": str(open_world.study)} | {kind: str(path)}

    def prepared():
        plan = grid.expand(read_study(names["study"]), names["dataset"], names["profile"])
        experiment = plan.finetune[0].experiment
        assert plan.finetune[0].folder.resolve().is_relative_to(paths.runs_root().resolve())
        results = paths.results_dir(plan.profile, plan.place, plan.study.name)
        assert results.resolve().is_relative_to(paths.out_root())
        prepare(experiment.dataset, experiment.geometry, progress=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_DATA", str(open_world.root / "data"))
        patch.setenv("CLSEG_OUT", str(open_world.out))
        accepted(prepared)


RESOLVED = resolve("phantom", "smoke", "gd+lr").model_dump()


@some
@given(
    key=st.sampled_from([".".join(map(str, place)) for place in places(RESOLVED)]) | st.text(max_size=10),
    value=YAML_VALUES.map(lambda value: yaml.safe_dump(value, default_flow_style=True)) | st.text(max_size=10),
)
def test_any_override(key, value):
    accepted(lambda: resolve("phantom", "smoke", "gd+lr", overrides=[f"{key}={value}"]))


@some
@given(data=st.data())
def test_any_dataset_json(data, open_world):
    trees = [
        json.loads(open_world.json.read_text()),
        {"labels": {"rim": 1}, "channel_names": {"0": "T"}, "file_ending": ""},
    ]
    tree = data.draw(st.sampled_from(trees))
    tree = (
        replaced(tree, data.draw(st.sampled_from(places(tree))), data.draw(VALUES))
        if data.draw(st.booleans())
        else data.draw(VALUES)
    )
    folder = open_world.root / "json"
    folder.mkdir(exist_ok=True)
    if not (folder / "imagesTr").exists():
        shutil.copytree(open_world.task / "imagesTr", folder / "imagesTr")
    text = json.dumps(tree, default=str, skipkeys=True)
    (folder / "dataset.json").write_text(text)
    dataset = described(open_world, folder=str(folder))
    accepted(lambda: (scan(dataset), class_names(dataset, folder)))


ARRAYS = st.tuples(
    hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=6),
    st.sampled_from([np.int16, np.uint8, np.float32, np.float64, np.int32, np.complex64, np.uint16]),
)


@pytest.mark.filterwarnings("error")
@some
@given(
    array=ARRAYS.flatmap(lambda about: hnp.arrays(about[1], about[0])),
    spread=st.booleans(),
    affine=hnp.arrays(
        float, (3, 4), elements=st.floats(-1e4, 1e4) | st.sampled_from([0, 0, 1, -1, 1e-8, 1e30, np.nan, np.inf])
    ),
)
def test_any_shape_and_affine(array, spread, affine, open_world):
    """What is read runs toward the positive world axes that dominate, and can be prepared."""
    path = open_world.root / "any.nii"
    if spread and array.size:  # else most arrays are constant
        array = np.arange(array.size).reshape(array.shape).astype(array.dtype)
    image = nib.Nifti1Image(array, np.eye(4))
    image.header["sform_code"] = 2
    for name, row in zip(("srow_x", "srow_y", "srow_z"), affine.astype(np.float32), strict=True):
        image.header[name] = row
    path.write_bytes(bytes(image.header.binaryblock) + bytes(4) + array.tobytes("F"))
    dataset = described(open_world, adapter="pairs", options={"images": "{subject}.nii*"}, classes={1: "rim"})
    ref = VolumeRef("any", "", (path,), None, open_world.root)
    if (found := accepted(lambda: read(ref, dataset))) is not None:
        turned = nib.io_orientation(found.affine)[::-1]  # of stored axes z, y, x
        assert found.flips == tuple((turned[list(found.axes), 1] < 0).tolist())
        assert sorted(found.axes) == [0, 1, 2]
        assert found.slice_axis == "xyz"[int(turned[found.axes[0], 0])]
        across = [int(number) for number in turned[list(found.axes[1:]), 0]]
        assert across == sorted(across, reverse=True)  # rows along the later world axis
        accepted(lambda: used(found, dataset))


# ------------------------------------------------------------------------------------------------ what never happens

SOURCES = sorted(Path(clseg.__file__).parent.rglob("*.py"))
HARMFUL = {  # executes what it reads, or hands words to a shell
    *("pickle.load", "pickle.loads", "joblib.load", "marshal.loads", "shelve.open", "pd.read_pickle", "eval", "exec"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "torch.hub.load"),
}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_what_is_read_is_never_executed_and_no_shell_is_asked(source):
    found = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ast.unparse(node)
        words = {word.arg: ast.unparse(word.value) for word in getattr(node, "keywords", []) if word.arg}
        found += [name] if name in HARMFUL else []
        found += (
            [name]
            if name == "torch.load" and isinstance(node, ast.Call) and words.get("weights_only") != "True"
            else []
        )
        found += (
            [name] if words.get("shell", "False") != "False" or words.get("allow_pickle", "False") != "False" else []
        )
    assert found == []


WATCH = """
import os, sys
LOG = os.environ["WATCH_LOG"]
CHANGED = {"os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.chmod": 0, "os.utime": 0}
CHANGED |= {"os.rename": 1, "os.link": 1, "os.symlink": 1}  # which argument
def watch(event, arguments):
    writes, path = False, arguments[CHANGED[event]] if event in CHANGED else None
    if event == "open":
        path, mode, flags = arguments
        writes = isinstance(mode, str) and set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    elif path:
        writes = not (isinstance(arguments[-1], int) and arguments[-1] >= 0)  # else it lies in an open folder
    if writes and not isinstance(path, int) and path != LOG:
        with open(LOG, "a", encoding="utf-8", errors="backslashreplace") as file:
            print(os.path.realpath(os.fsdecode(path)), file=file)
sys.addaudithook(watch)
"""
LIBRARIES = (".cache", ".config", ".ipython", ".local")  # what those that we use keep in a home folder


@pytest.mark.slow
def test_commands_write_below_their_output_alone(world):
    """Seen in every process, kernels too: what Python opens to write; and all files as they are before and after."""
    watch, out, home = world.root / "watch", world.out, world.root / "home"
    for folder in (watch, out):
        folder.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    commands = [
        ["check", world.task, "--write", out / "checked.yaml"],
        ["run", world.study, "--dataset", world.dataset, "--out", out, "--jobs", "1", "--set", "finetune.steps=2"],
        ["predict", "--weights", world.weights, "--input", world.image, "--output", out / "labels", "--probabilities"],
        ["export", "--weights", world.weights, "--format", "safetensors", "--output", out / "exported.safetensors"],
        ["table", out / "runs", "--out", out / "table.csv"],
        ["methods"],
        ["datasets"],
    ]
    words = json.dumps([[str(word) for word in command] for command in commands])
    program = "import json, sys; from clseg.tools import cli; sys.exit(max(map(cli.main, json.loads(sys.argv[1]))))"
    left = {"CLSEG_OUT", "TORCHINDUCTOR_CACHE_DIR"}  # the latter is set by torch, and of this process
    environment = {name: value for name, value in os.environ.items() if name not in left}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(watch), os.environ.get("PYTHONPATH")]))
    environment |= {"WATCH_LOG": str(watch / "log"), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as temporary:  # its name is short, as that of a socket must be
        environment |= {"TMPDIR": temporary, "OMP_NUM_THREADS": "1"}
        allowed = [*map(str, (out, watch, temporary, "/dev", *(home / name for name in LIBRARIES)))]

        def elsewhere(paths):
            return sorted(path for path in paths if not any(Path(path).is_relative_to(place) for place in allowed))

        before = files_below(world.root)
        done = subprocess.run(
            [sys.executable, "-c", program, words],
            cwd=world.root / "cwd",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} >= {"runs", "paper_figures", "labels", "checked.yaml", "table.csv"}
    written = set((watch / "log").read_text().splitlines())
    assert any("finetune-random" in path and path.endswith(".tmp") for path in written), "kernels are watched"
    assert elsewhere(written) == []
    after = files_below(world.root)
    assert {path: after[path] for path in elsewhere(after)} == {path: before[path] for path in elsewhere(before)}
