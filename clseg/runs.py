"""Runs: one pre-training stage or one fine-tuning each, with a folder that holds all that is known about it.

The folder is named by readable fields and a hash of everything that decides the run's numbers. Files are complete or
absent; `status.json` comes last and names the hash of `record.json`, which names the size of every other file. A run
counts as done only while all of that agrees.
"""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import torch
from safetensors.torch import load_file, save_file

from clseg import __version__, config, paths
from clseg.config import Experiment, FinetuneParameters, Optimisation, PretrainParameters, RequestError
from clseg.data.prepare import Store, prepare
from clseg.data.splits import Split, make_split, unlabelled
from clseg.loop import Fit, Training, Work, device, fit, seed_of, write_atomically, write_json
from clseg.models import UNet, transfer
from clseg.recipes import RECIPES
from clseg.recipes.evaluation import scores, validation_dice
from clseg.stages import STAGES

TABLE_COLUMNS = (
    *("study", "dataset", "profile", "method", "labelled", "draw", "seed"),
    *("subject", "phase", "class_name", "dice", "hd95", "hd95_unit", "missed", "run"),
)
# set in kernels of a grid: there the worker seals the run, after the executed notebook is in place
WORKER = "CLSEG_WORKER"
PACKAGES = ("torch", "numpy", "pandas", "scipy", "nibabel")


