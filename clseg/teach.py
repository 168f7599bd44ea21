"""Exercises that check themselves, with help: a wrong answer is told what went wrong, not only that it is wrong.

>>> from clseg import teach
>>> teach.dice_by_hand(0.6)
Not yet: that is the share of the reference that was found (recall); Dice counts what was found twice, over both sizes.
>>> teach.dice_by_hand(0.75).right
True

Each exercise is one function below that returns a `Check`: the right answer, and the wrong answers that are known.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import exp, log, log2, log10
from typing import Any, NoReturn

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from clseg.cluster import purity as package_purity
from clseg.losses import contrastive_loss, local_contrastive_loss
from clseg.metrics import dice as package_dice
from clseg.pairs import cluster_pairs, instance_pairs, partition_pairs, position_pairs
from clseg.recipes.weak_to_strong import consistency_loss, pseudo_labels
from clseg.regions import region_grid

CLOSE, EXACT = 6e-3, 1e-4  # how near a number must be: one that was rounded to two decimals, one that a function gave
CHECKS: dict[str, Callable[[], "Check"]] = {}


class NotYet(Exception):
    """Stops a notebook where the reader is to write something; Jupyter shows its one line and no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"Your turn: {self}"]


def todo(hint: str) -> NoReturn:
    """Stands where an answer belongs. Raises `NotYet` with a hint."""
    raise NotYet(hint)


@dataclass(frozen=True)
class Verdict:
    """What is said of an answer; it shows itself in a notebook."""

    right: bool
    text: str

    def __repr__(self) -> str:
        return f"{'Right' if self.right else 'Not yet'}: {self.text}"

    def _repr_markdown_(self) -> str:
        return f"**{'Right' if self.right else 'Not yet'}:** {self.text}"


@dataclass(frozen=True)
class Check:
    """How an answer is judged.

    right: a right answer, a value or, with `cases`, a function; why: said to whoever is right; wrong: what went wrong
    -> an answer by which one sees it; otherwise: said of every other answer; cases: the arguments of each call of the
    function; measure: what of an answer is compared, where more than one is right.
    """

    right: Any
    why: str
    wrong: Mapping[str, Any]
    otherwise: str
    cases: Sequence[tuple] = ()
    measure: Callable[[Any], Any] | None = None

    def tell(self, answer: Any) -> Verdict:
        """Right, or what is wrong. Raises `NotYet` where a function is not written yet, and nothing else."""
        if callable(answer) != bool(self.cases):
            wanted = "write a function, not its result" if self.cases else "give the value, not a function"
            return Verdict(False, f"{wanted}.")
        try:
            if isinstance(self.right, float) and np.shape(answer):
                return Verdict(False, "give one number, not a list of numbers.")
            if isinstance(self.right, int | float) and isinstance(answer, str):
                return Verdict(False, "write a number, without quotes.")
            found = self._measured(answer)
        except NotYet:
            raise
        except Exception as error:  # whatever the reader's code may do
            return Verdict(False, f"it stops with {type(error).__name__}: {error}")
        if self.cases and found[0] is None:
            return Verdict(False, "the function returns nothing; end it with `return ...`.")
        tolerance, right = EXACT if self.cases else CLOSE, self._measured(self.right)
        if _same(found, right, tolerance):
            if self.cases and _kinds(right[0]) != _kinds(found[0]):
                return Verdict(False, "the values are right; return them as a tensor of bool.")
            return Verdict(True, self.why)
        known = (hint for hint, example in self.wrong.items() if _same(found, self._measured(example), tolerance))
        return Verdict(False, next(known, self.otherwise))

    def _measured(self, answer: Any) -> Any:
        if self.cases:
            return [answer(*copy.deepcopy(case)) for case in self.cases]
        return self.measure(answer) if self.measure else answer


def _kinds(value: Any) -> list[bool]:
    """Whether a tensor, or each of several, is of bool."""
    parts = value if isinstance(value, list | tuple) else [value]
    return [part.dtype == torch.bool for part in parts if isinstance(part, Tensor)]


