"""Every benchmark runs at its smallest size, and leaves what the notebook reads; nothing here is about time.

That ours and the peers compute the same value is asserted by the benchmarks themselves.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("benchmarks")
ROW = {"case", "value", "low", "high", "n", "unit", "peer", "goal", "met"}
ABOUT = {"benchmark", "title", "goal", "quick", "threads", "peers", "missing_peers", "notes", "rows"}
ABOUT |= {"provenance", "seconds", "code"}
SLOW = {"grid_cost", "memory", "study"}
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__main__", "common"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in NAMES])
def test_a_benchmark_runs_and_says_what_it_measured(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.syspath_prepend(FOLDER)
    importlib.import_module("common").report(name, quick=True)
    said = capsys.readouterr().out
    (written,) = (tmp_path / "paper_figures" / "benchmarks").iterdir()
    about = json.loads(written.read_bytes())
    assert written.name == f"{name}.json"
    assert set(about) == ABOUT
    assert (about["benchmark"], about["quick"]) == (name, True)
    assert str(tmp_path) not in written.read_text()
    assert about["rows"]
    for row in about["rows"]:
        assert set(row) >= ROW, row
        assert row["case"] in said
        assert row["low"] <= row["value"] <= row["high"]
        assert row["met"] == (None if row["goal"] is None else round(row["value"] / row["goal"], 2) <= 1)
        if row["peer"]:
            assert {row["ours"], row["peer"]} <= set(row["medians"])
    goals = [row["goal"] for row in about["rows"] if row["goal"] is not None]
    assert bool(goals) == (name != "growth")


def test_all_are_run_by_name():
    command = [sys.executable, str(FOLDER), "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"choose from {', '.join(NAMES)}" in " ".join(done.stderr.split()).replace("'", "")
