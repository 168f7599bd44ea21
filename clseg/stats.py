"""From the tidy result table to means, intervals and paired tests; the unit of all of them is the test subject.

The volumes, structures and runs of one subject are no independent observations: they are averaged inside the subject
before anything is resampled or tested. Rows where reference and prediction are both empty carry NaN (`metrics.score`):
they are counted, and in no mean. Missed structures count with Dice 0 and the image diagonal as HD95.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata, wilcoxon

GROUP = ["study", "dataset", "profile", "labelled"]  # what is compared with each other; never averaged across
CELL = ["study", "dataset", "profile", "method", "labelled"]
RUN = ["draw", "seed"]
SUMMARY_COLUMNS = [
    *[*CELL, "n_subjects", "n_draws", "n_seeds", "n_runs", "runs_missing"],
    *["dice_mean", "dice_low", "dice_high", "dice_sd_draws"],
    *["hd95_mean", "hd95_unit", "missed", "missed_share", "scored_rows", "empty_rows"],
]
EFFECTS = ["median_difference", "rank_biserial", "p", "p_holm"]
COMPARISON_COLUMNS = [*CELL, "baseline", "n_subjects", "n_runs", "runs_left_out", *EFFECTS, "note"]
RANK_COLUMNS = ["method", "rank_mean", "rank_low", "rank_high", "n_subjects", "n_cells", "cells_left_out"]


def per_subject(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice and HD95 of each subject in each run (`CELL`, `RUN`, subject), over its structures and phases.

    NaN for a subject of whom no row is left. The order of the rows of `table` does not matter, not even for rounding.
    """
    table = table.sort_values([*CELL, *RUN, "subject", "phase", "class_name"], kind="stable")
    return table.groupby([*CELL, *RUN, "subject"], as_index=False)[["dice", "hd95"]].mean()


def per_draw(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of each draw of labelled subjects, over seeds and test subjects: `CELL` columns, draw, dice."""
    return per_subject(table).groupby([*CELL, "draw"], as_index=False)["dice"].mean()


def bootstrap_interval(values: np.ndarray, resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over subjects; `values` [n], one per subject, NaN if n < 2.

    A little too narrow: about 93 % coverage with n = 20, 91 % with 10. Memory: 16 n * `resamples` bytes.
    """
    if len(values) < 2:
        return float("nan"), float("nan")
    chosen = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[chosen].mean(axis=1), [2.5, 97.5])  # [resamples, n] -> [resamples]
    return float(low), float(high)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per study, data set, profile, method and number of labelled subjects (`SUMMARY_COLUMNS`).

    * `dice_mean`: over draws and seeds inside each test subject, then over test subjects; `dice_low`, `dice_high`: its
      95 % bootstrap interval, which says how far it depends on who was tested; how far on who was labelled says
      `dice_sd_draws`, the standard deviation (n - 1) of the means of the draws. `hd95_mean`, averaged likewise, is in
      `hd95_unit`; NaN where a cell mixes mm and px.
    * `runs_missing`: pairs of draw and seed that another method of the same group has and this one lacks. Where it is
      not 0 the draws may be easier or harder than the others'; `compare` pairs them.
    * `missed`, `missed_share`: structures the prediction lacks, and their share of the `scored_rows` (subject x phase x
      structure x run); `empty_rows`: rows where both are empty.
    """
    subjects = per_subject(table)
    runs_of_group = {key: set(zip(rows["draw"], rows["seed"], strict=True)) for key, rows in subjects.groupby(GROUP)}
    of_draw, of_cell, rows = per_draw(table).groupby(CELL)["dice"].std(), subjects.groupby(CELL), []
    for cell, raw in table.groupby(CELL):
        own, units, empty = of_cell.get_group(cell), sorted(raw["hd95_unit"].unique()), raw["dice"].isna().sum()
        runs = set(zip(own["draw"], own["seed"], strict=True))
        lacking = len(runs_of_group[tuple(own[GROUP].iloc[0])] - runs)
        means = own.groupby("subject")[["dice", "hd95"]].mean()
        dice, hd95 = means["dice"].dropna().to_numpy(), means["hd95"].mean() if len(units) == 1 else np.nan
        missed, scored = raw["missed"].sum(), len(raw) - empty
        row = [*cell, len(dice), own["draw"].nunique(), own["seed"].nunique(), len(runs), lacking]
        row += [dice.mean() if len(dice) else np.nan, *bootstrap_interval(dice), of_draw[cell]]
        row += [hd95, "+".join(units), missed, missed / scored if scored else np.nan, scored, empty]
        rows.append(row)
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS)


def ranks(table: pd.DataFrame) -> pd.DataFrame:
    """Mean rank of every method (1 is best, ties share theirs), best first (`RANK_COLUMNS`).

    Methods are ranked by Dice in every cell (`GROUP`, `RUN`, subject), ranks averaged inside each test subject, then
    over them, with a 95 % bootstrap interval. Cells that not all methods have are left out, and counted; `benchmark`,
    which has more labels, is not ranked.
    """
    subjects = per_subject(table[table["method"] != "benchmark"])
    cells = subjects.pivot(index=[*GROUP, *RUN, "subject"], columns="method", values="dice")
    complete = cells.round(12).dropna()  # what differs by rounding is equal
    means = complete.rank(axis=1, ascending=False).groupby(["dataset", "subject"]).mean()  # [subjects, methods]
    counts = [len(means), len(complete), len(cells) - len(complete)]
    rows = [[method, rank.mean(), *bootstrap_interval(rank.to_numpy()), *counts] for method, rank in means.items()]
    return pd.DataFrame(rows, columns=RANK_COLUMNS).sort_values(["rank_mean", "method"], ignore_index=True)


def holm(p: np.ndarray) -> np.ndarray:
    r"""Holm's adjusted p-values, for sorted p $\tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\,p_{(j)})$.

    `p` [m]; NaN stays NaN and does not count in m. Source: S. Holm, Scand. J. Statist. 6 (1979) 65-70.
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted


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


