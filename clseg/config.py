"""Typed, validated parameters: data set, method, profile, run, study. A wrong key is an error that names it.

A method, a data set and a profile are YAML files under `params/`; `resolve` puts one of each together, applies
`KEY=VALUE` overrides and returns an `Experiment`: everything that decides the numbers except labelled, draw and seed.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from clseg import paths


class RequestError(Exception):
    """The request or the data are wrong: one sentence that names the file or key and what to do."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest valid name, or the list of valid names when none is near."""
    valid = sorted(map(str, valid))
    match = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"valid are {', '.join(valid)}"


class Strict(BaseModel):
    """Base of all parameters: no unknown keys, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {key!r}, {nearest(key, cls.model_fields)}")
        return data


AnyStrict = TypeVar("AnyStrict", bound=Strict)

# ---------------------------------------------------------------------------------------------------------- data sets


class Geometry(Strict):
    """Grid that the network sees.

    `size` [H, W] in network pixels; `spacing_mm` of a network pixel where the files carry a spacing, else `step_px`
    native pixels per network pixel.
    """

    size: list[Annotated[int, Field(ge=32, multiple_of=32)]] = Field(min_length=2, max_length=2)
    spacing_mm: float | None = Field(default=None, gt=0)
    step_px: float = Field(default=1.0, gt=0)


class Normalisation(Strict):
    """Intensities per volume and channel: (v - p_low) / (p_high - p_low), not clipped; `n4` corrects the bias first."""

    low: float = Field(default=1.0, ge=0, le=100)
    high: float = Field(default=99.0, ge=0, le=100)
    n4: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> "Normalisation":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class SeededProtocol(Strict):
    """Subjects drawn by a seed: `test` and `validation` subjects first, the rest is the pool of nested draws."""

    kind: Literal["seeded"]
    test: int = Field(ge=1)
    validation: int = Field(ge=1)
    seed: int = 0
    transductive: bool = False


class ListProtocol(Strict):
    """Subject lists as published; `labelled[n][c]` and `validation_of[n][c]` are those of draw c with n subjects."""

    kind: Literal["lists"]
    pretrain: list[str]
    test: list[str]
    validation: list[str]
    validation_of: dict[int, dict[int, list[str]]] = {}
    labelled: dict[int, dict[int, list[str]]]
    not_in_all: list[str] = []
    transductive: bool = False


Protocol = Annotated[SeededProtocol | ListProtocol, Field(discriminator="kind")]


class DatasetConfig(Strict):
    """One data set: where it is, how it is read, what it may be used for, how its subjects are divided."""

    name: str
    title: str
    description: str
    adapter: str
    options: dict[str, int | float | str | bool] = {}
    folder: str = ""
    tree: str = ""
    source: str = ""
    licence: str = ""
    citation: str = ""
    download_size: str = ""
    channels: int = Field(default=1, ge=1)
    classes: dict[int, str] = Field(default={}, description="label value in the file -> name; empty: the adapter knows")
    phases: list[str] = Field(default=[], description="phases used; empty: all")
    positions: Literal["known", "unknown"] = "known"
    normalisation: Normalisation = Normalisation()
    geometry: dict[str, Geometry]
    protocols: dict[str, Protocol] = Field(min_length=1, description="the first is the default")


# ------------------------------------------------------------------------------------------------------------ methods


class ContrastStage(Strict):
    """Contrastive pre-training of the encoder; `pairs` says who is alike (`clseg.pairs`)."""

    stage: Literal["contrast"]
    pairs: Literal["instance", "partition"]
    strategy: Literal["gd-", "gd"] = "gd"
    partitions: int = Field(default=4, ge=2)
    slices: int = Field(default=12, ge=2, description="slices per batch, before augmentation")
    temperature: float = Field(default=0.1, gt=0)
    denominator: Literal["all", "pair"] = "pair"
    learning_rate: float = Field(default=1e-3, gt=0)


class LocalStage(Strict):
    """Local contrastive pre-training of the first decoder blocks, encoder frozen."""

    stage: Literal["local"]
    strategy: Literal["lr", "ld"] = "lr"
    decoder_blocks: int = Field(default=3, ge=1, le=5)
    regions: Literal[9, 13] = 13
    size: Literal[1, 3] = 3
    negatives: int = Field(default=5, ge=1, le=5)
    neighbours: Literal["published", "nearest"] = "published"
    partitions: int = Field(default=4, ge=2)
    slices: int = Field(default=12, ge=2, description="slices per batch, before augmentation")
    temperature: float = Field(default=0.1, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)


Stage = Annotated[ContrastStage | LocalStage, Field(discriminator="stage")]


class SupervisedRecipe(Strict):
    """Fine-tuning of the whole network on the labelled slices."""

    recipe: Literal["supervised"]
    loss: Literal["dice", "cross_entropy", "dice+cross_entropy"] = "dice"
    augmentation: Literal["published", "none"] = "published"
    learning_rate: float = Field(default=1e-3, gt=0)


class MethodConfig(Strict):
    """A list of pre-training stages and a fine-tuning recipe."""

    title: str
    stages: list[Stage] = []
    recipe: SupervisedRecipe
    all_labels: bool = Field(
        default=False, description="the ceiling: every subject outside test and validation is labelled"
    )


# ----------------------------------------------------------------------------------------------------------- profiles


class NetworkConfig(Strict):
    """Widths of the network; the published ones are the default (`papers.md`-style table in `models.UNet`)."""

    filters: list[Annotated[int, Field(ge=1)]] = Field(default=[16, 32, 64, 128, 128, 128], min_length=6, max_length=6)
    norm_momentum: float = Field(default=0.01, gt=0, le=1, description="share of a new batch in the running averages")


class PretrainBudget(Strict):
    steps: int = Field(ge=1)
    max_slices: int | None = Field(default=None, ge=2, description="upper limit of a stage's slices per batch")


class FinetuneBudget(Strict):
    steps: int = Field(ge=1)
    batch: int = Field(default=20, ge=1)
    validate_every: int = Field(default=50, ge=1)


class ProfileConfig(Strict):
    """How much is computed: budgets, widths, threads."""

    name: str
    title: str
    threads: int = Field(default=1, ge=1, description="CPU threads of one run")
    precision: Literal["float32", "bf16"] = "float32"
    checkpoint_every: int = Field(default=100, ge=1, description="steps between checkpoints")
    network: NetworkConfig = NetworkConfig()
    pretrain: PretrainBudget
    finetune: FinetuneBudget


# ------------------------------------------------------------------------------------------------- experiment and runs


class Experiment(Strict):
    """Everything that decides a method's numbers on a data set, except labelled, draw and seed."""

    method: str
    profile: str
    dataset: DatasetConfig
    protocol: str
    unlabelled: int | None = Field(default=None, ge=1, description="subjects for pre-training; null: all")
    geometry: Geometry
    network: NetworkConfig
    stages: list[Stage]
    recipe: SupervisedRecipe
    all_labels: bool
    pretrain: PretrainBudget
    finetune: FinetuneBudget
    threads: int
    precision: Literal["float32", "bf16"]
    checkpoint_every: int

    def data_key(self) -> dict[str, Any]:
        """The part of the data set that decides numbers: what is read and how, not how it is described."""
        deciding = ("name", "adapter", "options", "channels", "classes", "phases", "normalisation")
        return self.dataset.model_dump(include=set(deciding)) | {
            "geometry": self.geometry.model_dump(),
            "protocol": self.dataset.protocols[self.protocol].model_dump(),
            "unlabelled": self.unlabelled,
        }


