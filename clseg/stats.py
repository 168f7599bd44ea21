r"""From the tidy result table to means, intervals and contrasts.

A score depends on who was tested, on who was labelled (the draw) and on the seed of training. All three are random: the
next study would have others. So a mean is of an array y[subject, draw, seed], and what is uncertain about it comes from
each of the three: with the means over the other two factors, of variance $s_f^2$ over the $n_f$ levels of factor f,

$$v_f = s_f^2 / n_f, \quad \mathrm{Var}(\bar y) \approx \sum_f v_f, \quad
  \mathrm{df} = (\textstyle\sum_f v_f)^2 / \sum_f (v_f^2 / (n_f - 1))$$

(Satterthwaite 1946), and the interval is $\bar y \pm t_{df} \sqrt{\sum_f v_f}$. What two factors do together is counted
in both, so the interval is rather too wide than too narrow. Intervals over patients alone, as usually printed, say
nothing of other labelled patients or seeds. Why not a bootstrap: resampling three seeds or five draws gives intervals
that are too narrow (`tests/interval_coverage.py` measures both; `paper_figures/statistics/coverage.json`).

Under profile `smoke` there are no intervals, tests or conclusions. Rows where reference and prediction are both
empty carry NaN (`metrics.score`): they are counted, and in no mean. Missed structures count with Dice 0 and the image
diagonal.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata, wilcoxon
from scipy.stats import t as student

GROUP = ["study", "dataset", "profile", "labelled"]  # what is compared with each other; never averaged across
CELL = ["study", "dataset", "profile", "method", "labelled"]
RUN = ["draw", "seed"]
FACTORS = ("subjects", "draws", "seeds")
MARGIN = 0.02  # of Dice: less does not matter
LEVEL = 0.05
NO_TESTS = ("smoke",)  # profiles whose numbers prove only that everything runs
SUMMARY_COLUMNS = [
    *[*CELL, "n_subjects", "n_draws", "n_seeds", "n_runs", "runs_missing"],
    *["dice_mean", "dice_low", "dice_high", "interval_over", "dice_sd_draws", "dice_sd_seeds"],
    *["hd95_mean", "hd95_unit", "missed", "missed_share", "scored_rows", "empty_rows"],
]
CONTRAST_COLUMNS = [
    *["study", "dataset", "profile", "labelled", "method", "baseline", "family"],
    *["n_subjects", "n_draws", "n_seeds", "runs_left_out", "difference", "low", "high", "interval_over"],
    *["p", "p_holm", "verdict"],
]


def per_subject(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice and HD95 of each subject in each run (`CELL`, `RUN`, subject), over its structures and phases.

    NaN for a subject of whom no row is left. The order of the rows of `table` does not matter, not even for rounding.
    """
    table = table.sort_values([*CELL, *RUN, "subject", "phase", "class_name"], kind="stable")
    return table.groupby([*CELL, *RUN, "subject"], as_index=False)[["dice", "hd95"]].mean()


