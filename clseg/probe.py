"""Did a pre-training learn, and what? Numbers beside its loss that say so; they find faults and never choose a winner.

The loss alone says little: beside it stands its *floor*, that of a network that gives every image the same answer (of
context restoration, that of leaving the image as it is). For a contrastive loss it is about the logarithm of the number
of rows that an anchor is compared with. What a pre-training learned is how far it came from there.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor, nn

from clseg import ranks
from clseg.data.store import Store
from clseg.errors import RequestError
from clseg.loop import Training
from clseg.losses import contrastive_terms
from clseg.models import BetaVAE
from clseg.pairs import Pairs
from clseg.settings import NetworkConfig, Stage
from clseg.stages import STAGES
from clseg.train import Pretrained, stage_work

BATCHES = 8  # drawn for every mean
IMAGES = 32  # that the encoder sees at once
FOLDS = 5  # of subjects, of the linear probes
COLUMNS = [
    *("loss", "floor", "bound", "learned", "loss_held_out", "floor_held_out"),
    *("rank", "cosine", "position_r2", "size_r2", "held_out_subjects"),
]


def floor(pairs: Pairs, temperature: float, denominator: str) -> float:
    """The contrastive loss of collapsed embeddings: every similarity is the same."""
    same = torch.ones(len(pairs.positive), 2)
    return float(contrastive_terms(same, pairs.positive, pairs.negative, temperature, denominator))


def bound(pairs: Pairs, temperature: float, denominator: str) -> float:
    """What no embedding can go below: every positive at cosine 1, every negative at -1, if that were possible.

    "all": mean over anchors of log(|P_i| + |N_i| e^{-2 / temperature}); "pair": log(1 + |N_i| e^{-2 / temperature}),
    mean over positive pairs.
    """
    positives, negatives = pairs.positive.sum(1).double(), pairs.negative.sum(1).double()
    rivals = negatives * np.exp(-2 / temperature)
    if denominator == "pair":
        return float(((1 + rivals).log() * positives).sum() / positives.sum())
    return float((positives + rivals).log()[positives > 0].mean())


def limits(stage: Stage, batch: Sequence[Tensor]) -> tuple[float, float]:
    """Floor and bound of the loss of a stage on a batch of its `draw`; NaN for a stage that this does not know.

    The floor of a rotation is chance; of inpainting, one grey for all boxes; of context restoration, to leave the image
    as it was spoilt; of an auto-encoder, the mean image of the batch. Their bound is 0, which not every task allows.
    """
    match stage.stage:
        case "contrast":
            pairs = Pairs(batch[0].cpu(), batch[1].cpu())
            about = pairs, stage.temperature, stage.denominator
            return floor(*about), bound(*about)
        case "local" | "pirl":  # one positive
            rivals = 2 * stage.negatives if stage.stage == "local" else batch[3].shape[1]
            return float(np.log1p(rivals)), float(np.log1p(rivals * np.exp(-2 / stage.temperature)))
        case "rotation":
            return float(np.log(4)), 0.0
        case "inpainting":
            image, _, hidden = batch
            return float(image[hidden.expand_as(image)].var(correction=0)), 0.0
        case "context_restoration":
            return float((batch[1] - batch[0]).square().mean()), 0.0
        case "autoencoder":
            return float((batch[0] - batch[0].mean(0)).square().mean() / 2), 0.0
    return np.nan, np.nan


def effective_rank(embedding: Tensor) -> float:
    """e to the entropy of the normalised singular values of centred embeddings [B, D]: from 1 to min(B, D).

    Source: Roy and Vetterli, EUSIPCO 2007.
    """
    values = torch.linalg.svdvals((embedding - embedding.mean(0)).double())
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def subject_of(store: Store, rows: np.ndarray) -> np.ndarray:
    """The subject of every slice [n]."""
    return store.volumes["subject"].to_numpy()[store.slices["volume"].to_numpy()[rows]]


@torch.no_grad()
def features(encoder: nn.Module, store: Store, rows: np.ndarray) -> np.ndarray:
    """The deepest feature map of slices as they are, averaged over its places [n, width] float64, or the features of an
    auto-encoder [n, latent]; running averages of batch norm are used."""
    encoder.eval()
    device, parts = next(encoder.parameters()).device, np.array_split(rows, -(-len(rows) // IMAGES))

    def feature(image: Tensor) -> Tensor:
        if isinstance(encoder, BetaVAE):
            return encoder.encode(image)[0]
        return encoder(image)[-1].float().flatten(2).mean(2)

    found = (feature(store.batch(part, device).image) for part in parts)
    return np.concatenate([values.cpu().double().numpy() for values in found])


def linear_prediction(feature: np.ndarray, target: np.ndarray, group: np.ndarray) -> np.ndarray:
    """`target` [n] or [n, k] as a ridge regression on features [n, d] predicts it, fitted without the row's group.

    Over folds of groups (subjects). NaN for fewer than three groups or a target that never changes.
    """
    if len(set(group)) < 3 or np.ptp(target, axis=0).min() == 0:
        return np.full_like(target, np.nan, dtype=float)
    scaled = (feature - feature.mean(0)) / (feature.std(0) + 1e-9)
    folds = GroupKFold(min(FOLDS, len(set(group))))
    return cross_val_predict(RidgeCV(np.logspace(-2, 4, 13)), scaled, target, groups=group, cv=folds)


def linear_probe(feature: np.ndarray, target: np.ndarray, group: np.ndarray) -> float:
    """Share of the variance of `target` that `linear_prediction` explains: 1 is all, 0 or less nothing; or NaN."""
    found = linear_prediction(feature, target, group)
    return float("nan") if np.isnan(found).any() else float(r2_score(target, found))


def nearest(feature: np.ndarray, position: np.ndarray, subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the nearest slice, by cosine of features [n, d], has in common with each slice.

    The distance in position [n] to the nearest slice of another subject, and whether the nearest of all is of the same
    subject [n].
    """
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True).clip(1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    same = subject[:, None] == subject[None, :]
    other = np.where(same, -2, similarity).argmax(axis=1)
    return np.abs(position - position[other]), subject == subject[similarity.argmax(axis=1)]


def fault(found: Mapping[str, float]) -> str:
    """What a row of `COLUMNS` says against a pre-training, or cannot say; empty if nothing."""
    if np.isnan(found["floor"]):
        return "not known: the loss has no floor here"
    if found["learned"] < 0.1:
        return "learned little: the loss came less than a tenth of the way from its floor to its bound"
    if np.isnan(found["loss_held_out"]):
        return "not known on subjects that it never saw: there is no loss on them"
    lowest = (
        found["floor"] if np.isnan(found["floor_held_out"]) else found["floor_held_out"]
    )  # of rows before there was
    if found["loss_held_out"] >= lowest:
        return "on subjects that it never saw, the loss is not below its floor"
    return ""


@torch.no_grad()
def probe(
    done: Pretrained,
    store: Store,
    subjects: Sequence[str],
    held_out: Iterable[str],
    stage: Stage,
    steps: int,
    *,
    network: NetworkConfig | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """What a pre-training learned (`COLUMNS`); the arguments are those of `train.pretrain`, with `held_out` subjects.

    `learned`: the part of the way from the floor to the bound, on training slices. `loss_held_out` and its floor are
    NaN for cluster contrast and PIRL, whose pseudo-classes and memory are of training slices, and where held-out
    volumes do not make a batch. `rank`, `cosine`: effective rank and mean cosine of the embeddings of the first
    held-out batch, of the first training batch where there is none; of a contrast alone. `position_r2`, `size_r2`:
    linear probes of the frozen encoder for the position of a slice and for the share of its pixels that each structure
    has, on held-out subjects with labels, three or more.
    """
    seen, held_out = [*subjects], sorted({*held_out})
    labelled = [subject for subject in held_out if subject in {*store.labelled_subjects}]
    found: dict[str, float] = dict.fromkeys(COLUMNS, np.nan) | {"held_out_subjects": len(labelled)}

    def again(subjects: Sequence[str]) -> tuple[Training, nn.Module]:
        """The stage with what was learned, on slices of these subjects, and the encoder."""
        work = stage_work(store, subjects, stage, steps, network or NetworkConfig(), seed, done.weights)
        training = STAGES[stage.stage](work, stage)
        for prefix, module in training.learning.items():
            own = {name: value for name, value in done.weights.items() if name.startswith(f"{prefix}.")}
            module.load_state_dict({name.removeprefix(f"{prefix}."): value for name, value in own.items()})
        for name, module in training.state.items() if subjects is seen else ():
            module.load_state_dict(done.training.state[name].state_dict())
        ranks.connect([work.network, *training.learning.values()])
        return training, training.learning.get("autoencoder", work.network.encoder)

    def means(training: Training) -> list[float]:
        """Loss, floor and bound."""
        every = []
        for batch in map(training.draw, range(steps, steps + BATCHES)):
            every.append([float(training.loss(*batch)), *limits(stage, batch)])
        return np.mean(every, axis=0).tolist()

    own, encoder = again(seen)
    if len(labelled) >= 3:
        rows = store.rows(labelled, labelled=True)
        feature, subject = features(encoder, store, rows), subject_of(store, rows)
        found["position_r2"] = linear_probe(feature, store.slices["position"].to_numpy()[rows], subject)
        labels = np.asarray(store.labels[rows])
        sizes = [(labels == k).reshape(len(rows), -1).mean(1) for k in store.class_names]
        found["size_r2"] = linear_probe(feature, np.stack(sizes, 1), subject)
    encoder.train()
    found["loss"], found["floor"], found["bound"] = means(own)
    found["learned"] = (found["floor"] - found["loss"]) / (found["floor"] - found["bound"])
    shown = own
    if held_out and stage.stage != "pirl" and getattr(stage, "pairs", "") != "cluster":
        with suppress(RequestError):  # volumes that are too short for partitions, say
            others, _ = again(held_out)
            found["loss_held_out"], found["floor_held_out"], _ = means(others)
            shown = others
    if stage.stage == "contrast":
        _, _, *views = shown.draw(steps)
        body, head = shown.learning["encoder"], shown.learning["head"]
        z = F.normalize(torch.cat([head(body(view)[-1]).float() for view in views]), dim=1)
        found["rank"] = effective_rank(z)
        found["cosine"] = float(((z.sum(0) ** 2).sum() - len(z)) / (len(z) ** 2 - len(z)))
    return found
