r"""From the tidy result table to means, intervals and contrasts.

A score depends on who was tested, on who was labelled (the draw) and on the seed of training. All three are random: the
next study would have others. So a mean is of an array y[subject, draw, seed], and what is uncertain about it comes from
each of the three: with the means over the other two factors, of variance $s_f^2$ over the $n_f$ levels of factor f,

$$v_f = s_f^2 / n_f, \quad \mathrm{Var}(\bar y) \approx \sum_f v_f, \quad
  \mathrm{df} = (\textstyle\sum_f v_f)^2 / \sum_f (v_f^2 / (n_f - 1))$$

(Satterthwaite 1946), and the interval is $\bar y \pm t_{df} \sqrt{\sum_f v_f}$. What two factors do together is counted
in both, so the interval is rather too wide than too narrow. Intervals over patients alone, as usually printed, say
nothing of other labelled patients or seeds. Why not a bootstrap: resampling three seeds or five draws gives intervals
that are too narrow. How often intervals miss the truth, where 5 % is wanted, in simulated studies of the size of ours
(`tests/interval_coverage.py`; numbers in `paper_figures/statistics/coverage.json`):

| patients x draws x seeds | this interval | crossed bootstrap | patients alone |
|---|---|---|---|
| planned: 20 or 60 x 3 or 5 x 3; all labels, 20 x 1 x 3 | 3.3 to 6.4 | 5.4 to 16.7 | 14.2 to 54.2 |
| seeds differ as much as patients: 20 x 1 x 3 | 7.4 to 7.5 | 15.8 to 16.7 | 43.2 to 46.5 |
| folds of 20: 100 x 5 x 3 | 2.8 to 4.4 | | |
| a few draws far worse: 20 or 60 x 5 x 3 | 6.4 to 7.7 | | |
| two draws: 20 x 2 x 3 | 3.6 to 9.2 | 7.6 to 25.9 | 18.9 to 55.5 |
| one draw of several: 20 x 1 x 3 | 8.8 to 42.2 | 15.8 to 54.3 | 24.5 to 64.3 |
| two seeds: 20 x 3 or 5 x 2 | 3.5 to 4.8 | 7.2 to 11.1 | 15.6 to 38.2 |
| two seeds, all labels: 20 x 1 x 2 | 6.5 to 11.7 | 12.2 to 25.5 | 21.6 to 50.4 |
| one seed: 20 x 3 or 5 x 1 | 6.5 to 9.3 | 13.2 to 14.8 | 21.0 to 39.7 |
| one seed, all labels: 20 x 1 x 1 | 25.9 to 26.4 | 30.0 to 30.9 | 30.2 to 31.0 |
| one patient: 1 x 5 x 3 | 34.2 to 51.0 | | |
| two patients: 2 x 5 x 3 | 7.8 to 9.3 | | |

The lines from "two draws" on are why there is no verdict of fewer than three test subjects or seeds, nor of one draw of
several or of two (`lacks`). Of 26 contrasts in which nothing differs, any was called "helps" or "harms" in 5.1 % of
1,000 studies; of 26 that are just as large as matters, any was called "no difference that matters" in 3.2 %. Where
nothing differs, it was said of 13.4 % of those with all labels: three seeds seldom prove that two methods are alike.

Under profile `smoke` there are no intervals, tests or conclusions. Rows where reference and prediction are both
empty carry NaN (`metrics.score`): they are counted, and in no mean (but see `contrasts`). Missed structures count with
Dice 0 and the image diagonal.
"""

import re
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import pandas as pd
from scipy.stats import t as student

GROUP = ["study", "dataset", "profile", "labelled"]  # what is compared with each other; never averaged across
CELL = ["study", "dataset", "profile", "method", "labelled"]
RUN = ["draw", "seed"]
FACTORS = ("subjects", "draws", "seeds")
MARGIN = 0.02  # of Dice: less does not matter
LEVEL = 0.05
VERDICTS = ("helps", "harms", "no difference that matters", "not known")
NO_TESTS = ("smoke",)  # profiles whose numbers prove only that everything runs
SUMMARY_COLUMNS = [
    *[*CELL, "n_subjects", "n_draws", "n_seeds", "n_runs", "runs_missing"],
    *["dice_mean", "dice_low", "dice_high", "interval_over", "note", "dice_sd_draws", "dice_sd_seeds"],
    *["hd95_mean", "hd95_unit", "missed", "missed_share", "scored_rows", "empty_rows"],
]
CONTRAST_COLUMNS = [
    *["study", "dataset", "profile", "labelled", "method", "baseline", "family"],
    *["n_subjects", "n_draws", "n_seeds", "runs_left_out", "difference", "low", "high", "interval_over"],
    *["p", "p_holm", "p_margin_holm", "verdict", "note"],
]