def _same(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two answers are equal: numbers, tensors and arrays within the tolerance, lists item by item."""
    one, other = (value.detach().cpu() if isinstance(value, Tensor) else value for value in (one, other))
    try:
        one, other = np.asarray(one, dtype=float), np.asarray(other, dtype=float)
    except (TypeError, ValueError, RuntimeError):  # the last: of tensors with a gradient inside of lists
        if all(isinstance(value, list | tuple) for value in (one, other)):
            return len(one) == len(other) and all(_same(*pair, tolerance) for pair in zip(one, other, strict=True))
        return type(one) is type(other) and one == other
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)


def statements(right: str, why: str, **hints: str) -> Check:
    """Which of several statements are true: `right` has their letters, `hints` what to say where one is misjudged.

    Capitals, spaces, commas and parentheses of an answer do not matter.
    """

    def first_misjudged(answer: str | Sequence[str]) -> str:
        text = "".join(map(str, answer)) if np.iterable(answer) else ""
        letters = set(re.sub(r"[\s,()]", "", text.lower()))
        if not letters or not letters <= {*hints}:
            return "no letters"
        return min(letters - set(right), default=min(set(right) - letters, default=""))  # wrongly chosen ones first

    wrong = {hint: "".join(sorted(set(right) ^ {letter})) for letter, hint in hints.items()}
    letters = f"write the letters of the true statements in one text, such as 'abc'; they go from a to {max(hints)}."
    return Check(right, why, wrong, letters, measure=first_misjudged)


def exercise(make: Callable[[], Check]) -> Callable[[Any], Verdict]:
    """Enters a check into `CHECKS`; what is left under its name takes an answer and gives a `Verdict`."""
    CHECKS[make.__name__] = make = cache(make)

    def judge(answer: Any) -> Verdict:
        return make().tell(answer)

    judge.__name__, judge.__doc__ = make.__name__, make.__doc__
    return judge


# ------------------------------------------------------------------------------------------- 90: few labels, lesson 02


@exercise
def dice_by_hand() -> Check:
    """Dice of a prediction of 6 pixels that lies inside a reference of 10."""
    wrong = {
        "that is the share of the reference that was found (recall), and here also what both have over what either has "
        "(IoU); Dice counts what both have twice, over both sizes.": 6 / 10,
        "that is the share of the prediction that is right (precision); the four missed pixels must cost something.": 1,
        "what both have is counted twice.": 6 / 16,
        "12 is right above the line; divide by the sizes of both, 6 + 10.": 12,
        "a Dice is a share, from 0 to 1, not a percentage.": 75,
    }
    otherwise = "twice the pixels that both have, over the pixels of one plus the pixels of the other."
    return Check(12 / 16, "2 · 6 / (6 + 10) = 0.75.", wrong, otherwise)


def _masks(*rows: str) -> np.ndarray:
    return np.array([[pixel == "#" for pixel in row] for row in rows])


@exercise
def dice() -> Check:
    """A function of two bool arrays of one shape: their Dice coefficient."""

    def overlap_over_union(prediction, reference):
        return (prediction & reference).sum() / (prediction | reference).sum()

    def without_two(prediction, reference):
        return (prediction & reference).sum() / (prediction.sum() + reference.sum())

    def accuracy(prediction, reference):
        return (prediction == reference).mean()

    def recall(prediction, reference):
        return (prediction & reference).sum() / reference.sum()

    def precision(prediction, reference):
        return (prediction & reference).sum() / prediction.sum()

    def either(prediction, reference):
        return 2 * (prediction & reference).sum() / (prediction + reference).sum()

    def no_sum(prediction, reference):
        return 2 * (prediction & reference) / (prediction.sum() + reference.sum())

    wrong = {
        "that is intersection over union (Jaccard): a relative of Dice, and smaller.": overlap_over_union,
        "it never exceeds 0.5; what both have is counted twice.": without_two,
        "that is the share of equal pixels: an empty prediction of a small organ would score above 0.9.": accuracy,
        "that is the share of the reference that was found (recall): divide by both sizes.": recall,
        "that is the share of the prediction that is right (precision): divide by both sizes.": precision,
        "of two bool arrays, `+` is `or`: add the two sums, not the arrays.": either,
        "it returns an array; count the pixels that both have with `.sum()`.": no_sum,
    }
    cases = [
        (_masks("###.", "##.."), _masks("##..", "####")),
        (_masks("....", "#..."), _masks("....", ".##.")),
        (_masks("###.", "##.."), _masks("##..", "####")),
    ]
    otherwise = "`prediction & reference` (not `and`) has the pixels that both have, `.sum()` counts pixels."
    why = "it is 2 |P and R| / (|P| + |R|), the function `clseg.metrics.dice`."
    return Check(package_dice, why, wrong, otherwise, cases)


@exercise
def mean_over_subjects() -> Check:
    """A function of a table with columns subject and dice, several rows a subject: the mean of the subjects' means."""
    table = pd.DataFrame({"subject": ["a", "b", "b", "b", "c", "c"], "dice": [0.9, 0.3, 0.4, 0.08, 0.8, 0.71]})
    wrong = {
        "that is the mean of all rows: the subject with most rows counts most. The unit is the subject.": lambda t: t[
            "dice"
        ].mean(),
        "you have one mean for each subject; now take the mean of those.": lambda t: (
            t.groupby("subject")["dice"].mean().to_numpy()
        ),
        "that is the mean of the first rows: take all rows of a subject.": lambda t: (
            t.groupby("subject")["dice"].first().mean()
        ),
        "that is the mean of the medians: take the mean of a subject.": lambda t: (
            t.groupby("subject")["dice"].median().mean()
        ),
        "you rounded; return the number as it is.": lambda t: round(t.groupby("subject")["dice"].mean().mean(), 2),
        "you return a series with one number in it; take `table['dice']`, and return the number.": lambda t: (
            t.groupby("subject").mean().mean()
        ),
    }
    why = "every subject counts once, however many slices, structures or runs it has."
    otherwise = "`table.groupby('subject')['dice']` holds the values of each subject; use the argument `table`."
    cases = [(table,), (table.iloc[1:],)]
    return Check(lambda t: t.groupby("subject")["dice"].mean().mean(), why, wrong, otherwise, cases)


@exercise
def few_labels_statements() -> Check:
    """Which of the statements about few labels and their scores are true."""
    return statements(
        "bd",
        "a score belongs to a subject, and which subjects were labelled is a chance of its own.",
        a="(a) ten slices of one patient are not ten independent observations: n is the number of subjects.",
        b="(b) a structure that was not found counts with Dice 0. To leave it out would reward missing it.",
        c="(c) an interval over test subjects says nothing about other draws of labelled subjects: that is another "
        "source of chance.",
        d="(d) Dice can be high although the border is far off at one place. HD95 sees that.",
    )


# -------------------------------------------------------------------------------------------- 91: InfoNCE, lesson 04


@exercise
def collapsed_loss() -> Check:
    """InfoNCE of 20 slices with two views each where the network gives all rows the same embedding."""
    wrong = {
        "an anchor is not compared with itself.": log(40),
        "the positive stands in the denominator, too.": log(38),
        "there are two views of each slice, so 40 rows.": log(20),
        "that would be the loss of a network that has learned everything.": 0.0,
        "39 equal terms is right: the positive has the share 1/39; the loss is -log of it.": 39.0,
        "the share 1/39 is right; the loss is -log of it.": 1 / 39,
        "right, if you rounded: give two decimals.": 3.7,
        "39 equal terms is right; take the natural logarithm, not that of 10.": log10(39),
        "39 equal terms is right; take the natural logarithm, not that of 2.": log2(39),
    }
    equal = torch.ones(40, 2)
    right = contrastive_loss(equal, instance_pairs(torch.arange(20).repeat(2))).item()
    why = "all 39 terms of the denominator are equal, so the fraction is 1/39 at every temperature: log 39 ≈ 3.66."
    return Check(right, why, wrong, "all e^s are equal, so the fraction is 1 over how many terms?")


@exercise
def info_nce() -> Check:
    """A function (embedding [B, D], partner: list of B row numbers, temperature): InfoNCE, where row `partner[i]` is
    the positive of row i and all rows but i itself are in the denominator."""

    def variant(unit=True, itself=False, positive=True, power=-1, neighbours=False, end=torch.mean):
        def loss(embedding, partner, temperature):
            z = F.normalize(embedding, dim=1) if unit else embedding
            s = z @ z.T * temperature**power
            terms = []
            for i, j in enumerate(partner):
                j = i ^ 1 if neighbours else j
                rows = [k for k in range(len(z)) if (itself or k != i) and (positive or k != j)]
                terms.append(s[i, rows].logsumexp(dim=0) - s[i, j])
            return end(torch.stack(terms))

        return loss

    generator = torch.Generator().manual_seed(0)
    orders = [1, 0, 3, 2, 5, 4], [3, 4, 5, 0, 1, 2]
    settings = zip(orders, (0.5, 2.0), strict=True)
    cases = [(torch.randn(6, 3, generator=generator) * 2, order, tau) for order, tau in settings]
    wrong = {
        "the embeddings must be divided by their lengths: the similarity is a cosine.": variant(unit=False),
        "leave the anchor itself out of the denominator (its similarity is 1, the largest there is).": variant(
            itself=True
        ),
        "the positive belongs into the denominator, too. Without it the loss can fall below 0.": variant(
            positive=False
        ),
        "divide the similarities by the temperature, do not multiply.": variant(power=1),
        "the similarities must be divided by the temperature.": variant(power=0),
        "the partner of row i is row `partner[i]`; it need not be the next row.": variant(neighbours=True),
        "the sign is missing: it is minus the logarithm.": variant(end=lambda terms: -terms.mean()),
        "you have the sum over the rows; return the mean.": variant(end=torch.sum),
        "take the logarithm of each row's share first, then the mean.": variant(
            end=lambda terms: -(-terms).exp().mean().log()
        ),
    }
    otherwise = "for every row i it is -log( e^s of its partner / sum of e^s over all rows but i ), then the mean."
    return Check(variant(), "the same value as `clseg.losses.contrastive_loss`.", wrong, otherwise, cases)


@exercise
def hardest_share() -> Check:
    """The share of the push that falls on the hardest of three negatives, of cosines 0.8, 0.6 and 0.2, at 0.5."""

    def share(*s):
        return exp(s[0]) / sum(map(exp, s))

    wrong = {
        "you forgot the temperature: s = cosine / 0.5.": share(0.8, 0.6, 0.2),
        "that is right for temperature 2, or you multiplied by 0.5: divide by it.": share(0.4, 0.3, 0.1),
        "that is right for temperature 0.1; here it is 0.5.": share(8, 6, 2),
        "that is the cosine's share of the cosines, or you rounded: the weights are e^s; give two decimals.": 0.8 / 1.6,
        "an equal share it would be at a very high temperature.": 1 / 3,
    }
    why = "e^1.6 / (e^1.6 + e^1.2 + e^0.4) ≈ 0.51; at temperature 0.1 it is 0.88."
    otherwise = "e^s of this negative over the sum of e^s of all three, with s = cosine / 0.5; give two decimals."
    return Check(share(1.6, 1.2, 0.4), why, wrong, otherwise)


@exercise
def infonce_statements() -> Check:
    """Which of the statements about InfoNCE are true."""
    return statements(
        "ad",
        "and so one looks first at the loss of a collapsed network, log(2N - 1), and at the embeddings themselves.",
        a="(a) a loss that stays at log(2N - 1) is no better than that of equal embeddings.",
        b="(b) the cosine forgets the length: embeddings of twice the length have the same loss.",
        c="(c) more rows mean more terms in the denominator and a larger loss: compare batches of one size only.",
        d="(d) the lower the temperature, the larger the share of the most similar negative in the push.",
    )


# ------------------------------------------------------------------------------------- 92: global contrast, lesson 10


@exercise
def first_loss_gd() -> Check:
    """The loss of `gd` ("pair") where all rows have one embedding: 5 volumes, 4 partitions, two views."""
    number, views = torch.arange(20).repeat(2), torch.arange(2).repeat_interleave(20)
    pairs = partition_pairs(number, number % 4, "gd", views)
    right = contrastive_loss(torch.ones(40, 3), pairs, 0.1, "pair").item()
    wrong = {
        "you counted every other row; of its own partition an anchor has no negatives.": log(39),
        "the positive itself is in the denominator, too.": log(30),
        "each slice has two views, and both are negatives.": log(16),
        "slices of other volumes are negatives, too, if they are of another partition.": log(7),
        "other partitions of the anchor's own volume are negatives, too.": log(25),
        "31 is the number of terms; the loss is its logarithm.": 31.0,
        "31 equal terms is right; take the natural logarithm, not that of 10.": log10(31),
        "31 equal terms is right; take the natural logarithm, not that of 2.": log2(31),
    }
    why = "the negatives are the rows of the other partitions, 5 · 3 · 2 = 30, so every term is log(1 + 30) ≈ 3.43."
    return Check(right, why, wrong, "all e^s are equal, so the fraction is 1 over how many terms?")


@exercise
def pairs_of_gd_minus() -> Check:
    """(positives, negatives) of an anchor of `gd-`: 5 volumes, 3 partitions, the slice itself and two copies."""
    number = torch.arange(15).repeat(3)
    pairs = partition_pairs(number, number % 3, "gd-")
    right = (pairs.positive[0].sum().item(), pairs.negative[0].sum().item())
    wrong = {
        "two copies and the slice itself are three rows of each slice: more positives, more negatives.": (1, 20),
        "the positives are right; a slice of another partition has three rows, itself and two copies.": (2, 20),
        "the negatives are right; an anchor has two other rows of its own slice.": (1, 30),
        "the other way round: (positives, negatives).": (30, 2),
        "rows of the same partition of other volumes are neither positive nor negative.": (2, 42),
        "the rows of the same partition of other volumes would be positives of `gd`; `gd-` leaves them out.": (14, 30),
        "an anchor is not its own positive.": (3, 30),
        "each slice of another partition has three rows.": (2, 10),
    }
    why = "two other rows of its own slice; 5 volumes · 2 other partitions · 3 rows."
    return Check(right, why, wrong, "write (positives, negatives); count the rows of each slice first.")


@exercise
def gd_positives() -> Check:
    """A function (partition [B]): who is a positive of whom, bool [B, B], if the same partition is alike (`gd`)."""

    def right(partition):
        return (partition[:, None] == partition[None, :]).fill_diagonal_(False)

    wrong = {
        "no row is a positive of itself; clear the diagonal.": lambda p: p[:, None] == p[None, :],
        "those are the negatives: rows of *other* partitions.": lambda p: p[:, None] != p[None, :],
        "if i is like j, j is like i: the mask must be symmetric.": lambda p: (p[:, None] == p[None, :]).triu(1),
        "neighbouring partitions are not alike, only the same one.": lambda p: (
            (p[:, None] - p[None, :]).abs() <= 1
        ).fill_diagonal_(False),
    }
    orders = [0, 1, 2, 0, 1, 2], [3, 3, 0], [2, 0, 1, 1, 0, 2, 2, 0, 0, 1, 2]
    cases = [(torch.tensor(order),) for order in orders]
    why = "the mask of `clseg.pairs.partition_pairs(slice_id, partition, 'gd').positive`, without `view`."
    otherwise = "`partition[:, None] == partition[None, :]` compares every row with every other, [B, B]."
    return Check(right, why, wrong, otherwise, cases)


@exercise
def global_statements() -> Check:
    """Which of the statements about global contrast are true."""
    return statements(
        "bc",
        "pairs say what is alike; whether that is true of the anatomy, masks or a look at new subjects must tell.",
        a="(a) `gr` and `gd` differ in the number of negatives, and so in the first loss: do not compare their curves.",
        b="(b) a slice just across the border of a partition is a negative although it shows nearly the same.",
        c="(c) the loss can fall because training subjects are remembered: look at subjects that were in no batch.",
        d="(d) `gd-` calls rows of the same partition of other volumes neither alike nor unlike.",
    )


# -------------------------------------------------------------------------------------- 93: local contrast, lesson 11


@exercise
def first_local_loss() -> Check:
    """The local loss where all regions have one embedding, with 5 negatives."""
    corners, near = region_grid((48, 48), 3, 13)
    equal = torch.ones(1, len(corners), 2)
    wrong = {
        "the neighbours of both maps are negatives: twice 5.": log(6),
        "the positive is in the denominator, too.": log(10),
        "only its 5 neighbours are negatives of a region, not all others.": log(25),
        "the natural logarithm, not that to base 10.": log(11, 10),
        "that is the number of terms; the positive has the share 1/11: what is the loss?": 11.0,
    }
    right = local_contrastive_loss(equal, equal, near).item()
    return Check(right, "1 positive and 2 · 5 negatives: log 11 ≈ 2.40.", wrong, "how many terms are equal?")


@exercise
def cheat() -> Check:
    """Embeddings [17, D] of the places, the same for every image, with a local loss below 0.001 at temperature 0.1."""
    near = region_grid((48, 48), 3, 13)[1]

    def fault(answer):
        answer = torch.as_tensor(answer).detach()
        if tuple(answer.shape[:1]) != (17,) or answer.ndim != 2:
            return "shape"
        regions = answer.float().expand(2, -1, -1)  # [2, 17, D]: two images with the same regions
        loss = local_contrastive_loss(regions, regions, near, 0.1).item()
        closest = F.normalize(answer.float(), dim=1)
        closest = (closest @ closest.T).fill_diagonal_(-1).max().item()
        return "none" if loss < 1e-3 else "equal" if closest > 0.99 else "near"

    wrong = {
        "it must be a tensor [17, D], a row for every place (13 anchors and 4 that are negatives only).": torch.eye(13),
        "at least two places have the same direction, so they cannot be told apart.": torch.ones(17, 2),
        "some cosines are still too high: how many directions at right angles do D dimensions have, and are all "
        "your numbers positive?": torch.randn(17, 4, generator=torch.Generator().manual_seed(0)),
    }
    why = "the loss cannot tell this cheat from an embedding that knows anatomy."
    return Check(torch.eye(17), why, wrong, "how far apart can 17 directions be?", measure=fault)


@exercise
def local_term() -> Check:
    """A function (a, b, r, near, temperature): the term of region r of map a [R, D] compared with map b [R, D]; `near`
    is the list of its neighbours."""

    def variant(own=True, across=True, positive=True):
        def term(a, b, r, near, temperature):
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
            alike = a[r] @ b[r] / temperature
            rivals = [m @ a[r] / temperature for m in [*(a[near] if own else ()), *(b[near] if across else ())]]
            return torch.stack([*rivals, *([alike] if positive else [])]).logsumexp(dim=0) - alike

        return term

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, generator=generator)
    wrong = {
        "the sign: minus the logarithm is positive.": lambda *of: -variant()(*of),
        "divide every cosine by the temperature.": lambda a, b, r, near, _: variant()(a, b, r, near, 1.0),
        "the natural logarithm, not that to base 10.": lambda *of: variant()(*of) / log(10),
        "the value is right; return one number, not a tensor [1].": lambda *of: variant()(*of)[None],
        "the neighbours in map b are negatives, too.": variant(across=False),
        "the neighbours in its own map a are negatives, too.": variant(own=False),
        "the positive belongs into the denominator, too.": variant(positive=False),
    }
    otherwise = "-log( e^s(a_r, b_r) / (e^s(a_r, b_r) + sum over m of e^s(a_r, a_m) + e^s(a_r, b_m)) ), s a cosine."
    cases = [(a, b, 0, [1, 3], 0.5), (b, a, 2, [4], 1.0)]
    return Check(variant(), "the mean of these terms is `local_contrastive_loss`.", wrong, otherwise, cases)


