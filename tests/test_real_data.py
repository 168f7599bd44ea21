"""The study on real volumes, end to end at smoke size: the job whose laptop results are committed."""

import json
import os
import subprocess
import sys

import pytest

from clseg.metrics import dice
from clseg.study import archive, runs
from clseg.study.files import read_dataset
from clseg.study.parameters import resolve

pytestmark = pytest.mark.real_data
CELLS = ["--set=study.labelled=[2]", "--set=study.draws=[1]"]


def study(root, data_root, dataset, methods="random, gd+lr"):
    environment = os.environ | {"CLSEG_OUT": str(root), "CLSEG_DATA": str(data_root), "OMP_NUM_THREADS": "1"}
    words = [
        "run",
        "glcl_strategies",
        "--dataset",
        dataset,
        "--profile",
        "smoke",
        f"--set=study.methods=[{methods}]",
        *CELLS,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "clseg", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return archive.read_table(root / f"paper_figures/smoke/{dataset}/glcl_strategies/table.csv")


def test_acdc_end_to_end_with_the_paper_s_own_subjects(tmp_path, data_root):
    table = study(tmp_path, data_root, "acdc")
    assert set(table["method"]) == {"random", "gd+lr"}
    protocol = read_dataset("acdc").protocols["chaitanya"]
    assert set(table["subject"]) == set(protocol.test)
    assert set(table["phase"]) == {"ED"}
    assert set(table["hd95_unit"]) == {"px"}
    assert len(table) == 2 * 20 * 3
    for path in tmp_path.glob("runs/acdc/smoke/*/subjects.json"):
        subjects = json.loads(path.read_text())
        assert subjects["pretrain"] == protocol.pretrain
        if path.parent.name.startswith("finetune"):
            assert subjects["labelled"] == ["patient042", "patient062"]
            assert subjects["validation"] == ["patient031", "patient072"]


def test_hippocampus_end_to_end(tmp_path, data_root):
    table = study(tmp_path, data_root, "hippocampus")
    assert table["subject"].nunique() == 60
    assert set(table["class_name"]) == {"Anterior", "Posterior"}
    assert set(table["hd95_unit"]) == {"mm"}
    assert table["dice"].dropna().between(0, 1).all()


@pytest.mark.parametrize(
    ("dataset", "subjects", "structures", "unit"),
    [("mscmr", 10, {"myocardium", "left ventricle", "right ventricle"}, "mm"), ("ph2", 50, {"lesion"}, "px")],
)
def test_pairs_of_images_and_masks_end_to_end(tmp_path, data_root, dataset, subjects, structures, unit):
    table = study(tmp_path, data_root, dataset, methods="random")
    assert table["subject"].nunique() == subjects
    assert set(table["class_name"]) == structures
    assert set(table["hd95_unit"]) == {unit}
    assert table["dice"].dropna().between(0, 1).all()


def test_the_way_back_to_the_native_grid_keeps_the_reference(data_root, tmp_path, monkeypatch):
    """The reference of real patients, taken to the laptop grid and back, is the ceiling of what is reported there."""
    import torch

    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setenv("CLSEG_DATA", str(data_root))
    experiment = resolve("acdc", "laptop", "random")
    store = runs.open_store(experiment, progress=False)
    for volume in range(0, 100, 20):
        known = torch.from_numpy(store.labels[store.volume_rows(volume)].astype("int64"))
        perfect = torch.nn.functional.one_hot(known, 4).movedim(-1, 1).float()
        back, reference = store.to_native(volume, perfect), store.native_label(volume)
        assert dice(back == 3, reference == 3) > 0.93