@dataclass(frozen=True)
class Run:
    """A run that may or may not have been done yet. `parent`: the pre-training whose weights it starts from."""

    parameters: PretrainParameters | FinetuneParameters
    parent: "Run | None"

    @cached_property
    def experiment(self) -> Experiment:
        return self.parameters.experiment()

    @property
    def kind(self) -> str:
        return "pretrain" if isinstance(self.parameters, PretrainParameters) else "finetune"

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides the numbers of this run."""
        experiment, parameters = self.experiment, self.parameters
        common = {
            "kind": self.kind,
            "data": experiment.data_key(),
            "network": experiment.network.model_dump(),
            "threads": experiment.threads,
            "precision": experiment.precision,
            "seed": parameters.seed,
            "parent": self.parent.name if self.parent else "",
        }
        if isinstance(parameters, PretrainParameters):
            stage = experiment.stages[parameters.stage].model_dump()
            return common | {"stage": stage, "steps": self.steps, "max_slices": experiment.pretrain.max_slices}
        return common | {
            "recipe": experiment.recipe.model_dump(),
            "budget": experiment.finetune.model_dump(),
            "labelled": "all" if experiment.all_labels else parameters.labelled,
            "draw": 1 if experiment.all_labels else parameters.draw,
        }

    @cached_property
    def name(self) -> str:
        parameters = self.parameters
        if isinstance(parameters, PretrainParameters):
            stage = self.experiment.stages[parameters.stage]
            fields = [stage.stage, *filter(None, [getattr(stage, "answer", "")])]
        else:
            variant = parameters.variant.rpartition(".")[2].replace("/", "_").replace(" ", "")
            fields = [parameters.method, *filter(None, [variant, parameters.pretrain_dataset])]
            fields += [f"labelled{self.key['labelled']}", f"draw{self.key['draw']}"]
        return "-".join([self.kind, *fields, f"seed{parameters.seed}", config.digest(self.key)])

    @property
    def folder(self) -> Path:
        return paths.runs_root() / self.experiment.dataset.name / self.experiment.profile / self.name

    @property
    def method(self) -> str:
        """The method as results name it: with the ablated value if there is one, and if test subjects pre-train it."""
        protocol = self.experiment.dataset.protocols[self.experiment.protocol]
        own = self.parent and not getattr(self.parameters, "pretrain_dataset", "")
        seen = " (transductive)" if protocol.transductive and own else ""
        return self.parameters.method + (f" [{self.parameters.variant}]" if self.parameters.variant else "") + seen

    @property
    def steps(self) -> int:
        if isinstance(self.parameters, PretrainParameters):
            stage, budget = self.experiment.stages[self.parameters.stage], self.experiment.pretrain
            return budget.steps_of.get(stage.stage, budget.steps)
        return self.experiment.finetune.steps

    @property
    def cost(self) -> float:
        """Price relative to other runs, about image passes; only for estimates of the time left."""
        experiment = self.experiment
        if isinstance(self.parameters, PretrainParameters):
            return self.steps * 2.0 * experiment.stages[self.parameters.stage].slices
        return self.steps * 2.5 * experiment.finetune.batch

    def is_done(self) -> bool:
        return is_done(self.folder)

    def read(self, name: str) -> pd.DataFrame:
        """`log`, `metrics` (best on validation) or `metrics_last` of a finished run."""
        return read_table(self.folder / f"{name}.csv")


def pretrain_run(parameters: PretrainParameters) -> Run:
    """The run of one stage of a method; stages before it are its parents. Raises `RequestError`."""
    stages = parameters.experiment().stages
    if parameters.stage >= len(stages):
        raise RequestError(
            f"stage {parameters.stage}: method {parameters.method!r} has {len(stages)} pre-training stages, from 0 on"
        )
    before = parameters.model_copy(update={"stage": parameters.stage - 1})
    return Run(parameters, pretrain_run(before) if parameters.stage else None)


def finetune_run(parameters: FinetuneParameters) -> Run:
    """The run of one fine-tuning; its parent is the last pre-training stage of the method. Raises `RequestError`."""
    stages = parameters.experiment().stages
    if not stages:
        return Run(parameters, None)
    shared = parameters.model_dump(exclude={"labelled", "draw", "pretrain_dataset"})
    if parameters.pretrain_dataset:
        shared |= {"dataset": parameters.pretrain_dataset, "protocol": ""}
    return Run(parameters, pretrain_run(PretrainParameters(**shared, stage=len(stages) - 1)))


# ------------------------------------------------------------------------------------------------------------ training


def open_store(experiment: Experiment, progress: bool = True) -> Store:
    """The prepared data set of an experiment."""
    return prepare(experiment.dataset, experiment.geometry, progress)


def split_of(run: Run, store: Store) -> Split:
    """The subjects of a run. A pre-training has no labelled set of its own."""
    experiment, parameters = run.experiment, run.parameters
    protocol = experiment.dataset.protocols[experiment.protocol]
    labelled, draw = "all", 1
    if isinstance(parameters, FinetuneParameters) and not experiment.all_labels:
        labelled, draw = parameters.labelled, parameters.draw
    split = make_split(protocol, store.subjects, store.labelled_subjects, labelled, draw)
    return replace(split, pretrain=unlabelled(split, experiment.unlabelled))


def _network(run: Run, store: Store) -> UNet:
    experiment = run.experiment
    return UNet(store.channels, store.num_classes, experiment.network, experiment.geometry.dimensions)


def build_network(run: Run, store: Store) -> UNet:
    """The network as the run starts with it: seeded weights, then the parent's where there is one."""
    torch.manual_seed(seed_of(run.parameters.seed, "network"))
    network = _network(run, store)
    if run.parent is not None:
        transfer(network, earlier_weights(run), run.parent.folder / "weights.safetensors")
    return network.to(device())


def stage_work(run: Run, store: Store, split: Split, network: UNet) -> Work:
    """What the stage of a pre-training works on."""
    stage, limit = run.experiment.stages[run.parameters.stage], run.experiment.pretrain.max_slices
    slices, rows = min(stage.slices, limit or stage.slices), store.rows(split.pretrain)
    return Work(network, store, rows, slices, run.parameters.seed, run.steps, earlier=earlier_weights(run))


def earlier_weights(run: Run) -> dict[str, torch.Tensor]:
    """The weights that the run's parent left, none without a parent."""
    return load_file(run.parent.folder / "weights.safetensors") if run.parent else {}


def trained_network(run: Run, store: Store) -> UNet:
    """The network of a finished fine-tuning: best on validation."""
    network = _network(run, store)
    network.load_state_dict(load_file(run.folder / "weights.safetensors"))
    return network.to(device())


