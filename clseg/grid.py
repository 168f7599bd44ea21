"""A study: its grid of runs, executed by papermill in warm kernels, and the tables and figures it leaves.

Every run is one executed worker notebook. Pre-trainings are shared by all fine-tunings that start from them, finished
runs are skipped, and a run that another process holds is waited for, never done twice.
"""

import json
import logging
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from clseg import config, loop, paths, runs, stats
from clseg.config import FinetuneParameters, RequestError, StudyConfig
from clseg.data.splits import available_draws
from clseg.runs import Run

NOTEBOOK = {"pretrain": "20_pretrain.ipynb", "finetune": "21_finetune.ipynb"}
TRIES = 3  # of a run whose kernel died
POLL_SECONDS = 1.0
CONNECT_SECONDS = 10


class RunFailed(Exception):
    """At least one run failed; the message names the folders."""


@dataclass(frozen=True)
class Grid:
    """The runs of a study on one data set; in `pretrain` parents come first. `notes`: what was left out."""

    study: StudyConfig
    profile: str
    pretrain: list[Run]
    finetune: list[Run]
    notes: list[str]

    @property
    def all(self) -> list[Run]:
        return [*self.pretrain, *self.finetune]

    @property
    def place(self) -> str:  # folder name of what concerns the data set
        return self.finetune[0].experiment.dataset.name


def expand(study: StudyConfig, dataset: str, profile: str, overrides: Iterable[str] = ()) -> Grid:
    """The grid of a study: methods x labelled x draws x seeds, and each value of each ablation axis.

    An override of a stage applies to the methods that have it. Raises `RequestError`.
    """
    _require_parameters(paths.NOTEBOOKS / f"{study.notebook}.ipynb")
    methods = config.read_methods()
    budget = config.read_profile(profile)
    common = [*study.set.get(budget.name, []), *overrides]
    for name in [*study.methods, *(m for axis in study.axes for m in axis.methods)]:
        if name not in methods:
            raise RequestError(f"study {study.name}: method {name!r} is not known, {config.nearest(name, methods)}")
    for text in common:
        if not any(text in config.applicable([text], methods[name]) for name in study.methods):
            raise RequestError(f"--set {text}: no method of study {study.name} has this stage")
    cells = [(method, "") for method in study.methods]
    for axis in study.axes:
        cells += [(m, f"{axis.key}={json.dumps(value)}") for value in axis.values for m in axis.methods]
    finetune: dict[str, Run] = {}
    notes: dict[str, None] = {}
    for (method, variant), draw, seed in product(cells, study.draws, study.seeds):
        shared = {"dataset": dataset, "profile": profile, "method": method, "variant": variant, "study": study.name}
        shared |= {name: getattr(study, name) for name in ("protocol", "dimensions", "pretrain_dataset")}
        shared |= {"seed": seed, "draw": draw, "overrides": config.applicable(common, methods[method])}
        for labelled in [0] if methods[method].all_labels else study.labelled:
            run = runs.finetune_run(FinetuneParameters(**shared, labelled=labelled))
            about = f"protocol {run.experiment.protocol}"
            offered = available_draws(run.experiment.division, labelled) if labelled else None
            if offered == []:
                lists = f"{labelled} labelled subjects; it has {', '.join(map(str, run.experiment.division.labelled))}"
                raise RequestError(f"study {study.name}: {about} of {dataset} has no lists with {lists}")
            if offered is not None and draw not in offered:
                notes[f"{labelled} labelled, draw {draw}: not in the lists of {about}"] = None
            else:
                finetune.setdefault(run.name, run)
    pretrain: dict[str, Run] = {}
    for run in finetune.values():
        for parent in run.ancestors:
            pretrain.setdefault(parent.name, parent)
    if not finetune:
        raise RequestError(f"study {study.name}: nothing to run on {dataset}; " + "; ".join(notes))
    return Grid(study, budget.name, list(pretrain.values()), list(finetune.values()), list(notes))


