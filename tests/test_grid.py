"""Studies: what a grid holds, that it is done once whatever happens, and what it leaves. Kernels are real here."""

import json
import math
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clseg.errors import RequestError
from clseg.study import archive, grid, results, runs
from clseg.study.files import read_profile, read_study
from clseg.study.parameters import override_study
from clseg.tools import cli


def expand(name, dataset, profile="smoke", overrides=()):
    return grid.expand(read_study(name), dataset, profile, overrides)


def test_the_papers_grid_on_acdc():
    plan = expand("glcl_strategies", "acdc", "paper")
    assert len(plan.finetune) == 7 * (5 + 5 + 3) + 1
    names = [run.name.rpartition("-seed")[0] for run in plan.pretrain]
    contrasts = ["pretrain-contrast-instance", "pretrain-contrast-gd-", "pretrain-contrast-gd"]
    locals_ = ["pretrain-local-lr", "pretrain-local-lr", "pretrain-local-ld"]
    assert sorted(names) == sorted(contrasts + locals_)
    for index, run in enumerate(plan.pretrain):
        assert run.parent is None or run.parent.name in [before.name for before in plan.pretrain[:index]]
    assert plan.notes == [f"8 labelled, draw {draw}: not in the lists of protocol chaitanya" for draw in (4, 5)]


def test_an_ablation_varies_one_key_and_names_it():
    plan = expand("glcl_ablation", "phantom")
    axes = read_study("glcl_ablation").axes
    varied = [run for run in plan.finetune if run.parameters.variant]
    assert len(varied) == 3 * sum(len(axis.values) * len(axis.methods) for axis in axes)
    run = next(run for run in varied if run.method == "gd [stages.0.temperature=0.5]")
    assert run.experiment.stages[0].temperature == 0.5
    assert run.parent.experiment.stages[0].temperature == 0.5


def test_smoke_takes_one_draw_of_a_study_and_what_is_asked_for_by_name():
    study = read_study("glcl_ablation")
    assert study.within(read_profile("smoke")).draws == [1]
    assert study.within(read_profile("laptop")).draws == study.draws == [1, 2, 3]
    asked, _ = override_study(study.within(read_profile("smoke")), ["study.draws=[2, 3]"])
    assert asked.draws == [2, 3]


def test_all_that_is_as_many_as_a_number_is_left_out():
    pool = ["dataset.options.subjects=9", "dataset.protocols.seeded.test=3", "dataset.protocols.seeded.validation=1"]
    words = ["study.methods=[random]", "study.all_labels=[random]", "study.labelled=[2,5]", "study.draws=[1,2]", *pool]
    plan = grid.expand(*_asked("quickstart", words))
    subjects = {run.data: runs.subjects_of(run.experiment) for run in plan.all}
    splits = {run.name: runs.split_of(run, subjects[run.data]) for run in plan.all}
    plan = grid.distinct(plan, splits, subjects)
    assert [run.labelled for run in plan.finetune] == [2, 5, 2]
    assert plan.all_labels == {5}  # there is no other draw of them
    assert "all labelled, draw 1: the same subjects as draw 1 of 5" in plan.notes
    assert "5 labelled, draw 2: the same subjects as draw 1" in plan.notes


def _asked(name, words):
    study, overrides = override_study(read_study(name), words)
    return study, "phantom", "smoke", overrides


def test_contrasts_of_a_transductive_protocol_are_counted():
    study, *rest = _asked("quickstart", ["study.contrasts=[[gd, random]]", "study.protocol=folds"])
    plan = grid.expand(study, *rest)
    assert results._pairs(plan) == [["gd (transductive)", "random"]]
    assert results._declared(plan) == len(study.labelled)


def test_contrasts_of_methods_that_are_not_run_are_named():
    study, _ = override_study(read_study("acdc"), ["study.methods=[random, matched-gr]"])
    notes = grid.expand(study, "acdc", "laptop").notes
    assert "contrast matched-gd minus random: matched-gd is not among the methods" in notes
    assert "all_labels of matched-gd+lr: not among the methods" in notes
    assert not [note for note in notes if "matched-gr" in note]
    assert not [note for note in expand("acdc_published", "acdc", "laptop").notes if "among" in note]  # variants


def test_an_override_that_no_method_can_take_is_refused():
    with pytest.raises(RequestError, match=r"stages.5.slices=4"):
        expand("quickstart", "phantom", overrides=["stages.5.slices=4"])


