"""Runs: one pre-training stage or one fine-tuning each, with a folder that holds all that is known about it.

The folder is named by readable fields and a hash of everything that decides the run's numbers, the code among it.
Files are complete or absent; `status.json` comes last and names the hash of `record.json`, which names the size of
every other file. A run counts as done only while all of that agrees.
"""

import json
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from clseg import paths, ranks, train
from clseg.data.formats import Subjects, listed, scan
from clseg.data.prepare import prepare
from clseg.data.splits import Split, make_split, unlabelled
from clseg.data.store import Store
from clseg.digest import code_digest, digest
from clseg.errors import RequestError, reading
from clseg.loop import Fit, Work
from clseg.models import UNet
from clseg.probe import COLUMNS, probe
from clseg.recipes import RECIPES
from clseg.settings import DatasetConfig, Stage
from clseg.stages import SHARED, STAGES
from clseg.study.archive import (
    TABLE_COLUMNS,
    Checkpoints,
    is_done,
    locked,
    provenance,
    read_table,
    seal,
    write_atomically,
    write_json,
    write_table,
)
from clseg.study.bf16 import arithmetic
from clseg.study.parameters import FinetuneParameters, PretrainParameters
from clseg.study.schema import Experiment, FinetuneBudget

WORKER = "CLSEG_WORKER"  # set in kernels of a grid: there the worker seals the run, once its notebook is in place
SEEN = " (transductive)"  # a method whose pre-training saw images of test subjects
GPU_CONTEXT = 2**29  # bytes that a process takes of a GPU beside its tensors, about


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
        """The stage of a pre-training, with no more slices per batch than the profile allows."""
        stage, most = self.experiment.stages[self.parameters.stage], self.experiment.pretrain.max_slices
        return stage.model_copy(update={"slices": min(stage.slices, most)}) if most else stage

    @property
    def labelled(self) -> int | Literal["all"]:
        """How many subjects carry labels in a fine-tuning."""
        return "all" if self.experiment.all_labels or not self.parameters.labelled else self.parameters.labelled

    @cached_property
    def data(self) -> str:
        """The same for all runs that read the same data in the same way."""
        return digest(self.experiment.data_key())

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that decides the numbers of this run."""
        experiment, parameters = self.experiment, self.parameters
        common = {"kind": self.kind, "data": experiment.data_key(), "network": experiment.network.model_dump()}
        common |= {"threads": experiment.threads, "precision": experiment.precision, "seed": parameters.seed}
        common["parent"] = self.parent.name if self.parent else ""
        if self.kind == "pretrain":
            common |= {"draw": parameters.draw} if experiment.pretrained_by_draw else {}
            return common | {"stage": self.stage.model_dump(), "steps": self.steps}
        draws = experiment.cross_validated or self.labelled != "all"
        cell = {"labelled": self.labelled}
        cell["draw"] = parameters.draw if draws else 1
        budget = experiment.finetune.model_dump(exclude={"steps_of"}) | {"steps": self.steps}
        return common | cell | {"recipe": experiment.recipe.model_dump(), "budget": budget}

    @cached_property
    def code(self) -> str:
        """The digest of the code that decides the numbers of this run; that of its parents is in their names."""
        kind, name, code = "recipe", self.experiment.recipe.recipe, RECIPES
        if self.kind == "pretrain":
            kind, name, code = "stage", self.stage.stage, STAGES
        if not (does := code.get(name)):
            raise RequestError(f"{kind} {name!r} has settings and no code; add it to _ALL of clseg/{kind}s/__init__.py")
        return code_digest(("clseg.train", "clseg.data.splits", does.__module__))

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
        return "-".join(filter(None, [self.kind, *fields, f"seed{parameters.seed}", digest([self.key, self.code])]))

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
        if self.kind == "pretrain":
            return budget.steps_of.get(self.stage.stage, budget.steps)
        return self.finetune.steps_for(self.labelled)

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
        """`log`, `metrics` or another table of a finished run."""
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
    parent = pretrain_run(PretrainParameters(**shared, stage=len(stages) - 1))
    for key in ("architecture", "filters"):
        ours, theirs = (getattr(one.network, key) for one in (experiment, parent.experiment))
        if ours != theirs:
            wrong = f"network.{key} is {theirs} in the pre-training on {parent.experiment.dataset.name}, here {ours}"
            remedy = "name one with --set study.pretrain_dataset=NAME that has the same"
            raise RequestError(f"method {parameters.method}: {wrong}; {remedy}")
    return Run(parameters, parent)


def open_store(experiment: Experiment, progress: bool = True) -> Store:
    """The prepared data set of an experiment."""
    return prepare(experiment.dataset, experiment.geometry, progress)


def subjects_of(experiment: Experiment) -> Subjects | Store:
    """Who is in the data set of an experiment, and who has labels, before anything is prepared."""
    folder = paths.data_root() / experiment.dataset.folder
    return listed(experiment.dataset) if folder.exists() else open_store(experiment, progress=False)


def split_of(run: Run, store: Subjects | Store) -> Split:
    """The subjects of a run. A pre-training has no labelled set of its own; most serve all draws.

    Raises `RequestError`, also where one of two twins is tested and the other seen in training.
    """
    experiment, parameters = run.experiment, run.parameters
    labelled = "all" if run.kind == "pretrain" else run.labelled
    split = make_split(experiment.division, store.subjects, store.labelled_subjects, labelled, parameters.draw)
    split = replace(split, pretrain=unlabelled(split, experiment.unlabelled))
    seen = {*split.pretrain, *split.labelled, *split.validation}
    for twins in experiment.dataset.twins:
        if not experiment.division.transductive and {*twins} & {*split.test} and {*twins} & seen:
            apart = f"{' and '.join(twins)} have the same images, and one of them is tested, the other seen in training"
            remedy = "remove one, or choose another seed or protocol"
            raise RequestError(f"protocol {experiment.protocol}: {apart}; {remedy}")
    if run.parent and getattr(parameters, "pretrain_dataset", ""):
        _require_unseen(run, split)
    return split


def _require_unseen(run: Run, split: Split) -> None:
    """Raises `RequestError` where a pre-training on another data set sees images of who is tested."""
    ours, theirs = run.experiment.dataset, run.parent.experiment.dataset
    seen = set(_images(theirs, split_of(run.parent, subjects_of(run.parent.experiment)).pretrain).values())
    if both := [subject for subject, images in _images(ours, split.test).items() if images in seen]:
        wrong = f"{theirs.name} has images of {ours.name}, and pre-trains on subject {both[0]}, who is tested here"
        remedy = "leave it away, or name data without those who are tested"
        raise RequestError(f"pretrain_dataset: {wrong} ({len(both)} of {len(split.test)}); {remedy}")


def _images(dataset: DatasetConfig, subjects: Iterable[str]) -> dict[str, Any]:
    """What the images of each subject are known by: their first file or, where there is none here, who it is."""
    if not dataset.folder or not (paths.data_root() / dataset.folder).exists():
        return {subject: (dataset.adapter, dataset.folder, subject) for subject in subjects}
    return {ref.subject: ref.images[0].resolve() for ref in scan(dataset) if ref.subject in {*subjects}}


def build_network(run: Run, store: Store) -> UNet:
    """The network as the run starts with it: seeded weights, then the parent's where there is one."""
    return train.new_network(store, run.experiment.network, run.parameters.seed, earlier_weights(run))


