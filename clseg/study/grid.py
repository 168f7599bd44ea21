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
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from clseg import loop, paths
from clseg.data.formats import Subjects
from clseg.data.splits import Split, available_draws
from clseg.data.store import Store
from clseg.digest import package_digest
from clseg.errors import RequestError, nearest, reading
from clseg.recipes import RECIPES
from clseg.study import archive, runs
from clseg.study.files import known_names, read_methods, read_profile
from clseg.study.parameters import RECIPE, FinetuneParameters, applicable
from clseg.study.runs import Run
from clseg.study.schema import MethodConfig, ProfileConfig, StudyConfig

NOTEBOOK = {"pretrain": "20_pretrain.ipynb", "finetune": "21_finetune.ipynb"}
TRIES = 3  # of a run whose kernel died
POLL_SECONDS = 1.0
LOG_SECONDS = 30.0  # between two lines of progress in a file
CONNECT_SECONDS = 10
CODE = package_digest()


class RunFailed(Exception):
    """At least one run failed; the message names the folders."""


@dataclass(frozen=True)
class Grid:
    """The runs of a study on one data set; in `pretrain` parents come first. `notes`: what was left out; `all_labels`:
    the numbers of labelled subjects that are all there are, as far as `distinct` found them."""

    study: StudyConfig
    profile: str
    pretrain: list[Run]
    finetune: list[Run]
    notes: list[str]
    all_labels: frozenset[int] = frozenset()

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
    methods = read_methods()
    budget = read_profile(profile)
    common = [*study.set.get(budget.name, []), *overrides]
    _require_names(study, budget, methods)
    for text in common:
        if not any(text in applicable(common, methods[name]) for name in study.methods):
            raise RequestError(f"--set {text}: no method of study {study.name} has this stage, or reads this key")
    cells = [(method, "") for method in study.methods]
    for axis in study.axes:
        cells += [(m, f"{axis.key}={json.dumps(value)}") for value in axis.values for m in axis.methods]
    finetune: dict[str, Run] = {}
    notes = dict.fromkeys(_passed_over(study))
    for (method, variant), draw, seed in product(cells, study.draws, study.seeds):
        shared = {"dataset": dataset, "profile": profile, "method": method, "variant": variant, "study": study.name}
        shared |= {name: getattr(study, name) for name in ("protocol", "dimensions", "pretrain_dataset")}
        shared |= {"seed": seed, "draw": draw, "overrides": applicable(common, methods[method])}
        some = [] if methods[method].all_labels else study.labelled
        every = [0] if methods[method].all_labels or method in study.all_labels else []
        for labelled in [*some, *every]:
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


def _require_names(study: StudyConfig, budget: ProfileConfig, methods: Mapping[str, MethodConfig]) -> None:
    """Raise `RequestError` where a study or profile names what is not there, which would be passed over in silence."""
    named = [*study.methods, *study.all_labels, *(m for axis in study.axes for m in axis.methods)]
    named += [re.sub(r" [\[(].*", "", name) for pair in study.contrasts for name in pair]  # without an ablated value
    who = ["*", *methods, *(RECIPE + recipe for recipe in RECIPES)]
    for owner, names, valid in (
        (f"study {study.name}", named, methods),
        (f"profile {budget.name}: set", budget.set, who),
    ):
        if unknown := [name for name in names if name not in valid]:
            raise RequestError(f"{owner}: method {unknown[0]!r} is not known, {nearest(unknown[0], valid)}")
    profiles = known_names("profiles")  # and there may be others, in files
    for name in study.set:
        if name not in (*profiles, budget.name) and "did you mean" in (hint := nearest(name, profiles)):
            raise RequestError(f"study {study.name}: set: profile {name!r} is not known, {hint}")
    for first, second in study.contrasts:
        if first == second:
            raise RequestError(f"study {study.name}: contrasts: {first} minus itself is no contrast; name two methods")


def _passed_over(study: StudyConfig) -> Iterator[str]:
    """What a study says of methods that are not among its own, as when `--set study.methods=...` names fewer."""
    there = {*study.methods}
    for name in study.all_labels:
        if name not in there:
            yield f"all_labels of {name}: not among the methods"
    there |= {f"{m} [{axis.key}={json.dumps(v)}]" for axis in study.axes for m in axis.methods for v in axis.values}
    for pair in study.contrasts:
        if absent := [name for name in pair if name.removesuffix(runs.SEEN) not in there]:
            yield f"contrast {pair[0]} minus {pair[1]}: {absent[0]} is not among the methods"


