"""Preparing ACDC: 200 volumes, both phases of 100 patients, against reading the same files with h5py and nothing else.

With the data set under $CLSEG_DATA it is that; without, files of its layout and size are written first: three of ten
volumes whole, the others a file per slice, as in the copy that is in use. Files are in the page cache for both.
"""

import os
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
from common import Row, absolute, against, in_turn, temporary_root

from clseg import paths
from clseg.data.prepare import prepare
from clseg.settings import Geometry
from clseg.study.files import read_dataset

TITLE = "preparing ACDC's 200 volumes, and opening the prepared store again"
GOAL = "preparing at most 3 times reading the files with h5py; opening again under 0.5 s"
PEERS = ["h5py"]
NOTES: list[str] = []


def write_files(folder: Path, subjects: int) -> None:
    """h5 files as in the copy of ACDC that carries no spacing, of random blobs."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(2 * subjects):
        image = random.random((10, 216, 256), np.float32)
        label = (image > 0.99).astype(np.uint8)
        stem = f"patient{number // 2 + 1:03d}_frame{number % 2 + 1:02d}"
        parts = {stem: np.s_[:]} if number % 10 < 3 else {f"{stem}_slice_{z + 1}": z for z in range(len(image))}
        for name, part in parts.items():
            with h5py.File(folder / f"{name}.h5", "w") as file:
                for what, values in (("image", image), ("label", label)):
                    file.create_dataset(what, data=values[part], compression="gzip")


def measure(quick: bool) -> list[Row]:
    with temporary_root() as root:
        if quick or not (paths.data_root() / "acdc").is_dir():
            subjects = 3 if quick else 100
            write_files(root / "data" / "acdc" / "data", subjects)
            os.environ["CLSEG_DATA"] = str(root / "data")
            NOTES.append(f"files of {2 * subjects} volumes were written for this, in the layout of ACDC")
        dataset = read_dataset("acdc").model_copy(update={"phases": ["ED", "ES"]})
        files = sorted((paths.data_root() / "acdc" / "data").rglob("*.h5"))
        # slices of volumes that are there whole are not read
        whole = {file.stem for file in files if "slice" not in file.stem}
        files = [file for file in files if file.stem in whole or file.stem.partition("_slice")[0] not in whole]

        def read() -> None:
            for path in files:
                with h5py.File(path) as file:
                    for name in ("image", "label"):
                        file[name][()]

        rows = []
        for profile in ("laptop",) if quick else ("laptop", "paper"):
            geometry = dataset.geometry[profile]

            def build(geometry: Geometry = geometry) -> None:
                shutil.rmtree(paths.prepared_root(), ignore_errors=True)
                prepare(dataset, geometry, progress=False)

            samples = in_turn({"ours": build, "reading": read}, 2 if quick else 5, 0)
            store = prepare(dataset, geometry, progress=False)
            side = geometry.size[-1]
            case = f"{len(store.volumes)} volumes at {side} px"
            rows.append(against(f"{case}: time", samples, "reading", 3.0))
            opened = []
            for _ in range(2 if quick else 7):
                began = time.perf_counter()
                prepare(dataset, geometry, progress=False)
                opened.append(time.perf_counter() - began)
            rows.append(absolute(f"{case}: opening again", opened, 0.5, "s"))
        return rows
