import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from clseg import stats

NAN = float("nan")


def rows(method, labelled, draw, dice_of, seed=0, **more):
    """Rows of one run: `dice_of` {subject: [dice of each structure]}."""
    return [
        {
            "study": "s",
            "dataset": "d",
            "profile": "smoke",
            "method": method,
            "labelled": labelled,
            "draw": draw,
            "seed": seed,
            "subject": subject,
            "phase": "",
            "class_name": f"class {index}",
            "dice": dice,
            "hd95": NAN if np.isnan(dice) else 10 * (1 - dice),
            "hd95_unit": "mm",
            "missed": 0,
            "run": f"{method}-{labelled}-{draw}-{seed}",
        }
        | more
        for subject, values in dice_of.items()
        for index, dice in enumerate(values)
    ]


def study(seed=0, subjects=12, draws=(1, 2, 3), labelled=(1, 2), gain=None):
    """A made-up study: `gain` {method: Dice over random}, subjects and draws differ."""
    random = np.random.default_rng(seed)
    hardness, table = random.normal(0, 0.05, subjects), []
    for (method, more), count, draw in itertools.product((gain or {"random": 0, "gd": 0.05}).items(), labelled, draws):
        luck = random.normal(0, 0.03)
        values = {
            f"p{n:02}": np.clip(0.6 + 0.05 * count + more + hardness[n] + luck + random.normal(0, 0.02, 3), 0, 1)
            for n in range(subjects)
        }
        table += rows(method, count, draw, values)
    return pd.DataFrame(table)


# -------------------------------------------------------------------------------------------------- means of subjects


def test_per_subject_is_the_mean_over_structures_of_each_run():
    table = pd.DataFrame(rows("gd", 1, 1, {"a": [0.2, 0.4], "b": [0.9, NAN]}) + rows("gd", 1, 2, {"a": [1.0, 1.0]}))
    result = stats.per_subject(table)
    assert result["subject"].tolist() == ["a", "b", "a"]
    assert result["draw"].tolist() == [1, 1, 2]
    assert result["dice"].tolist() == pytest.approx([0.3, 0.9, 1.0])
    assert result["hd95"].tolist() == pytest.approx([7.0, 1.0, 0.0])


def test_summary_literal():
    table = pd.DataFrame(
        rows("gd", 1, 1, {"a": [0.2, 0.4], "b": [0.8, NAN]})
        + rows("gd", 1, 2, {"a": [0.5, 0.5], "b": [1.0, 0.6]})
        + rows("random", 1, 1, {"a": [0.0, 0.0], "b": [0.2, NAN]})
        + rows("benchmark", 9, 1, {"a": [0.9, 0.9], "b": [0.9, 0.9]})
    )
    table.loc[(table["method"] == "random") & (table["dice"] == 0), "missed"] = 1
    result = stats.summary(table).set_index("method")
    assert result.columns.tolist() == [column for column in stats.SUMMARY_COLUMNS if column != "method"]
    gd, random = result.loc["gd"], result.loc["random"]
    # subjects: a (0.3 + 0.5) / 2 = 0.4, b (0.8 + 0.8) / 2 = 0.8; draws: (0.3 + 0.8) / 2 = 0.55, (0.5 + 0.8) / 2 = 0.65
    assert gd["dice_mean"] == pytest.approx(0.6)
    assert gd["dice_sd_draws"] == pytest.approx(np.std([0.55, 0.65], ddof=1))
    assert gd["hd95_mean"] == pytest.approx(4.0)
    assert gd[["n_subjects", "n_draws", "n_seeds", "n_runs", "runs_missing"]].tolist() == [2, 2, 1, 2, 0]
    assert gd[["missed", "missed_share", "scored_rows", "empty_rows"]].tolist() == [0, 0, 7, 1]
    assert gd["hd95_unit"] == "mm"
    assert random[["n_runs", "runs_missing", "missed", "scored_rows", "empty_rows"]].tolist() == [1, 1, 2, 3, 1]
    assert random["missed_share"] == pytest.approx(2 / 3)
    assert np.isnan(random["dice_sd_draws"])
    assert result.loc["benchmark", "runs_missing"] == 0  # its number of labelled subjects is its own


