"""How often the intervals of `clseg.stats` miss the truth, and how often a study of nothing comes to a verdict.

Simulated scores y[subject, draw, seed] with the spread of patients, of draws, of seeds, of what a draw and a seed do
together (a run), and of the rest; in paired differences each is half as large. With all labels methods may be more
alike: then patients spread as in the paired differences of the study `acdc` (SD .012 to .019). The truth is the mean
over all patients, draws and seeds. Beside the crossed interval: a percentile bootstrap crossed over the three, and one
over patients alone, as usually printed.

    python tests/interval_coverage.py     some minutes; writes paper_figures/statistics/coverage.json
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clseg.stats import MARGIN, crossed_interval, holm, verdict


class Spread(NamedTuple):
    """Standard deviations of Dice."""

    patient: float
    draw: float
    seed: float
    run: float
    rest: float


FEW, MORE = Spread(0.10, 0.08, 0.02, 0.03, 0.05), Spread(0.10, 0.02, 0.02, 0.03, 0.05)
ALL, ALIKE = Spread(0.10, 0.0, 0.02, 0.03, 0.05), Spread(0.02, 0.0, 0.014, 0.014, 0.02)
SPREADS = {"1 labelled": FEW, "8 labelled": MORE, "all labels": ALL, "all labels, methods alike": ALIKE}
REPEATS, OF_BOOTSTRAPS, OF_FAMILIES, RESAMPLES = 4000, 1000, 1000, 400
BOOTSTRAP, ALONE = "crossed bootstrap", "bootstrap of patients alone"
Shape = tuple[int, int, int]  # patients, draws, seeds
DESIGNS: dict[str, list[tuple[Shape, str]]] = {
    "planned": [
        *(
            ((n, draws, 3), labels)
            for n, draws in ((20, 5), (20, 3), (60, 5))
            for labels in ("1 labelled", "8 labelled")
        ),
        ((20, 1, 3), "all labels"),
    ],
    "seeds differ as much as patients": [((20, 1, 3), "all labels, methods alike")],
    "two draws": [((20, 2, 3), "1 labelled"), ((20, 2, 3), "8 labelled")],
    "one draw of several": [((20, 1, 3), "1 labelled"), ((20, 1, 3), "8 labelled")],
    "two seeds": [*(((20, 5, 2), labels) for labels in ("1 labelled", "8 labelled")), ((20, 3, 2), "8 labelled")],
    "two seeds, all labels": [((20, 1, 2), "all labels"), ((20, 1, 2), "all labels, methods alike")],
    "one seed": [*(((20, 5, 1), labels) for labels in ("1 labelled", "8 labelled")), ((20, 3, 1), "8 labelled")],
    "one seed, all labels": [((20, 1, 1), "all labels")],
}


def scores(
    n: int, shape: Shape, spread: Spread, random: np.random.Generator, skewed: bool = False, folds: bool = False
) -> np.ndarray:
    """Scores [n, patients, draws, seeds] of true mean 0.

    `skewed`: a few draws are far worse than the others; `folds`: every draw has patients of its own.
    """
    s, d, k = shape
    draws = 1 - random.exponential(size=(n, 1, d, 1)) if skewed else random.normal(size=(n, 1, d, 1))
    patients = random.normal(size=(n, s, d if folds else 1, 1))
    y = spread.patient * patients + spread.draw * draws + spread.seed * random.normal(size=(n, 1, 1, k))
    return y + spread.run * random.normal(size=(n, 1, d, k)) + spread.rest * random.normal(size=(n, s, d, k))


def crossed(y: np.ndarray) -> tuple[float, float, float]:
    """The interval and p of one study [patients, draws, seeds]."""
    axes = [axis for axis in range(3) if y.shape[axis] > 1]
    return crossed_interval(float(y.mean()), [y.mean(axis=tuple({0, 1, 2} - {axis})) for axis in axes])


def of_folds(y: np.ndarray) -> tuple[float, float, float]:
    """The same where every draw tests patients of its own: those are part of the draw."""
    return crossed_interval(float(y.mean()), [y.mean(axis=(0, 2)), y.mean(axis=(0, 1))])


def bootstrap(axes: tuple[int, ...], random: np.random.Generator) -> Callable[[np.ndarray], tuple[float, float, float]]:
    """Percentile intervals, resampled along these axes."""

    def interval(y: np.ndarray) -> tuple[float, float, float]:
        weights = [
            random.multinomial(n, [1 / n] * n, RESAMPLES) / n if axis in axes else np.full((RESAMPLES, n), 1 / n)
            for axis, n in enumerate(y.shape)
        ]
        means = np.einsum("sdk,rs,rd,rk->r", y, *weights, optimize=True)
        low, high = np.percentile(means, [2.5, 97.5])
        return low, high, np.nan

    return interval


def misses(studies: np.ndarray, interval: Callable[[np.ndarray], tuple[float, float, float]]) -> float:
    """Per cent of the studies whose interval does not hold 0."""
    return 100 * sum(not low <= 0 <= high for low, high, _ in map(interval, studies)) / len(studies)


def of_families(n: int, truth: float, random: np.random.Generator) -> list[list[str]]:
    """The verdicts on n families of 26 contrasts: seven against one baseline at three numbers of labels, and five with
    all labels, which are the last."""
    found = []
    for _ in range(n):
        levels = []
        for shape, spread in (((20, 5, 3), FEW), ((20, 5, 3), MORE._replace(draw=0.05)), ((20, 3, 3), MORE)):
            y = scores(8, shape, spread, random) / 8**0.5  # the difference of two of them has half of the spread
            levels += [truth + y[other] - y[0] for other in range(1, 8)]
        y = scores(6, (20, 1, 3), ALIKE, random) / 8**0.5
        levels += [truth + y[other] - y[0] for other in range(1, 6)]
        intervals = [(*crossed(y), crossed(y - np.sign(y.mean()) * MARGIN)[2]) for y in levels]
        p_holm, p_margin = holm(np.array([row[2] for row in intervals])), holm(np.array([row[3] for row in intervals]))
        rows = zip(intervals, p_holm, p_margin, strict=True)
        found.append([verdict(low, high, p, MARGIN, of_margin) for (low, high, *_), p, of_margin in rows])
    return found


def about(kind: str, shape: Shape, labels: str, what: str = "mean of a cell") -> dict[str, Any]:
    return {"kind": kind, "patients x draws x seeds": " x ".join(map(str, shape)), "labels": labels, "what": what}


def rows() -> Iterator[dict[str, Any]]:
    """What was simulated; `crossed interval` and the others: per cent of intervals that miss, 5 wanted."""
    random = np.random.default_rng(0)
    for kind, designs in DESIGNS.items():
        for shape, labels in designs:
            for what, scale in (("mean of a cell", 1.0), ("paired difference", 0.5)):
                y = scale * scores(REPEATS, shape, SPREADS[labels], random)
                row = about(kind, shape, labels, what) | {"crossed interval": misses(y, crossed)}
                row[BOOTSTRAP] = misses(y[:OF_BOOTSTRAPS], bootstrap((0, 1, 2), random))
                yield row | {ALONE: misses(y[:OF_BOOTSTRAPS], bootstrap((0,), random))}
    for labels in ("1 labelled", "8 labelled"):
        y = scores(REPEATS, (20, 5, 3), SPREADS[labels], random, folds=True)
        yield about("folds of 20", (100, 5, 3), labels) | {"crossed interval": misses(y, of_folds)}
    for shape in ((20, 5, 3), (60, 5, 3)):
        y = scores(REPEATS, shape, FEW, random, skewed=True)
        yield about("a few draws far worse", shape, "1 labelled") | {"crossed interval": misses(y, crossed)}
    random = np.random.default_rng(2)
    for kind, patients in (("one patient", 1), ("two patients", 2)):
        for labels in ("1 labelled", "8 labelled"):
            y = scores(REPEATS, (patients, 5, 3), SPREADS[labels], random)
            yield about(kind, (patients, 5, 3), labels) | {"crossed interval": misses(y, crossed)}


def families() -> tuple[dict[str, float], float]:
    """Per cent of whole studies with a false verdict, at most 5 wanted; and how many of the contrasts with all labels
    are found to be alike where they are."""
    random = np.random.default_rng(1)
    same, other = of_families(OF_FAMILIES, 0.0, random), of_families(OF_FAMILIES, MARGIN, random)
    alike = "no difference that matters"
    false = {
        "helps or harms, where nothing differs": np.mean([not {"helps", "harms"}.isdisjoint(said) for said in same]),
        f"{alike}, of 0.02 each": np.mean([alike in said for said in other]),
    }
    found = np.mean([verdict == alike for said in same for verdict in said[-5:]])
    return {name: round(100 * float(share), 1) for name, share in false.items()}, round(100 * float(found), 1)


def main() -> dict[str, Any]:
    found = []
    for row in rows():
        found.append({name: round(value, 1) if isinstance(value, float) else value for name, value in row.items()})
        print(found[-1], flush=True)
    false, alike = families()
    about = {"repeats": REPEATS, "sd": {labels: spread._asdict() for labels, spread in SPREADS.items()}, "rows": found}
    about |= {"families of 26 contrasts": false, "found alike where nothing differs, all labels": alike}
    return about


if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[1] / "paper_figures" / "statistics"
    (folder / "coverage.json").write_text(json.dumps(main(), indent=1) + "\n", encoding="utf-8")
