"""Rows that outlive a machine: what finished runs found, in four tables per profile and data set.

| table | a row per | columns |
|---|---|---|
| `runs.csv` | run, pre-training or fine-tuning | its name, what it is, how many scores, when and where |
| `scores.csv` | run, subject, phase and structure | Dice, HD95 |
| `probes.csv` | pre-training | what it learned (`clseg.probe`) |
| `losses.csv` | pre-training and at most `POINTS` steps | the mean loss since the row before |

A run's name ends in the hash of all that decides its numbers, the code among it (`Run.name`): a row is of that name or
it is another's. The tables lie in `paper_figures/` of the project and are committed; whoever has them need not repeat
the runs, and `extend` adds what is missing, on any machine.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from clseg import paths, probe
from clseg.errors import RequestError
from clseg.study import archive, runs
from clseg.study.files import read_profile, read_study
from clseg.study.grid import Grid, RunFailed, bar_of, expand
from clseg.study.processes import end_with_parent
from clseg.study.runs import Run

RUNS = [
    *("run", "kind", "method", "labelled", "draw", "seed", "parent", "steps", "last_loss", "scores"),
    *("seconds", "device", "precision", "code", "content", "commit", "torch"),
]
SCORES = ["run", "subject", "phase", "class_name", "dice", "hd95", "hd95_unit", "missed"]
LOSSES = ["run", "step", "loss"]
PROBES = ["run", *probe.COLUMNS]
ORDER = {"runs": RUNS[1:6], "scores": SCORES[:4], "losses": LOSSES[:2], "probes": PROBES[:1]}
POINTS = 60
DECIMALS = 4
WRITE_SECONDS = 20.0


@dataclass(frozen=True)
class Rows:
    """Four tables, each sorted; see the module."""

    runs: pd.DataFrame
    scores: pd.DataFrame
    losses: pd.DataFrame
    probes: pd.DataFrame

    def __add__(self, other: "Rows") -> "Rows":
        """The rows of both; of a run that both have, those of `self`."""
        new = ~other.runs["run"].isin(self.runs["run"])
        names = set(other.runs["run"][new])
        tables = []
        for name, order in ORDER.items():
            mine, theirs = getattr(self, name), getattr(other, name)
            both = [table for table in (mine, theirs[theirs["run"].isin(names)]) if len(table)] or [mine]
            tables.append(pd.concat(both).sort_values([*order, "run"], kind="stable", ignore_index=True))
        return Rows(*tables)

    def of(self, names: Iterable[str]) -> "Rows":
        """Those of these runs."""
        names = set(names)
        tables = (getattr(self, name) for name in ORDER)
        return Rows(*(table[table["run"].isin(names)] for table in tables))

    def table(self, study: str, dataset: str, profile: str) -> pd.DataFrame:
        """The scores as a tidy result table."""
        about = self.runs[["run", "method", "labelled", "draw", "seed"]]
        table = self.scores.merge(about, on="run").assign(study=study, dataset=dataset, profile=profile)
        table = table.astype({"labelled": int, "draw": int})[archive.TABLE_COLUMNS]
        order = ["method", "labelled", "draw", "seed", "subject", "phase", "class_name", "run"]
        return table.sort_values(order, kind="stable", ignore_index=True)


NONE = Rows(*(pd.DataFrame(columns=columns) for columns in (RUNS, SCORES, LOSSES, PROBES)))


def place(profile: str, dataset: str) -> Path:
    """The folder of the committed tables."""
    return paths.COMMITTED / profile / dataset


def read(profile: str, dataset: str) -> Rows:
    """The committed rows of a profile and data set; none where there are none."""
    folder = place(profile, dataset)
    if not (folder / "runs.csv").is_file():
        return NONE
    about, *others = (archive.read_table(folder / f"{name}.csv") for name in ORDER)
    if "scores" not in about:  # of before 30 November 2026
        counts = others[0].groupby("run").size().reindex(about["run"], fill_value=0)
        about.insert(RUNS.index("scores"), "scores", counts.to_numpy())
    kept = [table[table["run"].isin(about["run"])].reset_index(drop=True) for table in others]  # of whole runs
    _require_whole(folder, about, kept[0])
    return Rows(about.astype({"labelled": "Int64", "draw": "Int64"}), *kept)


def _require_whole(folder: Path, about: pd.DataFrame, scores: pd.DataFrame) -> None:
    """Raises `RequestError` where a run is there twice, or a score of a run twice or lost, as after a bad merge."""
    remedy = "take these files from git again, then add rows with --extend"
    if (twice := about["run"].duplicated()).any():
        raise RequestError(f"{folder / 'runs.csv'}: has {about['run'][twice].iloc[0]} twice; {remedy}")
    twice, had = scores.duplicated(SCORES[:4]), about.set_index("run")["scores"]
    there = scores["run"].value_counts().reindex(had.index, fill_value=0)
    if twice.any() or (there != had).any():
        name = scores["run"][twice].iloc[0] if twice.any() else (there != had).idxmax()
        raise RequestError(f"{folder / 'scores.csv'}: {name} had {had[name]} scores and has {there[name]}; {remedy}")


def add(found: Rows, profile: str, dataset: str) -> Rows:
    """Add rows to the committed ones, whoever else does so at the same time; returns them all."""
    with archive.locked(place(profile, dataset) / ".lock"):
        rows = read(profile, dataset) + found
        write(rows, profile, dataset)
    return rows


def write(rows: Rows, profile: str, dataset: str) -> None:
    """Replace the committed rows; `runs.csv` last, as a run counts once it is there."""
    folder = place(profile, dataset)
    folder.mkdir(parents=True, exist_ok=True)
    for name in reversed(ORDER):
        archive.write_table(folder / f"{name}.csv", getattr(rows, name), f"%.{DECIMALS}f")


def collect(done: Iterable[Run]) -> Rows:
    """The rows of finished runs, from their folders."""
    about, scores, losses, probes = [], [NONE.scores], [NONE.losses], [NONE.probes]
    for run in done:
        record, log = json.loads((run.folder / "record.json").read_bytes()), run.read("log")
        made = record["provenance"]
        fields = {"run": run.name, "kind": run.kind, "parent": run.parent.name if run.parent else ""}
        fields |= {"scores": 0, "method": "", "seed": run.parameters.seed, "steps": run.steps}
        fields |= {"last_loss": log["loss"].tail(max(len(log) // 20, 1)).mean()}
        fields |= {"seconds": record["training_seconds"], "device": made["gpu"] or made["cpu"]}
        fields |= {"precision": run.experiment.precision, "code": run.code, "content": record["content"]}
        fields |= {"commit": made["commit"][:12], "torch": made["packages"]["torch"]}
        if run.kind == "finetune":
            metrics = run.read("metrics")
            fields |= {"method": run.method, "labelled": metrics["labelled"].iloc[0], "draw": run.key["draw"]}
            fields["scores"] = len(metrics)
            scores.append(metrics[SCORES])
        about.append(fields)
        if run.kind == "finetune":
            continue
        part = np.arange(len(log)) * min(POINTS, len(log)) // len(log)
        thin = log.groupby(part).agg(step=("step", "last"), loss=("loss", "mean"))
        losses.append(thin.assign(run=run.name)[LOSSES])
        if (run.folder / "probe.csv").is_file():
            probes.append(run.read("probe").assign(run=run.name).reindex(columns=PROBES))
    kept = [[table for table in tables if len(table)] or tables[:1] for tables in (scores, losses, probes)]
    whole = {"labelled": "Int64", "draw": "Int64"}  # of a pre-training there are none
    tables = pd.DataFrame(about, columns=RUNS).astype(whole), *map(pd.concat, kept)
    return Rows(*(table.round(DECIMALS) for table in tables))  # as `write` keeps them


def missing(grid: Grid, rows: Rows) -> list[Run]:
    """The fine-tunings of a grid without rows, seed by seed: every method and draw once before the next seed."""
    have = set(rows.runs["run"])
    return sorted((run for run in grid.finetune if run.name not in have), key=lambda run: run.parameters.seed)


def progress(study: str, dataset: str, profile: str) -> tuple[int, int]:
    """How many fine-tunings of a study have committed rows, and how many it plans."""
    grid = expand(read_study(study).within(read_profile(profile)), dataset, profile)
    return len(grid.finetune) - len(missing(grid, read(profile, grid.place))), len(grid.finetune)


def needed(grid: Grid, rows: Rows) -> dict[str, Run]:
    """The fine-tunings of a grid that have no rows and the pre-trainings that they start from, by name."""
    return {run.name: run for child in missing(grid, rows) for run in (*child.ancestors, child)}


def _do(run: Run) -> str:
    """In a process of `extend`: do a run, without a notebook, and without bars that would write over the one here."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        runs.do(run)
    return run.name