@exercise
def local_statements() -> Check:
    """Which of the statements about local contrast are true."""
    return statements(
        "ac",
        "a falling curve is no evidence; ask what could have made it fall.",
        a="(a) the place of a region alone solves the task, and noise has places, too.",
        b="(b) the two views differ in brightness and contrast only: a crop would move what lies at a place.",
        c="(c) the positive pairs of `ld` assume that one place shows one thing in two patients: aligned images.",
        d="(d) the encoder is frozen in this stage: only decoder blocks and the head learn.",
    )


# --------------------------------------------------------------------------------- 94: positional contrast, lesson 12


@exercise
def count_positives() -> Check:
    """The positives of the anchor at 0.5 in a volume of 10 slices with two views of each, threshold 0.3."""
    place = (torch.arange(10) + 1) / 10
    right = position_pairs(place.repeat(2), 0.3).positive[4].sum().item()
    wrong = {
        "a distance of exactly 0.3 is not below 0.3.": 13,
        "no row is a positive of itself.": 10,
        "the other view of its own slice is a positive, too.": 8,
        "those are the slices; each has two views, and one of these rows is the anchor.": 5,
        "the four other slices are right; each has two views, and the anchor's own other view counts, too.": 4,
    }
    why = "0.3 to 0.7 are five slices, ten rows, and one of them is the anchor."
    return Check(right, why, wrong, "which of 0.1, 0.2, ... 1.0 are nearer to 0.5 than 0.3?")