def compare(table: pd.DataFrame, baseline: str = "random") -> pd.DataFrame:
    """Paired test (`signed_rank_test`) of every method against `baseline` with as many labels (`COMPARISON_COLUMNS`).

    Pairs are test subjects: the difference of each is averaged over the draws and seeds that both methods have
    (`n_runs`; `runs_left_out` counts the others) and in which both have a value for it; with folds that is one.
    `median_difference` is method minus baseline; `p_holm` is corrected over the methods of one `GROUP`. A method
    without common runs keeps its row, with n 0 and a note; `benchmark` only where the baseline has as many labels.
    """
    rows = []
    for group, members in per_subject(table).groupby(GROUP):
        values = members.pivot(index="subject", columns=["method", *RUN], values="dice")
        methods = values.columns.unique("method")
        base = values[baseline] if baseline in methods else values.iloc[:, :0].droplevel("method", axis=1)
        for method in methods.drop(baseline, errors="ignore"):
            if method == "benchmark" and base.empty:
                continue
            own = values[method]  # [subjects, runs]
            runs = own.columns.intersection(base.columns)
            difference = (own[runs] - base[runs]).mean(axis=1).dropna().to_numpy()
            row = dict(zip(GROUP, group, strict=True)) | {"method": method, "baseline": baseline, "n_runs": len(runs)}
            row |= {"n_subjects": len(difference), "runs_left_out": len(own.columns.union(base.columns)) - len(runs)}
            if len(difference):
                row["median_difference"] = float(np.median(difference))
                row["p"], row["rank_biserial"], row["note"] = signed_rank_test(difference)
            else:
                row["note"] = f"no {'subject' if len(runs) else 'run'} in common with {baseline}"
            rows.append(row)
    result = pd.DataFrame(rows, columns=COMPARISON_COLUMNS)
    result[EFFECTS] = result[EFFECTS].astype(float)
    for _, family in result.groupby(GROUP):
        result.loc[family.index, "p_holm"] = holm(family["p"].to_numpy())
    return result
