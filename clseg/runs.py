"""Runs: one pre-training stage or one fine-tuning each, with a folder that holds all that is known about it.

The folder is named by readable fields and a hash of everything that decides the run's numbers. Files are complete or
absent; `status.json` comes last and names the hash of `record.json`, which names the size of every other file. A run
counts as done only while all of that agrees.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import safetensors
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from torch import Tensor

from clseg import __version__, config, paths, ranks
from clseg.config import Experiment, FinetuneBudget, FinetuneParameters, PretrainParameters, RequestError, Stage
from clseg.data.formats import class_names
from clseg.data.prepare import Store, prepare
from clseg.data.splits import Split, make_split, unlabelled
from clseg.loop import CODE, Fit, Work, device, fit, seed_of, write_atomically, write_json
from clseg.models import UNet, transfer
from clseg.recipes import RECIPES
from clseg.recipes.evaluation import scores, validation_dice
from clseg.stages import SHARED, STAGES

TABLE_COLUMNS = [
    *("study", "dataset", "profile", "method", "labelled", "draw", "seed"),
    *("subject", "phase", "class_name", "dice", "hd95", "hd95_unit", "missed", "run"),
]
WORKER = "CLSEG_WORKER"  # set in kernels of a grid: there the worker seals the run, once its notebook is in place
SEEN = " (transductive)"  # a method whose pre-training saw images of test subjects
DECIDING = ("clseg", "params")  # numbers: folders of the project
GPU_CONTEXT = 2**29  # bytes that a process takes of a GPU beside its tensors, about
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

    @property
    def stage(self) -> Stage:
        """The stage of a pre-training."""
        return self.experiment.stages[self.parameters.stage]

    @cached_property
    def data(self) -> str:
        """The same for all runs that read the same data in the same way."""
        return config.digest(self.experiment.data_key())

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides the numbers of this run."""
        experiment, parameters = self.experiment, self.parameters
        common = {"kind": self.kind, "data": experiment.data_key(), "network": experiment.network.model_dump()}
        common |= {"threads": experiment.threads, "precision": experiment.precision, "seed": parameters.seed}
        common["parent"] = self.parent.name if self.parent else ""
        if self.kind == "pretrain":
            limit = experiment.pretrain.max_slices
            common |= {"draw": parameters.draw} if experiment.pretrained_by_draw else {}
            return common | {"stage": self.stage.model_dump(), "steps": self.steps, "max_slices": limit}
        draws = experiment.cross_validated or not experiment.all_labels
        cell = {"labelled": "all" if experiment.all_labels else parameters.labelled}
        cell["draw"] = parameters.draw if draws else 1
        return common | cell | {"recipe": experiment.recipe.model_dump(), "budget": experiment.finetune.model_dump()}

    @cached_property
    def name(self) -> str:
        parameters = self.parameters
        if self.kind == "pretrain":
            fields = [self.stage.stage, getattr(self.stage, "answer", "")]
            fields += [f"draw{parameters.draw}"] * self.experiment.pretrained_by_draw
        else:
            variant = parameters.variant.rpartition(".")[2].replace("/", "_").replace(" ", "")
            fields = [parameters.method, variant, Path(parameters.pretrain_dataset).stem]
            fields += [f"labelled{self.key['labelled']}", f"draw{self.key['draw']}"]
        return "-".join(filter(None, [self.kind, *fields, f"seed{parameters.seed}", config.digest(self.key)]))

    @property
    def folder(self) -> Path:
        return paths.runs_root() / self.experiment.dataset.name / self.experiment.profile / self.name

    @property
    def method(self) -> str:
        """The method as results name it: with the ablated value if there is one, and if test subjects pre-train it."""
        own = self.parent and not getattr(self.parameters, "pretrain_dataset", "")
        seen = SEEN if own and self.experiment.division.transductive else ""
        return self.parameters.method + (f" [{self.parameters.variant}]" if self.parameters.variant else "") + seen

    @property
    def steps(self) -> int:
        budget = self.experiment.pretrain
        return budget.steps_of.get(self.stage.stage, budget.steps) if self.kind == "pretrain" else self.finetune.steps

    @property
    def finetune(self) -> FinetuneBudget:
        return self.experiment.finetune

    @property
    def cost(self) -> float:
        """Price relative to other runs, about image passes; only for estimates of the time left."""
        return self.steps * (2.0 * self.stage.slices if self.kind == "pretrain" else 2.5 * self.finetune.batch)

    @property
    def ancestors(self) -> list["Run"]:
        """The pre-trainings that it builds on, first to last."""
        return [*self.parent.ancestors, self.parent] if self.parent else []

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
    experiment = parameters.experiment()
    stages = experiment.stages
    if not stages:
        return Run(parameters, None)
    shared = parameters.model_dump(exclude={"labelled", "draw", "pretrain_dataset"})
    if parameters.pretrain_dataset:
        shared |= {"dataset": parameters.pretrain_dataset, "protocol": ""}
    elif experiment.pretrained_by_draw:
        shared["draw"] = parameters.draw
    return Run(parameters, pretrain_run(PretrainParameters(**shared, stage=len(stages) - 1)))


