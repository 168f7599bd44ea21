"""Typed, validated parameters: data set, method, profile, run, study. A wrong key is an error that names it.

`resolve` puts one data set, profile and method of `params/` together and applies `KEY=VALUE` overrides.
"""

import ast
import difflib
import hashlib
import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from clseg import paths

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and what breaks a line


class RequestError(Exception):
    """The request or the data are wrong: one sentence, on one line, that names the file or key and what to do."""

    def __init__(self, sentence: str) -> None:
        sentence = sentence if len(sentence) < 900 else f"{sentence[:700]} ... {sentence[-150:]}"
        super().__init__(UNPRINTABLE.sub(lambda character: ascii(character[0])[1:-1], sentence))


@contextmanager
def reading(path: Path | str, kind: str, remedy: str = "replace the file") -> Iterator[None]:
    """Make one sentence of what a library raises on a file that is absent or damaged; that can be almost anything."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150] or type(error).__name__
        where = getattr(error, "filename", None) or path
        raise RequestError(f"{where}: cannot be read or is not valid {kind} ({reason}); {remedy}") from None


@contextmanager
def writing(path: Path | str, remedy: str) -> Iterator[None]:
    """Make one sentence of what the machine refuses, such as a folder without permission or a full disk."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from None


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean X?' for the nearest valid name, or the list of valid names when none is near."""
    valid = sorted(map(str, valid))
    match = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
    return f"did you mean {match[0]!r}?" if match else f"valid are {', '.join(valid)}"