@exercise
def position_positives() -> Check:
    """A function (position [B], threshold): who is a positive of whom, bool [B, B]."""

    def variant(equal=False, itself=False, sign=False):
        def positives(position, threshold):
            apart = position[:, None] - position[None, :]
            apart = apart if sign else apart.abs()
            near = apart <= threshold if equal else apart < threshold
            return near if itself else near.fill_diagonal_(False)

        return positives

    wrong = {
        "a pair at exactly the threshold is a negative.": variant(equal=True),
        "no row is a positive of itself.": variant(itself=True),
        "take the absolute value: a slice far below is not alike.": variant(sign=True),
        "two views of one slice have difference 0 and are positives: remove only the diagonal.": lambda p, t: (
            variant()(p, t) & (p[:, None] != p[None, :])
        ),
    }
    position = torch.tensor([0.0, 0.25, 0.25, 0.5, 1.0])  # exact in binary, so the border is one
    otherwise = "`position[:, None] - position[None, :]` has all differences, [B, B]."
    cases = [(position, 0.25), (position, 0.75)]
    why = "the mask of `clseg.pairs.position_pairs`, but for the rounding of float32 at exactly the threshold."
    return Check(variant(), why, wrong, otherwise, cases)


@exercise
def share_of_positives() -> Check:
    """The share of pairs of slices of two long volumes that are alike at t = 0.1."""
    wrong = {
        "a slice is alike in both directions along the volume: below and above.": 0.1,
        "near the ends of the volume there is less than t on one side.": 0.2,
        "that is the share of the pairs that are negative.": 0.81,
        "write it as a fraction, 0.19 for 19 %.": 19.0,
    }
    why = "two uniform places differ by less than t with probability 1 - (1 - t)² = 0.19."
    return Check(0.19, why, wrong, "draw the square of all (p, q) and shade the band |p - q| < 0.1.")