def _begin() -> None:
    """In each process of `extend`: it ends with its parent, and leaves no lock of a progress bar behind if killed."""
    end_with_parent()
    tqdm.set_lock(threading.RLock())


@contextmanager
def _processes(jobs: int, running: Mapping[Future, Run]) -> Iterator[Callable[[Run], Future]]:
    """What does a run in one of `jobs` processes; those that still do one at the end are killed."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield lambda run: pool.submit(_do, run)
    finally:
        children = list((pool._processes or {}).values()) if running else []
        pool.shutdown(wait=not running, cancel_futures=True)
        for child in children:
            child.kill()


def extend(grid: Grid, jobs: int = 1, minutes: float | None = None) -> Rows:
    """Do the runs of a grid that have no rows, and add their rows to the committed tables as they come.

    Runs are done in plain processes, `jobs` at a time, without notebooks. After `minutes` what runs is stopped at its
    last checkpoint; the same call goes on there. A pre-training is done again where its weights are not here.
    Returns the rows of the grid. Raises `RunFailed` when runs failed (the others are done first).
    """
    began = written = time.monotonic()
    rows = read(grid.profile, grid.place)
    here = [run for run in grid.all if run.is_done() and run.name not in set(rows.runs["run"])]
    if here:
        rows = add(collect(here), grid.profile, grid.place)
    every = needed(grid, rows)
    done = {name for name, run in every.items() if run.is_done()}
    waiting = [run for name, run in every.items() if name not in done]
    failed: dict[str, str] = {}
    running: dict[Future, Run] = {}
    found: list[Run] = []
    with _processes(jobs, running) as submit, bar_of(waiting, len(every)) as show:
        while waiting or running:
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            for run in list(waiting):
                parent = run.parent.name if run.parent else None
                if parent in failed:
                    failed[run.name] = f"its pre-training {parent} failed"
                    waiting.remove(run)
                elif len(running) < jobs and (parent is None or parent in done):
                    running[submit(run)] = run
                    waiting.remove(run)
            complete, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for future in complete:
                run = running.pop(future)
                if isinstance(error := future.exception(), BrokenExecutor):
                    remedy = "memory may be full; the same command goes on at its last checkpoint"
                    raise RunFailed(f"{run.folder}: its process was killed ({remedy})")
                if error:
                    failed[run.name] = f"{type(error).__name__}: {error}"
                    tqdm.write(f"{run.name} failed: {error}")
                    continue
                done.add(run.name)
                found.append(run)
            if found and (time.monotonic() - written > WRITE_SECONDS or not (waiting or running)):
                rows, found, written = add(collect(found), grid.profile, grid.place), [], time.monotonic()
            show(done, running.values())
    if found:
        rows = add(collect(found), grid.profile, grid.place)
    if failed:
        lines = [f"{every[name].folder}: {message}" for name, message in failed.items()]
        raise RunFailed(f"{len(failed)} of {len(every)} runs failed\n" + "\n".join(lines))
    return rows.of(run.name for run in grid.all)
