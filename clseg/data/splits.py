"""Which subjects pre-train, carry labels, validate and test; disjoint by subject."""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from clseg.errors import RequestError, writing
from clseg.settings import CrossValidation, Fold, FoldsProtocol, ListProtocol, Protocol, SeededProtocol

Count = int | Literal["all"]  # of subjects with labels
Sets = tuple[list[str], list[str], list[str], list[str]]  # those of `Split`


@dataclass(frozen=True)
class Split:
    """Subject ids of the four sets; `pretrain` may overlap `labelled` and, in published lists, `validation`."""

    pretrain: tuple[str, ...]
    labelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def others(self) -> set[str]:
        """Those whose images fine-tuning may use without labels: to pre-train on, and in no other set."""
        return set(self.pretrain) - {*self.labelled, *self.validation, *self.test}


def unlabelled(split: Split, limit: int | None) -> tuple[str, ...]:
    """The first `limit` subjects of the pre-training set (all: None); a smaller limit is inside a larger one."""
    if limit is not None and limit > len(split.pretrain):
        most = len(split.pretrain)
        raise RequestError(f"unlabelled={limit}: only {most} subjects are there for pre-training; lower it")
    return split.pretrain[:limit]


def available_draws(protocol: Protocol, labelled: Count) -> list[int] | None:
    """The draws that exist for so many labelled subjects; None: any number of them."""
    if isinstance(protocol, CrossValidation):
        return list(range(1, _number(protocol) + 1))
    if labelled == "all":
        return [1]
    return None if isinstance(protocol, SeededProtocol) else sorted(protocol.labelled.get(labelled, {}))


def make_split(
    protocol: Protocol, subjects: Iterable[str], labelled_subjects: Iterable[str], labelled: Count, draw: int
) -> Split:
    """The four sets for `labelled` subjects with labels (or "all"), in the given draw (from 1 on).

    Raises `RequestError` if the protocol and the subjects of the folder do not offer it, or it uses a subject twice.
    """
    if draw < 1 or (labelled != "all" and labelled < 1):
        raise ValueError(f"labelled and draw start at 1 (given: {labelled}, {draw})")
    make = {SeededProtocol: _seeded, ListProtocol: _listed}.get(type(protocol), _cross_validated)
    sets = make(protocol, sorted(set(subjects)), sorted(set(labelled_subjects)), labelled, draw)
    split = Split(*map(tuple, sets))
    if protocol.transductive:
        split = replace(split, pretrain=tuple(dict.fromkeys(split.pretrain + split.validation + split.test)))
    disjoint = [("labelled", "validation"), ("labelled", "test"), ("validation", "test")]
    for first, second in disjoint if protocol.transductive else [*disjoint, ("pretrain", "test")]:
        if both := sorted(set(getattr(split, first)) & set(getattr(split, second))):
            raise RequestError(f"subjects {', '.join(both)} are both in {first} and {second}; correct the protocol")
    return split


def _seeded(protocol: SeededProtocol, subjects: list[str], with_label: list[str], labelled: Count, draw: int) -> Sets:
    """One permutation gives test, validation and pool, in this order; the n-subject set is the start of the draw's."""
    wanted, held_out = 1 if labelled == "all" else labelled, protocol.test + protocol.validation
    if len(with_label) < held_out + wanted:
        sizes = f"{wanted} labelled, {protocol.validation} validation and {protocol.test} test subjects are wanted and"
        remedy = "lower `labelled`, or test and validation of the protocol"
        raise RequestError(f"{sizes} {len(with_label)} have labels; {remedy}")
    order = np.random.default_rng(protocol.seed).permutation(with_label).tolist()
    test, validation, pool = order[: protocol.test], order[protocol.test : held_out], order[held_out:]
    chosen = np.random.default_rng([protocol.seed, draw]).permutation(pool).tolist()[:wanted]
    # pre-training subjects in an order of their own, so that a limit on their number takes a random part
    pretrain = np.random.default_rng(protocol.seed).permutation(sorted(set(subjects) - {*test, *validation})).tolist()
    return pretrain, sorted(pool) if labelled == "all" else chosen, validation, test


def _number(protocol: CrossValidation) -> int:
    """How many folds it has."""
    return protocol.folds if isinstance(protocol, FoldsProtocol) else len(protocol.folds)