def per_subject(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice and HD95 of each subject in each run (`CELL`, `RUN`, subject), over its structures and phases.

    NaN for a subject of whom no row is left. The order of the rows of `table` does not matter, not even for rounding.
    """
    table = table.sort_values([*CELL, *RUN, "subject", "phase", "class_name"], kind="stable")
    return table.groupby([*CELL, *RUN, "subject"], as_index=False)[["dice", "hd95"]].mean()


def per_draw(table: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of each draw of labelled subjects, over seeds and test subjects: `CELL` columns, draw, dice.

    Of seeds that have every draw, as in `summary`.
    """
    return per_subject(_counted(table)).groupby([*CELL, "draw"], as_index=False)["dice"].mean()


def crossed_interval(mean: float, levels: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The 95 % interval of a mean, and the two-sided p of 0, from the means of the levels of each random factor.

    levels: an array [n_f] for every factor, n_f > 1; none gives NaN. The equations, and how often the interval misses
    the truth, stand at the top of the module.
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


def levels_of(values: pd.Series) -> dict[str, np.ndarray]:
    """The means of the levels of each factor, for `crossed_interval`, of values by (subject, draw, seed).

    A factor of a single level is left out. Where every draw tests other subjects (cross-validation), subjects are part
    of the draw, and draws are counted in their place. That folds share subjects to train on is not counted: there is no
    estimate without bias of what it adds (Bengio & Grandvalet, JMLR 5 (2004) 1089-1105).
    """
    cells = values.groupby(["draw", "seed", "subject"]).mean().dropna()
    draws = cells.reset_index().groupby("subject")["draw"].nunique()
    nested = cells.index.get_level_values("draw").nunique() > 1 and (draws == 1).all()
    levels = {}
    for name, factor in zip(FACTORS, ("subject", "draw", "seed"), strict=True):
        means = cells.groupby(factor).mean().to_numpy()
        if len(means) > 1 and not (nested and factor == "subject"):
            levels[name] = means
    return levels


def lacks(subjects: int, draws: int, seeds: int, all_labels: bool = False) -> str:
    """What an interval cannot know as its subjects, draws or seeds are too few, or nothing: then no verdict is given.

    Two are not enough: that they are alike by chance is too frequent. With all labels there is no other draw, so one
    lacks nothing.
    """
    counts = {"subject": subjects, "draw": draws, "seed": seeds}
    if all_labels and draws == 1:
        del counts["draw"]
    words = {1: "one {}", 2: "two {}s"}
    return ", ".join(words[count].format(name) for name, count in counts.items() if count in words)


def whole_seeds(runs: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Of (draw, seed) pairs those of seeds that have every draw; all where no seed has."""
    runs = set(runs)
    draws = {draw for draw, _ in runs}
    whole = {(draw, seed) for draw, seed in runs if all((other, seed) in runs for other in draws)}
    return whole or runs


def _entered(table: pd.DataFrame) -> pd.DataFrame:
    """A tidy table with "" for no phase and no study, which pandas reads as NaN.

    Raises `ValueError` where a score is there twice, as of two runs that differ in what no column says.
    """
    table = table.assign(**{name: table[name].astype(object).fillna("") for name in ("phase", "study")})
    if (twice := table.duplicated([*CELL, *RUN, "subject", "phase", "class_name"])).any():
        method, labelled, draw, seed, subject = table.loc[twice, [*CELL[3:], *RUN, "subject"]].iloc[0]
        where = f"{method}, {labelled} labelled, draw {draw}, seed {seed}: subject {subject}"
        raise ValueError(f"{where} has several scores of one structure; keep the rows of one run")
    return table


def _indexed(rows: pd.DataFrame) -> pd.Series:
    return rows.set_index(["subject", "draw", "seed"])["dice"]


def _difference(own: pd.DataFrame, base: pd.DataFrame) -> pd.Series:
    """Of every subject, draw and seed of both: mean Dice over structures and phases of the one minus that of the other.

    Where one of the two has no Dice, as it rightly finds nothing, and the other finds something, the first has 1.
    """
    subject = ["subject", *RUN]
    one, other = (rows.groupby([*subject, "phase", "class_name"])["dice"].mean() for rows in (own, base))
    one, other = one.align(other, join="inner")
    one, other = one.where(one.notna() | other.isna(), 1.0), other.where(other.notna() | one.isna(), 1.0)
    means = [some.groupby(subject).mean() for some in (one, other)]
    return (means[0] - means[1]).dropna()


def _runs(rows: pd.DataFrame) -> list[tuple[int, int]]:
    return [*zip(rows["draw"], rows["seed"], strict=True)]


def _counted(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each cell that are of seeds with every draw, as `_entered`."""
    table, kept = _entered(table), []
    for _, own in table.groupby(CELL):
        whole = whole_seeds(runs := _runs(own))
        kept.append(own[[run in whole for run in runs]])
    return pd.concat(kept) if kept else table


def summary(table: pd.DataFrame, all_labels: Collection[int] = ()) -> pd.DataFrame:
    """One row per study, data set, profile, method and number of labelled subjects (`SUMMARY_COLUMNS`).

    Only seeds that have every draw of the cell count, in all columns. `all_labels`: the numbers of labelled subjects
    that are all there are. Raises `ValueError` for a score that is there twice.
    * `dice_mean`: over subjects, draws and seeds; `dice_low`, `dice_high`: `crossed_interval` within 0 and 1, over what
      `interval_over` names; `note`: what it `lacks`. No interval under `smoke`. `dice_sd_draws`, `dice_sd_seeds`:
      standard deviation (n - 1) of the means of draws and of seeds. `hd95_mean`, over runs inside each subject first,
      is in `hd95_unit`; NaN where a cell mixes mm and px.
    * `n_runs`: pairs of draw and seed. `runs_missing`: those that another method of the same group has and this one
      lacks. Where it is not 0 the draws may be easier or harder than the others'; `contrasts` pairs them.
    * `missed`, `missed_share`: structures the prediction lacks, and their share of the `scored_rows` (subject x phase x
      structure x run); `empty_rows`: rows where both are empty.
    """
    table = _counted(table)
    subjects = per_subject(table)
    runs_of_group = {group: set(_runs(own)) for group, own in subjects.groupby(GROUP)}
    of_cell, rows = subjects.groupby(CELL), []
    for cell, raw in table.groupby(CELL):
        own, units, empty = of_cell.get_group(cell), sorted(raw["hd95_unit"].unique()), raw["dice"].isna().sum()
        among, runs, scored = runs_of_group[tuple(own[GROUP].iloc[0])], set(_runs(own)), own.dropna(subset="dice")
        levels = {} if cell[CELL.index("profile")] in NO_TESTS else levels_of(_indexed(own))
        low, high = np.clip(crossed_interval(scored["dice"].mean(), [*levels.values()])[:2], 0, 1)
        draws, seeds = own["draw"].nunique(), own["seed"].nunique()
        note = lacks(scored["subject"].nunique(), draws, seeds, own["labelled"].iloc[0] in all_labels)
        sd = [own.groupby(RUN)["dice"].mean().groupby(factor).mean().std() for factor in RUN]
        hd95 = own.groupby("subject")["hd95"].mean().mean() if len(units) == 1 else np.nan
        missed, count = raw["missed"].sum(), len(raw) - empty
        row = [*cell, scored["subject"].nunique(), draws, seeds, len(runs), len(among - runs)]
        row += [scored["dice"].mean(), low, high, ", ".join(levels), note * bool(levels), *sd, hd95, "+".join(units)]
        row += [missed, missed / count if count else np.nan, count, empty]
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


def holm(p: np.ndarray, tests: int = 0) -> np.ndarray:
    r"""Holm's adjusted p-values, for sorted p $\tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\,p_{(j)})$.

    `p` [n]; m is n, or `tests` if that is more: those that have no p yet count as well. NaN stays NaN and counts only
    by `tests`. Source: S. Holm, Scand. J. Statist. 6 (1979) 65-70.
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]  # NaN sorts last
    factors = max(tests, len(order)) - np.arange(len(order))
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * factors))
    return adjusted


def verdict(low: float, high: float, p_holm: float, margin: float = MARGIN, p_margin_holm: float = 0.0) -> str:
    """What a declared contrast says, in words: the interval must say it, and so must Holm's p, beside all others.

    "no difference that matters": the whole interval is within ± `margin`, and `p_margin_holm` is below .05. "helps" or
    "harms", by the side of the interval: it reaches beyond the margin, and `p_holm` is below .05. Everything else is
    "not known". `p_holm` is of the question whether there is a difference, `p_margin_holm` of the question whether it
    is on this side of the margin; of a contrast that stands alone the interval answers the second.
    """
    if np.isnan(low) or np.isnan(p_holm):
        return "not known"
    if -margin < low and high < margin:
        return "no difference that matters" if p_margin_holm < LEVEL else "not known"
    if p_holm < LEVEL:
        return "helps" if low + high > 0 else "harms"
    return "not known"


def in_words(verdict: str, note: str) -> str:
    """A verdict with its note: helps (by more than 0.02), not known (one seed)."""
    return f"{verdict} ({note})" if verdict and note else verdict or note


def _of_interest(methods: Sequence[str]) -> list[tuple[str, str]]:
    """What is compared where nothing was declared: an ablated value with the method's own, all others with `random`."""
    plain = [re.sub(r" \[.*\]", "", method) for method in methods]
    pairs = [(m, own if own != m and own in methods else "random") for m, own in zip(methods, plain, strict=True)]
    return [(method, baseline) for method, baseline in pairs if method != baseline]


def contrasts(
    table: pd.DataFrame,
    declared: Sequence[Sequence[str]] = (),
    tests: int = 0,
    margin: float = MARGIN,
    all_labels: Collection[int] = (),
) -> pd.DataFrame:
    """Differences of Dice between two methods with as many labels, on the same subjects, draws and seeds.

    `declared`: pairs (method, baseline) that a protocol named before there were numbers; over all numbers of labels of
    a study they are one family of `tests` (those without runs have no row, and count). Without any, every method is
    compared with `random`, an ablated value with the method's own: `family` "exploratory", an interval, p as it is, and
    nothing more. `all_labels` as in `summary`. No row under `smoke`. Where a subject lacks a structure, a method that
    finds none has Dice 1 for it if the other finds some (Dice 0), and it counts for neither if both find none. Columns
    (`CONTRAST_COLUMNS`):
    * `difference`, `low`, `high`, `p`: method minus baseline and its `crossed_interval` over what `interval_over`
      names; `runs_left_out`: pairs of draw and seed that one of the two lacks, or of seeds that lack draws.
    * Of a declared family `p_holm`: is there a difference? `p_margin_holm`: is it on the side of `margin` where it
      seems to be? Both adjusted, so that in a whole study the chance of one false answer to each question is 5 %.
    * `verdict`, and in `note` "by more than 0.02" where `p_margin_holm` allows it. What the interval `lacks` stands in
      `note`, too, and then the verdict is "not known" whatever the interval, as others may differ by more, and there
      is no adjusted p.
    """
    table, rows, family = _entered(table), [], "declared" if declared else "exploratory"
    for group, members in table[~table["profile"].isin(NO_TESTS)].groupby(GROUP):
        methods, everybody = sorted(set(members["method"])), members["labelled"].iloc[0] in all_labels
        for method, baseline in declared or _of_interest(methods):
            if not {method, baseline} <= {*methods}:
                continue
            own, base = (members[members["method"] == name] for name in (method, baseline))
            common, either = {*_runs(own)} & {*_runs(base)}, {*_runs(own)} | {*_runs(base)}
            common = whole_seeds(common)
            difference = _difference(own, base)
            difference = difference[[index[1:] in common for index in difference.index]]
            if difference.empty:
                continue
            subjects, draws, seeds = (difference.index.get_level_values(name).nunique() for name in ("subject", *RUN))
            mean, levels = float(difference.mean()), levels_of(difference)
            low, high, p = crossed_interval(mean, [*levels.values()])
            _, _, p_margin = crossed_interval(abs(mean) - margin, [*levels.values()])
            row = [*group, method, baseline, family, subjects, draws, seeds, len(either - common)]
            row += [mean, low, high, ", ".join(levels), p, np.nan, p_margin, "not known"]
            row += [lacks(subjects, draws, seeds, everybody)]
            rows.append(row)
    result = pd.DataFrame(rows, columns=CONTRAST_COLUMNS)
    if not declared:
        return result.assign(p_margin_holm=np.nan, verdict="")
    for _, own in result.groupby(GROUP[:3]):  # a family is of one study
        for column, p in (("p_holm", own["p"]), ("p_margin_holm", own["p_margin_holm"])):
            result.loc[own.index, column] = holm(p.where(own["note"] == "").to_numpy(float), max(tests, len(own)))
    for place, row in result[result["note"] == ""].iterrows():
        said = verdict(row["low"], row["high"], row["p_holm"], margin, row["p_margin_holm"])
        surely = min(abs(row["low"]), abs(row["high"])) > margin and row["p_margin_holm"] < LEVEL
        more = f"by more than {margin:g}" if surely and said in ("helps", "harms") else ""
        result.loc[place, ["verdict", "note"]] = said, more
    return result


def why_no_tests(table: pd.DataFrame) -> str:
    """A sentence where a table is of a profile without intervals and tests, else nothing."""
    if set(table["profile"]) <= {*NO_TESTS}:
        return "Profile smoke proves that every row runs: no intervals, tests or conclusions are drawn from it."
    return ""