def open_store(experiment: Experiment, progress: bool = True) -> Store:
    """The prepared data set of an experiment."""
    return prepare(experiment.dataset, experiment.geometry, progress)


def split_of(run: Run, store: Store) -> Split:
    """The subjects of a run. A pre-training has no labelled set of its own; most serve all draws.

    Raises `RequestError`, also where one of two twins is tested and the other seen in training.
    """
    experiment, parameters = run.experiment, run.parameters
    labelled = "all" if run.kind == "pretrain" or experiment.all_labels else parameters.labelled
    split = make_split(experiment.division, store.subjects, store.labelled_subjects, labelled, parameters.draw)
    split = replace(split, pretrain=unlabelled(split, experiment.unlabelled))
    seen = {*split.pretrain, *split.labelled, *split.validation}
    for twins in experiment.dataset.twins:
        if not experiment.division.transductive and {*twins} & {*split.test} and {*twins} & seen:
            apart = f"{' and '.join(twins)} have the same images, and one of them is tested, the other seen in training"
            remedy = "remove one, or choose another seed or protocol"
            raise RequestError(f"protocol {experiment.protocol}: {apart}; {remedy}")
    return split


def _network(run: Run, store: Store) -> UNet:
    return UNet(store.channels, store.num_classes, run.experiment.network, store.dimensions)


def build_network(run: Run, store: Store) -> UNet:
    """The network as the run starts with it: seeded weights, then the parent's where there is one."""
    torch.manual_seed(seed_of(run.parameters.seed, "network"))
    network = _network(run, store)
    if run.parent is not None:
        transfer(network, earlier_weights(run), run.parent.folder / "weights.safetensors")
    return network.placed(device())


def stage_work(run: Run, store: Store, split: Split, network: UNet) -> Work:
    """What the stage of a pre-training works on."""
    slices, rows = run.stage.slices, store.rows(split.pretrain)
    slices = min(slices, run.experiment.pretrain.max_slices or slices)
    seen, earlier = store.only(unlabelled=split.pretrain), earlier_weights(run)
    return Work(network, seen, rows, slices, run.parameters.seed, run.steps, earlier=earlier)


def earlier_weights(run: Run) -> dict[str, Tensor]:
    """The weights that the run's parent left, none without a parent."""
    if run.parent is None:
        return {}
    with config.reading(path := run.parent.folder / "weights.safetensors", "safetensors", "remove its folder"):
        return load_file(path)


def trained_network(run: Run, store: Store) -> UNet:
    """The network of a finished fine-tuning: best on validation."""
    network = _network(run, store)
    network.load_state_dict(load_file(run.folder / "weights.safetensors"))
    return network.placed(device())


