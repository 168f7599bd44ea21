"""What the files of a study may say: methods, profiles, grids."""

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from clseg.errors import nearest
from clseg.settings import (
    READ,
    Count,
    CrossValidation,
    DatasetConfig,
    Geometry,
    Name,
    Natural,
    NetworkConfig,
    Protocol,
    Recipe,
    Several,
    Stage,
    StageName,
    Strict,
)


class MethodConfig(Strict):
    title: str
    stages: list[Stage] = []
    recipe: Recipe
    all_labels: bool = False  # of every subject outside test and validation: the ceiling


class PretrainBudget(Strict):
    steps: Count  # of a stage
    steps_of: dict[StageName, Count] = {}  # of stages with a number of their own
    max_slices: Several | None = None  # limits the slices per batch


class FinetuneBudget(Strict):
    steps: Count
    steps_of: dict[int, Count] = {}  # with so many labelled subjects, or fewer
    batch: Count = 20  # slices
    checkpoint: Literal["last", "best"] = "last"  # whose scores count: the last step, or the best on validation
    validate_every: Natural = 0  # steps; 0: never

    def steps_for(self, labelled: int | Literal["all"]) -> int:
        """The steps with so many labelled subjects: of the least number in `steps_of` that is as large."""
        larger = [count for count in sorted(self.steps_of) if labelled != "all" and count >= labelled]
        return self.steps_of[larger[0]] if larger else self.steps

    @model_validator(mode="after")
    def _validates(self) -> "FinetuneBudget":
        if self.checkpoint == "best" and not self.validate_every:
            raise ValueError("checkpoint 'best' needs validate_every; set it, or choose 'last'")
        return self


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
    set: dict[str, list[str]] = {}  # overrides at this scale, of all ("*"), of a recipe ("recipe:NAME") or of a method
    draws: Count | None = None  # at most so many of a study's draws, and of its seeds
    network_3d: NetworkConfig  # takes the place of `network` in 3-D


class SettingConfig(Strict):
    """Overrides that belong together, by profile and by PROFILE.DATASET; `setting=NAME` stands for them."""

    name: Name
    title: str
    set: dict[str, list[str]]


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
        if "autoencoder" in kinds and "cluster" not in kinds:
            raise ValueError("stages: an autoencoder leaves the network as it was; add pairs 'cluster' after it")
        if "local" in kinds and set(kinds[kinds.index("local") :]) != {"local"}:
            raise ValueError("stages: what comes after 'local' changes the encoder below it; let 'local' be the last")
        if self.finetune.checkpoint == "best" and not getattr(self.division, "validation", True):
            raise ValueError(f"finetune.checkpoint: 'best' needs validation subjects; {self.protocol} has none: last")
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
        key = self.dataset.model_dump(include=READ) | self.model_dump(include={"geometry", "unlabelled"})
        return key | {"protocol": self.dataset.protocols[self.protocol].model_dump()}


FLAT_STAGES = ("local", "rotation", "inpainting", "context_restoration", "pirl")
OVERRIDABLE = (
    "precision",
    "dataset",
    "protocol",
    "unlabelled",
    "geometry",
    "network",
    "stages",
    "recipe",
    "pretrain",
    "finetune",
)


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
    all_labels: list[str] = []  # methods that are fine-tuned on all labels, too
    protocol: str = ""
    dimensions: Literal[2, 3] = 2
    pretrain_dataset: str = ""
    axes: list[Axis] = []
    set: dict[str, list[str]] = {}  # overrides of this study, by profile
    contrasts: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []  # declared: first minus second method

    def within(self, profile: ProfileConfig) -> "StudyConfig":
        """The study with no more of its draws and seeds than the profile asks for."""
        return self.model_copy(update={"draws": self.draws[: profile.draws], "seeds": self.seeds[: profile.draws]})