def train(run: Run) -> Run:
    """Do the run unless it is done; its parents first. Waits for another process that is doing it."""
    torch.set_num_threads(run.experiment.threads)
    if run.parent is not None:
        train(run.parent)
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder / ".lock"):
        if not run.is_done():
            store = open_store(run.experiment)
            split = split_of(run, store)
            write_json(run.folder / "parameters.json", {"key": run.key, "parameters": run.parameters.model_dump()})
            write_json(run.folder / "subjects.json", asdict(split))
            (_pretrain if run.kind == "pretrain" else _finetune)(run, store, split)
            if not os.environ.get(WORKER):
                seal(run.folder)
    return run


def _pretrain(run: Run, store: Store, split: Split) -> None:
    stage, network = run.experiment.stages[run.parameters.stage], build_network(run, store)
    torch.manual_seed(seed_of(run.parameters.seed, "head", run.parameters.stage))
    work = stage_work(run, store, split, network)
    training = STAGES[stage.stage](work, stage)
    result = _fit(run, network, training, stage, "pre-training")
    # what came from earlier stages and what was learned now; heads of earlier stages stay behind
    learned = {f"{prefix}.{k}": v for prefix, part in training.learning.items() for k, v in part.state_dict().items()}
    weights = {name: value for name, value in work.earlier.items() if not name.startswith("head.")} | learned
    own = network.state_dict()
    weights |= {name: value for name, value in own.items() if name in weights or name.startswith("encoder.")}
    _save_weights(run, store, weights)
    _write_record(run, result, ["log.csv", *_write_tables(run, training), "weights.safetensors"])


def _finetune(run: Run, store: Store, split: Split) -> None:
    experiment, seed = run.experiment, run.parameters.seed
    budget, recipe = experiment.finetune, experiment.recipe
    network = build_network(run, store)
    labelled = store.rows(split.labelled, labelled=True)
    others = store.rows(set(split.pretrain) - {*split.labelled, *split.validation, *split.test})
    torch.manual_seed(seed_of(seed, "recipe"))
    work = Work(network, store, labelled, budget.batch, seed, budget.steps, others)
    training = RECIPES[recipe.recipe](work, recipe)
    result = _fit(
        run,
        network,
        training,
        recipe,
        "fine-tuning",
        evaluate=lambda: validation_dice(network, store, split.validation),
        evaluate_every=budget.validate_every,
    )
    fields = {
        "dataset": experiment.dataset.name,
        "profile": experiment.profile,
        "method": run.method,
        "labelled": len(split.labelled),
        "draw": run.key["draw"],
        "seed": seed,
        "run": run.name,
    }
    last = scores(network, store, split.test)
    network.load_state_dict(result.best_state)
    for name, rows in (("metrics", scores(network, store, split.test)), ("metrics_last", last)):
        table = pd.DataFrame(rows).assign(**fields)[[c for c in TABLE_COLUMNS if c != "study"]]
        write_table(run.folder / f"{name}.csv", table)
    _save_weights(run, store, network.state_dict())
    tables = _write_tables(run, training)
    _write_record(run, result, ["log.csv", "metrics.csv", "metrics_last.csv", *tables, "weights.safetensors"])


def _fit(run: Run, network: UNet, training: Training, settings: Optimisation, title: str, **more: Any) -> Fit:
    every, precision = run.experiment.checkpoint_every, run.experiment.precision
    result = fit(network, training, settings, run.steps, run.folder, every, precision, title=title, **more)
    write_table(run.folder / "log.csv", result.log)
    return result


def _write_tables(run: Run, training: Training) -> list[str]:
    for name, content in training.tables.items():
        write_table(run.folder / f"{name}.csv", content)
    return [f"{name}.csv" for name in training.tables]


# ---------------------------------------------------------------------------------------------------- files and status


