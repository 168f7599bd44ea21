"""What a network, stage, recipe, geometry or data set may be told, as typed objects.

Defaults are the published values where they are known; of cluster contrast (Zhang et al.) none is, and they are ours.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clseg.errors import nearest, repeated


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
Nearness = Annotated[float, Field(gt=0, lt=1)]  # of positions, which run from 0 to 1: at 1 all slices are alike
Decay = Annotated[float, Field(ge=0, lt=1)]
Part = Annotated[float, Field(ge=0, le=1)]
Filters = Annotated[list[Pixels], Field(min_length=2, max_length=12)]
Plane = Annotated[list[Pixels], Field(min_length=2, max_length=2)]
Sides = Annotated[list[Pixels], Field(min_length=2, max_length=3)]


class Geometry(Strict):
    size: Sides  # of the network: [H, W], in 3-D [D, H, W] of a patch
    spacing_mm: Step | None = None  # of a pixel in the plane; None: it is `step_px` native ones
    step_px: Step = 1.0  # where spacing_mm is None
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
    kind: Literal["percentiles", "z_score"] = "percentiles"  # z_score: clipped to p_low and p_high, (v - mean) / sd
    low: Percent = 1.0  # (v - p_low) / (p_high - p_low) per volume and channel, not clipped
    high: Percent = 99.0
    n4: bool = False  # corrects the bias field first


class SeededProtocol(Strict):
    kind: Literal["seeded"] = "seeded"
    test: Natural  # subjects, drawn first; 0: weights alone, and no number
    validation: Natural  # subjects; the rest is the pool of nested draws
    seed: Natural = 0
    transductive: bool = False


class CrossValidation(Strict):
    seed: Natural = 12345  # of random folds, and of which subjects a limit on those of pre-training leaves
    draw_seed: Natural = 1234  # of labelled and validation subjects, from the other folds
    validation: Count = 2
    transductive: bool = False  # else every draw has a pre-training of its own


class FoldsProtocol(CrossValidation):
    kind: Literal["folds"] = "folds"
    folds: Several = 5  # draw f tests on fold f


class Fold(Strict):  # nnU-Net has `train` and `val`; where there is more, `clseg` wrote the file
    train: list[str]
    val: list[str]  # what nnU-Net does not train on: our test subjects
    validation: list[str] = []  # none: drawn from `train`
    pretrain: list[str] = []  # none: what is left of `train`, and subjects without labels

    @model_validator(mode="after")
    def _names_each_once(self) -> "Fold":
        for name, own in self:
            if twice := repeated(own):
                raise ValueError(f"{name}: names {twice[0]} twice")
        return self


Folds = Annotated[list[Fold], Field(min_length=1)]


class SplitsFileProtocol(CrossValidation):
    kind: Literal["splits_file"] = "splits_file"
    file: str = "splits_final.json"  # of nnU-Net, in the data set's folder; draw f tests on `val` of fold f
    folds: list[Fold] = []  # what it holds, which `resolve` reads


class ListProtocol(Strict):
    kind: Literal["lists"] = "lists"
    pretrain: list[str]  # as published
    test: list[str]
    validation: list[str]
    validation_of: dict[int, dict[int, list[str]]] = {}  # [n][c]: that of draw c with n subjects
    labelled: dict[int, dict[int, list[str]]]  # [n][c]: draw c with n subjects
    not_in_all: list[str] = []
    transductive: bool = False

    @model_validator(mode="after")
    def _as_long_as_they_say(self) -> "ListProtocol":
        lists = [(name, None, getattr(self, name)) for name in ("pretrain", "test", "validation")]
        lists += [(f"labelled.{n}.{c}", n, own) for n, some in self.labelled.items() for c, own in some.items()]
        for name, count, own in lists:
            if twice := repeated(own):
                raise ValueError(f"{name}: names {twice[0]} twice; remove one")
            if count not in (None, len(own)):
                raise ValueError(f"{name}: names {len(own)} subjects, and {count} are to be labelled; correct it")
        return self


Protocol = Annotated[SeededProtocol | FoldsProtocol | SplitsFileProtocol | ListProtocol, Field(discriminator="kind")]


class DatasetConfig(Strict):
    name: Name
    adapter: str
    title: str = ""
    description: str = ""
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
    threshold: Nearness | None = None  # of positional contrast
    normalisation: Normalisation = Normalisation()
    geometry: dict[str, Geometry] = {}  # by profile
    geometry_3d: dict[str, Geometry] = {}
    protocols: dict[str, Protocol] = {}  # the first is the default

    @model_validator(mode="after")
    def _names_differ(self) -> "DatasetConfig":
        if twice := repeated(self.classes.values()):
            raise ValueError(f"classes: {twice[0]!r} is the name of two label values; give each its own")
        return self

    @property
    def photographs(self) -> bool:
        """Whether its images are photographs, in colour and without a header, and not NIfTI files or the like."""
        name = str(self.options.get("images", "")).lower()
        return self.adapter == "pairs" and not any(end in name for end in (".nii", ".mgz", ".mgh", ".hdr", ".img"))


READ = {"name", "adapter", "options", "channels", "classes", "phases", "normalisation"}  # what decides what is read


class Optimisation(Strict):
    optimiser: Literal["adam", "adamw", "sgd"] = "adam"  # sgd has momentum 0.9
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: per step, from `learning_rate` to the final one
    final_learning_rate: NotNegative = 0.0
    weight_decay: NotNegative = 0.0

    @property
    def unread(self) -> dict[str, str]:
        """The keys that have no effect with the others, and why."""
        return {"final_learning_rate": "a constant schedule"} if self.schedule == "constant" else {}

    @model_validator(mode="after")
    def _has_effect(self) -> "Optimisation":
        for name, why in self.unread.items():  # it would name another run of the same numbers
            if getattr(self, name) != (default := type(self).model_fields[name].default):
                raise ValueError(f"{name} has no effect with {why}; leave it at {default!r}")
        return self


class StageConfig(Optimisation):
    slices: Several = 12  # that make a batch, before augmentation

    @property
    def of_parts(self) -> bool:  # of volumes: it needs slices whose positions are known
        return getattr(self, "pairs", "") == "partition" or getattr(self, "strategy", "") == "ld"


class ContrastStage(StageConfig):
    stage: Literal["contrast"] = "contrast"  # trains the encoder
    pairs: Literal["instance", "partition", "position", "cluster"]  # who is alike
    strategy: Literal["gd-", "gd", "gcl"] = "gd"  # of partitions: gd-, gd of Chaitanya et al., gcl of Zeng et al.
    set_of: Several | None = 2  # of gd: so many volumes of the batch have positives in each other; None: all of them
    partitions: Several = 4
    threshold: Nearness | None = None  # of positions; None: that of the data set
    clusters: Several = 10  # of the features of an autoencoder stage before
    cluster_distance: Positive | None = None  # cuts there, in place of a number of `clusters`
    linkage: Literal["ward", "average", "complete"] = "ward"
    positives: Literal["cluster", "view"] = "cluster"  # view: rows of one cluster are only kept out of the negatives
    views: Literal["glcl", "pcl"] = "glcl"
    head: Literal["flatten", "pool"] = "flatten"  # g1 of Chaitanya et al., that of Zeng et al.
    temperature: Positive = 0.1
    denominator: Literal["all", "pair"] = "pair"

    @property
    def unread(self) -> dict[str, str]:
        keys = {"partition": ["partitions"], "position": ["threshold"]}
        keys["cluster"] = ["clusters", "cluster_distance", "linkage", "positives"]
        pairs = f"pairs {self.pairs}"
        found = {name: pairs for other, names in keys.items() if other != self.pairs for name in names}
        if self.pairs != "partition":
            found |= {"set_of": pairs} | ({"strategy": pairs} if self.strategy == "gd-" else {})  # gcl is shared
        elif self.strategy != "gd":
            found["set_of"] = f"strategy {self.strategy}"
        if self.cluster_distance is not None:
            found["clusters"] = "a cluster_distance"
        return super().unread | found

    @property
    def answer(self) -> str:  # who is alike, in a word; in the names of runs
        return self.strategy if self.pairs == "partition" else self.pairs


class AutoencoderStage(StageConfig):
    stage: Literal["autoencoder"] = "autoencoder"  # a beta-VAE on slices
    latent: Several = 32  # features that are clustered into pseudo-classes
    beta: Positive = 1.0


class LocalStage(StageConfig):
    stage: Literal["local"] = "local"  # trains the first decoder blocks, encoder frozen
    strategy: Literal["lr", "ld"] = "lr"
    decoder_blocks: UpToFive = 3
    regions: Literal[9, 13] = 13
    size: Literal[1, 3] = 3
    negatives: UpToFive = 5
    neighbours: Literal["published", "nearest"] = "published"
    partitions: Several = 4
    temperature: Positive = 0.1

    @property
    def unread(self) -> dict[str, str]:
        return super().unread | ({"partitions": "strategy lr"} if self.strategy == "lr" else {})

    @property
    def answer(self) -> str:  # in the names of runs
        return self.strategy


class RotationStage(StageConfig):
    stage: Literal["rotation"] = "rotation"  # which multiple of 90 degrees was a slice turned by? Trains the encoder


class InpaintingStage(StageConfig):
    stage: Literal["inpainting"] = "inpainting"  # fill a box; trains encoder and decoder
    box: Share = 100 / 192  # times the image side
    place: Literal["centre", "random"] = "random"


class ContextRestorationStage(StageConfig):
    stage: Literal["context_restoration"] = (
        "context_restoration"  # put swapped patches back; trains encoder and decoder
    )
    swaps: Count = 10  # pairs of patches
    patch: Share = 5 / 192  # times the image side, at least 4 pixels


class PirlStage(StageConfig):
    stage: Literal["pirl"] = "pirl"  # a slice and its jigsaw are alike; trains the encoder
    grid: Several = 3  # x `grid` pieces
    negatives: Count = 1024  # from a memory of slices
    momentum: Share = 0.5  # of the memory
    weight: Share = 0.5  # of the jigsaw's loss; the rest is that of the slice itself
    temperature: Positive = 0.07


Pretext = RotationStage | InpaintingStage | ContextRestorationStage | PirlStage
Stage = Annotated[ContrastStage | AutoencoderStage | LocalStage | Pretext, Field(discriminator="stage")]
StageName = Literal[tuple(kind.model_fields["stage"].default for kind in get_args(get_args(Stage)[0]))]


class SupervisedRecipe(Optimisation):
    recipe: Literal["supervised"] = "supervised"  # fine-tunes the whole network on the labelled slices
    loss: Literal["dice", "cross_entropy", "dice+cross_entropy"] = "dice"
    augmentation: Literal["published", "pcl", "none"] = "published"
    mixup: NotNegative = 0.0  # alpha of Beta(alpha, alpha), 0 is off
    average: Decay = 0.0  # the segmenter is a running average of the weights with this decay; 0 is off


class OwnWeightsRecipe(SupervisedRecipe):  # is scored with the weights of its last step
    @property
    def unread(self) -> dict[str, str]:
        return super().unread | {"average": f"recipe {self.recipe}"}


class SelfTrainingRecipe(OwnWeightsRecipe):
    recipe: Literal["self_training"] = "self_training"  # slices without labels get those of a frozen copy
    rounds: Count = 3  # the copy is renewed so often
    warm_up: Share = 0.4  # of the steps, before the first copy
    weight: Positive = 1.0


class MeanTeacherRecipe(SupervisedRecipe):
    recipe: Literal["mean_teacher"] = "mean_teacher"  # a running average of the weights teaches
    average: Decay = 0.99
    weight: Positive = 0.1
    ramp: Share = 0.4  # of the steps, over which the weight of its lesson grows


class AdversarialRecipe(OwnWeightsRecipe):
    recipe: Literal["adversarial"] = "adversarial"  # predictions with and without labels are to look alike
    weight: Positive = 0.1


class GanAugmentationRecipe(OwnWeightsRecipe):
    recipe: Literal["gan_augmentation"] = "gan_augmentation"  # deformations and intensity changes are learned too
    adversarial_weight: Positive = 1.0
    size_weight: Positive = 1e-3
    warm_up: Share = 0.04


class WeakToStrongRecipe(SupervisedRecipe):
    recipe: Literal["weak_to_strong"] = "weak_to_strong"  # what is sure on a weakly changed slice holds on a strong one
    average: Decay = 0.99
    statistics: Literal["running", "batch"] = "running"  # of batch norm, with which the teacher sees a slice
    confidence: Share = 0.95  # least probability of a pseudo-label
    weight: Positive = 1.0
    ramp: Part = 0.0  # of the steps, over which the weight grows; 0: it is there at once


SemiSupervised = SelfTrainingRecipe | MeanTeacherRecipe | WeakToStrongRecipe | AdversarialRecipe | GanAugmentationRecipe
Recipe = Annotated[SupervisedRecipe | SemiSupervised, Field(discriminator="recipe")]


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