@exercise
def positional_statements() -> Check:
    """Which of the statements about positional contrast are true."""
    return statements(
        "bd",
        "a threshold is a choice about anatomy and about the number of slices.",
        a="(a) 0.2 is like 0.4 and 0.4 like 0.6, but 0.2 is not like 0.6: no classes.",
        b="(b) in a stack of ten slices all differences are multiples of 0.1, so many thresholds are one.",
        c="(c) at t = infinity all are alike: the least loss is that of equal embeddings, and nothing is learned.",
        d='(d) with `denominator="all"` positives compete, and the nearest of them can be pushed.',
    )


# ------------------------------------------------------------------------------------ 95: cluster contrast, lesson 13


@exercise
def least_loss() -> Check:
    """The least loss ("all") of 12 slices, four each of three pseudo-classes, two views."""
    of_row = torch.arange(3).repeat_interleave(4).repeat(2)
    perfect = cluster_pairs(torch.arange(12).repeat(2), of_row)
    wrong = {
        "the positives are in the denominator, all of them.": 0.0,
        "an anchor is not its own positive.": log(8),
        "each slice has two views, and both are rows.": log(3),
        "an anchor is not its own positive, and each slice has two views.": log(4),
        "that is the loss before training, when all 24 rows are alike.": log(23),
        "that is the number of terms; each positive has the share 1/7: what is the loss?": 7.0,
        "7 equal terms is right; take the natural logarithm, not that of 10.": log10(7),
        "7 equal terms is right; take the natural logarithm, not that of 2.": log2(7),
    }
    right = contrastive_loss(torch.eye(3)[of_row], perfect, 0.01).item()
    why = "4 · 2 - 1 = 7 equal terms are left: log 7 ≈ 1.95. Larger clusters have a larger least loss."
    otherwise = "how many terms of the denominator are left, and how large are they?"
    return Check(right, why, wrong, otherwise)