def test_seeds_are_averaged_before_draws():
    table = pd.DataFrame(
        rows("gd", 1, 1, {"a": [0.2]}, seed=0) + rows("gd", 1, 1, {"a": [0.4]}, seed=1) + rows("gd", 1, 2, {"a": [0.5]})
    )
    assert stats.per_draw(table)["dice"].tolist() == pytest.approx([0.3, 0.5])
    cell = stats.summary(table).iloc[0]
    assert cell[["n_draws", "n_seeds", "n_runs"]].tolist() == [2, 2, 3]
    assert cell["dice_sd_draws"] == pytest.approx(np.std([0.3, 0.5], ddof=1))


def test_profiles_and_units_are_never_averaged():
    table = study()
    paper = table.assign(profile="paper", dice=table["dice"] - 0.3)
    both = stats.summary(pd.concat([table, paper]))
    assert both.groupby("profile")["dice_mean"].mean()["smoke"] == pytest.approx(
        stats.summary(table)["dice_mean"].mean()
    )
    table.loc[table["subject"] == "p00", "hd95_unit"] = "px"
    mixed = stats.summary(table)
    assert (mixed["hd95_unit"] == "mm+px").all()
    assert mixed["hd95_mean"].isna().all()


def test_subject_of_whom_nothing_is_scored_does_not_count():
    table = pd.DataFrame(rows("gd", 1, 1, {"a": [NAN, NAN], "b": [0.5, 0.7]}))
    cell = stats.summary(table).iloc[0]
    assert (cell["n_subjects"], cell["empty_rows"]) == (1, 2)
    assert cell["dice_mean"] == pytest.approx(0.6)
    assert np.isnan(cell["dice_low"])


def test_order_of_rows_does_not_matter():
    table = study()
    shuffled = table.sample(frac=1, random_state=1)
    for function in (stats.per_subject, stats.per_draw, stats.summary, stats.compare, stats.ranks):
        pd.testing.assert_frame_equal(function(shuffled), function(table), check_exact=True)


def test_better_predictions_never_lower_the_summary():
    table = study()
    better = table.assign(dice=np.minimum(1, table["dice"] + 0.01))
    columns = ["dice_mean", "dice_low", "dice_high"]
    assert (stats.summary(better)[columns] >= stats.summary(table)[columns]).all(axis=None)


def test_empty_table_gives_empty_tables():
    empty = study().iloc[:0]
    assert stats.summary(empty).columns.tolist() == stats.SUMMARY_COLUMNS
    assert stats.compare(empty).columns.tolist() == stats.COMPARISON_COLUMNS
    nothing = pd.DataFrame(columns=empty.columns)  # no types either
    assert len(stats.summary(nothing)) == len(stats.compare(nothing)) == 0


# ---------------------------------------------------------------------------------------------------------- bootstrap


def test_interval_equals_scipy_up_to_sampling():
    values = np.random.default_rng(3).beta(5, 2, 20)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert stats.bootstrap_interval(values) == pytest.approx((expected.low, expected.high), abs=4e-3)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = stats.bootstrap_interval(random.normal(0.7, 0.1, 20), resamples=1000)
        covered += low <= 0.7 <= high
    assert 0.88 < covered / 400 < 0.98  # nominal 0.95; a percentile interval of 20 subjects has about 0.93


def test_interval_is_that_of_subjects_not_of_rows():
    """Ten copies of every subject's rows (more runs with the same values) must not narrow the interval."""
    table = study(draws=(1,))
    copies = pd.concat([table.assign(draw=draw) for draw in range(1, 11)])
    columns = ["dice_low", "dice_high"]
    np.testing.assert_allclose(stats.summary(copies)[columns], stats.summary(table)[columns], atol=1e-12)


def test_interval_is_repeatable_contains_the_mean_and_needs_two_subjects():
    values = np.random.default_rng(5).uniform(size=15)
    low, high = stats.bootstrap_interval(values)
    assert (low, high) == stats.bootstrap_interval(values)
    assert low < values.mean() < high
    assert stats.bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25)
    assert np.isnan(stats.bootstrap_interval(np.array([0.5]))).all()