def _require_parameters(source: Path) -> None:
    """Raise `RequestError` unless a notebook has a parameters cell, of which papermill would only warn."""
    with config.reading(source, "notebook"):
        tags = [cell["metadata"].get("tags", []) for cell in json.loads(source.read_bytes())["cells"]]
    if not any("parameters" in some for some in tags):
        raise RequestError(f"{source}: has no cell with the tag `parameters`; give it to the one that assigns them")


def execute_notebook(source: Path, target: Path, parameters: dict[str, Any], **environment: str) -> None:
    """Run a notebook with parameters in a fresh kernel, with more environment; `target` is complete or absent.

    What the kernel writes to its standard streams is kept beside `target` if the notebook fails.
    Raises `RequestError` or `OSError` where the notebook raised one, else papermill's exception.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from clseg.kernels import WarmKernelManager

    _require_parameters(source)
    running, log = target.with_name(f"{target.stem}.running.ipynb"), target.with_suffix(".log")
    manager = type("Manager", (WarmKernelManager,), {"log_file": log, "environment": environment})
    about = {"kernel_name": "python3", "kernel_manager_class": manager, "progress_bar": False, "cwd": paths.NOTEBOOKS}
    log.unlink(missing_ok=True)
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of parameters that our schema checks
    try:
        papermill.execute_notebook(source, running, parameters, **about)
    except PapermillExecutionError as error:
        for kind in (RequestError, OSError):
            if error.ename == kind.__name__:
                raise kind(error.evalue) from None
        raise
    os.replace(running, target)
    log.unlink(missing_ok=True)


def execute_run(run: Run) -> tuple[str, str]:
    """Execute a run's notebook in a kernel.

    Returns ('done' | 'busy' | 'request' | 'machine' | 'failed' | 'died', message); 'machine': it refuses something, it
    may be that the disk is full.
    """
    with runs.locked(run.folder / ".claim", wait=False) as mine:
        if not mine:
            return "busy", ""
        if run.is_done():
            return "done", ""
        source = paths.NOTEBOOKS / NOTEBOOK[run.kind]
        try:
            parameters = run.parameters.model_dump()
            execute_notebook(source, run.folder / "notebook.ipynb", parameters, **{runs.WORKER: "1"})
            runs.seal(run.folder)
        except RequestError as error:
            return "request", str(error)
        except RuntimeError as error:  # of a kernel that died or never answered
            return "died", f"its kernel died {TRIES} times ({error})"
        except OSError as error:
            return "machine", f"{run.folder}: {error}"
        except Exception as error:  # whatever a notebook does must not end the grid
            (run.folder / "error.txt").write_text(str(error), encoding="utf-8")
            return "failed", str(error).strip().rpartition("\n")[2]
        return "done", ""


def _execute_remotely(run: Run, roots: dict[str, str], code: str) -> tuple[str, str]:
    """`execute_run` in a worker of a cluster."""
    if code != loop.CODE:
        return "request", f"{platform.node()} has other code of clseg; give all workers the same"
    os.environ.update(roots)
    # Dask makes its workers daemons, which may have no children; our kernels end with the worker by themselves
    multiprocessing.current_process()._config["daemon"] = False
    return execute_run(run)


@contextmanager
def _executor(jobs: int, scheduler: str) -> Iterator[tuple[Callable[[Run], Future], float]]:
    """What starts a run, and how many at a time: here in kernels, or on the Dask cluster of a scheduler."""
    if not scheduler:
        from clseg import kernels  # with all that a kernel needs: only where notebooks are executed

        executor = ThreadPoolExecutor(jobs)  # of threads that wait for kernels
        try:
            yield lambda run: executor.submit(execute_run, run), jobs
        except BaseException:
            kernels.kill_all()
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
        return
    try:
        from distributed import Client
    except ImportError:
        raise RequestError("--scheduler needs Dask; install the extra: pip install 'clseg[cluster]'") from None
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        remedy = "start one with `dask scheduler`, and workers with `dask worker`"
        raise RequestError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error}); {remedy}") from None
    with client:
        roots = {"CLSEG_DATA": str(paths.data_root()), "CLSEG_OUT": str(paths.out_root())}
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        resources = {"GPU": 1} if any("GPU" in worker["resources"] for worker in workers) else None
        executor = client.get_executor(pure=False, resources=resources)
        yield lambda run: executor.submit(_execute_remotely, run, roots, loop.CODE), jobs or math.inf


class _Memory:
    """How many runs the memory of this machine's GPU holds, beside what other programs have of it: as many as the
    hungriest finished run allows, and one until there is a finished one. Without a GPU, or on a cluster, any number."""

    def __init__(self, done: Iterable[Run], scheduler: str = "") -> None:
        device = loop.device()
        self.free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" and not scheduler else math.inf
        self.need = 0
        for run in done if self.free < math.inf else ():
            self.learn(run)

    def learn(self, run: Run) -> None:
        """Take account of a finished run."""
        self.need = max(self.need, json.loads((run.folder / "record.json").read_bytes()).get("gpu_bytes", 0))

    @property
    def room(self) -> float:
        if self.free == math.inf:
            return math.inf
        return max(self.free // self.need, 1) if self.need else 1


def _step_now(run: Run) -> int:
    try:
        return min(json.loads((run.folder / "progress.json").read_bytes())["step"], run.steps)
    except (OSError, ValueError, KeyError):
        return 0


def execute(grid: Grid, jobs: int, scheduler: str = "") -> None:
    """Do all runs of a grid that are not done, `jobs` at a time, parents first.

    scheduler: the address of a Dask scheduler, whose workers see the same data and output folders; then `jobs` may be
    0, as many as the workers take. Raises `RequestError` when the request turns out wrong, `OSError` when the machine
    refuses something (what runs is let finish), `RunFailed` when a run failed (the others are done first).
    """
    every = {run.name: run for run in grid.all}
    done = {name for name, run in every.items() if run.is_done()}
    todo = [run for name, run in every.items() if name not in done]
    failed: dict[str, str] = {}
    wrong: Exception | None = None
    tries: dict[str, int] = {}
    running: dict[Future, Run] = {}
    if not todo:
        return
    memory = _Memory((every[name] for name in done), scheduler)
    total, finished = sum(run.cost for run in todo), 0.0
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
    with _executor(jobs, scheduler) as (submit, room), tqdm(total=total, bar_format=layout, mininterval=1) as bar:
        while todo or running:
            for run in list(todo):
                parent = run.parent.name if run.parent else None
                if parent in failed:
                    failed[run.name] = f"its pre-training {parent} failed"
                    todo.remove(run)
                elif len(running) < min(room, memory.room) and (parent is None or parent in done) and wrong is None:
                    running[submit(run)] = run
                    todo.remove(run)
            if not running:
                if wrong is not None:
                    break
                continue
            complete, _ = wait(running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in complete:
                run = running.pop(future)
                lost = future.exception()  # a run whose Dask workers died again and again
                outcome, message = ("failed", str(lost)) if lost else future.result()
                tries[run.name] = tries.get(run.name, 0) + (outcome == "died")
                if outcome == "done":
                    done.add(run.name)
                    memory.learn(run)
                    finished += run.cost
                elif outcome == "busy" or (outcome == "died" and tries[run.name] < TRIES):
                    todo.append(run)
                    time.sleep(POLL_SECONDS)
                elif outcome in ("request", "machine"):
                    wrong = RequestError(message) if outcome == "request" else OSError(message)
                else:
                    failed[run.name] = message
                    tqdm.write(f"{run.name} failed: {message}")
            active = sum(run.cost * _step_now(run) / run.steps for run in running.values())
            bar.n = min(finished + active, total)
            bar.set_description_str(f"{len(done)}/{len(every)} runs", refresh=True)
    if wrong is not None:
        raise wrong
    if failed:
        lines = [f"{every[name].folder}: {message}" for name, message in failed.items()]
        raise RunFailed(f"{len(failed)} of {len(every)} runs failed\n" + "\n".join(lines))


def _subjects(run: Run) -> dict[str, str]:
    """The ids of every set of a finished run, a line each."""
    sets = json.loads((run.folder / "subjects.json").read_bytes())
    unused = ("labelled", "validation", "test") if run.kind == "pretrain" else ("pretrain",)
    return {name: " ".join(ids) for name, ids in sets.items() if name not in unused}


def write_results(grid: Grid, command: str) -> Path:
    """Tables, statistics and provenance of a grid's finished runs; returns their folder."""
    folder = paths.results_dir(grid.profile, grid.place, grid.study.name)
    folder.mkdir(parents=True, exist_ok=True)
    folders = [run.folder for run in grid.finetune]
    table = runs.table(folders, grid.study.name)
    runs.write_table(folder / "table.csv", table)
    runs.write_table(folder / "table_last.csv", runs.table(folders, grid.study.name, "metrics_last"))
    runs.write_table(folder / "summary.csv", stats.summary(table))
    tested = stats.compare(table)
    for column in ("p", "p_holm"):  # six decimals would make zeros of them
        tested[column] = tested[column].map(lambda p: "" if p != p else f"{p:.4g}")
    runs.write_table(folder / "comparison.csv", tested)
    records = [json.loads((run.folder / "record.json").read_bytes()) for run in grid.all if run.is_done()]
    logs = [run.read("log").assign(run=run.name) for run in grid.pretrain if run.is_done()]
    runs.write_table(folder / "pretraining.csv", pd.concat([pd.DataFrame(columns=["step", "loss", "run"]), *logs]))
    about = {
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        **runs.provenance(),
        "commits of the runs": sorted({record["provenance"]["commit"] for record in records}),
        "runs": {"expected": len(grid.all), "done": len(records)},
        "training_seconds": round(sum(record["training_seconds"] for record in records), 1),
        "training_seconds_by_run": {record["run"]: record["training_seconds"] for record in records},
        "expected_runs": [run.name for run in grid.finetune],
        "settings": {run.method: run.experiment.model_dump(exclude={"dataset"}) for run in grid.finetune},
        "dataset": grid.finetune[0].experiment.dataset.model_dump(exclude={"protocols", "geometry", "geometry_3d"}),
        "subjects": {run.name: _subjects(run) for run in grid.all if run.is_done()},
    }
    runs.write_json(folder / "provenance.json", about)
    return folder