OVERRIDABLE = ("dataset", "protocol", "unlabelled", "geometry", "network", "stages", "recipe", "pretrain", "finetune")


class RunParameters(Strict):
    """What a worker notebook is told; the same for `20_pretrain` and `21_finetune`."""

    dataset: str
    profile: str
    method: str
    protocol: str = ""
    seed: int = Field(default=0, ge=0)
    overrides: list[str] = []
    variant: str = Field(
        default="", description="KEY=VALUE of an ablation: an override that is also named in the results"
    )
    study: str = ""

    def experiment(self) -> Experiment:
        overrides = [*self.overrides, *([self.variant] if self.variant else [])]
        return resolve(self.dataset, self.profile, self.method, self.protocol, overrides)


class PretrainParameters(RunParameters):
    """One pre-training stage; the stages before it are its parents."""

    stage: int = Field(default=0, ge=0)


class FinetuneParameters(RunParameters):
    """One fine-tuning: how many subjects carry labels, and which draw of them."""

    labelled: int = Field(default=1, ge=0, description="subjects with labels; 0 stands for all (benchmark)")
    draw: int = Field(default=1, ge=1)


class DataParameters(Strict):
    """What the notebook that shows a data set is told."""

    dataset: str
    profile: str
    labelled: int = Field(ge=1)
    draws: int = Field(ge=1)