@exercise
def purity() -> Check:
    """A function (cluster [n], labels [n]): the share of slices whose label is the most frequent of their cluster."""

    def of_clusters(cluster, labels):
        return [pd.Series(labels[cluster == c]).value_counts(normalize=True).max() for c in np.unique(cluster)]

    wrong = {
        "that is the mean over clusters: a cluster of one slice counts as much as one of a hundred.": lambda c, y: (
            np.mean(of_clusters(c, y))
        ),
        "you asked which cluster is most frequent for each label; it is the other way round.": lambda c, y: (
            package_purity(y, c)
        ),
        "that is the share of the most frequent label; look inside each cluster.": lambda _, y: (
            pd.Series(y).value_counts(normalize=True).max()
        ),
        "some numbers have no slice, others come after them: use np.unique(cluster).": lambda c, y: (
            sum((np.bincount(y[c == k]) if (c == k).any() else np.zeros(1)).max() for k in range(len(np.unique(c))))
            / len(y)
        ),
    }
    cases = [
        (np.array([0, 0, 0, 0, 1, 2]), np.array([0, 0, 1, 1, 1, 1])),
        (np.array([0, 1, 1, 1, 1]), np.array([0, 2, 2, 0, 1])),
        (np.array([0, 2, 2, 5]), np.array([1, 1, 0, 0])),
    ]
    otherwise = "for each cluster count its most frequent label, add up, divide by the number of slices."
    return Check(package_purity, "the function `clseg.cluster.purity`.", wrong, otherwise, cases)