def stage_work(run: Run, store: Store, split: Split) -> Work:
    """What the stage of a pre-training works on."""
    return train.stage_work(store, split.pretrain, run.stage, run.steps, **_start(run))


def _start(run: Run) -> dict[str, Any]:
    """What pre-training and fine-tuning start from."""
    return {"network": run.experiment.network, "seed": run.parameters.seed, "start": earlier_weights(run)}


def earlier_weights(run: Run) -> dict[str, Tensor]:
    """The weights that the run's parent left, none without a parent."""
    if run.parent is None:
        return {}
    with reading(path := run.parent.folder / "weights.safetensors", "safetensors", "remove its folder"):
        return load_file(path)


def trained_network(run: Run, store: Store) -> UNet:
    """The network of a finished fine-tuning."""
    network = train.new_network(store, run.experiment.network, run.parameters.seed)
    network.load_state_dict(load_file(run.folder / "weights.safetensors"))
    return network


def do(run: Run) -> Run:
    """Do the run unless it is done; its parents first. Waits for another process that is doing it.

    Of processes that `torchrun` started, the first holds the lock and writes the files, and does alone what only one
    can do; the others wait.
    """
    torch.set_num_threads(run.experiment.threads)
    if run.parent is not None:
        do(run.parent)
    run.folder.mkdir(parents=True, exist_ok=True)
    first, shared = not ranks.number(), run.kind == "pretrain" and run.stage.stage in SHARED
    with locked(run.folder / ".lock") if first else nullcontext():
        store = open_store(run.experiment, progress=first)
        if ranks.agreed(run.is_done()):
            require_same_data(run, store)
        elif first or shared:
            require_positions(run, store)
            split = split_of(run, store)
            if first:
                write_json(run.folder / "parameters.json", {"key": run.key, "parameters": run.parameters.model_dump()})
                write_json(run.folder / "subjects.json", asdict(split))
            with nullcontext() if shared else ranks.alone(), arithmetic(run.experiment.precision):
                (_pretrain if run.kind == "pretrain" else _finetune)(run, store, split)
            if first and not os.environ.get(WORKER):
                seal(run.folder)
        ranks.agreed(True)
    return run


