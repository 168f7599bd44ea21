"""The command line as a user meets it: exit status and one clear sentence."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from clseg import cli, config


def clseg(*words, out, data=None):
    environment = os.environ | {"CLSEG_OUT": str(out), "OMP_NUM_THREADS": "1"}
    if data is not None:
        environment["CLSEG_DATA"] = str(data)
    return subprocess.run(
        [sys.executable, "-m", "clseg", *words], env=environment, capture_output=True, text=True, check=False
    )


def test_methods_and_data_sets_are_listed_a_line_each(capsys):
    assert cli.main(["methods"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(config.read_methods())
    assert cli.main(["datasets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == config.names("datasets")
    for name, about in zip(config.names("datasets"), lines[1::2], strict=True):  # indented, where to get it
        dataset = config.read_dataset(name)
        assert about.startswith("    ")
        assert all(text in about for text in (dataset.source, dataset.licence, dataset.tree, dataset.download_size))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quickstrat"], "did you mean 'quickstart'"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "quickstart", "--profile", "smoky"], "did you mean 'smoke'"),
        (["run", "quickstart", "--dataset", "phantoms"], "did you mean 'phantom'"),
        (["run", "quickstart", "--set", "pretrain.step=1"], "did you mean 'steps'"),
        (["run", "quickstart", "--set", "study.method=[gd]"], "did you mean 'methods'"),
        (["run", "quickstart", "--set", "study.methods=[gdd]"], "did you mean"),
        (["run", "quickstart", "--set", "study.labelled=[1000]"], "1000"),
        (["run", "glcl_strategies", "--set", "study.labelled=[3]"], "no lists with 3 labelled"),
        (["run", "glcl_strategies"], "acdc"),
        (["run", "quickstart", "--set", "stages.0.partitions=40"], "40"),
        (["table", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    errors = capsys.readouterr().err
    line = next(line for line in errors.splitlines() if line.startswith("clseg: "))
    assert message in line
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("pretrain*/status.json"))


def msd_folder(root, label=None, image=None):
    """A small folder in MSD layout; `label` and `image` change one volume of it."""
    import json

    import nibabel as nib

    generator = np.random.default_rng(0)
    folder = root / "Task04_Hippocampus"
    cases = [f"hippocampus_{k:03d}" for k in range(80)]
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    values = generator.integers(0, 1000, (34, 48, 8)).astype(np.int16)
    mask = np.zeros((34, 48, 8), np.uint8)
    mask[10:20, 10:20], mask[10:20, 25:35] = 1, 2
    for k, case in enumerate(cases):
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / "imagesTr" / f"{case}.nii.gz")
        nib.save(
            nib.Nifti1Image(mask if k or label is None else label(mask), np.eye(4)),
            folder / "labelsTr" / f"{case}.nii.gz",
        )
    if image is not None:
        (folder / "imagesTr" / f"{cases[0]}.nii.gz").write_bytes(image)
    listed = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in cases]
    about = {
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "modality": {"0": "MRI"},
        "training": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return root


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"image": b"not an image"}, "imagesTr/hippocampus_000.nii.gz"),
        ({"label": lambda mask: mask + 5}, "labelsTr/hippocampus_000.nii.gz"),
    ],
)
def test_wrong_data_end_in_one_sentence_and_status_2(damage, message, tmp_path):
    data = msd_folder(tmp_path / "data", **damage)
    done = clseg(
        "run", "glcl_strategies", "--dataset", "hippocampus", "--profile", "smoke", out=tmp_path / "out", data=data
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").rglob("status.json"))


def test_the_console_command_is_the_module(tmp_path):
    done = clseg("--version", out=tmp_path)
    assert done.returncode == 0
    assert done.stdout.strip()


def test_the_draws_of_a_study_are_written_for_nnunet(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    words = ["run", "quickstart", "--dry-run", "--splits", str(tmp_path / "splits_final.json")]
    assert cli.main([*words, "--set", "study.labelled=[2]"]) == 0
    folds = json.loads((tmp_path / "splits_final.json").read_text())
    draws = len(config.read_study("quickstart").draws)
    assert len(folds) == draws
    assert all(len(fold["train"]) == 2 and not set(fold["train"]) & set(fold["val"]) for fold in folds)