def per_draw(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of each draw of labelled subjects, over seeds and test subjects: `CELL` columns, draw, dice."""
    return per_subject(table).groupby([*CELL, "draw"], as_index=False)["dice"].mean()


def crossed_interval(mean: float, levels: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The 95 % interval of a mean, and the two-sided p of 0, from the means of the levels of each random factor.

    levels: an array [n_f] for every factor, n_f > 1; none gives NaN. The equations stand at the top of the module.
    Coverage in simulation, where 95 % is wanted: 93.7 to 97.1 %, that of a bootstrap of patients alone 55 to 89 %
    (`paper_figures/statistics/coverage.json`).
    """
    terms = [(float(np.var(each, ddof=1)) / len(each), len(each) - 1) for each in levels]
    variance = sum(v for v, _ in terms)
    if not terms:
        return np.nan, np.nan, np.nan
    if variance < 1e-18:  # nothing varies
        return mean, mean, float(abs(mean) < 1e-12)
    df = variance**2 / sum(v**2 / n for v, n in terms)
    half = float(student.ppf(1 - LEVEL / 2, df)) * variance**0.5
    return mean - half, mean + half, float(2 * student.sf(abs(mean) / variance**0.5, df))


def mean_interval(values: pd.Series) -> tuple[float, float, float, float, str]:
    """Mean of values by (subject, draw, seed), its `crossed_interval` (low, high, p), and the factors that it is over.

    A factor of a single level adds nothing and is not named. Where every draw tests other subjects (cross-validation),
    subjects are part of the draw, and draws are counted in their place.
    """
    cells = values.groupby(["draw", "seed", "subject"]).mean().dropna()
    draws = cells.reset_index().groupby("subject")["draw"].nunique()
    nested = cells.index.get_level_values("draw").nunique() > 1 and (draws == 1).all()
    levels = {}
    for name, factor in zip(FACTORS, ("subject", "draw", "seed"), strict=True):
        means = cells.groupby(factor).mean().to_numpy()
        if len(means) > 1 and not (nested and factor == "subject"):
            levels[name] = means
    mean = float(cells.mean())
    return mean, *crossed_interval(mean, list(levels.values())), ", ".join(levels)


def whole_seeds(runs: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Of (draw, seed) pairs those of seeds that have every draw; all where no seed has."""
    runs = set(runs)
    draws = {draw for draw, _ in runs}
    whole = {(draw, seed) for draw, seed in runs if all((other, seed) in runs for other in draws)}
    return whole or runs


def _indexed(rows: pd.DataFrame) -> pd.Series:
    return rows.set_index(["subject", "draw", "seed"])["dice"]


def _of_runs(rows: pd.DataFrame, runs: set[tuple[int, int]]) -> pd.DataFrame:
    return rows[[run in runs for run in zip(rows["draw"], rows["seed"], strict=True)]]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per study, data set, profile, method and number of labelled subjects (`SUMMARY_COLUMNS`).

    * `dice_mean`, `dice_low`, `dice_high`, `interval_over`: `mean_interval`, under `smoke` without the interval.
      `dice_sd_draws`, `dice_sd_seeds`: standard deviation (n - 1) of the means of draws and of seeds. `hd95_mean`, over
      runs inside each subject first, is in `hd95_unit`; NaN where a cell mixes mm and px.
    * `n_runs`: pairs of draw and seed that count. `runs_missing`: those that another method of the same group has and
      this one lacks. Where it is not 0 the draws may be easier or harder than the others'; `contrasts` pairs them.
    * `missed`, `missed_share`: structures the prediction lacks, and their share of the `scored_rows` (subject x phase x
      structure x run); `empty_rows`: rows where both are empty.
    """
    subjects = per_subject(table)
    runs_of_group = {
        key: whole_seeds(zip(own["draw"], own["seed"], strict=True)) for key, own in subjects.groupby(GROUP)
    }
    rows = []
    for cell, raw in table.groupby(CELL):
        own = subjects[(subjects[CELL] == list(cell)).all(axis=1)]
        units, empty = sorted(raw["hd95_unit"].unique()), raw["dice"].isna().sum()
        runs = set(zip(own["draw"], own["seed"], strict=True))
        lacking = len(runs_of_group[tuple(own[GROUP].iloc[0])] - runs)
        own = _of_runs(own, counted := whole_seeds(runs))
        scored_subjects = own.dropna(subset="dice")["subject"].nunique()
        mean, low, high, _, over = mean_interval(_indexed(own)) if scored_subjects else (np.nan,) * 4 + ("",)
        if cell[CELL.index("profile")] in NO_TESTS:
            low, high, over = np.nan, np.nan, ""
        sd = [own.groupby(["draw", "seed"])["dice"].mean().groupby(factor).mean().std() for factor in RUN]
        hd95 = own.groupby("subject")["hd95"].mean().mean() if len(units) == 1 else np.nan
        missed, scored = raw["missed"].sum(), len(raw) - empty
        row = [*cell, scored_subjects, own["draw"].nunique(), own["seed"].nunique(), len(counted), lacking]
        row += [mean, low, high, over, *sd, hd95, "+".join(units)]
        row += [missed, missed / scored if scored else np.nan, scored, empty]
        rows.append(row)
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over subjects; `values` [n], one per subject, NaN if n < 2.

    A little too narrow: about 93 % coverage with n = 20, 91 % with 10. Memory: 16 n * `resamples` bytes.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])  # [resamples, n] -> [resamples]
    return float(low), float(high)