def train(run: Run) -> Run:
    """Do the run unless it is done; its parents first. Waits for another process that is doing it.

    Of processes that `torchrun` started, the first holds the lock and writes the files, and does alone what only one
    can do; the others wait.
    """
    torch.set_num_threads(run.experiment.threads)
    if run.parent is not None:
        train(run.parent)
    run.folder.mkdir(parents=True, exist_ok=True)
    first, shared = not ranks.number(), run.kind == "pretrain" and run.stage.stage in SHARED
    with locked(run.folder / ".lock") if first else nullcontext():
        store = open_store(run.experiment, progress=first)
        if ranks.agreed(run.is_done()):
            require_same_files(run, store)
        elif first or shared:
            split = split_of(run, store)
            if first:
                write_json(run.folder / "parameters.json", {"key": run.key, "parameters": run.parameters.model_dump()})
                write_json(run.folder / "subjects.json", asdict(split))
            with nullcontext() if shared else ranks.alone():
                (_pretrain if run.kind == "pretrain" else _finetune)(run, store, split)
            if first and not os.environ.get(WORKER):
                seal(run.folder)
        ranks.agreed(True)
    return run


def code_of(run: Run) -> str:
    """The `loop.CODE` that made a finished run."""
    return json.loads((run.folder / "record.json").read_bytes())["provenance"].get("code", "")


def require_same_files(run: Run, store: Store) -> None:
    """Raise `RequestError` where a finished run read other files of its data set than are there now."""
    record = json.loads((run.folder / "record.json").read_bytes())
    if record.get("data_files", store.files) != store.files:
        wrong = f"was made from other files than data set {run.experiment.dataset.name} has now"
        raise RequestError(f"{run.folder}: {wrong}; move it away to have it made again, or choose another --out")


def _pretrain(run: Run, store: Store, split: Split) -> None:
    network = build_network(run, store)
    torch.manual_seed(seed_of(run.parameters.seed, "head", run.parameters.stage))
    work = stage_work(run, store, split, network)
    training = STAGES[run.stage.stage](work, run.stage)
    result = fit(network, training, run.stage, run.steps, run.folder, run.experiment, title="pre-training")
    # what came from earlier stages and what was learned now; heads of earlier stages stay behind
    learned = {f"{prefix}.{k}": v for prefix, part in training.learning.items() for k, v in part.state_dict().items()}
    weights = {name: value for name, value in work.earlier.items() if not name.startswith("head.")} | learned
    own = network.state_dict()
    weights |= {name: value for name, value in own.items() if name in weights or name.startswith("encoder.")}
    _keep(run, store, result, weights, training.tables)


def _finetune(run: Run, store: Store, split: Split) -> None:
    experiment, seed, recipe = run.experiment, run.parameters.seed, run.experiment.recipe
    others = set(split.pretrain) - {*split.labelled, *split.validation, *split.test}
    network, seen = build_network(run, store), store.only(split.labelled, others)
    labelled = seen.rows(split.labelled, labelled=True)
    torch.manual_seed(seed_of(seed, "recipe"))
    work = Work(network, seen, labelled, run.finetune.batch, seed, run.steps, seen.rows(others))
    held_out = store.only(split.validation)
    training, every = RECIPES[recipe.recipe](work, recipe), run.finetune.validate_every

    def validate() -> float:
        return validation_dice(network, held_out, split.validation)

    result = fit(network, training, recipe, run.steps, run.folder, experiment, validate, every, "fine-tuning")
    fields = {"dataset": experiment.dataset.name, "profile": experiment.profile, "method": run.method}
    fields |= {"labelled": len(split.labelled), "draw": run.key["draw"], "seed": seed, "run": run.name}

    def scored() -> pd.DataFrame:
        return pd.DataFrame(scores(network, tested, split.test)).assign(**fields)[TABLE_COLUMNS[1:]]

    tested = store.only(split.test)  # now that training has ended
    last = scored()
    network.load_state_dict(result.best_state)
    tables = {"metrics": last if result.best_step == run.steps else scored(), "metrics_last": last} | training.tables
    _keep(run, store, result, network.state_dict(), tables)