def _save_weights(run: Run, store: Store, weights: dict[str, torch.Tensor]) -> None:
    """Weights with the adaptation record: what a network and its input must be like for them to fit."""
    experiment = run.experiment
    adaptation = {
        "network": experiment.network.model_dump(),
        "channels": store.channels,
        "classes": store.class_names,
        "geometry": experiment.geometry.model_dump(),
        "normalisation": experiment.dataset.normalisation.model_dump(),
        "prefixes": {"for transfer": ["encoder.", "decoder."], "of a segmenter": ["output."]},
        "dataset": experiment.dataset.name,
        "method": run.method,
        "run": run.name,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {"clseg": json.dumps(adaptation, sort_keys=True)}
    write_atomically(run.folder / "weights.safetensors", lambda path: save_file(tensors, path, metadata))


def adaptation(weights: Path) -> dict[str, Any]:
    """The adaptation record inside a weight file."""
    with safetensors.safe_open(weights, framework="pt") as file:
        return json.loads(file.metadata()["clseg"])


def write_table(path: Path, table: pd.DataFrame) -> None:
    """CSV with six decimals, written atomically."""
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6f"))


def read_table(path: Path) -> pd.DataFrame:
    """A table as `write_table` left it: names and ids stay text, also where they are empty or look like numbers."""
    text = ["study", "method", "subject", "phase", "class_name", "hd95_unit", "note", "run"]
    table = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=[""])
    return table.fillna(dict.fromkeys(table.columns.intersection(text), ""))


def provenance() -> dict[str, Any]:
    """Code, versions and hardware at this moment."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=paths.PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        commit = (git("rev-parse", "HEAD") or "unknown") + (
            "+changes" if git("status", "--porcelain", "clseg", "params") else ""
        )
    except OSError:
        commit = "unknown"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit,
        "clseg": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpu": gpu,
    }


def _write_record(run: Run, result: Fit, files: list[str]) -> None:
    names = ["parameters.json", "subjects.json", *files]
    record = {
        "run": run.name,
        "kind": run.kind,
        "steps": run.steps,
        "best_step": result.best_step,
        "training_seconds": round(result.seconds, 1),
        "provenance": provenance(),
        "files": {name: (run.folder / name).stat().st_size for name in names},
    }
    write_json(run.folder / "record.json", record)


def seal(folder: Path) -> None:
    """Write the status, last: from here on the run counts as done."""
    record = (folder / "record.json").read_bytes()
    status = {
        "status": "done",
        "record_sha256": hashlib.sha256(record).hexdigest(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / "status.json", status)
    for leftover in ("checkpoint.pt", "progress.json", "error.txt"):
        (folder / leftover).unlink(missing_ok=True)


def is_done(folder: Path) -> bool:
    """Whether a folder's status, record and files agree."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
        record = (folder / "record.json").read_bytes()
        if status["status"] != "done" or status["record_sha256"] != hashlib.sha256(record).hexdigest():
            return False
        return all((folder / name).stat().st_size == size for name, size in json.loads(record)["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock, which ends with the process whatever happens to it; yields whether it is held.

    With `wait` it is always held in the end; without, another holder gives False at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                if not said:
                    print(f"waiting for another process that holds {path}")
                    said = True
                time.sleep(0.5)
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def table(folders: Iterable[Path], study: str | None = None, name: str = "metrics") -> pd.DataFrame:
    """Tidy results of finished fine-tunings, a row per subject, phase and class; `study` overrides the recorded one."""
    tables = []
    for folder in sorted(folders):
        if (folder / f"{name}.csv").is_file() and is_done(folder):
            recorded = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))["parameters"]["study"]
            tables.append(read_table(folder / f"{name}.csv").assign(study=recorded if study is None else study))
    if not tables:
        return pd.DataFrame(columns=list(TABLE_COLUMNS))
    order = ["dataset", "profile", "method", "labelled", "draw", "seed", "subject", "phase", "class_name", "run"]
    return pd.concat(tables)[list(TABLE_COLUMNS)].sort_values(order, kind="stable", ignore_index=True)