# ---------------------------------------------------------------------------------------------------------- the tests


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04 -> x 4, 3, 2, 1 = 0.02, 0.03, 0.06, 0.04 -> running maximum 0.02, 0.03, 0.06, 0.06
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(stats.holm([0.9, 0.6]), [1.0, 1.0])
    np.testing.assert_allclose(stats.holm([0.02, NAN, 0.04]), [0.04, NAN, 0.04])  # m = 2
    assert stats.holm([]).shape == (0,)


def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order():
    p = np.random.default_rng(0).uniform(0, 0.3, 9)
    adjusted = stats.holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 9 * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_signed_rank_by_hand():
    # ranks 1, 2, 3, 4 of 0.1, 0.2, -0.3, 0.4: W+ = 1 + 2 + 4 = 7, W- = 3; sign patterns of 1..4 with W- <= 3:
    # {}, {1}, {2}, {3}, {1, 2} = 5 of 16, two-sided 10 / 16
    p, effect, note = stats.signed_rank_test(np.array([0.1, 0.2, -0.3, 0.4]))
    assert p == pytest.approx(10 / 16)
    assert effect == pytest.approx((7 - 3) / 10)
    assert note == "only 4 subjects differ: p cannot fall below 0.125"
    assert stats.signed_rank_test(np.arange(1, 7) / 100) == (pytest.approx(2 / 2**6), 1.0, "")
    assert stats.signed_rank_test(np.arange(1, 6))[2] == "only 5 subjects differ: p cannot fall below 0.0625"


def test_identical_values_are_no_difference_and_no_crash():
    assert stats.signed_rank_test(np.zeros(20)) == (1.0, 0.0, "no subject differs")
    assert stats.signed_rank_test(np.full(8, 1e-16)) == (1.0, 0.0, "no subject differs")


def test_few_tied_differences_cannot_be_significant():
    p, _, note = stats.signed_rank_test(np.full(4, 0.1))
    assert p >= 2 / 2**4
    assert "only 4" in note


def test_compare_finds_the_gain_and_pairs_subjects():
    table = study(subjects=20, gain={"random": 0, "gd": 0.08, "gr": 0.0}, draws=(1, 2, 3), seed=4)
    result = stats.compare(table).set_index(["method", "labelled"])
    assert sorted(result.index) == [("gd", 1), ("gd", 2), ("gr", 1), ("gr", 2)]
    assert (result["n_subjects"] == 20).all()
    assert (result["n_runs"] == 3).all()
    subjects = stats.per_subject(table).groupby(["method", "labelled", "subject"])["dice"].mean()
    difference = subjects["gd", 1] - subjects["random", 1]
    row = result.loc["gd", 1]
    assert row["median_difference"] == pytest.approx(difference.median())
    assert row["p"] == pytest.approx(scipy_stats.wilcoxon(difference).pvalue)
    for labelled in (1, 2):  # one family per number of labelled subjects
        family = result.xs(labelled, level="labelled")
        np.testing.assert_allclose(family["p_holm"], stats.holm(family["p"]))


def test_compare_is_antisymmetric():
    table = study(seed=2)
    there = stats.compare(table)
    back = stats.compare(table, baseline="gd")
    np.testing.assert_allclose(there["median_difference"], -back["median_difference"])
    np.testing.assert_allclose(there["rank_biserial"], -back["rank_biserial"])
    np.testing.assert_allclose(there["p"], back["p"])


def test_compare_uses_common_runs_only():
    table = study(draws=(1, 2, 3), labelled=(1,))
    without = table[~((table["method"] == "gd") & (table["draw"] == 3))]
    common = table[table["draw"] < 3]
    row, expected = stats.compare(without).iloc[0], stats.compare(common).iloc[0]
    assert (row["n_runs"], row["runs_left_out"], expected["runs_left_out"]) == (2, 1, 0)
    assert row["median_difference"] == expected["median_difference"]
    assert row["p"] == expected["p"]
    assert stats.summary(without).set_index("method")["runs_missing"].to_dict() == {"gd": 1, "random": 0}


def test_compare_pairs_a_subject_in_the_runs_in_which_both_methods_have_it():
    table = study(labelled=(1,))
    whole = stats.compare(table)
    table.loc[(table["subject"] == "p03") & (table["method"] == "gd") & (table["draw"] == 2), "dice"] = NAN
    assert stats.compare(table)["n_subjects"].tolist() == [12]
    # folds: every subject is tested in one draw only
    number = table["subject"].str[1:].astype(int)
    folds = stats.compare(table[number % 2 == table["draw"] % 2])
    assert folds["n_subjects"].tolist() == [12]
    assert folds["n_runs"].tolist() == whole["n_runs"].tolist()
    assert folds["p"].notna().all()


