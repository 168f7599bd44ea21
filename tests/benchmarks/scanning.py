"""Scanning 2,000 finished runs before a resume: what `clseg run` does until the first kernel would start.

That is: the grid is expanded, every run's status, record and files are looked at, its subjects are drawn, and its data
files are compared; what the runs of one more seed, which are not done, will cost is estimated. The folders are those of
one finished run, linked under the name of each run of the grid.
"""

import os
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest.mock import patch

from common import FEW, Row, absolute, temporary_root

from clseg.study import grid, runs
from clseg.study.files import read_study
from clseg.study.parameters import override_study
from clseg.study.runs import Run
from clseg.tools import cli

TITLE = "scanning finished runs before a resume"
GOAL = "2,000 runs in under 2 s"
PEERS: list[str] = []


def changes(seeds: int, quick: bool) -> list[str]:
    """`--set` of a grid with 19 runs per seed, pre-trainings among them."""
    return [
        f"study.seeds={list(range(seeds))}",
        *("study.methods=[random,gd]", "study.labelled=[1,2,4]", "study.draws=[1,2,3]"),
        *("pretrain.steps=2", "finetune.steps=2", "finetune.validate_every=2"),
        *(FEW if quick else []),
    ]


def expand(seeds: int, quick: bool) -> grid.Grid:
    study, others = override_study(read_study("quickstart"), changes(seeds, quick))
    return grid.expand(study, "phantom", "smoke", others)


def finish(whole: grid.Grid) -> None:
    """Finish all runs of a grid: two are done, the folders of the others hold links to their files."""
    done: dict[str, Run] = {}
    for run in whole.all:
        if run.kind not in done:
            done[run.kind] = runs.do(run)
        source = done[run.kind].folder
        if run.folder != source:
            run.folder.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                if file.is_file() and not (run.folder / file.name).exists():
                    os.link(file, run.folder / file.name)


def until_the_first_kernel(seeds: int, quick: bool) -> float:
    """Seconds of `clseg run` up to the execution of the grid."""

    class Reached(Exception):
        pass

    words = ["run", "quickstart", *(word for text in changes(seeds, quick) for word in ("--set", text))]
    began = time.perf_counter()
    try:
        with (
            patch.object(grid, "execute", side_effect=Reached),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            cli.main(words)
    except Reached:
        return time.perf_counter() - began
    raise AssertionError("clseg run ended before it executed anything")


def measure(quick: bool) -> list[Row]:
    seeds, rounds = (1, 2) if quick else (106, 5)
    with temporary_root():
        whole = expand(seeds, quick)
        finish(whole)
        looked, all_of_it = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            assert all(run.is_done() for run in whole.all)
            looked.append(time.perf_counter() - began)
            all_of_it.append(until_the_first_kernel(seeds + 1, quick))
        runs_of_it = f"{len(whole.all)} runs"
    return [
        absolute(f"{runs_of_it}: all that `clseg run` does before the first kernel", all_of_it, 2.0, "s"),
        absolute(f"{runs_of_it}: status, record and files alone", looked, None, "s"),
    ]