class FigureParameters(Strict):
    """What a figure notebook is told: which study's table to read."""

    study: str
    dataset: str
    profile: str


# ------------------------------------------------------------------------------------------------------------ studies


class Axis(Strict):
    """One ablated key and its values; the other keys stay as they are."""

    name: str
    key: str
    values: list[Any]
    methods: list[str]


class StudyConfig(Strict):
    """A grid (method x labelled x draw x seed, per data set) and the notebook that turns its table into figures."""

    name: str
    title: str
    notebook: str
    datasets: list[str] = Field(min_length=1, description="data sets it is meant for; the first is the default")
    methods: list[str] = Field(min_length=1)
    labelled: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    draws: list[Annotated[int, Field(ge=1)]] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = [0]
    protocol: str = ""
    axes: list[Axis] = []
    set: dict[str, list[str]] = Field(default={}, description="profile -> KEY=VALUE overrides of this study")


# ------------------------------------------------------------------------------------------------------------- reading


def _validated(schema: Any, data: Any, where: str) -> Any:
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        loc = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Mapping) else f" (given: {first['input']!r})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise RequestError(f"{where}: {loc + ': ' if loc else ''}{message}{given}{more}") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, or a `RequestError` that names it."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).replace("\n", " ")
        raise RequestError(f"{path}: is not valid YAML: {first}") from None


def _named(kind: str, name: str, schema: type[Strict]) -> Any:
    """A data set, profile or study by its name under `params/`, or by the path of a YAML file."""
    folder = paths.PARAMS / kind
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = [file.stem for file in folder.glob("*.yaml")]
        raise RequestError(f"{kind.removesuffix('s')} {name!r} is not known, {nearest(name, known)}")
    return _validated(schema, read_yaml(path), str(path))


def read_dataset(name: str) -> DatasetConfig:
    return _named("datasets", name, DatasetConfig)


def read_profile(name: str) -> ProfileConfig:
    return _named("profiles", name, ProfileConfig)


def read_study(name: str) -> StudyConfig:
    return _named("studies", name, StudyConfig)


def names(kind: str) -> list[str]:
    """The names known under `params/<kind>`."""
    return sorted(file.stem for file in (paths.PARAMS / kind).glob("*.yaml"))


def read_methods() -> dict[str, MethodConfig]:
    """All methods of `params/methods.yaml`, by name."""
    path = paths.PARAMS / "methods.yaml"
    return _validated(dict[str, MethodConfig], read_yaml(path), str(path))