def signed_rank_test(difference: np.ndarray) -> tuple[float, float, str]:
    """Two-sided Wilcoxon signed-rank test of paired differences [n], one per subject: p, effect, note.

    Zeros are left out; p is exact for up to 50 differences without ties (SciPy decides), and 1 where nothing differs.
    The effect is the matched-pairs rank-biserial correlation (W+ - W-) / (W+ + W-), 1 where every subject gains.
    """
    difference = np.round(difference, 12)  # what differs by rounding only is equal
    difference = difference[difference != 0]
    if (n := len(difference)) == 0:
        return 1.0, 0.0, "no subject differs"
    ranks = rankdata(np.abs(difference))
    effect = float((ranks * np.sign(difference)).sum() / ranks.sum())
    note = f"only {n} subjects differ: p cannot fall below {2 / 2**n:.3g}" if n < 6 else ""
    return float(wilcoxon(difference).pvalue), effect, note


def holm(p: np.ndarray) -> np.ndarray:
    r"""Holm's adjusted p-values, for sorted p $\tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\,p_{(j)})$.

    `p` [m]; NaN stays NaN and does not count in m. Source: S. Holm, Scand. J. Statist. 6 (1979) 65-70.
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


def verdict(low: float, high: float, p_holm: float, margin: float = MARGIN) -> str:
    """What a declared contrast says, in words.

    "no difference that matters": the whole interval is within ± `margin`. Else, where Holm's p is below .05, "helps" or
    "harms" by the side of the interval. Everything else is "not known": the data allow a gain as well as nothing.
    """
    if np.isnan(low) or np.isnan(p_holm):
        return "not known"
    if -margin < low and high < margin:
        return "no difference that matters"
    if p_holm < LEVEL:
        return "helps" if low + high > 0 else "harms"
    return "not known"


def contrasts(table: pd.DataFrame, declared: Sequence[Sequence[str]] = (), margin: float = MARGIN) -> pd.DataFrame:
    """Differences of Dice between two methods with as many labels, on the same subjects, draws and seeds.

    `declared`: pairs (method, baseline) that a protocol named before there were numbers; they are one family over all
    numbers of labels, with Holm's p and a `verdict`. Without any, every method is compared with `random`, `family`
    "exploratory": an interval, and neither. A pair without a common run has no row. None under `smoke`.
    Columns: `CONTRAST_COLUMNS`; `difference`, `low`, `high`: method minus baseline (`mean_interval`); `runs_left_out`:
    pairs of draw and seed that one of the two lacks, or of seeds that lack draws.
    """
    rows, family = [], "declared" if declared else "exploratory"
    for group, members in per_subject(table[~table["profile"].isin(NO_TESTS)]).groupby(GROUP):
        methods = sorted(set(members["method"]))
        for method, baseline in declared or [(method, "random") for method in methods if method != "random"]:
            if not {method, baseline} <= {*methods}:
                continue
            own, base = (_indexed(members[members["method"] == name]) for name in (method, baseline))
            runs = [set(zip(*map(each.index.get_level_values, RUN), strict=True)) for each in (own, base)]
            common = whole_seeds(runs[0] & runs[1]) if runs[0] & runs[1] else set()
            difference = (own - base).dropna()
            kept = [index[1:] in common for index in difference.index]
            if not any(kept):
                continue
            difference = difference[kept]
            counts = [difference.index.get_level_values(name).nunique() for name in ("subject", *RUN)]
            mean, low, high, p, over = mean_interval(difference)
            row = [*group, method, baseline, family, *counts, len((runs[0] | runs[1]) - common)]
            rows.append([*row, mean, low, high, over, p, np.nan, ""])
    result = pd.DataFrame(rows, columns=CONTRAST_COLUMNS)
    if declared and len(result):
        result["p_holm"] = holm(result["p"].to_numpy(float))
        result["verdict"] = [
            verdict(*row, margin) for row in zip(result["low"], result["high"], result["p_holm"], strict=True)
        ]
    return result


def why_no_tests(table: pd.DataFrame) -> str:
    """A sentence where a table is of a profile without intervals and tests, else nothing."""
    if set(table["profile"]) <= {*NO_TESTS}:
        return "Profile smoke proves that every row runs: no intervals, tests or conclusions are drawn from it."
    return ""
