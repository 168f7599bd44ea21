"""The study on real volumes, end to end at smoke size: the job whose laptop results are committed."""

import json

import pytest

from clseg.metrics import dice
from clseg.study import archive, runs
from clseg.study.files import read_dataset
from clseg.study.parameters import resolve

pytestmark = pytest.mark.real_data
CELLS = ["--set=study.labelled=[2]", "--set=study.draws=[1]"]


@pytest.fixture
def study(tmp_path, data_root, command):
    def run(dataset, methods="random, gd+lr"):
        words = ["glcl_strategies", "--dataset", dataset, "--profile", "smoke", f"--set=study.methods=[{methods}]"]
        status, _, errors = command(tmp_path, "run", *words, *CELLS)
        assert status == 0, errors
        return archive.read_table(tmp_path / f"paper_figures/smoke/{dataset}/glcl_strategies/table.csv")

    return run


def test_acdc_end_to_end_with_the_paper_s_own_subjects(tmp_path, study):
    table = study("acdc")
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


def test_hippocampus_end_to_end(study):
    table = study("hippocampus")
    assert table["subject"].nunique() == 60
    assert set(table["class_name"]) == {"Anterior", "Posterior"}
    assert set(table["hd95_unit"]) == {"mm"}
    assert table["dice"].dropna().between(0, 1).all()


@pytest.mark.parametrize(
    ("dataset", "subjects", "structures", "unit"),
    [("mscmr", 10, {"myocardium", "left ventricle", "right ventricle"}, "mm"), ("ph2", 50, {"lesion"}, "px")],
)
def test_pairs_of_images_and_masks_end_to_end(study, dataset, subjects, structures, unit):
    table = study(dataset, methods="random")
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
