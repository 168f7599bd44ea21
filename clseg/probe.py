"""Did a pre-training learn, and what? Numbers beside its loss that say so; they find faults and never choose a winner.

The loss alone says little: that of a collapsed network, whose embeddings are all the same, is its *floor*, about the
logarithm of the number of rows that an anchor is compared with. What a pre-training learned is how far it came from
there.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor, nn

from clseg.data.store import Store
from clseg.losses import contrastive_terms
from clseg.pairs import Pairs

BATCHES = 8  # drawn for every mean
Batch = Sequence[Tensor]  # what the draw of `stages.contrast` gives: positives, negatives, views
FOLDS = 5  # of subjects, of the linear probes
COLUMNS = [
    *("loss", "loss_held_out", "floor", "bound", "learned", "rank", "cosine"),
    *("position_r2", "size_r2", "held_out_subjects"),
]


def floor(pairs: Pairs, temperature: float, denominator: str) -> float:
    """The loss of collapsed embeddings: every similarity is the same."""
    return _loss(torch.ones(len(pairs.positive), 2), pairs, temperature, denominator)


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


def effective_rank(embedding: Tensor) -> float:
    """e to the entropy of the normalised singular values of centred embeddings [B, D]: from 1 to min(B, D).

    Source: Roy and Vetterli, EUSIPCO 2007.
    """
    values = torch.linalg.svdvals((embedding - embedding.mean(0)).double())
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def _loss(embedding: Tensor, pairs: Pairs, temperature: float, denominator: str) -> float:
    masks = (mask.to(embedding.device) for mask in (pairs.positive, pairs.negative))
    return float(contrastive_terms(embedding, *masks, temperature, denominator))


@torch.no_grad()
def features(encoder: nn.Module, store: Store, rows: np.ndarray) -> np.ndarray:
    """The deepest feature map of slices as they are, averaged over its places [n, width] float64; running averages of
    batch norm are used."""
    encoder.eval()
    device, parts = next(encoder.parameters()).device, np.array_split(rows, max(len(rows) // 64, 1))
    maps = (encoder(store.batch(part, device).image)[-1].float() for part in parts if len(part))
    return np.concatenate([feature.flatten(2).mean(2).cpu().double().numpy() for feature in maps])


def linear_probe(feature: np.ndarray, target: np.ndarray, group: np.ndarray) -> float:
    """Share of the variance of `target` [n] or [n, k] that a ridge regression on features [n, d] explains.

    Over folds of groups (subjects): 1 is all, 0 or less nothing. NaN for fewer than three groups or a target that never
    changes.
    """
    if len(set(group)) < 3 or np.ptp(target, axis=0).min() == 0:
        return float("nan")
    scaled = (feature - feature.mean(0)) / (feature.std(0) + 1e-9)
    folds = GroupKFold(min(FOLDS, len(set(group))))
    found = cross_val_predict(RidgeCV(np.logspace(-2, 4, 13)), scaled, target, groups=group, cv=folds)
    return float(r2_score(target, found))


def nearest(feature: np.ndarray, position: np.ndarray, subject: np.ndarray) -> tuple[float, float]:
    """What the nearest slice, by cosine of features [n, d], has in common with a slice.

    The mean distance in position [n] to the nearest slice of another subject, and the share of slices whose nearest of
    all is of the same subject [n].
    """
    unit = feature / np.linalg.norm(feature, axis=1, keepdims=True).clip(1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -2)
    same = subject[:, None] == subject[None, :]
    other = np.where(same, -2, similarity).argmax(axis=1)
    return np.abs(position - position[other]).mean(), (subject == subject[similarity.argmax(axis=1)]).mean()


def fault(found: Mapping[str, float]) -> str:
    """What a row of `COLUMNS` says against a pre-training, or cannot say; empty if nothing."""
    if not found["learned"] >= 0.1:
        return "learned little: the loss came less than a tenth of the way from its floor to its bound"
    if np.isnan(found["loss_held_out"]):
        return "not known on subjects that it never saw: there is no loss on them"
    if found["loss_held_out"] >= found["floor"]:
        return "on subjects that it never saw, the contrastive loss is not below its floor"
    return ""


@torch.no_grad()
def probe(
    encoder: nn.Module,
    head: nn.Module,
    seen: Iterable[Batch],
    unseen: Iterable[Batch],
    store: Store,
    held_out: Iterable[str],
    temperature: float,
    denominator: str,
) -> dict[str, float]:
    """What a contrastive pre-training learned (`COLUMNS`).

    seen, unseen: batches of training slices and of those of `held_out` subjects; there may be none of the second.
    `learned`: the part of the way from the floor to the bound, on training slices. `rank`, `cosine`: effective rank and
    mean cosine of the embeddings of the first held-out batch, of the first training batch where there is none.
    `position_r2`, `size_r2`: linear probes of the frozen encoder for the position of a slice and for the share of its
    pixels that each structure has, on held-out subjects.
    """
    frozen, encoder, head = deepcopy(encoder), deepcopy(encoder).train(), deepcopy(head).train()

    def embedded(batch: Batch) -> tuple[Tensor, Pairs]:
        positive, negative, *views = batch
        return torch.cat([head(encoder(view)[-1]).float() for view in views]), Pairs(positive.cpu(), negative.cpu())

    about, found = (temperature, denominator), {}
    own, others = list(map(embedded, seen)), list(map(embedded, unseen))
    found["loss"] = float(np.mean([_loss(z, pairs, *about) for z, pairs in own]))
    found["floor"] = float(np.mean([floor(pairs, *about) for _, pairs in own]))
    found["bound"] = float(np.mean([bound(pairs, *about) for _, pairs in own]))
    found["learned"] = (found["floor"] - found["loss"]) / (found["floor"] - found["bound"])
    found["loss_held_out"] = float(np.mean([_loss(z, pairs, *about) for z, pairs in others])) if others else np.nan
    z = F.normalize((others or own)[0][0], dim=1)
    found["rank"], found["cosine"] = effective_rank(z), float(((z.sum(0) ** 2).sum() - len(z)) / (len(z) ** 2 - len(z)))
    labelled = sorted({*held_out} & {*store.labelled_subjects})
    rows = store.rows(labelled, labelled=True)
    found |= {"position_r2": np.nan, "size_r2": np.nan, "held_out_subjects": len(labelled)}
    if len(labelled) >= 3:
        feature, subject = features(frozen, store, rows), store.batch(rows).subject.numpy()
        found["position_r2"] = linear_probe(feature, store.slices["position"].to_numpy()[rows], subject)
        labels = np.asarray(store.labels[rows])
        sizes = [(labels == k).reshape(len(rows), -1).mean(1) for k in store.class_names]
        found["size_r2"] = linear_probe(feature, np.stack(sizes, 1), subject)
    return {name: found[name] for name in COLUMNS}