def distinct(grid: Grid, splits: Mapping[str, Split], subjects: Mapping[str, Subjects | Store]) -> Grid:
    """The grid without draws that label, validate and test the subjects of an earlier draw: they would count twice.

    splits: of its fine-tunings by name; subjects: of each `Run.data`. A protocol that draws subjects by chance may
    draw a set again, and of n subjects there are no more than C(n, k) sets of k. "All" may be as many as one of the
    numbers.
    """
    first: dict[tuple, Run] = {}
    kept, all_labels, notes = [], set(), dict.fromkeys(grid.notes)
    for run in sorted(grid.finetune, key=lambda run: (run.labelled == "all", run.parameters.draw)):
        split = splits[run.name]
        if {*split.labelled} == {*subjects[run.data].labelled_subjects} - {*split.test, *split.validation}:
            all_labels.add(len(split.labelled))
        others = run.parameters.model_dump_json(exclude={"draw", "labelled"})
        sets = map(frozenset, (split.labelled, split.test, split.validation))
        before = first.setdefault((others, *sets), run)
        if before is run:
            kept.append(run.name)
            continue
        same = f"draw {before.parameters.draw}" + f" of {before.labelled}" * (before.labelled != run.labelled)
        notes[f"{run.labelled} labelled, draw {run.parameters.draw}: the same subjects as {same}"] = None
    finetune = [run for run in grid.finetune if run.name in set(kept)]
    needed = {parent.name for run in finetune for parent in run.ancestors}
    pretrain = [run for run in grid.pretrain if run.name in needed]
    about = {"notes": list(notes), "all_labels": frozenset(all_labels)}
    return replace(grid, pretrain=pretrain, finetune=finetune, **about)


def _require_parameters(source: Path) -> None:
    """Raise `RequestError` unless a notebook has a parameters cell, of which papermill would only warn."""
    with reading(source, "notebook"):
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

    from clseg.study.kernels import WarmKernelManager

    _require_parameters(source)
    running, log = target.with_name(f"{target.stem}.running.ipynb"), target.with_suffix(".log")
    manager = type("Manager", (WarmKernelManager,), {"log_file": log, "environment": environment})
    about = {"kernel_name": "python3", "language": "python", "kernel_manager_class": manager}
    about |= {"progress_bar": False, "cwd": paths.NOTEBOOKS}
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
    with archive.locked(run.folder / ".claim", wait=False) as mine:
        if not mine:
            return "busy", ""
        if run.is_done():
            return "done", ""
        source = paths.NOTEBOOKS / NOTEBOOK[run.kind]
        try:
            parameters = run.parameters.model_dump()
            execute_notebook(source, run.folder / "notebook.ipynb", parameters, **{runs.WORKER: "1"})
            archive.seal(run.folder)
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
    if code != CODE:
        return "request", f"{platform.node()} has other code of clseg; give all workers the same"
    os.environ.update(roots)
    # Dask makes its workers daemons, which may have no children; our kernels end with the worker by themselves
    multiprocessing.current_process()._config["daemon"] = False
    return execute_run(run)


@contextmanager
def _executor(jobs: int, scheduler: str) -> Iterator[tuple[Callable[[Run], Future], float]]:
    """What starts a run, and how many at a time: here in kernels, or on the Dask cluster of a scheduler."""
    if not scheduler:
        from clseg.study import kernels  # with all that a kernel needs: only where notebooks are executed

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
        yield lambda run: executor.submit(_execute_remotely, run, roots, CODE), jobs or math.inf


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


@contextmanager
def bar_of(todo: Iterable[Run], total: int) -> Iterator[Callable[[set[str], Iterable[Run]], None]]:
    """A bar of what the runs of `todo` cost; `total` counts those done before, too. Call what it gives with the names
    of done runs and with those that run now."""
    cost = {run.name: run.cost for run in todo}
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left"
    often = POLL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(total=sum(cost.values()), bar_format=layout, desc=f"{total - len(cost)}/{total} runs") as bar:
        shown = time.monotonic()

        def show(done: set[str], running: Iterable[Run]) -> None:
            nonlocal shown
            finished = sum(cost[name] for name in done & cost.keys())
            active = sum(run.cost * _step_now(run) / run.steps for run in running)
            bar.n = min(finished + active, bar.total)
            due = time.monotonic() - shown >= often
            shown = time.monotonic() if due else shown
            bar.set_description_str(f"{len(done)}/{total} runs", refresh=due)

        yield show


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
    with _executor(jobs, scheduler) as (submit, room), bar_of(todo, len(every)) as show:
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
                elif outcome == "busy" or (outcome == "died" and tries[run.name] < TRIES):
                    todo.append(run)
                    time.sleep(POLL_SECONDS)
                elif outcome in ("request", "machine"):
                    wrong = RequestError(message) if outcome == "request" else OSError(message)
                else:
                    failed[run.name] = message
                    tqdm.write(f"{run.name} failed: {message}")
            show(done, running.values())
    if wrong is not None:
        raise wrong
    if failed:
        lines = [f"{every[name].folder}: {message}" for name, message in failed.items()]
        raise RunFailed(f"{len(failed)} of {len(every)} runs failed\n" + "\n".join(lines))
