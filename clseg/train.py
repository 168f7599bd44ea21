"""Pre-train, fine-tune, score: the whole study on one store, without files of parameters.

>>> import pandas as pd
>>> from clseg.data.phantom import phantom_dataset
>>> from clseg.data.prepare import prepare
>>> from clseg.data.splits import make_split
>>> from clseg.settings import ContrastStage, Geometry, NetworkConfig, SeededProtocol, SupervisedRecipe
>>> from clseg.train import finetune, pretrain, scores
>>> store = prepare(phantom_dataset(subjects=8), Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
>>> protocol = SeededProtocol(test=2, validation=1)
>>> split = make_split(protocol, store.subjects, store.labelled_subjects, labelled=2, draw=1)
>>> network = NetworkConfig(filters=[8, 16, 16, 32])
>>> encoder = pretrain(store, split.pretrain, ContrastStage(pairs="partition"), steps=5, network=network)
>>> segmenter = finetune(store, split.labelled, SupervisedRecipe(), steps=5, network=network, start=encoder.weights)
>>> table = pd.DataFrame(scores(segmenter.network, store, split.test))
>>> sorted(table["class_name"].unique())
['left ventricle', 'myocardium', 'right ventricle']
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from clseg.data.store import Store
from clseg.errors import RequestError
from clseg.loop import Fit, Keeper, Training, Work, device, fit, seed_of
from clseg.models import UNet, transfer
from clseg.recipes import RECIPES
from clseg.recipes.evaluation import scores, validation_dice
from clseg.settings import NetworkConfig, Recipe, Stage
from clseg.stages import STAGES

__all__ = ["Finetuned", "Pretrained", "finetune", "new_network", "pretrain", "scores", "stage_work"]


@dataclass(frozen=True)
class Pretrained:
    """What a stage leaves: weights by name, with those of the stages before it; log and tables; the training itself."""

    weights: dict[str, Tensor]
    fit: Fit
    tables: dict[str, pd.DataFrame]
    training: Training


@dataclass(frozen=True)
class Finetuned:
    """A segmenter, of the last step or of the best on validation; log and tables of the training."""

    network: UNet
    fit: Fit
    tables: dict[str, pd.DataFrame]


def new_network(store: Store, config: NetworkConfig, seed: int, start: Mapping[str, Tensor] | None = None) -> UNet:
    """A network with seeded weights, then those of `start` where it has them (`models.transfer`)."""
    torch.manual_seed(seed_of(seed, "network"))
    network = UNet(store.channels, store.num_classes, config, store.dimensions)
    if start:
        transfer(network, start, "start")
    return network.placed(device())


def stage_work(
    store: Store,
    subjects: Iterable[str],
    stage: Stage,
    steps: int,
    network: NetworkConfig,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
) -> Work:
    """What a stage works on: the slices of these subjects, none of their labels."""
    subjects, start = list(subjects), start or {}
    built, rows = new_network(store, network, seed, start), store.rows(subjects)
    return Work(built, store.only(unlabelled=subjects), rows, stage.slices, seed, steps, earlier=start)


def pretrain(
    store: Store,
    subjects: Iterable[str],
    stage: Stage,
    steps: int,
    *,
    network: NetworkConfig | None = None,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    number: int = 0,
    precision: str = "float32",
    keeper: Keeper | None = None,
) -> Pretrained:
    """One stage of pre-training on the slices of `subjects`, without their labels, for `steps` steps.

    start: the weights that an earlier stage left; number: how many stages came before. Raises as the stage does.
    """
    work = stage_work(store, subjects, stage, steps, network or NetworkConfig(), seed, start)
    torch.manual_seed(seed_of(seed, "head", number))
    training: Training = STAGES[stage.stage](work, stage)
    result = fit(work.network, training, stage, steps, precision, keeper=keeper, title="pre-training")
    # what came from earlier stages and what was learned now; heads of earlier stages stay behind
    learned = {f"{prefix}.{k}": v for prefix, part in training.learning.items() for k, v in part.state_dict().items()}
    weights = {name: value for name, value in work.earlier.items() if not name.startswith("head.")} | learned
    own = work.network.state_dict()
    weights |= {name: value for name, value in own.items() if name in weights or name.startswith("encoder.")}
    return Pretrained(weights, result, training.tables, training)


def finetune(
    store: Store,
    labelled: Iterable[str],
    recipe: Recipe,
    steps: int,
    *,
    network: NetworkConfig | None = None,
    batch: int = 12,
    seed: int = 0,
    start: Mapping[str, Tensor] | None = None,
    unlabelled: Iterable[str] = (),
    validation: Iterable[str] = (),
    validate_every: int = 0,
    best: bool = False,
    precision: str = "float32",
    keeper: Keeper | None = None,
) -> Finetuned:
    """A segmenter from the labelled subjects, and from the images of the `unlabelled` ones where the recipe uses them.

    start: weights of a pre-training, none for random ones. The network is that of the last step; with `best` that of
    the best step on `validation`, which is measured every `validate_every` steps. Raises as the recipe does, and
    `RequestError` where `best` has no structure to be measured on.
    """
    labelled, unlabelled, validation = list(labelled), list(unlabelled), list(validation)
    held_out = store.only(validation)
    if best and not held_out.labels[held_out.rows(validation, labelled=True)].any():
        raise RequestError("checkpoint best: validation subjects have no labelled structure; choose last, or others")
    built, seen = new_network(store, network or NetworkConfig(), seed, start), store.only(labelled, unlabelled)
    torch.manual_seed(seed_of(seed, "recipe"))
    rows = seen.rows(labelled, labelled=True)
    work = Work(built, seen, rows, batch, seed, steps, seen.rows(unlabelled))
    training: Training = RECIPES[recipe.recipe](work, recipe)

    def validate() -> float:
        return validation_dice(built, held_out, validation)

    watched = (validate, validate_every) if validate_every else (None, 0)
    result = fit(built, training, recipe, steps, precision, *watched, keeper, "fine-tuning")
    if best:
        built.load_state_dict(result.best_state)
    return Finetuned(built, result, training.tables)