def _keep(run: Run, store: Store, result: Fit, weights: dict[str, Tensor], tables: dict[str, pd.DataFrame]) -> None:
    """Tables, weights with their adaptation record (what must fit for them to be used), and the record of the run."""
    if ranks.number():
        return
    experiment, dataset = run.experiment, run.experiment.dataset
    adaptation = {
        "network": experiment.network.model_dump(),
        "channels": store.channels,
        "channel": dataset.options.get("channel"),
        "photograph": dataset.photographs,
        "orient": dataset.adapter != "acdc" and dataset.options.get("orient", True),
        "classes": store.class_names,
        "label_values": [0, *class_names(dataset, paths.data_root() / dataset.folder)],
        "geometry": experiment.geometry.model_dump(),
        "normalisation": dataset.normalisation.model_dump(),
        "prefixes": {"for transfer": ["encoder.", "decoder."], "of a segmenter": ["output."]},
        "dataset": dataset.name,
        "method": run.method,
        "run": run.name,
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {"clseg": json.dumps(adaptation, sort_keys=True)}
    # through bytes, so that a full disk is an `OSError` as everywhere
    write_atomically(run.folder / "weights.safetensors", lambda path: path.write_bytes(save(tensors, metadata)))
    tables = {"log": result.log} | tables
    for name, content in tables.items():
        write_table(run.folder / f"{name}.csv", content)
    names = ["parameters.json", "subjects.json", "weights.safetensors", *(f"{name}.csv" for name in tables)]
    record = {
        "run": run.name,
        "kind": run.kind,
        "steps": run.steps,
        "best_step": result.best_step,
        "training_seconds": round(result.seconds, 1),
        "gpu_bytes": torch.cuda.max_memory_reserved() + GPU_CONTEXT if torch.cuda.is_available() else 0,
        "provenance": provenance(),
        "data_files": store.files,
        "files": {name: (run.folder / name).stat().st_size for name in names},
    }
    write_json(run.folder / "record.json", record)


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
        commit = (git("rev-parse", "HEAD") or "unknown") + "+changes" * bool(git("status", "--porcelain", *DECIDING))
    except OSError:
        commit = "unknown"
    return {
        "commit": commit,
        "code": CODE,
        "clseg": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def seal(folder: Path) -> None:
    """Write the status, last: from here on the run counts as done."""
    digest = hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "status.json", {"status": "done", "record_sha256": digest, "finished": finished})
    for leftover in ("checkpoint.pt", "progress.json", "error.txt"):
        (folder / leftover).unlink(missing_ok=True)


def flaw(folder: Path) -> str | None:
    """None for a run that is done: its status, record and files agree; else what is wrong, "" if it never finished."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
        record = (folder / "record.json").read_bytes()
        if status["status"] != "done" or status["record_sha256"] != hashlib.sha256(record).hexdigest():
            return "its record is not the one it finished with"
        for name, size in json.loads(record)["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes and had {size}"
    except OSError as error:
        name = Path(error.filename).name
        return "" if name == "status.json" else f"{name} is missing"
    except (ValueError, KeyError, TypeError):
        return "its status or record cannot be read"
    return None


def is_done(folder: Path) -> bool:
    return flaw(folder) is None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock, which ends with the process whatever happens to it; yields whether it is held.

    With `wait` it is always held in the end; without, another holder gives False at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:  # releasing what is not held does nothing
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                yield False
                return
            print(f"waiting for another process that holds {path}")
            lock.acquire()
        yield True
    finally:
        lock.release()


def table(folders: Iterable[Path], study: str | None = None, name: str = "metrics") -> pd.DataFrame:
    """Tidy results of finished fine-tunings, a row per subject, phase and class; `study` overrides the recorded one."""
    tables = []
    for folder in sorted(folders):
        if (folder / f"{name}.csv").is_file() and is_done(folder):
            with config.reading(folder, "finished run", "remove it to have it made again"):
                recorded = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))["parameters"]["study"]
                own = read_table(folder / f"{name}.csv").assign(study=recorded if study is None else study)
                tables.append(own[TABLE_COLUMNS])
    if not tables:
        return pd.DataFrame(columns=TABLE_COLUMNS)
    order = ["dataset", "profile", "method", "labelled", "draw", "seed", "subject", "phase", "class_name", "run"]
    return pd.concat(tables).sort_values(order, kind="stable", ignore_index=True)