def require_positions(run: Run, store: Store) -> None:
    """Raise `RequestError` where a pre-training needs parts or positions of volumes, and their slices have none."""
    needed = run.kind == "pretrain" and (run.stage.of_parts or getattr(run.stage, "pairs", "") == "position")
    if needed and not store.positions_known:
        wrong = f"contrasts parts of volumes, and slices of {run.experiment.dataset.name} run along several axes"
        raise RequestError(f"method {run.parameters.method} {wrong}; choose a method with other pairs")


def require_same_data(run: Run, store: Store) -> None:
    """Raise `RequestError` where a finished run saw other images or masks of its data set than there are now."""
    record = json.loads((run.folder / "record.json").read_bytes())
    if record["content"] != store.content:
        wrong = f"was made from other files than data set {run.experiment.dataset.name} has now"
        raise RequestError(f"{run.folder}: {wrong}; move it away to have it made again, or choose another --out")


def _pretrain(run: Run, store: Store, split: Split) -> None:
    about = _start(run) | {"number": run.parameters.stage, "precision": run.experiment.precision}
    result = train.pretrain(store, split.pretrain, run.stage, run.steps, keeper=_checkpoints(run, store), **about)
    held_out = set(store.subjects) - {*split.pretrain, *split.test}
    about = {"network": run.experiment.network, "seed": run.parameters.seed}
    try:
        found = probe(result, store, split.pretrain, held_out, run.stage, run.steps, **about)
    except (RuntimeError, ValueError) as error:  # of memory, say: it must not cost what was trained
        print(f"what was learned is not known: {error}")
        found = dict.fromkeys(COLUMNS, float("nan"))
    _keep(run, store, result.fit, result.weights, result.tables | {"probe": pd.DataFrame([found])})


def _finetune(run: Run, store: Store, split: Split) -> None:
    experiment, budget = run.experiment, run.finetune
    about = _start(run) | {"batch": budget.batch, "precision": experiment.precision}
    about |= {"unlabelled": split.others, "validation": split.validation}
    about |= {"validate_every": budget.validate_every, "best": budget.checkpoint == "best"}
    result = train.finetune(
        store, split.labelled, experiment.recipe, run.steps, keeper=_checkpoints(run, store), **about
    )
    fields = {"dataset": experiment.dataset.name, "profile": experiment.profile, "method": run.method}
    fields |= {"labelled": len(split.labelled), "draw": run.key["draw"], "seed": run.parameters.seed, "run": run.name}
    tested = store.only(split.test)  # now that training has ended
    metrics = pd.DataFrame(train.scores(result.network, tested, split.test)).assign(**fields)
    metrics = metrics.reindex(columns=TABLE_COLUMNS[1:])  # without test subjects there are no rows
    _keep(run, store, result.fit, result.network.state_dict(), {"metrics": metrics} | result.tables)


def _checkpoints(run: Run, store: Store) -> Checkpoints:
    return Checkpoints(run.folder, run.experiment.checkpoint_every, run.steps, f"{run.code} {store.content}")


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
        "slice_axis": store.volumes["slice_axis"].mode()[0],
        "nan": dataset.options.get("nan"),
        "classes": store.class_names,
        "label_values": store.label_values,
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
        "code": run.code,
        "content": store.content,
        "files": {name: (run.folder / name).stat().st_size for name in names},
    }
    write_json(run.folder / "record.json", record)