def test_compare_says_what_it_cannot_compare():
    table = study(labelled=(1, 2), gain={"random": 0, "gd": 0.05})
    lonely = table[~((table["method"] == "random") & (table["labelled"] == 2))]
    benchmark = table[(table["method"] == "gd") & (table["labelled"] == 2)].assign(method="benchmark", labelled=78)
    result = stats.compare(pd.concat([lonely, benchmark])).set_index("labelled")
    assert result.index.tolist() == [1, 2]  # benchmark has no random with 78 to be compared with
    assert result.loc[2, "note"] == "no run in common with random"
    assert (result.loc[2, "n_subjects"], result.loc[2, "runs_left_out"]) == (0, 3)
    assert np.isnan(result.loc[2, ["p", "p_holm", "median_difference"]].astype(float)).all()
    others = table.replace({"subject": {f"p{n:02}": f"q{n:02}" for n in range(12)}})
    strangers = pd.concat([table[table["method"] == "random"], others[others["method"] == "gd"]])
    assert set(stats.compare(strangers)["note"]) == {"no subject in common with random"}


def test_ablated_methods_are_compared_with_their_own_baseline():
    table = study(labelled=(2,), gain={"gd": 0.0, "gd [stages.0.temperature=0.5]": -0.1})
    row = stats.compare(table, baseline="gd").iloc[0]
    assert row["method"] == "gd [stages.0.temperature=0.5]"
    assert row["median_difference"] < 0


# ------------------------------------------------------------------------------------------------------------- ranks


def test_ranks_by_hand():
    table = pd.DataFrame(
        rows("gd", 1, 1, {"a": [0.9], "b": [0.5]})
        + rows("gr", 1, 1, {"a": [0.8], "b": [0.5 + 1e-15]})  # equal but for rounding
        + rows("random", 1, 1, {"a": [0.1], "b": [0.7]})
        + rows("gd", 2, 1, {"a": [0.9], "b": [0.9]})
        + rows("gr", 2, 1, {"a": [0.8], "b": [0.6]})  # random is missing: two cells left out
        + rows("benchmark", 1, 1, {"a": [1.0], "b": [1.0]})
    )
    result = stats.ranks(table)
    assert result.columns.tolist() == stats.RANK_COLUMNS
    # a: gd 1, gr 2, random 3; b: random 1, gd and gr share 2 and 3
    assert result[["method", "rank_mean"]].to_numpy().tolist() == [["gd", 1.75], ["random", 2.0], ["gr", 2.25]]
    assert (result[["n_subjects", "n_cells", "cells_left_out"]] == [2, 2, 2]).all(axis=None)
    assert result.set_index("method").loc["gd", ["rank_low", "rank_high"]].tolist() == [1.0, 2.5]


def test_ranks_do_not_depend_on_scale_and_are_of_subjects():
    table = study(gain={"random": 0, "gd": 0.05, "gr": 0.02})
    result = stats.ranks(table)
    assert result["method"].tolist() == ["gd", "gr", "random"]
    assert result["rank_mean"].sum() == pytest.approx(1 + 2 + 3)
    easier = table.assign(dice=table["dice"] * table["subject"].map({f"p{n:02}": 0.5 + n / 30 for n in range(12)}))
    pd.testing.assert_frame_equal(stats.ranks(easier), result)
    copies = pd.concat([table.assign(draw=table["draw"] + 3 * n) for n in range(4)])  # more runs, the same subjects
    columns = ["rank_mean", "rank_low", "rank_high", "n_subjects"]
    np.testing.assert_allclose(stats.ranks(copies)[columns].astype(float), result[columns].astype(float))


def test_ranks_of_methods_without_a_common_cell():
    table = study(labelled=(1, 2))
    apart = table[(table["method"] == "gd") == (table["labelled"] == 1)]
    result = stats.ranks(apart)
    assert result["cells_left_out"].tolist() == [72, 72]
    assert result["rank_mean"].isna().all()
    assert stats.ranks(table.iloc[:0]).empty