@dataclass(frozen=True)
class Results:
    """What a study left on one data set, for its figure notebook. `missing`: cells of the grid without a run."""

    folder: Path
    table: pd.DataFrame
    last: pd.DataFrame
    summary: pd.DataFrame
    comparison: pd.DataFrame
    provenance: dict[str, Any]
    pretraining: pd.DataFrame
    missing: list[str]
    command: str

    @property
    def shown(self) -> str:
        """The folder as a reader knows it, without the root."""
        return "/".join(self.folder.parts[-4:])

    @property
    def about(self) -> str:
        """Which results these are, how they were made, and on what."""
        about, made_by = self.provenance, f"{self.shown}\nmade by: {self.provenance['command']}"
        time = f"{about['training_seconds'] / 60:.0f} minutes of training on {about['gpu'] or 'a CPU'}"
        return f"{made_by}\n{about['runs']['done']} runs, {time}\n{about['dataset']['description']}"

    @property
    def gaps(self) -> str:
        """The cells of the grid that have no run, and the command that makes them."""
        lines = [f"{len(self.missing)} cells are missing", *(f"  {cell}" for cell in self.missing[:10])]
        return "\n".join(lines + [f"make them with: {self.command}"] * bool(self.missing))

    @property
    def dice(self) -> str:
        """Means with intervals, a line per method and number of labelled subjects."""
        numbers = ["n_subjects", "n_draws", "dice_mean", "dice_low", "dice_high", "dice_sd_draws"]
        return self.summary[["method", "labelled", *numbers]].round(2).to_string(index=False)

    @property
    def tests(self) -> str:
        """Paired tests against `random`, a line per method and number of labelled subjects."""
        columns = ["method", "labelled", "n_subjects", "n_runs", "median_difference", "rank_biserial"]
        tested = self.comparison[columns].round(3)
        return tested.assign(p_holm=self.comparison["p_holm"].map("{:.1e}".format)).to_string(index=False)

    @property
    def distances(self) -> pd.DataFrame:
        """Surface distances and missed structures."""
        columns = ["hd95_mean", "hd95_unit", "missed", "missed_share", "scored_rows"]
        return self.summary[["method", "labelled", *columns]].round(3)

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure beside the tables, as PNG, under the output root."""
        profile, dataset, study = self.folder.parts[-3:]
        folder = paths.results_dir(profile, dataset, study)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches="tight")


def read_results(study: str, dataset: str, profile: str) -> Results:
    """The tables of a study: of this output root, else those that come with the project. Raises `RequestError`."""
    command = f"clseg run {study} --dataset {dataset} --profile {profile}"
    about, of = config.read_study(study), config.read_dataset(dataset).name
    own = paths.results_dir(config.read_profile(profile).name, of, about.name)
    places = own, paths.PROJECT / own.relative_to(paths.out_root())
    if not (folder := next((place for place in places if (place / "table.csv").is_file()), None)):
        raise RequestError(f"study {study} has no results for {dataset}, profile {profile}; make them with: {command}")
    names = ("table", "table_last", "summary", "comparison", "pretraining")
    table, last, summary, comparison, pretraining = (runs.read_table(folder / f"{name}.csv") for name in names)
    there = set(zip(table["method"], table["labelled"], table["draw"], table["seed"], strict=True))
    benchmark = {(method, 0, draw, seed) for method, _, draw, seed in there}
    missing = []
    for run in expand(about, dataset, profile).finetune:
        cell = (run.method, run.parameters.labelled, run.key["draw"], run.parameters.seed)
        if cell not in (benchmark if run.experiment.all_labels else there):
            missing.append(f"{run.method}, {run.key['labelled']} labelled, draw {cell[2]}, seed {cell[3]}")
    provenance = json.loads((folder / "provenance.json").read_bytes())
    return Results(folder, table, last, summary, comparison, provenance, pretraining, missing, command)


def ablation_axes(study: str, dataset: str, profile: str, summary: pd.DataFrame) -> pd.DataFrame:
    """The summary rows of an ablation, one per axis and value: columns axis, value, base (the method's own value), and
    those of the summary."""
    rows = []
    for axis in config.read_study(study).axes:
        key = axis.key.split(".")
        for method in axis.methods:
            tree = config.resolve(dataset, profile, method).model_dump()
            for part in key:
                tree = tree[int(part) if part.isdigit() else part]
            values = {method: tree} | {f"{method} [{axis.key}={json.dumps(value)}]": value for value in axis.values}
            named = summary["method"].str.removesuffix(runs.SEEN)
            found = summary[named.isin(values)].assign(axis=axis.name, base=named == method, value=named.map(values))
            rows.append(found.assign(method=method))
    table, first = pd.concat(rows), ["axis", "value", "base"]
    return table[[*first, *table.columns.drop(first)]]


def draw_figures(grid: Grid, parameters: dict[str, str]) -> Path:
    """Execute the study's figure notebook on its table; returns the executed notebook.

    parameters: study, dataset and profile, by name or by file.
    """
    study = grid.study
    target = paths.runs_root() / grid.place / grid.profile / f"{study.notebook}-{study.name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    execute_notebook(paths.NOTEBOOKS / f"{study.notebook}.ipynb", target, parameters)
    return target