class Strict(BaseModel):
    """Base of all parameters: no unknown keys, no silent conversion, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}, {nearest(key, cls.model_fields)}")
        return data


AnyStrict = TypeVar("AnyStrict", bound=Strict)
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$", max_length=80)]  # of a folder: it leads nowhere else
LabelValue = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Natural = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Several = Annotated[int, Field(ge=2, lt=2**31)]
Pixels = Annotated[int, Field(ge=1, le=4096)]
UpToFive = Annotated[int, Field(ge=1, le=5)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Step = Annotated[float, Field(ge=1e-9, le=1e9)]
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(gt=0, le=1)]
Filters = Annotated[list[Pixels], Field(min_length=2, max_length=12)]
Plane = Annotated[list[Pixels], Field(min_length=2, max_length=2)]
Sides = Annotated[list[Pixels], Field(min_length=2, max_length=3)]


class Geometry(Strict):
    size: Sides  # of the network: [H, W], in 3-D [D, H, W] of a patch
    spacing_mm: Step | None = None  # of a pixel in the plane; None: it is `step_px` native ones
    step_px: Step = 1.0
    slice_mm: Step | None = None  # 3-D: slices are resampled to it; None: kept
    plane: Plane | None = None  # 3-D: [H, W] as stored, of which patches are taken; None: that of `size`
    resize: bool = False  # photographs are resized to `size`, not cropped or padded

    @model_validator(mode="after")
    def _holds_patches(self) -> "Geometry":
        if self.plane and (self.dimensions == 2 or self.plane[0] < self.size[1] or self.plane[1] < self.size[2]):
            raise ValueError(f"plane {self.plane} must hold 3-D patches of {self.size[-2:]}; enlarge or remove it")
        return self

    @property
    def dimensions(self) -> int:
        return len(self.size)


class Normalisation(Strict):
    low: Percent = 1.0  # (v - p_low) / (p_high - p_low) per volume and channel, not clipped
    high: Percent = 99.0
    n4: bool = False  # corrects the bias field first


class SeededProtocol(Strict):
    kind: Literal["seeded"]
    test: Count  # subjects, drawn first
    validation: Count  # subjects; the rest is the pool of nested draws
    seed: Natural = 0
    transductive: bool = False


class CrossValidation(Strict):
    seed: Natural = 12345  # of random folds, and of which subjects a limit on those of pre-training leaves
    draw_seed: Natural = 1234  # of labelled and validation subjects, from the other folds
    validation: Count = 2
    transductive: bool = False  # else every draw has a pre-training of its own


class FoldsProtocol(CrossValidation):
    kind: Literal["folds"]
    folds: Several = 5  # draw f tests on fold f


class Fold(Strict):  # nnU-Net has `train` and `val`; where there is more, `clseg` wrote the file
    train: list[str]
    val: list[str]  # what nnU-Net does not train on: our test subjects
    validation: list[str] = []  # none: drawn from `train`
    pretrain: list[str] = []  # none: what is left of `train`, and subjects without labels


Folds = Annotated[list[Fold], Field(min_length=1)]


class SplitsFileProtocol(CrossValidation):
    kind: Literal["splits_file"]
    file: str = "splits_final.json"  # of nnU-Net, in the data set's folder; draw f tests on `val` of fold f
    folds: list[Fold] = []  # what it holds, which `resolve` reads


class ListProtocol(Strict):
    kind: Literal["lists"]
    pretrain: list[str]  # as published
    test: list[str]
    validation: list[str]
    validation_of: dict[int, dict[int, list[str]]] = {}  # [n][c]: that of draw c with n subjects
    labelled: dict[int, dict[int, list[str]]]  # [n][c]: draw c with n subjects
    not_in_all: list[str] = []
    transductive: bool = False


Protocol = Annotated[SeededProtocol | FoldsProtocol | SplitsFileProtocol | ListProtocol, Field(discriminator="kind")]


class DatasetConfig(Strict):
    name: Name
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
    classes: dict[LabelValue, str] = {}  # label value in the files -> name, empty where the adapter knows
    phases: list[str] = []  # those used, empty for all
    positions: Literal["known", "unknown"] = "known"
    twins: list[list[str]] = []  # subjects that are known to have the same images; others with such are refused
    threshold: Positive | None = None  # of positional contrast
    normalisation: Normalisation = Normalisation()
    geometry: dict[str, Geometry]  # by profile
    geometry_3d: dict[str, Geometry] = {}
    protocols: Annotated[dict[str, Protocol], Field(min_length=1)]  # the first is the default

    @property
    def photographs(self) -> bool:
        """Whether its images are photographs, in colour and without a header, and not NIfTI files."""
        return self.adapter == "pairs" and ".nii" not in str(self.options["images"]).lower()


class Optimisation(Strict):
    optimiser: Literal["adam", "sgd"] = "adam"  # sgd has momentum 0.9
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: per step, from `learning_rate` to the final one
    final_learning_rate: NotNegative = 0.0
    weight_decay: NotNegative = 0.0


class StageConfig(Optimisation):
    slices: Several = 12  # that make a batch, before augmentation


class ContrastStage(StageConfig):
    stage: Literal["contrast"]  # trains the encoder
    pairs: Literal["instance", "partition", "position", "cluster"]  # who is alike
    strategy: Literal["gd-", "gd", "gcl"] = "gd"  # of partitions: gd-, gd of Chaitanya et al., gcl of Zeng et al.
    partitions: Several = 4
    threshold: Positive | None = None  # of positions; None: that of the data set
    clusters: Several = 10  # of the features of an autoencoder stage before
    cluster_distance: Positive | None = None  # cuts there, in place of a number of `clusters`
    linkage: Literal["ward", "average", "complete"] = "ward"
    positives: Literal["cluster", "view"] = "cluster"  # view: rows of one cluster are only kept out of the negatives
    views: Literal["glcl", "pcl"] = "glcl"
    head: Literal["flatten", "pool"] = "flatten"  # g1 of Chaitanya et al., that of Zeng et al.
    temperature: Positive = 0.1
    denominator: Literal["all", "pair"] = "pair"

    @property
    def answer(self) -> str:  # who is alike, in a word; in the names of runs
        return self.strategy if self.pairs == "partition" else self.pairs


class AutoencoderStage(StageConfig):
    stage: Literal["autoencoder"]  # a beta-VAE on slices
    latent: Several = 32  # features that are clustered into pseudo-classes
    beta: Positive = 1.0


class LocalStage(StageConfig):
    stage: Literal["local"]  # trains the first decoder blocks, encoder frozen
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
    stage: Literal["rotation"]  # which multiple of 90 degrees was a slice turned by? Trains the encoder


class InpaintingStage(StageConfig):
    stage: Literal["inpainting"]  # fill a box; trains encoder and decoder
    box: Share = 100 / 192  # times the image side
    place: Literal["centre", "random"] = "random"


class ContextRestorationStage(StageConfig):
    stage: Literal["context_restoration"]  # put swapped patches back; trains encoder and decoder
    swaps: Count = 10  # pairs of patches
    patch: Share = 5 / 192  # times the image side


class PirlStage(StageConfig):
    stage: Literal["pirl"]  # a slice and its jigsaw are alike; trains the encoder
    grid: Several = 3  # x `grid` pieces
    negatives: Count = 1024  # from a memory of slices
    momentum: Share = 0.5  # of the memory
    weight: Share = 0.5  # of the jigsaw's loss; the rest is that of the slice itself
    temperature: Positive = 0.07


Pretext = RotationStage | InpaintingStage | ContextRestorationStage | PirlStage
Stage = Annotated[ContrastStage | AutoencoderStage | LocalStage | Pretext, Field(discriminator="stage")]
StageName = Literal["contrast", "autoencoder", "local", "rotation", "inpainting", "context_restoration", "pirl"]


class SupervisedRecipe(Optimisation):
    recipe: Literal["supervised"]  # fine-tunes the whole network on the labelled slices
    loss: Literal["dice", "cross_entropy", "dice+cross_entropy"] = "dice"
    augmentation: Literal["published", "pcl", "none"] = "published"
    mixup: NotNegative = 0.0  # alpha of Beta(alpha, alpha), 0 is off


class SelfTrainingRecipe(SupervisedRecipe):
    recipe: Literal["self_training"]  # slices without labels get those of a frozen copy
    rounds: Count = 3  # the copy is renewed so often
    warm_up: Share = 0.4  # of the steps, before the first copy
    weight: Positive = 1.0


class MeanTeacherRecipe(SupervisedRecipe):
    recipe: Literal["mean_teacher"]  # a running average of the weights teaches
    decay: Share = 0.99
    weight: Positive = 0.1
    ramp: Share = 0.4  # of the steps, over which the weight of its lesson grows


class AdversarialRecipe(SupervisedRecipe):
    recipe: Literal["adversarial"]  # predictions with and without labels are to look alike
    weight: Positive = 0.1


class GanAugmentationRecipe(SupervisedRecipe):
    recipe: Literal["gan_augmentation"]  # deformations and intensity changes are learned too
    adversarial_weight: Positive = 1.0
    size_weight: Positive = 1e-3
    warm_up: Share = 0.04


SemiSupervised = SelfTrainingRecipe | MeanTeacherRecipe | AdversarialRecipe | GanAugmentationRecipe
Recipe = Annotated[SupervisedRecipe | SemiSupervised, Field(discriminator="recipe")]


class MethodConfig(Strict):
    title: str
    stages: list[Stage] = []
    recipe: Recipe
    all_labels: bool = False  # of every subject outside test and validation: the ceiling


class NetworkConfig(Strict):
    architecture: Literal["glcl", "pcl"] = "glcl"  # Chaitanya et al., Zeng et al.
    filters: Filters = [16, 32, 64, 128, 128, 128]  # of every level, the finest first
    norm_momentum: Share = 0.01  # of a new batch in the running averages

    @property
    def coarsest(self) -> int:  # pixels of the image side per pixel of the deepest level
        return 2 ** (len(self.filters) - 1)

    def require_sides(self, size: list[int]) -> None:
        """Raise `ValueError` unless every level halves the sides of an image."""
        if wrong := [side for side in size if side % self.coarsest]:
            raise ValueError(
                f"geometry.size: {wrong[0]} is no multiple of {self.coarsest}, as network.filters needs; change it"
            )


class PretrainBudget(Strict):
    steps: Count  # of a stage
    steps_of: dict[StageName, Count] = {}  # of stages with a number of their own
    max_slices: Several | None = None  # limits the slices per batch


class FinetuneBudget(Strict):
    steps: Count
    batch: Count = 20  # slices
    validate_every: Count = 50  # steps


class Budget(Strict):
    threads: Annotated[int, Field(ge=1, le=1024)] = 1  # of a CPU, per run
    precision: Literal["float32", "bf16"] = "float32"
    checkpoint_every: Count = 100  # so many steps
    network: NetworkConfig = NetworkConfig()
    pretrain: PretrainBudget
    finetune: FinetuneBudget


class ProfileConfig(Budget):
    name: Name
    title: str
    network_3d: NetworkConfig  # takes the place of `network` in 3-D


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
        self.network.require_sides(self.geometry.size)
        if self.protocol not in (known := self.dataset.protocols):
            raise ValueError(f"protocol {self.protocol!r} is not known, {nearest(self.protocol, known)}")
        kinds = [getattr(stage, "pairs", stage.stage) for stage in self.stages]
        if "cluster" in kinds and "autoencoder" not in kinds[: kinds.index("cluster")]:
            raise ValueError("stages: pairs 'cluster' need an autoencoder stage before them")
        if self.geometry.dimensions == 3 and (flat := [k for k in kinds if k in FLAT_STAGES]):
            raise ValueError(f"stages: {flat[0]} works on 2-D slices only; choose dimensions 2")
        return self

    @property
    def division(self) -> Protocol:
        """The protocol that divides the subjects."""
        return self.dataset.protocols[self.protocol]

    @property
    def cross_validated(self) -> bool:
        """Whether draws differ in their test subjects, so that the ceiling has draws, too."""
        return isinstance(self.division, CrossValidation)

    @property
    def pretrained_by_draw(self) -> bool:
        """Whether every draw has a pre-training of its own, which does not see the subjects that the draw tests."""
        return self.cross_validated and not self.division.transductive

    def data_key(self) -> dict[str, Any]:
        """The part of the data set that decides numbers: what is read and how, not how it is described."""
        deciding = {"name", "adapter", "options", "channels", "classes", "phases", "normalisation"}
        key = self.dataset.model_dump(include=deciding) | self.model_dump(include={"geometry", "unlabelled"})
        return key | {"protocol": self.dataset.protocols[self.protocol].model_dump()}


FLAT_STAGES = ("local", "rotation", "inpainting", "context_restoration", "pirl")
OVERRIDABLE = ("dataset", "protocol", "unlabelled", "geometry", "network", "stages", "recipe", "pretrain", "finetune")


class RunParameters(Strict):
    dataset: str
    profile: str
    method: str
    protocol: str = ""
    dimensions: Literal[2, 3] = 2
    seed: Natural = 0
    overrides: list[str] = []
    variant: str = ""  # an override that is also named in the results of an ablation
    study: str = ""

    def experiment(self) -> Experiment:
        overrides = [*self.overrides, *([self.variant] if self.variant else [])]
        source = getattr(self, "pretrain_dataset", "")
        return resolve(self.dataset, self.profile, self.method, self.protocol, overrides, self.dimensions, source)


class PretrainParameters(RunParameters):
    draw: Count = 1  # whose test subjects it must not see, where draws differ in them
    stage: Natural = 0  # of the method; those before it are its parents


class FinetuneParameters(RunParameters):
    labelled: Natural = 1  # subjects with labels; 0 stands for all
    draw: Count = 1  # of those subjects
    pretrain_dataset: str = ""  # where it is another one


class DataParameters(Strict):  # of the notebook that shows a data set
    dataset: str
    profile: str
    labelled: Count
    draws: Count


class OwnDataParameters(Strict):  # of the notebook for a folder of one's own
    folder: str
    profile: str
    labelled: Count
    method: str


class FigureParameters(Strict):  # which study's table a figure notebook reads
    study: str
    dataset: str
    profile: str


class Axis(Strict):  # one ablated key and its values; the other keys stay as they are
    name: str
    key: str
    values: list[JsonValue]
    methods: list[str]


class StudyConfig(Strict):
    """A grid (method x labelled x draw x seed) on the first of `datasets`, and the notebook of its figures."""

    name: Name
    title: str
    notebook: Name
    datasets: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[str], Field(min_length=1)]
    labelled: Annotated[list[Count], Field(min_length=1)]
    draws: Annotated[list[Count], Field(min_length=1)]
    seeds: Annotated[list[Natural], Field(min_length=1)] = [0]
    protocol: str = ""
    dimensions: Literal[2, 3] = 2
    pretrain_dataset: str = ""
    axes: list[Axis] = []
    set: dict[str, list[str]] = {}  # overrides of this study, by profile


class _PlainLoader(yaml.SafeLoader):
    """`yaml.safe_load` that also refuses a key given twice, and aliases that hold themselves or explode."""

    MOST_NODES = 1_000_000

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        alias = self.check_event(yaml.AliasEvent)
        node, parts = super().compose_node(parent, index), []
        if alias and hasattr(node, "nodes"):  # what it stands for is complete
            return node
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
            keys = Counter((key.tag, key.value) for key in parts[::2] if isinstance(key, yaml.ScalarNode))
            if twice := [name for (_, name), count in keys.items() if count > 1]:
                raise yaml.YAMLError(f"key {twice[0]!r} is there twice")
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        node.nodes = 1 + sum(getattr(part, "nodes", self.MOST_NODES) for part in parts)
        if alias or node.nodes > self.MOST_NODES:
            raise yaml.YAMLError("its aliases stand for too much; write out what is meant")
        return node


def _plain(text: str) -> Any:
    """What YAML says, in plain Python types."""
    return _PlainLoader(text).get_single_data()


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
        given = "" if isinstance(first["input"], Mapping) else f" (given: {reprlib.repr(first['input'])})"
        more = f"; and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise RequestError(f"{where}: {key}{first['msg'].removeprefix('Value error, ')}{given}{more}") from None


@lru_cache(maxsize=256)
def _read(schema: Any, path: Path, _modified_ns: int) -> Any:
    with reading(path, "YAML", "correct it"):
        data = _plain(path.read_text(encoding="utf-8"))
    return _validated(schema, data, str(path))


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
    with reading(f"--set {text!r}", "YAML", "quote the value"):
        parsed = _plain(value)
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
    dataset: str,
    profile: str,
    method: str,
    protocol: str = "",
    overrides: Iterable[str] = (),
    dimensions: int = 2,
    pretrain_dataset: str = "",
) -> Experiment:
    """Data set, profile and method by name, put together and overridden. Raises `RequestError`."""
    data, budget, methods = read_dataset(dataset), read_profile(profile), read_methods()
    source = read_dataset(pretrain_dataset) if pretrain_dataset else data  # of the stages
    protocol, folds = protocol or next(iter(data.protocols)), None
    if isinstance(division := data.protocols.get(protocol), SplitsFileProtocol):
        folds = _read_as(Folds, paths.data_root() / data.folder / division.file)
    # the runs of a grid share few experiments; files that did not change are the same objects
    read = tuple(map(_Same, (data, budget, methods, source, folds)))
    return _resolve(read, (dataset, profile, method), protocol, tuple(overrides), dimensions)


class _Same:
    """Stands for an object, and is equal to what stands for the same one."""

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


@lru_cache(maxsize=1024)
def _resolve(
    read: tuple[_Same, ...], names: tuple[str, str, str], protocol: str, overrides: tuple[str, ...], dimensions: int
) -> Experiment:
    data, budget, methods, source, folds = (same.it for same in read)
    dataset, profile, method = names
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
    if folds is not None:  # what the file holds decides, not its name
        tree["dataset"]["protocols"][protocol] |= {"file": "", "folds": [fold.model_dump() for fold in folds]}
    if dimensions == 3:
        tree["network"] = budget.network_3d.model_dump()
    for text in overrides:
        key, value = parse_override(text)
        if key[0] not in OVERRIDABLE:
            raise RequestError(f"--set {text}: unknown key {key[0]!r}, {nearest(key[0], OVERRIDABLE)}")
        tree = override(tree, key, value)
    experiment, stages = _validated(Experiment, tree, f"{dataset}, {profile}, {method}"), []
    for stage in experiment.stages:
        if getattr(stage, "pairs", "") == "position" and stage.threshold is None:
            if source.threshold is None:
                wrong = f"method {method} contrasts positions, and data set {source.name} has no `threshold`"
                raise RequestError(f"{wrong}; choose a method with other pairs, or set stages.0.threshold")
            stage = stage.model_copy(update={"threshold": source.threshold})
        stages.append(stage)
    return experiment.model_copy(update={"stages": stages})


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
