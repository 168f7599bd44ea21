"""Typed, validated parameters: data set, method, profile, run, study. A wrong key is an error that names it.

`resolve` puts one data set, profile and method of `params/` together and applies `KEY=VALUE` overrides.
"""

import ast
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from clseg import paths


class RequestError(Exception):
    """The request or the data are wrong: one sentence that names the file or key and what to do."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean X?' for the nearest valid name, or the list of valid names when none is near."""
    valid = sorted(map(str, valid))
    match = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"valid are {', '.join(valid)}"


class Strict(BaseModel):
    """Base of all parameters: no unknown keys, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}, {nearest(key, cls.model_fields)}")
        return data


AnyStrict = TypeVar("AnyStrict", bound=Strict)
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Several = Annotated[int, Field(ge=2)]
UpToFive = Annotated[int, Field(ge=1, le=5)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]


class Geometry(Strict):
    """Grid of the network: `size` [H, W], or [D, H, W] for 3-D patches, in pixels of `spacing_mm` in the plane.

    Without a spacing a pixel is `step_px` native ones. 3-D: slices are resampled to `slice_mm` (None: kept), patches
    taken from a stored `plane` [H, W] (None: that of `size`). `resize`: images are resized to `size`, not cropped.
    """

    size: Annotated[list[Count], Field(min_length=2, max_length=3)]
    spacing_mm: Positive | None = None
    step_px: Positive = 1.0
    slice_mm: Positive | None = None
    plane: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    resize: bool = False

    @property
    def dimensions(self) -> int:
        return len(self.size)


class Normalisation(Strict):
    """Intensities per volume and channel: (v - p_low) / (p_high - p_low), not clipped; `n4` corrects the bias first."""

    low: Percent = 1.0
    high: Percent = 99.0
    n4: bool = False


class SeededProtocol(Strict):
    """Subjects drawn by a seed: `test` and `validation` subjects first, the rest is the pool of nested draws."""

    kind: Literal["seeded"]
    test: Count
    validation: Count
    seed: int = 0
    transductive: bool = False


class FoldsProtocol(Strict):
    """Cross-validation: draw f tests on fold f; labelled subjects come from the other folds, by `draw_seed`."""

    kind: Literal["folds"]
    folds: Several = 5
    seed: int = 12345
    draw_seed: int = 1234
    validation: Count = 2
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


Protocol = Annotated[SeededProtocol | FoldsProtocol | ListProtocol, Field(discriminator="kind")]


class DatasetConfig(Strict):
    """One data set: where it is, how it is read, how its subjects are divided (by default the first of `protocols`).

    `classes`: label value in the files -> name, empty where the adapter knows; `phases`: those used, empty for all;
    `geometry`, `geometry_3d`: by profile; `threshold`: of positional contrast.
    """

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
    channels: Count = 1
    classes: dict[int, str] = {}
    phases: list[str] = []
    positions: Literal["known", "unknown"] = "known"
    threshold: Positive | None = None
    normalisation: Normalisation = Normalisation()
    geometry: dict[str, Geometry]
    geometry_3d: dict[str, Geometry] = {}
    protocols: Annotated[dict[str, Protocol], Field(min_length=1)]


class Optimisation(Strict):
    """How weights are changed; `cosine` goes per step from `learning_rate` to `final_learning_rate`."""

    optimiser: Literal["adam", "sgd"] = "adam"  # sgd has momentum 0.9
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    final_learning_rate: NotNegative = 0.0
    weight_decay: NotNegative = 0.0


class StageConfig(Optimisation):
    slices: Several = 12  # that make a batch, before augmentation


class ContrastStage(StageConfig):
    """Contrastive pre-training of the encoder; `pairs` says who is alike.

    partition: `strategy` gd- or gd (Chaitanya et al.), or gcl (Zeng et al.); position: `threshold` (None: the
    data set's); cluster: pseudo-classes from the features of an autoencoder stage before, cut at `clusters` or, if set,
    at `cluster_distance`; with `positives: view` rows of one pseudo-class are only kept out of the negatives.
    """

    stage: Literal["contrast"]
    pairs: Literal["instance", "partition", "position", "cluster"]
    strategy: Literal["gd-", "gd", "gcl"] = "gd"
    partitions: Several = 4
    threshold: Positive | None = None
    clusters: Several = 10
    cluster_distance: Positive | None = None
    linkage: Literal["ward", "average", "complete"] = "ward"
    positives: Literal["cluster", "view"] = "cluster"
    views: Literal["glcl", "pcl"] = "glcl"
    head: Literal["flatten", "pool"] = "flatten"  # g1 of Chaitanya et al., that of Zeng et al.
    temperature: Positive = 0.1
    denominator: Literal["all", "pair"] = "pair"

    @property
    def answer(self) -> str:  # who is alike, in a word; in the names of runs
        return self.strategy if self.pairs == "partition" else self.pairs


class AutoencoderStage(StageConfig):
    """A beta-VAE on slices, whose `latent` features are clustered into pseudo-classes."""

    stage: Literal["autoencoder"]
    latent: Several = 32
    beta: Positive = 1.0


class LocalStage(StageConfig):
    """Local contrastive pre-training of the first decoder blocks, encoder frozen."""

    stage: Literal["local"]
    strategy: Literal["lr", "ld"] = "lr"
    decoder_blocks: UpToFive = 3
    regions: Literal[9, 13] = 13
    size: Literal[1, 3] = 3
    negatives: UpToFive = 5
    neighbours: Literal["published", "nearest"] = "published"
    partitions: Several = 4
    temperature: Positive = 0.1

    @property
    def answer(self) -> str:  # in the names of runs
        return self.strategy


class RotationStage(StageConfig):
    """Which multiple of 90 degrees was a slice turned by? Trains the encoder."""

    stage: Literal["rotation"]


class InpaintingStage(StageConfig):
    """Fill a box of `box` times the image side. Trains encoder and decoder."""

    stage: Literal["inpainting"]
    box: Share = 100 / 192
    place: Literal["centre", "random"] = "random"


class ContextRestorationStage(StageConfig):
    """Put `swaps` pairs of swapped patches of `patch` times the image side back. Trains encoder and decoder."""

    stage: Literal["context_restoration"]
    swaps: Count = 10
    patch: Share = 5 / 192


class PirlStage(StageConfig):
    """A slice and its `grid` x `grid` jigsaw (share `weight` of the loss) are alike, slices of a memory are not."""

    stage: Literal["pirl"]
    grid: Several = 3
    negatives: Count = 1024
    momentum: Share = 0.5
    weight: Share = 0.5
    temperature: Positive = 0.07


Pretext = RotationStage | InpaintingStage | ContextRestorationStage | PirlStage
Stage = Annotated[ContrastStage | AutoencoderStage | LocalStage | Pretext, Field(discriminator="stage")]
StageName = Literal["contrast", "autoencoder", "local", "rotation", "inpainting", "context_restoration", "pirl"]


class SupervisedRecipe(Optimisation):
    """Fine-tuning of the whole network on the labelled slices; `mixup` is the alpha of Beta(alpha, alpha), 0 is off."""

    recipe: Literal["supervised"]
    loss: Literal["dice", "cross_entropy", "dice+cross_entropy"] = "dice"
    augmentation: Literal["published", "pcl", "none"] = "published"
    mixup: NotNegative = 0.0


class SelfTrainingRecipe(SupervisedRecipe):
    """After `warm_up` of the steps, slices without labels get those of a frozen copy, renewed `rounds` times."""

    recipe: Literal["self_training"]
    rounds: Count = 3
    warm_up: Share = 0.4
    weight: Positive = 1.0


class MeanTeacherRecipe(SupervisedRecipe):
    """A running average of the weights teaches; the weight of its lesson grows over `ramp` of the steps."""

    recipe: Literal["mean_teacher"]
    decay: Share = 0.99
    weight: Positive = 0.1
    ramp: Share = 0.4


class AdversarialRecipe(SupervisedRecipe):
    """A discriminator tells predictions on slices with labels from those on slices without."""

    recipe: Literal["adversarial"]
    weight: Positive = 0.1


class GanAugmentationRecipe(SupervisedRecipe):
    """Deformations and intensity changes of the labelled slices are learned together with the segmenter."""

    recipe: Literal["gan_augmentation"]
    adversarial_weight: Positive = 1.0
    size_weight: Positive = 1e-3
    warm_up: Share = 0.04


SemiSupervised = SelfTrainingRecipe | MeanTeacherRecipe | AdversarialRecipe | GanAugmentationRecipe
Recipe = Annotated[SupervisedRecipe | SemiSupervised, Field(discriminator="recipe")]


class MethodConfig(Strict):
    """Pre-training stages and a recipe; `all_labels`: every subject outside test and validation (the ceiling)."""

    title: str
    stages: list[Stage] = []
    recipe: Recipe
    all_labels: bool = False


class NetworkConfig(Strict):
    """The U-Net of Chaitanya et al. (glcl) or of Zeng et al. (pcl), with so many `filters` per level, finest first."""

    architecture: Literal["glcl", "pcl"] = "glcl"
    filters: Annotated[list[Count], Field(min_length=2)] = [16, 32, 64, 128, 128, 128]
    norm_momentum: Share = 0.01  # of a new batch in the running averages

    @property
    def coarsest(self) -> int:  # pixels of the image side per pixel of the deepest level
        return 2 ** (len(self.filters) - 1)


class PretrainBudget(Strict):
    """Steps of a stage, `steps_of` those of stages with a number of their own; `max_slices` limits slices per batch."""

    steps: Count
    steps_of: dict[StageName, Count] = {}
    max_slices: Several | None = None


class FinetuneBudget(Strict):
    steps: Count
    batch: Count = 20  # slices
    validate_every: Count = 50  # steps


class Budget(Strict):
    """How much is computed; `threads` of a CPU per run, `checkpoint_every` so many steps."""

    threads: Count = 1
    precision: Literal["float32", "bf16"] = "float32"
    checkpoint_every: Count = 100
    network: NetworkConfig = NetworkConfig()
    pretrain: PretrainBudget
    finetune: FinetuneBudget


class ProfileConfig(Budget):
    """A named budget; `network_3d` takes the place of `network` in 3-D."""

    name: str
    title: str
    network_3d: NetworkConfig


class Experiment(Budget):
    """All that decides a method's numbers but labelled, draw, seed; `unlabelled` limits subjects of pre-training."""

    method: str
    profile: str
    dataset: DatasetConfig
    protocol: str
    unlabelled: Count | None = None
    geometry: Geometry
    stages: list[Stage]
    recipe: Recipe
    all_labels: bool

    @model_validator(mode="after")
    def _fits(self) -> "Experiment":
        if wrong := [side for side in self.geometry.size if side % self.network.coarsest]:
            coarsest = self.network.coarsest
            raise ValueError(f"geometry.size: {wrong[0]} is no multiple of {coarsest}, as network.filters needs")
        kinds = [getattr(stage, "pairs", stage.stage) for stage in self.stages]
        if "cluster" in kinds and "autoencoder" not in kinds[: kinds.index("cluster")]:
            raise ValueError("stages: pairs 'cluster' need an autoencoder stage before them")
        if self.geometry.dimensions == 3 and (flat := [k for k in kinds if k in FLAT_STAGES]):
            raise ValueError(f"stages: {flat[0]} works on 2-D slices only; choose dimensions 2")
        return self

    def data_key(self) -> dict[str, Any]:
        """The part of the data set that decides numbers: what is read and how, not how it is described."""
        deciding = {"name", "adapter", "options", "channels", "classes", "phases", "normalisation"}
        key = self.dataset.model_dump(include=deciding) | self.model_dump(include={"geometry", "unlabelled"})
        return key | {"protocol": self.dataset.protocols[self.protocol].model_dump()}


FLAT_STAGES = ("local", "rotation", "inpainting", "context_restoration", "pirl")
OVERRIDABLE = ("dataset", "protocol", "unlabelled", "geometry", "network", "stages", "recipe", "pretrain", "finetune")


class RunParameters(Strict):
    """What a worker notebook is told. `variant`: an override that is also named in the results of an ablation."""

    dataset: str
    profile: str
    method: str
    protocol: str = ""
    dimensions: Literal[2, 3] = 2
    seed: Natural = 0
    overrides: list[str] = []
    variant: str = ""
    study: str = ""

    def experiment(self) -> Experiment:
        overrides = [*self.overrides, *([self.variant] if self.variant else [])]
        return resolve(self.dataset, self.profile, self.method, self.protocol, overrides, self.dimensions)


class PretrainParameters(RunParameters):
    """One pre-training stage; the stages before it are its parents."""

    stage: Natural = 0


class FinetuneParameters(RunParameters):
    """One fine-tuning: how many subjects carry labels (0 stands for all), and which draw of them."""

    labelled: Natural = 1
    draw: Count = 1
    pretrain_dataset: str = ""  # where it is another one


class DataParameters(Strict):  # of the notebook that shows a data set
    dataset: str
    profile: str
    labelled: Count
    draws: Count


class FigureParameters(Strict):  # which study's table a figure notebook reads
    study: str
    dataset: str
    profile: str


class Axis(Strict):  # one ablated key and its values; the other keys stay as they are
    name: str
    key: str
    values: list[Any]
    methods: list[str]


class StudyConfig(Strict):
    """A grid (method x labelled x draw x seed) on the first of `datasets`, and the notebook of its figures.

    `set`: overrides of this study by profile.
    """

    name: str
    title: str
    notebook: str
    datasets: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    labelled: Annotated[list[Count], Field(min_length=1)]
    draws: Annotated[list[Count], Field(min_length=1)]
    seeds: Annotated[list[Natural], Field(min_length=1)] = [0]
    protocol: str = ""
    dimensions: Literal[2, 3] = 2
    pretrain_dataset: str = ""
    axes: list[Axis] = []
    set: dict[str, list[str]] = {}


def _validated(schema: Any, data: Any, where: str) -> Any:
    try:
        return TypeAdapter(schema).validate_python(data)
    except ValidationError as error:
        first, here, keys = error.errors()[0], data, []
        for part in first["loc"]:
            if isinstance(here, Mapping) and part not in here and part in here.values():
                continue  # the tag that pydantic puts in for a union
            keys.append(str(part))
            with suppress(LookupError, TypeError):
                here = here[part]
        key = f"{'.'.join(keys)}: " if keys else ""
        given = "" if isinstance(first["input"], Mapping) else f" (given: {first['input']!r})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise RequestError(f"{where}: {key}{first['msg'].removeprefix('Value error, ')}{given}{more}") from None


@lru_cache(maxsize=256)
def _read(schema: Any, path: Path, _modified_ns: int) -> Any:
    try:
        return _validated(schema, yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: is not valid YAML: {str(error).replace(chr(10), ' ')}") from None


def _read_as(schema: Any, path: Path) -> Any:
    """A YAML file as a typed parameter, read again only when it changed; a `RequestError` names what is wrong."""
    return _read(schema, path, path.stat().st_mtime_ns if path.is_file() else 0)


def names(kind: str) -> list[str]:
    """The names known under `params/<kind>`."""
    return sorted(file.stem for file in (paths.PARAMS / kind).glob("*.yaml"))


def _named(schema: type[AnyStrict], kind: str, name: str) -> AnyStrict:
    path = Path(name) if name.endswith((".yaml", ".yml")) else paths.PARAMS / kind / f"{name}.yaml"
    if not path.is_file():
        what = schema.__name__.removesuffix("Config").lower()
        raise RequestError(f"{what} {name!r} is not known, {nearest(name, names(kind))}")
    return _read_as(schema, path)


read_dataset = partial(_named, DatasetConfig, "datasets")  # each by a name, or by the path of a YAML file
read_profile = partial(_named, ProfileConfig, "profiles")
read_study = partial(_named, StudyConfig, "studies")


def read_methods() -> dict[str, MethodConfig]:
    """All methods of `params/methods.yaml`, by name."""
    return _read_as(dict[str, MethodConfig], paths.PARAMS / "methods.yaml")


def _assigned(cell: str) -> list[str]:
    """The names a cell assigns if it assigns literals and does nothing else, as parameter cells do."""
    try:
        statements: Any = ast.parse(cell).body
        for statement in statements:
            ast.literal_eval(statement.value)
        return [target.id for s in statements for target in getattr(s, "targets", None) or [s.target]]
    except (SyntaxError, AttributeError, TypeError, ValueError):
        return []


def read_parameters(namespace: Mapping[str, Any], schema: type[AnyStrict]) -> AnyStrict:
    """The typed parameters of a notebook from its namespace (`globals()`). Raises `RequestError`.

    Those are the fields of the schema, and whatever else cells of nothing but literal assignments assigned (the
    parameters cell, the one papermill injects): a misspelt one fails here. Under nbval only the fields are looked at.
    """
    names = {*schema.model_fields, *(name for cell in namespace.get("In", ()) for name in _assigned(cell))}
    return _validated(schema, {name: namespace[name] for name in names if name in namespace}, "notebook parameters")


def parse_override(text: str) -> tuple[list[str], Any]:
    """'a.b=VALUE' as path and YAML value."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise RequestError(f"--set {text!r}: must read KEY=VALUE, for example pretrain.steps=100")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RequestError(f"--set {text!r}: the value is not valid YAML") from None
    with suppress(ValueError):
        parsed = float(parsed) if isinstance(parsed, str) else parsed  # YAML takes 1e-4 for a word
    return key.strip().split("."), parsed


def override(tree: Any, key: list[str], value: Any) -> Any:
    """A copy of a nested tree of dicts and lists with one value replaced; an unknown key is a `RequestError`."""
    copy = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree)) if isinstance(tree, list) else {}
    match = next((k for k in copy if str(k) == key[0]), None)
    if match is None:
        raise RequestError(f"--set: unknown key {key[0]!r}, {nearest(key[0], copy) if copy else 'nothing is below it'}")
    copy[match] = value if len(key) == 1 else override(copy[match], key[1:], value)
    return list(copy.values()) if isinstance(tree, list) else copy


def resolve(
    dataset: str, profile: str, method: str, protocol: str = "", overrides: Iterable[str] = (), dimensions: int = 2
) -> Experiment:
    """Data set, profile and method by name, put together and overridden. Raises `RequestError`."""
    data, budget, methods = read_dataset(dataset), read_profile(profile), read_methods()
    protocol = protocol or next(iter(data.protocols))
    geometry = data.geometry if dimensions == 2 else data.geometry_3d
    for what, name, valid in (
        ("method", method, methods),
        (f"protocol of data set {data.name}", protocol, data.protocols),
        (f"{dimensions}-D geometry of data set {data.name} for profile", budget.name, geometry or ["none"]),
    ):
        if name not in valid:
            raise RequestError(f"{what} {name!r} is not known, {nearest(name, valid)}")
    tree = budget.model_dump(exclude={"name", "title", "network_3d"}) | methods[method].model_dump(exclude={"title"})
    tree |= {"method": method, "profile": budget.name, "protocol": protocol, "unlabelled": None}
    tree |= {"dataset": data.model_dump(), "geometry": geometry[budget.name].model_dump()}
    if dimensions == 3:
        tree["network"] = budget.network_3d.model_dump()
    for text in overrides:
        key, value = parse_override(text)
        if key[0] not in OVERRIDABLE:
            raise RequestError(f"--set {text}: unknown key {key[0]!r}, {nearest(key[0], OVERRIDABLE)}")
        tree = override(tree, key, value)
    for stage in tree["stages"]:
        if stage.get("pairs") == "position" and stage["threshold"] is None:
            if data.threshold is None:
                wrong = f"method {method} contrasts positions, and data set {data.name} has no `threshold`"
                raise RequestError(f"{wrong}; choose a method with other pairs, or set stages.0.threshold")
            stage["threshold"] = data.threshold
    return _validated(Experiment, tree, f"{dataset}, {profile}, {method}")


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
    absent = [str(number) for number in range(len(method.stages), 10)]
    keys = {text: [*parse_override(text)[0], ""] for text in overrides}
    return [text for text, key in keys.items() if key[0] != "stages" or key[1] not in absent]


def digest(tree: Any) -> str:
    """A short hash of a JSON-able tree; equal trees, equal hash."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:10]
