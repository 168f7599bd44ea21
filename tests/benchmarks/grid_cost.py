"""What a run of a grid costs beyond its training: 32 fine-tunings of two steps, two at a time.

Ours executes them as `clseg run` does, in kernels forked from a warm process; stock papermill starts a kernel for each
of the same worker notebooks. What the training itself costs (opening the data, two steps, scoring sixteen test
subjects, writing) is measured in one warm process without notebooks and taken off both. Cost is wall time times the
two jobs, over the runs. All three must leave the same scores, byte for byte. The total holds the start of the warm
process.
"""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import papermill
from common import FEW, Row, absolute, against, temporary_root

from clseg import paths
from clseg.study import grid, runs
from clseg.study.files import read_study
from clseg.study.parameters import override_study
from clseg.study.runs import Run

TITLE = "cost of a run beyond its training, grid of 32 runs"
GOAL = "at most a tenth of stock papermill with one kernel per notebook, results identical"
PEERS = ["papermill"]
JOBS, RUNS, BLOCK = 2, 32, 4


def plan(count: int, more: list[str]) -> grid.Grid:
    """As many fine-tunings of two steps."""
    changes = ["study.methods=[random]", "study.labelled=[1]", "study.draws=[1]", f"study.seeds={list(range(count))}"]
    study, others = override_study(
        read_study("quickstart"), [*changes, "finetune.steps=2", "finetune.validate_every=2", *more]
    )
    return grid.expand(study, "phantom", "smoke", others)


def measure(quick: bool) -> list[Row]:
    count, block = (2, 2) if quick else (RUNS, BLOCK)

    def ours(part: list[Run]) -> None:
        grid.execute(replace(whole, finetune=part), JOBS)

    def stock(part: list[Run]) -> None:
        source, about = paths.NOTEBOOKS / grid.NOTEBOOK["finetune"], {"kernel_name": "python3", "progress_bar": False}
        for run in part:
            run.folder.mkdir(parents=True)
        with ThreadPoolExecutor(JOBS) as threads:
            list(
                threads.map(
                    lambda run: papermill.execute_notebook(
                        source, run.folder / "notebook.ipynb", run.parameters.model_dump(), cwd=paths.NOTEBOOKS, **about
                    ),
                    part,
                )
            )

    def training(part: list[Run]) -> None:
        for run in part:
            runs.do(run)

    ways: dict[str, tuple[Callable[[list[Run]], None], int]] = {
        "ours": (ours, JOBS),
        "stock papermill": (stock, JOBS),
        "training alone": (training, 1),
    }
    with temporary_root() as first, TemporaryDirectory() as second, TemporaryDirectory() as third:
        roots = dict(zip(ways, (first, Path(second), Path(third)), strict=True))
        whole = plan(count, FEW if quick else [])
        runs.open_store(whole.finetune[0].experiment, progress=False)
        for root in list(roots.values())[1:]:
            shutil.copytree(paths.prepared_root(), root / paths.prepared_root().relative_to(first))
        costs: dict[str, list[float]] = {name: [] for name in ways}
        for start in range(0, count, block):
            part = whole.finetune[start : start + block]
            for name, (way, jobs) in ways.items():
                os.environ["CLSEG_OUT"] = str(roots[name])
                began = time.perf_counter()
                way(part)
                costs[name].append((time.perf_counter() - began) * jobs / len(part))
        for run in whole.finetune:
            scores = set()
            for root in roots.values():
                os.environ["CLSEG_OUT"] = str(root)
                assert run.is_done(), run.folder
                scores.add((run.folder / "metrics.csv").read_bytes())
            assert len(scores) == 1, f"{run.name}: other scores"
    beyond = {
        name: [cost - alone for cost, alone in zip(costs[name], costs["training alone"], strict=True)]
        for name in ("ours", "stock papermill")
    }
    total = {name: [sum(values) / len(values)] for name, values in beyond.items()}
    rows = [
        against("cost per run beyond training, with the start of the warm process", total, "stock papermill", 0.1),
        against("cost per run beyond training, blocks of runs", beyond, "stock papermill", None),
    ]
    return rows + [absolute(f"wall time per run, {name}", values, None, "s") for name, values in costs.items()]