def read_parameters(namespace: Mapping[str, Any], schema: type[AnyStrict]) -> AnyStrict:
    """The typed parameters of a notebook from its namespace (`globals()`), called right after the parameters cell.

    Every plain value defined so far must be a parameter and have its type, so that a misspelt or mistyped parameter,
    injected by papermill or written by hand, fails here. Raises `RequestError`.
    """
    ignored = {"In", "Out", "exit", "quit"}
    plain = {
        name: value
        for name, value in namespace.items()
        if not name.startswith("_")
        and name not in ignored
        and not isinstance(value, ModuleType)
        and isinstance(value, str | int | float | list | dict | tuple | type(None))
    }
    return _validated(schema, plain, "notebook parameters")


def parse_override(text: str, where: str = "--set") -> tuple[list[str], Any]:
    """'a.b=VALUE' as path and YAML value."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RequestError(f"{where} {text!r}: must read KEY=VALUE, for example pretrain.steps=100")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise RequestError(f"{where} {text!r}: the value is not valid YAML") from None


def override(tree: Any, key: list[str], value: Any) -> Any:
    """A copy of a nested tree of dicts and lists with one value replaced; an unknown key is a `RequestError`."""
    head, *rest = key
    if isinstance(tree, dict):
        match = next((k for k in tree if str(k) == head), None)
        valid: list[str] = [str(k) for k in tree]
    elif isinstance(tree, list):
        match = int(head) if head.isdigit() and int(head) < len(tree) else None
        valid = [str(i) for i in range(len(tree))]
    else:
        match, valid = None, []
    if match is None:
        raise RequestError(f"--set: unknown key {head!r}, {nearest(head, valid) if valid else 'nothing is below it'}")
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[match] = value if not rest else override(tree[match], rest, value)
    return copy


def resolve(dataset: str, profile: str, method: str, protocol: str = "", overrides: Iterable[str] = ()) -> Experiment:
    """Data set, profile and method by name, put together and overridden. Raises `RequestError`."""
    data, budget, methods = read_dataset(dataset), read_profile(profile), read_methods()
    if method not in methods:
        raise RequestError(f"method {method!r} is not known, {nearest(method, methods)}")
    protocol = protocol or next(iter(data.protocols))
    if protocol not in data.protocols:
        raise RequestError(f"data set {data.name!r} has no protocol {protocol!r}, {nearest(protocol, data.protocols)}")
    if budget.name not in data.geometry:
        raise RequestError(
            f"data set {data.name!r} has no geometry for profile {budget.name!r}; add geometry.{budget.name}"
        )
    tree = {
        "method": method,
        "profile": budget.name,
        "dataset": data.model_dump(),
        "protocol": protocol,
        "unlabelled": None,
        "geometry": data.geometry[budget.name].model_dump(),
        **budget.model_dump(exclude={"name", "title"}),
        **methods[method].model_dump(exclude={"title"}),
    }
    for text in overrides:
        key, value = parse_override(text)
        if key[0] not in OVERRIDABLE:
            raise RequestError(f"--set {text}: unknown key {key[0]!r}, {nearest(key[0], OVERRIDABLE)}")
        tree = override(tree, key, value)
    experiment = _validated(Experiment, tree, f"{dataset}, {profile}, {method}")
    return experiment


def override_study(study: StudyConfig, overrides: Iterable[str]) -> tuple[StudyConfig, list[str]]:
    """The study with its `study.KEY=VALUE` overrides applied, and the overrides that concern its experiments."""
    tree, others = study.model_dump(), []
    for text in overrides:
        key, value = parse_override(text)
        if key[0] == "study" and len(key) > 1:
            tree = override(tree, key[1:], value)
        else:
            others.append(text)
    return _validated(StudyConfig, tree, f"study {study.name}"), others


def applicable(overrides: Iterable[str], method: MethodConfig) -> list[str]:
    """The overrides that concern a method: those of stages it does not have are left out."""
    kept = []
    for text in overrides:
        key, _ = parse_override(text)
        if key[0] == "stages" and len(key) > 1 and key[1].isdigit() and int(key[1]) >= len(method.stages):
            continue
        kept.append(text)
    return kept


def digest(tree: Any, length: int = 10) -> str:
    """A short hash of a JSON-able tree; equal trees, equal hash."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]
