"""How often the intervals of `clseg.stats` hold the true mean, and how often a test of nothing finds something.

Simulated scores y[subject, draw, seed] with the variance of patients, draws, seeds, of what a draw and a seed do
together, and of the rest; in paired differences each is half as large. Beside the crossed interval: the bootstrap over
subjects alone, as usually printed, and a percentile bootstrap crossed over the three.

    python tests/interval_coverage.py     two minutes; writes paper_figures/statistics/coverage.json
"""

import json
from pathlib import Path

import numpy as np

from clseg.stats import crossed_interval

DESIGNS = {"20 x 5 x 3": (20, 5, 3), "20 x 3 x 3": (20, 3, 3), "20 x 1 x 3": (20, 1, 3), "60 x 5 x 3": (60, 5, 3)}
SD = {"subject": 0.10, "seed": 0.02, "draw x seed": 0.03, "rest": 0.05}
DRAW_SD = {"1 labelled": 0.08, "8 labelled": 0.02}
REPEATS, RESAMPLES = 4000, 400


def scores(shape: tuple[int, int, int], draw_sd: float, scale: float, random: np.random.Generator) -> np.ndarray:
    """Scores [repeats, subjects, draws, seeds] of true mean 0."""
    s, d, k = shape

    def normal(sd: float, *sides: int) -> np.ndarray:
        return random.normal(0, scale * sd, (REPEATS, *sides))

    y = normal(SD["subject"], s, 1, 1) + normal(SD["seed"], 1, 1, k) + normal(SD["rest"], s, d, k)
    return y + (normal(draw_sd, 1, d, 1) + normal(SD["draw x seed"], 1, d, k) if d > 1 else 0)


def holds(y: np.ndarray) -> tuple[float, float]:
    """Share of the crossed intervals that hold 0, and of the p below .05."""
    inside, small = 0, 0
    for each in y:
        axes = [axis for axis in range(3) if each.shape[axis] > 1]
        levels = [each.mean(axis=tuple({0, 1, 2} - {axis})) for axis in axes]
        low, high, p = crossed_interval(float(each.mean()), levels)
        inside += low <= 0 <= high
        small += p < 0.05
    return inside / len(y), small / len(y)


def bootstrap_holds(y: np.ndarray, axes: tuple[int, ...], random: np.random.Generator) -> float:
    """Share of percentile bootstrap intervals, resampled along these axes, that hold 0."""
    inside = 0
    for each in y[: REPEATS // 4]:
        weights = []
        for axis in range(3):
            n = each.shape[axis]
            counts = random.multinomial(n, [1 / n] * n, RESAMPLES) if axis in axes else np.ones((RESAMPLES, n))
            weights.append(counts / n)
        means = np.einsum("sdk,rs,rd,rk->r", each, *weights, optimize=True)
        low, high = np.percentile(means, [2.5, 97.5])
        inside += low <= 0 <= high
    return inside / (REPEATS // 4)


def main() -> dict:
    random, found = np.random.default_rng(0), []
    for design, shape in DESIGNS.items():
        for labelled, draw_sd in DRAW_SD.items():
            if shape[1] == 1 and labelled == "1 labelled":
                continue  # all labels: there is one draw
            for what, scale in (("mean of a cell", 1.0), ("paired difference", 0.5)):
                y = scores(shape, draw_sd, scale, random)
                coverage, size = holds(y)
                row = {"patients x draws x seeds": design, "labels": labelled if shape[1] > 1 else "all", "what": what}
                row |= {"crossed interval": coverage, "p < .05 of nothing": size}
                row["bootstrap of patients alone"] = bootstrap_holds(y, (0,), random)
                row["crossed bootstrap"] = bootstrap_holds(y, (0, 1, 2), random)
                found.append({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()})
                print(found[-1], flush=True)
    return {"repeats": REPEATS, "sd": SD | {"draw, " + name: sd for name, sd in DRAW_SD.items()}, "rows": found}


if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[1] / "paper_figures" / "statistics"
    (folder / "coverage.json").write_text(json.dumps(main(), indent=1) + "\n", encoding="utf-8")