@exercise
def extreme_clusters() -> Check:
    """(k that makes cluster contrast SimCLR, k that makes all alike) for 200 slices."""
    wrong = {
        "the other way round: with one cluster all slices are alike.": (1, 200),
        "clusters are made of slices, before they are augmented: 200, not 400 rows.": (400, 1),
        "with no cluster there would be no pairs.": (200, 0),
    }
    why = "one slice in each cluster leaves only its own views alike; one cluster makes all alike."
    otherwise = "how many slices share a cluster in each? Write (k of SimCLR, k of all alike)."
    return Check((200, 1), why, wrong, otherwise)


@exercise
def cluster_statements() -> Check:
    """Which of the statements about cluster contrast are true."""
    return statements(
        "ad",
        "look at the purity before you believe in a pseudo-class.",
        a="(a) an auto-encoder describes what fills the image: on the phantom the chest of a patient.",
        b="(b) purity grows with k whatever the clusters hold: compare it with that of shuffled clusters.",
        c="(c) the least loss, the logarithm of the number of positives, differs with k: never compare the two.",
        d="(d) two slices of one patient fall into one cluster here, so they are positives: nearly the opposite of gd.",
    )


# ------------------------------------------------------------------------------------- 96: semi-supervised, lesson 14


@exercise
def memory_of_teacher() -> Check:
    """The part of its first weights that is left in a mean teacher with decay 0.99 after 100 steps."""
    wrong = {
        "that is the part of the student's weights; the rest is left.": 1 - 0.99**100,
        "each step keeps 0.99 of what was *left*: multiply, do not subtract.": 0.0,
        "that is after one step.": 0.99,
        "that is the share of the student in one step.": 0.01,
        "right in per cent; give a number from 0 to 1.": 37.0,
    }
    otherwise = "each step multiplies it by the decay; give a number from 0 to 1, with two decimals."
    return Check(0.99**100, "0.99^100 ≈ 0.37: it remembers some hundred steps.", wrong, otherwise)


