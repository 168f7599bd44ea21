"""Small data sets in the layouts that are published, and a data set description to read them with."""

import json

import h5py
import nibabel as nib
import numpy as np
import pytest

from clseg.settings import DatasetConfig, Geometry, SeededProtocol


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Empty data and output roots; the data root."""
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def describe():
    """A data set description with the given fields, and plain ones for the rest."""

    def make(**fields) -> DatasetConfig:
        plain = {
            "name": "example",
            "title": "example",
            "description": "",
            "adapter": "msd",
            "folder": "Task",
            "geometry": {"smoke": Geometry(size=[32, 32])},
            "protocols": {"seeded": SeededProtocol(kind="seeded", test=1, validation=1)},
        }
        return DatasetConfig(**plain | fields)

    return make


@pytest.fixture
def write_nifti():
    """Save an array with axes x, y, z (, channel)."""

    def write(path, data, affine=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(data, np.diag([1.5, 1.4, 8, 1]) if affine is None else affine), path)

    return write


@pytest.fixture
def write_h5():
    def write(path, **arrays):
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    return write


@pytest.fixture
def xyz():
    """Image [X, Y, Z] and label of a bright disc (1) with a core (2), different in every subject and slice."""

    def make(subject=0, shape=(34, 30, 5)):
        rng = np.random.default_rng(subject)
        x, y, z = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
        radius = np.hypot(x - shape[0] / 2 + subject % 3 + z / 2, y - shape[1] / 2 + 1)
        label = ((radius < 9).astype(np.uint8) + (radius < 5)).astype(np.uint8)
        return (100 * label + rng.normal(0, 5, shape)).astype(np.float32), label

    return make


@pytest.fixture
def msd(roots, write_nifti, xyz):
    """A Decathlon folder: cases a (labelled), b (its label file is absent), c (of imagesTs, never labelled)."""
    folder = roots / "Task"
    for number, name in enumerate("ab"):
        image, label = xyz(number)
        write_nifti(folder / "imagesTr" / f"{name}.nii.gz", image)
        if name == "a":
            write_nifti(folder / "labelsTr" / "a.nii.gz", label)
    write_nifti(folder / "imagesTs" / "c.nii.gz", xyz(2)[0])
    info = {
        "labels": {"0": "background", "1": "rim", "2": "core"},
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "ab"],
        "test": ["./imagesTs/c.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder
