"""Which subjects pre-train, carry labels, validate and test; disjoint by subject."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clseg.config import ListProtocol, RequestError, SeededProtocol


@dataclass(frozen=True)
class Split:
    """Subject ids of the four sets; `pretrain` may overlap `labelled` and, in published lists, `validation`."""

    pretrain: tuple[str, ...]
    labelled: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    def check(self, transductive: bool) -> "Split":
        """The split itself if no subject is used twice where it must not be, else `RequestError`."""
        disjoint = [("labelled", "validation"), ("labelled", "test"), ("validation", "test")]
        for first, second in disjoint if transductive else [*disjoint, ("pretrain", "test")]:
            if both := sorted(set(getattr(self, first)) & set(getattr(self, second))):
                raise RequestError(f"subjects {', '.join(both)} are both in {first} and {second}; correct the protocol")
        return self


def unlabelled(split: Split, limit: int | None) -> tuple[str, ...]:
    """The first `limit` subjects of the pre-training set (all: None); a smaller limit is inside a larger one."""
    if limit is not None and limit > len(split.pretrain):
        raise RequestError(f"unlabelled={limit}: only {len(split.pretrain)} subjects are there for pre-training")
    return split.pretrain[:limit]


def available_draws(protocol: SeededProtocol | ListProtocol, labelled: int | Literal["all"]) -> list[int] | None:
    """The draws that exist for so many labelled subjects; None: any number of them."""
    if labelled == "all":
        return [1]
    if isinstance(protocol, SeededProtocol):
        return None
    return sorted(protocol.labelled.get(labelled, {}))


def make_split(
    protocol: SeededProtocol | ListProtocol,
    subjects: Iterable[str],
    labelled_subjects: Iterable[str],
    labelled: int | Literal["all"],
    draw: int,
) -> Split:
    """The four sets for `labelled` subjects with labels (or "all"), in the given draw (from 1 on).

    Raises `RequestError` if the protocol and the subjects of the folder do not offer it.
    """
    if draw < 1 or (labelled != "all" and labelled < 1):
        raise ValueError(f"labelled and draw start at 1 (given: {labelled}, {draw})")
    make = _seeded if isinstance(protocol, SeededProtocol) else _listed
    return make(protocol, sorted(set(subjects)), sorted(set(labelled_subjects)), labelled, draw).check(
        protocol.transductive
    )


def _seeded(
    protocol: SeededProtocol, subjects: list[str], with_label: list[str], labelled: int | Literal["all"], draw: int
) -> Split:
    """One permutation gives test, validation and pool, in this order; the n-subject set is the start of the draw's."""
    held_out = protocol.test + protocol.validation
    wanted = 1 if labelled == "all" else labelled
    if len(with_label) < held_out + wanted:
        raise RequestError(
            f"{wanted} labelled, {protocol.validation} validation and {protocol.test} test subjects are wanted and "
            f"{len(with_label)} have labels; lower `labelled`, or test and validation of the protocol"
        )
    order = [str(subject) for subject in np.random.default_rng(protocol.seed).permutation(with_label)]
    test, validation, pool = order[: protocol.test], order[protocol.test : held_out], order[held_out:]
    chosen = [str(subject) for subject in np.random.default_rng([protocol.seed, draw]).permutation(pool)]
    # pre-training subjects in an order of their own, so that a limit on their number takes a random part
    rest = np.random.default_rng(protocol.seed).permutation([s for s in subjects if s not in {*test, *validation}])
    pretrain = [str(subject) for subject in rest]
    if protocol.transductive:
        pretrain += test + validation
    return Split(
        pretrain=tuple(pretrain),
        labelled=tuple(sorted(pool) if labelled == "all" else chosen[:labelled]),
        validation=tuple(validation),
        test=tuple(test),
    )


def _listed(
    protocol: ListProtocol, subjects: list[str], with_label: list[str], labelled: int | Literal["all"], draw: int
) -> Split:
    if labelled == "all":
        validation = protocol.validation
        chosen = [s for s in with_label if s not in {*protocol.test, *validation, *protocol.not_in_all}]
    else:
        if labelled not in protocol.labelled:
            offered = ", ".join(map(str, sorted(protocol.labelled)))
            raise RequestError(f"labelled={labelled}: the published lists offer {offered} or all")
        draws = protocol.labelled[labelled]
        if draw not in draws:
            offered = ", ".join(map(str, sorted(draws)))
            raise RequestError(f"draw={draw}: the published lists with {labelled} labelled offer draws {offered}")
        chosen = draws[draw]
        validation = protocol.validation_of.get(labelled, {}).get(draw, protocol.validation)
    pretrain = protocol.pretrain
    if protocol.transductive:
        pretrain = list(dict.fromkeys([*pretrain, *validation, *protocol.test]))
    if absent := sorted({*pretrain, *chosen, *validation, *protocol.test} - set(subjects)):
        raise RequestError(f"the protocol names subjects that the data set folder lacks: {', '.join(absent)}")
    if bare := sorted({*chosen, *validation, *protocol.test} - set(with_label)):
        raise RequestError(f"the protocol needs labels of subjects that have none: {', '.join(bare)}")
    return Split(tuple(pretrain), tuple(chosen), tuple(validation), tuple(protocol.test))