def test_runs_at_a_time_fit_into_the_memory_of_a_gpu(tmp_path, monkeypatch):
    """One until a finished run has recorded what it takes; never none."""
    monkeypatch.setattr(grid.loop, "device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 2**30, 2**40))

    def finished(name, gigabytes):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps({"gpu_bytes": gigabytes * 2**30}))
        return SimpleNamespace(folder=tmp_path / name)

    memory = grid._Memory([])
    assert memory.room == 1
    memory.learn(finished("small", 1))
    assert memory.room == 10
    memory.learn(finished("large", 3))
    assert memory.room == 3
    memory.learn(finished("other", 2))
    assert memory.room == 3
    assert grid._Memory([finished("too large", 30)]).room == 1
    assert grid._Memory([], "tcp://10.0.0.1:8786").room == math.inf
    monkeypatch.setattr(grid.loop, "device", lambda: torch.device("cpu"))
    assert grid._Memory([finished("anything", 1)]).room == math.inf


def test_a_grid_starts_no_more_runs_than_the_memory_takes(tmp_path, monkeypatch):
    """Of a device that holds two, runs that only wait: never more than two at once, and one before the first ended."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    plan = expand("quickstart", "phantom")
    plan = replace(plan, pretrain=[], finetune=[run for run in plan.finetune if run.parent is None][:3])
    active, seen, lock = [], [], threading.Lock()
    monkeypatch.setattr(grid.loop, "device", lambda: torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * 2**30, 2**40))

    def execute_run(run):
        with lock:
            active.append(run.name)
            seen.append(len(active))
        time.sleep(0.3)
        run.folder.mkdir(parents=True)
        (run.folder / "record.json").write_text(json.dumps({"gpu_bytes": 2**30}))
        with lock:
            active.remove(run.name)
        return "done", ""

    monkeypatch.setattr(grid, "execute_run", execute_run)
    grid.execute(plan, 8)
    assert seen == [1, 1, 2]


def test_the_bar_counts_the_steps_of_runs_that_are_not_done(tmp_path, monkeypatch, capsys):
    """Of two runs of one price, one done and one half done: 75 %; a run that was done before costs nothing."""
    monkeypatch.setattr(grid, "LOG_SECONDS", 0.0)
    first, second = (SimpleNamespace(name=name, cost=100, steps=10, folder=tmp_path / name) for name in "ab")
    with grid.bar_of([first, second], 3) as show:
        assert "1/3 runs" in capsys.readouterr().err
        second.folder.mkdir()
        (second.folder / "progress.json").write_text('{"step": 5, "steps": 10}')
        show({"before", "a"}, [second])
        assert "2/3 runs  75%" in capsys.readouterr().err
    monkeypatch.setattr(grid, "LOG_SECONDS", 60.0)
    with grid.bar_of([first, second], 3) as show:
        capsys.readouterr()
        show({"before", "a"}, [second])
        assert capsys.readouterr().err == ""  # a log gets few lines


def test_dry_run_prints_the_grid_and_trains_nothing(small_grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    assert cli.main([*small_grid.words, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "1 pre-trainings, 2 fine-tunings, 0 of them done" in output
    assert output.count("to do") == 3
    assert not list(tmp_path.rglob("*.csv"))


def test_a_grid_leaves_tables_figures_and_executed_notebooks(whole):
    root, output = whole
    folder = root / "paper_figures/smoke/phantom/quickstart"
    assert {"table.csv", "summary.csv", "contrasts.csv", "provenance.json"} <= {path.name for path in folder.iterdir()}
    assert str(folder) in output
    done = list(root.glob("runs/phantom/smoke/*/status.json"))
    assert len(done) == 3
    assert all((path.parent / "notebook.ipynb").is_file() for path in done)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["runs"] == {"done": 3, "expected": 3}
    frame = archive.read_table(folder / "table.csv")
    assert list(frame.columns) == archive.TABLE_COLUMNS
    assert set(frame["method"]) == {"random", "gd"}
    assert frame["subject"].nunique() == 3


def test_a_finished_grid_is_not_done_again(small_grid, whole):
    root, _ = whole
    before = {path: path.stat().st_mtime_ns for path in root.glob("runs/phantom/smoke/*/status.json")}
    status, output, errors = small_grid.finish(root)
    assert status == 0
    assert "3 of them done" in output
    assert "clseg:" not in errors
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_that_fails_is_named_and_the_others_are_done(small_grid, tmp_path):
    status, _, errors = small_grid.finish(tmp_path, "--set=stages.0.learning_rate=1e30")
    assert status == 1
    assert "2 of 3 runs failed" in errors
    assert "runs/phantom/smoke/pretrain-contrast-gd" in errors
    assert len(list(tmp_path.glob("runs/phantom/smoke/finetune-random*/status.json"))) == 1


def test_a_misspelt_notebook_parameter_is_a_request_error(tmp_path):
    from clseg import paths

    with pytest.raises(RequestError, match="labeled"):
        grid.execute_notebook(paths.NOTEBOOKS / "21_finetune.ipynb", tmp_path / "out.ipynb", {"labeled": 2})
    assert not (tmp_path / "out.ipynb").exists()
