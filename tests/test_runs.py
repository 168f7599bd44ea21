"""Runs: their names, their folders, when they count as done, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from clseg import paths
from clseg.errors import RequestError
from clseg.study import archive, runs
from clseg.study.parameters import FinetuneParameters, PretrainParameters
from clseg.tools import cli

SMALL = ["dataset.options.subjects=12", "dataset.protocols.seeded.test=3", "dataset.protocols.seeded.validation=2"]
FILES = {
    "parameters.json",
    "subjects.json",
    "log.csv",
    "metrics.csv",
    "weights.safetensors",
    "record.json",
    "status.json",
}


def finetuning(method="gd+lr", **changes):
    fields = {"dataset": "phantom", "profile": "smoke", "method": method, "labelled": 1, "overrides": SMALL} | changes
    return runs.finetune_run(FinetuneParameters(**fields))


def test_a_checkpoint_knows_the_code_and_the_data():
    run = finetuning()
    made_by = [runs._checkpoints(run, SimpleNamespace(content=content)).made_by for content in ("one", "other")]
    assert made_by == [f"{run.code} one", f"{run.code} other"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output root in which `gd+lr` has been pre-trained and fine-tuned once."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_OUT", str(root))
        runs.do(finetuning())
    return root


@pytest.fixture
def out(trained, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(trained))
    return trained


def test_the_same_parameters_are_the_same_run_and_any_other_is_another():
    base = finetuning()
    assert finetuning().name == base.name
    others = [
        finetuning(seed=1),
        finetuning(draw=2),
        finetuning(labelled=2),
        finetuning("gd"),
        finetuning(variant="stages.0.temperature=0.5"),
        finetuning(overrides=[*SMALL, "finetune.steps=3"]),
        finetuning(overrides=[*SMALL, "geometry.spacing_mm=7.0"]),
    ]
    assert len({run.name for run in [base, *others]}) == len(others) + 1
    assert finetuning(study="another").name == base.name


def test_pre_trainings_are_shared_by_what_starts_from_them():
    gd, both = finetuning("gd"), finetuning("gd+lr", draw=2, labelled=2)
    assert both.parent.parent.name == gd.parent.name
    assert finetuning(overrides=[*SMALL, "finetune.steps=3"]).parent.name == finetuning().parent.name
    assert finetuning("random").parent is None
    assert finetuning("gd+lr", variant="stages.1.size=1").parent.parent.name == gd.parent.name


def test_a_stage_that_a_method_does_not_have_is_refused():
    with pytest.raises(RequestError, match="2 pre-training stages"):
        runs.pretrain_run(PretrainParameters(dataset="phantom", profile="smoke", method="gd+lr", stage=2))


def test_a_finished_run_holds_everything_that_is_known_of_it(out):
    run = finetuning()
    assert run.is_done()
    assert run.parent.is_done()
    assert run.parent.parent.is_done()
    assert {path.name for path in run.folder.iterdir() if not path.name.startswith(".")} == FILES
    subjects = json.loads((run.folder / "subjects.json").read_text())
    assert len(subjects["labelled"]) == 1
    assert len(subjects["test"]) == 3
    assert len(subjects["validation"]) == 2
    assert not set(subjects["test"]) & {*subjects["pretrain"], *subjects["labelled"], *subjects["validation"]}
    metrics = run.read("metrics")
    assert list(metrics.columns) == [c for c in archive.TABLE_COLUMNS if c != "study"]
    assert len(metrics) == 3 * 3
    assert set(metrics["run"]) == {run.name}
    assert metrics["dice"].dropna().between(0, 1).all()
    record = json.loads((run.folder / "record.json").read_text())
    assert record["best_step"] in (20, 40, 60)
    assert record["provenance"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    adaptation = archive.adaptation(run.folder / "weights.safetensors")
    assert adaptation["network"] == run.experiment.network.model_dump()
    assert adaptation["classes"]["3"] == "left ventricle"


def test_stages_train_what_they_should_and_hand_it_on(out):
    run = finetuning()
    local, contrast = (load_file(r.folder / "weights.safetensors") for r in (run.parent, run.parent.parent))
    store = runs.open_store(run.experiment)
    fresh = runs.build_network(run.parent.parent, store).state_dict()
    assert not any(k.startswith(("decoder", "output")) for k in contrast)
    moved = [
        k
        for k in contrast
        if k.startswith("encoder") and k.endswith("0.weight") and not torch.equal(contrast[k], fresh[k].cpu())
    ]
    assert len(moved) == 12
    names = [k for k in contrast if k.startswith("encoder") and k.endswith((".weight", ".bias"))]
    assert all(torch.equal(contrast[k], local[k]) for k in names)  # the local stage freezes the encoder
    blocks = {k.split(".")[2] for k in local if k.startswith("decoder")}
    assert blocks == {"0", "1", "2"}
    start = runs.build_network(run, store).state_dict()
    assert all(torch.equal(start[k].cpu(), local[k]) for k in names)
    weight = "decoder.blocks.0.up.1.1.weight"
    assert torch.equal(start[weight].cpu(), local[weight])
    assert not torch.equal(start[weight].cpu(), fresh[weight].cpu())


def test_repeated_under_smoke_it_gives_the_same_bytes(out, tmp_path, monkeypatch):
    first = {name: (finetuning().folder / name).read_bytes() for name in ("metrics.csv", "log.csv")}
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    run = runs.do(finetuning())
    assert str(run.folder).startswith(str(tmp_path))
    assert {name: (run.folder / name).read_bytes() for name in first} == first


def test_what_is_done_is_not_done_again(out, monkeypatch):
    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "_finetune", never)
    runs.do(finetuning())


@pytest.mark.parametrize("damage", ["truncate", "remove", "record", "status"])
def test_a_damaged_run_is_not_taken_for_done_and_is_mended(out, damage):
    run = finetuning("random")
    runs.do(run)
    metrics = (run.folder / "metrics.csv").read_bytes()
    weights = run.folder / "weights.safetensors"
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "remove":
        weights.unlink()
    elif damage == "record":
        (run.folder / "record.json").write_text("{}")
    else:
        (run.folder / "status.json").write_text('{"status": "done"')
    assert not run.is_done()
    runs.do(run)
    assert run.is_done()
    assert (run.folder / "metrics.csv").read_bytes() == metrics


def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(out, tmp_path):
    """kill -9 at several moments of pre-training and fine-tuning, then resume."""
    slow = [*SMALL, "pretrain.steps=40", "finetune.steps=40"]
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_runs import finetuning
from clseg.study import runs
print("ready", flush=True)
runs.do(finetuning(overrides={slow!r}))
"""

    def start(root):
        environment = os.environ | {"CLSEG_OUT": str(root), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()
        return process

    began = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    whole = time.monotonic() - began
    for share in (0.3, 0.6, 0.6):
        process = start(tmp_path / "killed")
        time.sleep(share * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "killed").wait() == 0
    run = finetuning(overrides=slow)
    folders = [tmp_path / root / run.folder.relative_to(out) for root in ("whole", "killed")]
    for name in ("metrics.csv", "log.csv"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_lock_is_held_by_one_and_ends_with_it(tmp_path):
    path = tmp_path / "lock"
    with archive.locked(path) as first, archive.locked(path, wait=False) as second:
        assert first
        assert not second
    with archive.locked(path, wait=False) as again:
        assert again


def test_the_table_has_the_tidy_columns_and_skips_what_is_not_done(out):
    run = finetuning()
    other = finetuning("gd", draw=2)
    runs.do(other)
    (other.folder / "status.json").unlink()
    table = archive.table(path.parent for path in paths.runs_root().rglob("parameters.json"))
    assert list(table.columns) == [*archive.TABLE_COLUMNS, "overrides"]
    assert run.name in set(table["run"])
    assert other.name not in set(table["run"])
    assert set(table["study"]) == {""}  # of whichever study had it done first
    assert archive.table([]).empty
    assert list(archive.table([]).columns) == archive.TABLE_COLUMNS


def test_the_table_tells_apart_runs_that_were_told_other_things(out, capsys):
    plain, warmer = finetuning("gd"), finetuning("gd", overrides=[*SMALL, "stages.0.temperature=0.2"])
    ablated = finetuning("gd", variant="stages.0.temperature=0.2")
    for run in (plain, warmer, ablated):
        runs.do(run)
    table = archive.table([plain.folder, warmer.folder, ablated.folder])
    assert list(table.columns) == [*archive.TABLE_COLUMNS, "overrides"]
    said, small = table.groupby("run")[["method", "overrides"]].first(), "; ".join(SMALL)
    assert [*said.loc[plain.name]] == ["gd", small]
    assert [*said.loc[warmer.name]] == ["gd", f"{small}; stages.0.temperature=0.2"]
    assert [*said.loc[ablated.name]] == ["gd [stages.0.temperature=0.2]", small]
    capsys.readouterr()
    assert cli.main(["table", str(paths.runs_root())]) == 0
    told = capsys.readouterr()
    assert (
        " cells (phantom, smoke, gd, 1, 1, 0), of different settings, protocol or code (see `run` and `overrides`); "
        in told.err
    )
    assert told.out.startswith(",".join(table.columns))


def test_a_table_survives_its_file(tmp_path):
    table = pd.DataFrame({"subject": ["001", "NA"], "phase": ["", "ED"], "dice": [0.5, None], "missed": [0, 1]})
    archive.write_table(tmp_path / "t.csv", table)
    pd.testing.assert_frame_equal(archive.read_table(tmp_path / "t.csv"), table, check_dtype=False)


def test_a_run_made_from_other_files_is_not_taken_for_one_of_these(out):
    """More masks or volumes in the folder: the run stays as it is, and what is wrong is said."""
    run = finetuning()
    store = runs.open_store(run.experiment, progress=False)
    runs.require_same_data(run, store)
    record = run.folder / "record.json"
    before = record.read_bytes()
    changed = json.loads(before) | {"content": "0" * 10}
    record.write_text(json.dumps(changed))
    archive.seal(run.folder)
    assert run.is_done()
    with pytest.raises(RequestError, match=r"other files than data set phantom has now; move it away"):
        runs.do(run)
    record.write_bytes(before)
    archive.seal(run.folder)
    assert runs.do(run).is_done()