@exercise
def believe() -> Check:
    """A function (logits [B, K, H, W], confidence): pseudo-labels and which of them are sure, [B, H, W]."""

    def right(logits, confidence):
        return list(pseudo_labels(logits, confidence))

    def without_softmax(logits, confidence):
        return [logits.argmax(dim=1), logits.max(dim=1).values >= confidence]

    def strictly(logits, confidence):
        probability, label = logits.softmax(dim=1).max(dim=1)
        return [label, probability > confidence]

    def over_pixels(logits, confidence):
        return [logits.argmax(dim=1), logits.flatten(2).softmax(dim=2).reshape(logits.shape).amax(dim=1) >= confidence]

    def for_each_class(logits, confidence):
        return [logits.argmax(dim=1), logits.sigmoid().amax(dim=1) >= confidence]

    half = torch.tensor([[[[1.0, 0.0, 3.0]], [[1.0, 2.0, -1.0]]]])  # [1, 2, 1, 3], the first pixel at 0.5 exactly
    three = torch.tensor([[[[3.0, 0.0]], [[3.0, 1.0]], [[-2.0, 0.5]]]])  # [1, 3, 1, 2]
    cases = [(half, 0.5), (half * 2, 0.9), (three, 0.9)]
    wrong = {
        "sigmoid looks at each class alone: take the softmax over the classes.": for_each_class,
        "logits are no probabilities: take their softmax over the classes first.": without_softmax,
        "a probability that equals the confidence counts.": strictly,
        "the softmax runs over the classes (dim=1), not over the pixels.": over_pixels,
    }
    otherwise = (
        "return (label, sure), the argmax over dim=1, and whether the largest probability is confidence or more."
    )
    return Check(right, "the function `clseg.recipes.weak_to_strong.pseudo_labels`.", wrong, otherwise, cases)


@exercise
def consistency() -> Check:
    """A function (logits [B, K, H, W], label, sure [B, H, W]): cross-entropy of sure pixels over the number of all."""

    def over_sure(logits, label, sure):
        return F.cross_entropy(logits, label, reduction="none")[sure].mean()

    def everywhere(logits, label, sure):
        return F.cross_entropy(logits, label)

    def total(logits, label, sure):
        return F.cross_entropy(logits, label, reduction="none")[sure].sum()

    def without_minus(logits, label, sure):
        return -consistency_loss(logits, label, sure)

    def softmax_twice(logits, label, sure):
        return consistency_loss(logits.softmax(dim=1), label, sure)

    def unsure(logits, label, sure):
        return consistency_loss(logits, label, ~sure)

    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(2, 3, 4, 4, generator=generator), torch.randint(3, (2, 4, 4), generator=generator)
    wrong = {
        "divide by the number of all pixels: otherwise one sure pixel counts as much as a whole image.": over_sure,
        "pixels that are not sure must not count.": everywhere,
        "divide by the number of all pixels.": total,
        "all pixels of the batch are B · H · W: divide by that, not by B alone.": lambda *of: total(*of) / 2,
        "divide by the number of pixels of the whole batch, B · H · W, not of one image.": lambda *of: total(*of) / 16,
        "logits hold K numbers for each pixel; divide by the number of pixels, B · H · W.": lambda *of: total(*of) / 96,
        "the sign: cross-entropy is minus the logarithm, so the loss is positive.": without_minus,
        "the logits go in as they are: cross_entropy takes the softmax itself.": softmax_twice,
        "the other way round: the sure pixels count, the others do not.": unsure,
    }
    otherwise = "F.cross_entropy(logits, label, reduction='none') has a value for each pixel, [B, H, W]."
    cases = [(logits, label, logits.softmax(dim=1).amax(dim=1) > 0.6)]
    return Check(consistency_loss, "the function `consistency_loss` of the recipe.", wrong, otherwise, cases)


@exercise
def semi_supervised_statements() -> Check:
    """Which of the statements about semi-supervised fine-tuning are true."""
    return statements(
        "ad",
        "its own labels cannot tell a network that it is wrong; only masks, or what must not change, can.",
        a="(a) the label must still fit: what moves pixels (a crop, a box) must move their labels, too.",
        b="(b) the teacher is an average of the student's weights; no gradient reaches it.",
        c="(c) a pixel can be sure and wrong; training on it makes it surer.",
        d="(d) confidence 1 leaves hardly a pixel, and the consistency loss is nearly 0.",
    )
