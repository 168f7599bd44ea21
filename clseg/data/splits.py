"""Which subjects pre-train, carry labels, validate and test; disjoint by subject."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clseg.config import FoldsProtocol, ListProtocol, Protocol, RequestError, SeededProtocol

Count = int | Literal["all"]  # of subjects with labels
Sets = tuple[list[str], list[str], list[str], list[str]]  # those of `Split`


@dataclass(frozen=True)
class Split:
    """Subject ids of the four sets; `pretrain` may overlap `labelled` and, in published lists, `validation`."""

    pretrain: tuple[str, ...]
    labelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def unlabelled(split: Split, limit: int | None) -> tuple[str, ...]:
    """The first `limit` subjects of the pre-training set (all: None); a smaller limit is inside a larger one."""
    if limit is not None and limit > len(split.pretrain):
        raise RequestError(f"unlabelled={limit}: only {len(split.pretrain)} subjects are there for pre-training")
    return split.pretrain[:limit]


def available_draws(protocol: Protocol, labelled: Count) -> list[int] | None:
    """The draws that exist for so many labelled subjects; None: any number of them."""
    if isinstance(protocol, FoldsProtocol):
        return list(range(1, protocol.folds + 1))
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
    make = {SeededProtocol: _seeded, FoldsProtocol: _folds, ListProtocol: _listed}[type(protocol)]
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


def _folds(protocol: FoldsProtocol, subjects: list[str], with_label: list[str], labelled: Count, draw: int) -> Sets:
    """Draw f tests on fold f; the n-subject set is the start of one random order of the other folds.

    Source: released code of Zeng et al., the same subjects as scikit-learn's shuffled `KFold`, then `random.sample`.
    *Deviation*: there the epoch is chosen on the test fold, here by `validation` subjects, the last of that order.
    """
    if not protocol.transductive:  # one pre-training serves all folds, so it sees subjects that are tested
        raise RequestError("protocol of folds: its folds share one pre-training; declare `transductive: true`")
    if draw > protocol.folds:
        raise RequestError(f"draw={draw}: the protocol has {protocol.folds} folds; draws are numbered by them")
    shuffled = np.random.RandomState(protocol.seed).permutation(with_label).tolist()
    test = sorted(np.array_split(shuffled, protocol.folds)[draw - 1].tolist())
    others = sorted(set(with_label) - set(test))
    order = random.Random(protocol.draw_seed).sample(others, len(others))
    pool, validation = order[: -protocol.validation], order[-protocol.validation :]
    if labelled != "all" and labelled > len(pool):
        raise RequestError(f"labelled={labelled}: fold {draw} leaves {len(pool)} subjects beside test and validation")
    everyone = np.random.default_rng(protocol.seed).permutation(subjects).tolist()
    return everyone, sorted(pool) if labelled == "all" else pool[:labelled], validation, test


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
    labels_needed = {*chosen, *validation, *test}
    if absent := sorted({*protocol.pretrain, *labels_needed} - set(subjects)):
        raise RequestError(f"the protocol names subjects that the data set folder lacks: {', '.join(absent)}")
    if bare := sorted(labels_needed - set(with_label)):
        raise RequestError(f"the protocol needs labels of subjects that have none: {', '.join(bare)}")
    return protocol.pretrain, chosen, validation, test
