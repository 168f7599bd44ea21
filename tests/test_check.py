"""Folders of one's own: what the check finds in them, what it calls wrong, and that a study takes what it proposes."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from clseg import paths
from clseg.data.formats import scan
from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.study import archive, grid, runs
from clseg.study.files import read_dataset, read_study
from clseg.tools import cli
from clseg.tools.check import check, expect, write

AFFINE = np.diag([1.5, 1.5, 4.0, 1.0])


def volume(seed, shape=(40, 36, 10)):
    """Image and mask with axes x, y, z; class 2 is in subject 0 only."""
    mask = np.zeros(shape, np.uint8)
    mask[10:20, 12:20] = 1
    if seed == 0:
        mask[0:4, 12:20] = 2
    return np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16), mask


def save(path, data, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, affine), path)


def medical(folder, layout, subjects=8, labelled=8):
    """A folder in the layout `msd`, `nnunet` or `pairs` (images and masks side by side)."""
    cases = [f"case_{k:02d}" for k in range(subjects)]
    image_name, label_name = {
        "msd": ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz"),
        "nnunet": ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"),
        "pairs": ("{}.nii.gz", "{}_seg.nii.gz"),
    }[layout]
    for k, case in enumerate(cases):
        image, mask = volume(k)
        save(folder / image_name.format(case), image)
        if k < labelled:
            save(folder / label_name.format(case), mask)
    if layout == "msd":
        listed = [{"image": f"./imagesTr/{c}.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in cases]
        about = {"labels": {"0": "background", "1": "organ", "2": "rare"}, "modality": {"0": "CT"}, "training": listed}
    else:
        about = {"labels": {"background": 0, "organ": 1, "rare": 2}, "channel_names": {"0": "CT"}}
        about["file_ending"] = ".nii.gz"
    if layout != "pairs":
        (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def photographs(folder, image_name="images/IMG_{:03d}.png", mask_name="masks/IMG_{:03d}_segmentation.png", grey=False):
    for k in range(6):
        pixels = np.random.default_rng(k).integers(0, 255, (50, 70, 3)).astype(np.uint8)
        mask = np.zeros((50, 70), np.uint8)
        mask[10:30, 20:40] = 255
        for name, data in ((image_name, pixels[..., 0] if grey else pixels), (mask_name, mask)):
            path = folder / name.format(k)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data).save(path)
    return folder


@pytest.mark.parametrize("layout", ["msd", "nnunet", "pairs"])
def test_what_is_there_is_the_same_in_every_layout(layout, tmp_path):
    report = check(medical(tmp_path / "scans of mine", layout))
    assert report.problems == []
    assert len(report.volumes) == 8
    first = report.volumes[0]
    assert (first["shape"], first["orientation"]) == ([10, 36, 40], "RAS")
    assert first["spacing_mm"] == pytest.approx((4, 1.5, 1.5))
    assert [(c["value"], c["voxels"], c["subjects"]) for c in report.classes] == [(1, 8 * 800, 8), (2, 320, 1)]
    assert any(c["name"] in remark and "1 of 8" in remark for c in report.classes for remark in report.remarks)
    dataset = report.dataset
    assert (dataset.name, dataset.channels, dataset.positions) == ("scans_of_mine", 1, "known")
    # 40 x 1.5 mm are 60: 64 pixels of 1.5 mm hold them, 32 must be larger
    assert (dataset.geometry["laptop"].size, dataset.geometry["laptop"].spacing_mm) == ([64, 64], 1.5)
    assert dataset.geometry["smoke"].spacing_mm == pytest.approx(60 / 32)
    assert dataset.geometry_3d["smoke"].slice_mm == 4
    assert (dataset.protocols["seeded"].test, dataset.protocols["seeded"].validation) == (2, 1)


def test_unlabelled_volumes_are_kept_for_pre_training(tmp_path):
    report = check(medical(tmp_path / "few", "nnunet", subjects=9, labelled=5))
    assert report.problems == []
    assert sum(v["labelled"] for v in report.volumes) == 5
    assert any("5 labelled subjects: 2 to test, 1 to validate, 2" in remark for remark in report.remarks)
    assert any("4 more for pre-training" in remark for remark in report.remarks)


@pytest.mark.parametrize(
    "names",
    [
        ("images/IMG_{:03d}.png", "masks/IMG_{:03d}_segmentation.png"),
        ("img_{:03d}.png", "mask_{:03d}.png"),
        ("all/{:03d}.jpg", "all/{:03d}_mask.png"),
        ("p{:02d}/photo.png", "p{:02d}/mask.png"),
    ],
)
def test_photographs_and_masks_are_paired_by_name(names, tmp_path):
    report = check(photographs(tmp_path / "skin", *names))
    assert report.problems == []
    assert [v["labelled"] for v in report.volumes] == [True] * 6
    dataset = report.dataset
    assert (dataset.channels, dataset.positions, dataset.classes) == (3, "unknown", {255: "class 255"})
    assert all(geometry.resize for geometry in dataset.geometry.values())
    assert dataset.geometry["paper"].size == [96, 96]


def test_grey_photographs_have_one_channel(tmp_path):
    assert check(photographs(tmp_path / "grey", grey=True)).dataset.channels == 1


def test_one_grey_photograph_among_coloured_ones_is_read_in_colour(tmp_path):
    folder = photographs(tmp_path / "mixed")
    path = folder / "images/IMG_000.png"
    Image.open(path).convert("L").save(path)
    report = check(folder)
    assert (report.problems, report.dataset.channels) == ([], 3)
    assert {v["channels"] for v in report.volumes} == {3}


def test_every_problem_is_told_at_once(tmp_path, capsys):
    folder = medical(tmp_path / "scans", "nnunet")
    truncated, orphan = folder / "imagesTr/case_01_0000.nii.gz", folder / "labelsTr/nobody.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:200])
    save(folder / "imagesTr/case_02_0000.nii.gz", np.full((40, 36, 10), np.nan, np.float32))
    save(orphan, volume(1)[1])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert cli.main(["check", str(folder), "--write", str(tmp_path / "mine.yaml")]) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"clseg: {folder}") for line in lines)
    assert "6 usable" in output.out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "a check writes nothing"


def test_problems_are_in_the_json_too(tmp_path, capsys):
    assert cli.main(["check", str(tmp_path / "scans"), "--json"]) == 2
    output = capsys.readouterr()
    assert [f"clseg: {problem}" for problem in json.loads(output.out)["problems"]] == output.err.splitlines()


def test_the_grid_holds_labels_that_reach_beyond_the_median_volume(tmp_path):
    folder = tmp_path / "scans"
    medical(folder, "pairs")
    for k in range(3):  # of eight: their labels reach 60 pixels of 1.5 mm to each side, the median volume has 40
        image, mask = volume(k, (120, 36, 10))
        mask[0] = 1
        save(folder / f"case_{k:02d}.nii.gz", image)
        save(folder / f"case_{k:02d}_seg.nii.gz", mask)
    geometry = check(folder).dataset.geometry
    assert (geometry["paper"].size, geometry["paper"].spacing_mm) == ([128, 128], 1.5)
    assert geometry["laptop"].spacing_mm == pytest.approx(180 / 64, abs=1e-3)


def test_json_holds_everything(tmp_path, capsys):
    folder = medical(tmp_path / "scans", "msd")
    assert cli.main(["check", str(folder), "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    report = json.loads(output.out)
    assert [v["subject"] for v in report["volumes"]] == [f"case_{k:02d}" for k in range(8)]
    assert report["dataset"]["folder"] == str(folder)
    assert [row["profile"] for row in report["expect"]] == ["smoke", "laptop", "paper"]
    assert all(row["disk_mb"] > 0 and row["memory_mb"] > 500 for row in report["expect"])


def test_disk_and_memory_grow_as_they_must(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    report = check(medical(tmp_path / "scans", "msd"))
    smoke, laptop, paper = expect(report)
    store = prepare(report.dataset, report.dataset.geometry["laptop"], progress=False)
    files = [store.folder / "images.f16", store.folder / "labels.u8"]
    assert laptop["disk_mb"] == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, abs=0.01)
    assert smoke["memory_mb"] < laptop["memory_mb"] < paper["memory_mb"]
    assert laptop["pretrain_minutes"] < paper["pretrain_minutes"]


def test_a_study_takes_what_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    folder = medical(tmp_path / "scans", "nnunet", labelled=5)
    assert cli.main(["check", str(folder), "--write", "My scans.yaml"]) == 0
    dataset = read_dataset("My scans.yaml")
    assert dataset == check(folder, "my_scans").dataset
    assert len(scan(dataset)) == 8
    capsys.readouterr()
    words = ["run", "quickstart", "--dataset", "My scans.yaml", "--set", "study.labelled=[1,2]"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "finetune-gd+lr-labelled2" in capsys.readouterr().out


def test_folds_of_nnunet_are_a_protocol_of_the_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    folder, cases = medical(tmp_path / "scans", "nnunet"), [f"case_{k:02d}" for k in range(8)]
    folds = [{"train": cases[k:] + cases[: k - 4], "val": cases[k - 4 : k]} for k in (4, 8)]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    assert cli.main(["check", str(folder), "--write", "mine.yaml"]) == 0
    assert "study.protocol=nnunet" in capsys.readouterr().out
    words = ["run", "quickstart", "--dataset", "mine.yaml", "--set", "study.labelled=[2]", "--dry-run"]
    names = []
    for protocol in ("seeded", "nnunet"):
        assert cli.main([*words, "--set", f"study.protocol={protocol}"]) == 0
        names.append([line.split()[-1] for line in capsys.readouterr().out.splitlines() if "pretrain-" in line])
    assert len(names[1]) == 2 * len(names[0])  # each fold has its own pre-trainings
    study = read_study("quickstart").model_copy(update={"protocol": "nnunet", "labelled": [2], "draws": [1, 2]})
    for run in grid.expand(study, "mine.yaml", "smoke").all:
        split = runs.split_of(run, prepare(run.experiment.dataset, run.experiment.geometry, progress=False))
        assert list(split.test) == folds[run.parameters.draw - 1]["val"]
        assert not {*split.test} & {*split.pretrain, *split.labelled, *split.validation}


def test_a_data_set_file_is_not_overwritten_and_takes_no_known_name(tmp_path):
    dataset = check(medical(tmp_path / "scans", "msd")).dataset
    path = tmp_path / "mine.yaml"
    write(dataset, path)
    kept = path.read_bytes()
    for wrong, name in ((path, "mine"), (tmp_path / "acdc.yaml", "acdc"), (tmp_path / "mine.txt", "mine")):
        with pytest.raises(RequestError, match=wrong.name):
            write(dataset.model_copy(update={"name": name}), wrong)
    assert path.read_bytes() == kept
    assert sorted(file.name for file in tmp_path.glob("*.*")) == ["mine.yaml"]


@pytest.mark.slow
def test_a_whole_study_on_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    write(check(medical(tmp_path / "scans", "nnunet", labelled=5), "mine").dataset, tmp_path / "mine.yaml")
    words = ["run", "quickstart", "--dataset", "mine.yaml", "--jobs", "1"]
    words += ["--set", "study.labelled=[1]", "--set", "study.draws=[1]", "--set", "study.methods=[random,gd]"]
    assert cli.main(words) == 0
    assert (paths.results_dir("smoke", "mine", "quickstart") / "table.csv").is_file()
    assert list(paths.runs_root().glob("mine/smoke/*quickstart.ipynb"))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("folder", "volumes", "classes", "positions"),
    [("Task04_Hippocampus", 260, ["Anterior", "Posterior"], "known"), ("ph2", 200, ["class 255"], "unknown")],
)
def test_real_folders_are_in_order(folder, volumes, classes, positions, data_root):
    report = check(data_root / folder)
    assert report.problems == []
    assert len(report.volumes) == volumes
    assert [c["name"] for c in report.classes] == classes
    assert report.dataset.positions == positions
    assert report.dataset.geometry["laptop"].size == [64, 64]


def nnunet_copy(source, target):
    """Forty subjects of the hippocampus in nnU-Net v2 layout, five of them with a label."""
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True)
    for k, image in enumerate(sorted(source.glob("imagesTr/hippocampus_*.nii.gz"))[:40]):
        case = image.name.removesuffix(".nii.gz")
        shutil.copyfile(image, target / "imagesTr" / f"{case}_0000.nii.gz")
        if k < 5:
            shutil.copyfile(source / "labelsTr" / image.name, target / "labelsTr" / image.name)
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2}}
    (target / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz", "numTraining": 5}))
    return target


@pytest.mark.real_data
def test_hippocampus_in_nnunet_layout_with_five_labels(data_root, tmp_path):
    report = check(nnunet_copy(data_root / "Task04_Hippocampus", tmp_path / "Dataset004"))
    assert report.problems == []
    assert (len(report.volumes), sum(v["labelled"] for v in report.volumes)) == (40, 5)
    assert report.dataset.geometry["paper"].spacing_mm == 1.0


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Task04_Hippocampus", "ph2", "nnunet"])
def test_the_notebook_for_own_data_then_predict_and_export(kind, data_root, tmp_path, monkeypatch):
    """From a folder to weights, masks of its own grid and weights for other programs."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    folder = data_root / kind
    if kind == "nnunet":
        folder = nnunet_copy(data_root / "Task04_Hippocampus", tmp_path / "Dataset004")
    parameters = {"folder": str(folder), "labelled": 1}
    grid.execute_notebook(paths.NOTEBOOKS / "03_your_data.ipynb", tmp_path / "done.ipynb", parameters)
    (weights,) = paths.runs_root().glob("*/smoke/finetune-g*/weights.safetensors")
    images = sorted(path for path in folder.rglob("imagesTr/*.nii.gz") if not path.name.startswith("."))[-3:]
    images = images or sorted((folder / "images").iterdir())[:3]
    output = tmp_path / "new"
    for image in images:
        assert cli.main(["predict", "--weights", str(weights), "--input", str(image), "--output", str(output)]) == 0
    made = [path for path in output.iterdir() if path.suffix != ".json"]
    assert len(made) == len(images)
    if kind != "ph2":
        case = nib.load(next(path for path in made if path.name.startswith(images[0].name.partition(".")[0][:15])))
        assert np.array_equal(case.affine, nib.load(images[0]).affine)
        assert set(np.unique(case.dataobj)) <= {0, 1, 2}
    copy = tmp_path / "copy.safetensors"
    assert cli.main(["export", "--weights", str(weights), "--format", "safetensors", "--output", str(copy)]) == 0
    assert archive.adaptation(copy)["classes"] == archive.adaptation(weights)["classes"]