def _cross_validated(
    protocol: CrossValidation, subjects: list[str], with_label: list[str], labelled: Count, draw: int
) -> Sets:
    """Draw f tests on fold f; the n-subject set is the start of one random order of the fold's training subjects.

    Folds of a file: those of nnU-Net. Its `val` are tested, as it does not train on them; validation subjects are drawn
    from its `train`, of which those without labels are left to pre-training. A file that `write_splits` wrote gives the
    sets that were written. Random folds: source: released code of Zeng et al., the same subjects as scikit-learn's
    shuffled `KFold`, then `random.sample`.
    *Deviation*: there the epoch is chosen on the test fold, here by `validation` subjects, the last of that order.
    """
    if draw > _number(protocol):
        raise RequestError(f"draw={draw}: the protocol has {_number(protocol)} folds; draws are numbered by them")
    if isinstance(protocol, FoldsProtocol):
        shuffled = np.random.RandomState(protocol.seed).permutation(with_label).tolist()
        test = np.array_split(shuffled, protocol.folds)[draw - 1].tolist()
        fold = Fold(train=sorted(set(with_label) - set(test)), val=sorted(test))
    else:
        fold = protocol.folds[draw - 1]
        _require({*fold.train, *fold.pretrain}, {*fold.val, *fold.validation}, subjects, with_label)
    pool, validation = [subject for subject in fold.train if subject in with_label], fold.validation
    if not validation:
        order = random.Random(protocol.draw_seed).sample(sorted(pool), len(pool))
        pool, validation = order[: -protocol.validation], order[-protocol.validation :]
    if (1 if labelled == "all" else labelled) > len(pool):
        raise RequestError(f"labelled={labelled}: fold {draw} leaves {len(pool)} subjects beside test and validation")
    everyone = np.random.default_rng(protocol.seed).permutation(subjects).tolist()
    seen = set(subjects)
    if not protocol.transductive:
        seen = {*fold.train, *seen.difference(with_label)} - {*fold.val, *validation}
    pretrain = fold.pretrain or [subject for subject in everyone if subject in seen]
    return pretrain, sorted(pool) if labelled == "all" else pool[:labelled], validation, fold.val


def _listed(protocol: ListProtocol, subjects: list[str], with_label: list[str], labelled: Count, draw: int) -> Sets:
    draws, test, validation = protocol.labelled.get(labelled, {}), protocol.test, protocol.validation
    if labelled == "all":
        chosen = sorted(set(with_label) - {*test, *validation, *protocol.not_in_all})
    elif draw in draws:
        chosen, validation = draws[draw], protocol.validation_of.get(labelled, {}).get(draw, validation)
    else:
        asked = f"labelled={labelled}, draw={draw}" if draws else f"labelled={labelled}"
        offered = ", ".join(map(str, sorted(draws or protocol.labelled)))
        raise RequestError(f"{asked}: the published lists offer {offered}")
    _require(set(protocol.pretrain), {*chosen, *validation, *test}, subjects, with_label)
    return protocol.pretrain, chosen, validation, test


def _require(images: set[str], labels: set[str], subjects: list[str], with_label: list[str]) -> None:
    """Raise `RequestError` unless the folder has these images and labels."""
    if absent := sorted((images | labels) - set(subjects)):
        raise RequestError(
            f"the protocol names subjects that the data set folder lacks: {', '.join(absent)}; add or remove them"
        )
    if bare := sorted(labels - set(with_label)):
        raise RequestError(f"the protocol needs labels of subjects that have none: {', '.join(bare)}; add them")


def write_splits(path: Path, splits: Iterable[Split]) -> None:
    """Splits, a draw each, as folds of an nnU-Net `splits_final.json`: `train` the labelled subjects, `val` those that
    are tested. nnU-Net passes over the two other sets, which are there for `SplitsFileProtocol` to read.

    Equal splits are written once. Raises `RequestError` if the file cannot be written.
    """
    sets = {"train": "labelled", "val": "test", "validation": "validation", "pretrain": "pretrain"}
    folds = [{name: getattr(split, own) for name, own in sets.items()} for split in dict.fromkeys(splits)]
    with writing(path, "choose another place"):
        path.write_text(json.dumps(folds, indent=4) + "\n", encoding="utf-8")
