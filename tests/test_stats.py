import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from clseg import paths, stats
from clseg.study import grid, results
from clseg.study.files import read_study

NAN = float("nan")


def rows(method, labelled, draw, dice_of, seed=0, **more):
    """Rows of one run: `dice_of` {subject: [dice of each structure]}."""
    return [
        {
            "study": "s",
            "dataset": "d",
            "profile": "laptop",
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


def three_seeds(**more):
    return pd.concat([study(seed=seed, **more).assign(seed=seed) for seed in range(3)])


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


def test_a_seed_without_all_draws_does_not_count():
    table = pd.DataFrame(
        rows("gd", 1, 1, {"a": [0.2]}, seed=0)
        + rows("gd", 1, 1, {"a": [0.0]}, seed=1, missed=1)
        + rows("gd", 1, 2, {"a": [0.5]})
    )
    assert stats.per_draw(table)["dice"].tolist() == pytest.approx([0.2, 0.5])
    cell = stats.summary(table).iloc[0]
    assert cell[["n_draws", "n_seeds", "n_runs"]].tolist() == [2, 1, 2]
    assert cell[["missed", "missed_share", "scored_rows", "hd95_mean"]].tolist() == [0, 0, 2, 6.5]
    assert cell["dice_mean"] == pytest.approx(0.35)
    assert cell["dice_sd_draws"] == pytest.approx(np.std([0.2, 0.5], ddof=1))
    assert stats.whole_seeds([(1, 0), (2, 1)]) == {(1, 0), (2, 1)}  # no seed has both draws


def test_profiles_and_units_are_never_averaged():
    table = study()
    paper = table.assign(profile="paper", dice=table["dice"] - 0.3)
    both = stats.summary(pd.concat([table, paper]))
    assert both.groupby("profile")["dice_mean"].mean()["laptop"] == pytest.approx(
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
    for function in (stats.per_subject, stats.per_draw, stats.summary, stats.contrasts):
        pd.testing.assert_frame_equal(function(shuffled), function(table), check_exact=True)


def test_better_predictions_never_lower_the_summary():
    table = study()
    better = table.assign(dice=np.minimum(1, table["dice"] + 0.01))
    columns = ["dice_mean", "dice_low", "dice_high"]
    assert (stats.summary(better)[columns] >= stats.summary(table)[columns]).all(axis=None)


def test_empty_table_gives_empty_tables():
    empty = study().iloc[:0]
    assert stats.summary(empty).columns.tolist() == stats.SUMMARY_COLUMNS
    assert stats.contrasts(empty).columns.tolist() == stats.CONTRAST_COLUMNS
    nothing = pd.DataFrame(columns=empty.columns)  # no types either
    assert len(stats.summary(nothing)) == len(stats.contrasts(nothing)) == 0


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
    np.testing.assert_allclose(stats.holm([0.02, NAN, 0.01], tests=4), [0.06, NAN, 0.04])  # two have no p yet


def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order():
    p = np.random.default_rng(0).uniform(0, 0.3, 9)
    adjusted = stats.holm(p)
    assert (adjusted >= p).all()
    assert (adjusted <= np.minimum(1, 9 * p) + 1e-15).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


# -------------------------------------------------------------------------------- patients, draws and seeds are random


def test_crossed_interval_by_hand():
    # v = 0.5 / 2 and 0.02 / 4; df = 0.255² / (0.25² / 1 + 0.005² / 3)
    low, high, p = stats.crossed_interval(0.3, [np.array([0.0, 1.0]), np.array([0.1, 0.1, 0.3, 0.3]) * 1.0])
    v = [0.5 / 2, np.var([0.1, 0.1, 0.3, 0.3], ddof=1) / 4]
    df = sum(v) ** 2 / (v[0] ** 2 / 1 + v[1] ** 2 / 3)
    half = scipy_stats.t.ppf(0.975, df) * sum(v) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half))
    assert p == pytest.approx(2 * scipy_stats.t.sf(0.3 / sum(v) ** 0.5, df))


def test_with_one_factor_it_is_the_t_interval_of_scipy():
    values = np.random.default_rng(0).normal(0.1, 0.2, 12)
    expected = scipy_stats.ttest_1samp(values, 0)
    low, high, p = stats.crossed_interval(values.mean(), [values])
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval()))
    assert p == pytest.approx(expected.pvalue)


def test_what_does_not_vary_has_no_width_and_what_has_one_level_no_interval():
    assert stats.crossed_interval(0.2, [np.array([0.2, 0.2])]) == (0.2, 0.2, 0.0)
    assert stats.crossed_interval(0.0, [np.array([0.0, 0.0])]) == (0.0, 0.0, 1.0)
    assert np.isnan(stats.crossed_interval(0.2, [])).all()


def test_the_interval_says_what_it_is_over():
    one = study(draws=(1,), labelled=(1,))
    assert set(stats.summary(one)["interval_over"]) == {"subjects"}
    assert set(stats.summary(study(labelled=(1,)))["interval_over"]) == {"subjects, draws"}
    two = pd.concat([study(labelled=(1,)), study(seed=1, labelled=(1,)).assign(seed=1)])
    assert set(stats.summary(two)["interval_over"]) == {"subjects, draws, seeds"}
    folds = [rows("gd", 1, fold, {f"{fold}{k}": [0.3 + 0.1 * fold + 0.01 * k] for k in range(4)}) for fold in (1, 2, 3)]
    nested = stats.summary(pd.DataFrame(itertools.chain(*folds))).iloc[0]  # subjects are part of their fold
    assert nested["interval_over"] == "draws"
    half = scipy_stats.t.ppf(0.975, 2) * 0.1 / 3**0.5
    assert (nested["dice_low"], nested["dice_high"]) == pytest.approx((0.515 - half, 0.515 + half))


def test_no_interval_leaves_the_scale():
    dice = {draw: {f"p{k}": [0.3 * draw + 0.01 * k] for k in range(5)} for draw in (1, 2, 3)}
    (cell,) = stats.summary(pd.DataFrame(itertools.chain(*(rows("gd", 1, *one) for one in dice.items())))).to_dict(
        "records"
    )
    assert (cell["dice_low"], cell["dice_high"]) == (0.0, 1.0)  # 0.62 ± 0.75


@pytest.mark.parametrize(
    ("subjects", "draws", "seeds", "all_labels", "expected"),
    [
        (20, 5, 3, False, ""),
        (3, 3, 3, False, ""),
        (20, 1, 3, True, ""),
        (20, 1, 3, False, "one draw"),
        (20, 2, 3, False, "two draws"),
        (20, 2, 3, True, "two draws"),  # folds
        (20, 5, 1, False, "one seed"),
        (20, 5, 2, False, "two seeds"),
        (20, 2, 1, False, "two draws, one seed"),
        (20, 1, 1, True, "one seed"),
        (1, 5, 3, False, "one subject"),
        (2, 1, 3, True, "two subjects"),
    ],
)
def test_what_an_interval_lacks(subjects, draws, seeds, all_labels, expected):
    assert stats.lacks(subjects, draws, seeds, all_labels) == expected


def test_a_cell_says_what_its_interval_lacks():
    table = three_seeds(labelled=(1,))
    fewer = table[~((table["method"] == "gd") & (table["draw"] > 1))]
    found = stats.summary(fewer).set_index("method")
    assert found["note"].to_dict() == {"gd": "one draw", "random": ""}
    assert found["interval_over"].to_dict() == {"gd": "subjects, seeds", "random": "subjects, draws, seeds"}
    assert set(stats.summary(study().assign(profile="smoke"))["note"]) == {""}
    one = table[table["draw"] == 1]  # no method has another draw: that alone does not say that there is none
    assert set(stats.summary(one)["note"]) == {"one draw"}
    assert set(stats.summary(one, all_labels={1})["note"]) == {""}


def test_no_verdict_of_one_or_two_subjects():
    for count, note in ((1, "one subject"), (2, "two subjects")):
        table = differences(np.array([0.05, 0.06])[:count])
        (row,) = stats.contrasts(table, [("gd", "random")]).to_dict("records")
        assert (row["verdict"], row["note"]) == ("not known", note)
        assert set(stats.summary(table)["note"]) == {note}


def test_a_table_that_pandas_read_has_the_same_statistics(tmp_path):
    """It reads no phase and no study as NaN, which groups leave out."""
    table = three_seeds(labelled=(1,)).assign(study="")
    table.to_csv(tmp_path / "table.csv", index=False)
    read = pd.read_csv(tmp_path / "table.csv")
    assert read[["phase", "study"]].isna().all(axis=None)
    assert len(stats.contrasts(table)) == 1
    pd.testing.assert_frame_equal(stats.contrasts(read), stats.contrasts(table))
    pd.testing.assert_frame_equal(stats.summary(read), stats.summary(table))
    pd.testing.assert_frame_equal(stats.per_draw(read), stats.per_draw(table))


def test_scores_of_two_runs_of_a_cell_are_not_averaged():
    table = study(labelled=(1,))
    twice = pd.concat([table, table.query("method == 'gd' and draw == 2").assign(run="of other settings")])
    for statistics in (stats.summary, stats.contrasts, stats.per_draw):
        with pytest.raises(ValueError, match="gd, 1 labelled, draw 2, seed 0: subject p00 has several scores"):
            statistics(twice)


def test_draws_that_differ_widen_the_interval():
    def cell(shift):
        dice = {draw: {f"p{k}": [0.5 + 0.01 * k + shift * draw] for k in range(9)} for draw in (1, 2, 3)}
        return stats.summary(pd.DataFrame(itertools.chain(*(rows("gd", 1, *one) for one in dice.items()))))

    same, unlike = cell(0.0), cell(0.1)
    width = [(s["dice_high"] - s["dice_low"]).iloc[0] for s in (same, unlike)]
    assert width[1] > 3 * width[0]


def test_smoke_has_no_intervals_and_no_tests():
    table = study().assign(profile="smoke")
    assert stats.summary(table)[["dice_low", "dice_high"]].isna().all(axis=None)
    assert stats.contrasts(table).empty
    assert stats.contrasts(table, [("gd", "random")]).empty
    assert "no intervals, tests or conclusions" in stats.why_no_tests(table)
    assert stats.why_no_tests(study()) == ""


# ---------------------------------------------------------------------------------------------------------- contrasts


def test_a_contrast_pairs_subjects_draws_and_seeds():
    table = pd.DataFrame(
        rows("random", 1, 1, {"a": [0.1], "b": [0.5]})
        + rows("random", 1, 2, {"a": [0.3], "b": [0.7]})
        + rows("gd", 1, 1, {"a": [0.2], "b": [0.8]})
        + rows("gd", 1, 2, {"a": [0.4], "b": [1.0]})
        + rows("gd", 1, 3, {"a": [0.9], "b": [0.9]})
    )  # differences 0.1, 0.3, 0.1, 0.3: draws agree
    (row,) = stats.contrasts(table, [("gd", "random")]).to_dict("records")
    assert (row["method"], row["baseline"], row["family"]) == ("gd", "random", "declared")
    assert row["difference"] == pytest.approx(0.2)
    assert (row["n_subjects"], row["n_draws"], row["n_seeds"], row["runs_left_out"]) == (2, 2, 1, 1)
    half = scipy_stats.t.ppf(0.975, 1) * (0.02 / 2) ** 0.5
    assert (row["low"], row["high"]) == pytest.approx((0.2 - half, 0.2 + half))


def test_a_false_structure_where_there_is_none_counts_in_a_contrast():
    """Eight patients with a lesion, four without: `wary` rightly finds none there, `bold` one in each of the four."""
    table = []
    for seed in range(3):
        ill = {f"p{n}": [0.8 + 0.01 * n] for n in range(8)}
        table += rows("wary", 1, 1, ill | {f"q{n}": [NAN] for n in range(4)}, seed)
        table += rows("bold", 1, 1, ill | {f"q{n}": [0.0] for n in range(3)} | {"q3": [NAN]}, seed)
    (found,) = stats.contrasts(pd.DataFrame(table), [("wary", "bold")]).itertuples()
    assert found.n_subjects == 8 + 3  # in the last both are right, and nothing can be said
    assert found.difference == pytest.approx(3 / 11)


def test_a_false_structure_counts_beside_others_too():
    """Two structures, the second absent: who finds it has 0 for it, who does not has 1."""
    wary, bold = {"p": [0.8, NAN], "q": [0.8, NAN]}, {"p": [0.8, 0.0], "q": [0.8, NAN]}
    table = pd.DataFrame(rows("wary", 1, 1, wary) + rows("bold", 1, 1, bold))
    (found,) = stats.contrasts(table, [("wary", "bold")]).itertuples()
    assert found.difference == pytest.approx((0.9 - 0.4 + 0.8 - 0.8) / 2)


def test_declared_contrasts_are_one_family_over_all_numbers_of_labels():
    table = three_seeds(gain={"random": 0, "gd": 0.2, "gr": 0.0})
    pairs = [("gd", "random"), ("gr", "random"), ("absent", "random")]
    found = stats.contrasts(table, pairs)
    assert len(found) == 4  # two numbers of labels
    assert found["p_holm"].tolist() == pytest.approx(stats.holm(found["p"].to_numpy()).tolist())
    assert found.set_index(["method", "labelled"])["verdict"].loc["gd"].tolist() == ["helps", "helps"]
    swapped = stats.contrasts(table, [("random", "gd")])
    assert swapped["verdict"].tolist() == ["harms", "harms"]
    assert swapped["difference"].tolist() == pytest.approx((-found[found["method"] == "gd"]["difference"]).tolist())
    whole = stats.contrasts(table, pairs, tests=6)  # those that have no runs count as well
    assert whole["p_holm"].tolist() == pytest.approx(stats.holm(found["p"].to_numpy(), 6).tolist())
    assert (whole["p_holm"] > found["p_holm"]).any()
    twice = stats.contrasts(pd.concat([table, table.assign(dataset="e")]), pairs)  # a family is of one study
    assert twice["p_holm"].tolist() == pytest.approx([*found["p_holm"], *found["p_holm"]])


def differences(of_subject, of_seed=(0.0, 0.0, 0.0), draws=(1, 2, 3)):
    """`gd` minus `random`: a number for each subject, and for each seed."""
    table = []
    for (draw, (seed, more)), method in itertools.product(
        itertools.product(draws, enumerate(of_seed)), ("gd", "random")
    ):
        dice = {f"p{n}": [0.5 + (method == "gd") * (gain + more)] for n, gain in enumerate(of_subject)}
        table += rows(method, 1, draw, dice, seed=seed)
    return pd.DataFrame(table)


def test_the_margin_has_a_family_of_its_own():
    table = differences(np.array([0.05, 0.06, 0.07, 0.08]))
    (row,) = stats.contrasts(table, [("gd", "random")]).to_dict("records")
    error = np.std([0.05, 0.06, 0.07, 0.08], ddof=1) / 2  # nothing else varies, df = 3
    assert row["p_margin_holm"] == pytest.approx(2 * scipy_stats.t.sf((0.065 - 0.02) / error, 3))
    assert (row["verdict"], row["note"]) == ("helps", "by more than 0.02")
    (row,) = stats.contrasts(table, [("gd", "random")], tests=10).to_dict("records")
    assert row["p_margin_holm"] == pytest.approx(20 * scipy_stats.t.sf((0.065 - 0.02) / error, 3))
    assert (row["low"] > 0.02, row["p_margin_holm"] < 0.05) == (True, False)
    assert (row["verdict"], row["note"]) == ("helps", "")  # the interval alone does not prove it beside nine others
    (row,) = stats.contrasts(table, [("random", "gd")]).to_dict("records")
    assert (row["verdict"], row["note"]) == ("harms", "by more than 0.02")
    small = differences(np.array([0.002, 0.003, 0.004, 0.005]))  # surely more than 0, and surely less than matters
    (row,) = stats.contrasts(small, [("gd", "random")]).to_dict("records")
    assert (row["p_holm"] < 0.05, row["verdict"], row["note"]) == (True, "no difference that matters", "")
    (row,) = stats.contrasts(small, [("gd", "random")], margin=0.001).to_dict("records")
    assert (row["verdict"], row["note"]) == ("helps", "by more than 0.001")


def test_no_verdict_of_few_seeds_or_of_few_draws():
    gains = np.array([0.05, 0.06, 0.07, 0.08])
    for table, note in (
        (differences(gains, of_seed=(0.0,)), "one seed"),
        (differences(gains, of_seed=(0.0, 0.0)), "two seeds"),
        (differences(gains, draws=(1, 2)), "two draws"),
    ):
        (row,) = stats.contrasts(table, [("gd", "random")]).to_dict("records")
        assert (row["p"] < 0.05, row["verdict"], row["note"]) == (True, "not known", note)
        assert np.isnan([row["p_holm"], row["p_margin_holm"]]).all()
    one = differences(gains, draws=(1,))
    (row,) = stats.contrasts(one, [("gd", "random")], all_labels=set(one["labelled"])).to_dict("records")
    assert (row["verdict"], row["note"]) == ("helps", "by more than 0.02")
    more = pd.concat([one, differences(gains).query("method == 'gd' and draw > 1").assign(method="other")])
    for table in (one, more):  # whether another method has more draws or not
        (row,) = stats.contrasts(table, [("gd", "random")]).to_dict("records")
        assert (row["verdict"], row["note"]) == ("not known", "one draw")


def test_what_has_no_verdict_helps_no_other_to_one():
    """An interval that cannot be trusted has a small p by chance: it counts in the family, and never as a finding."""
    gains = np.array([0.03, 0.06, 0.07, 0.12])
    table = differences(gains)
    (alone,) = stats.contrasts(table, [("gd", "random")]).to_dict("records")
    few = differences(gains + 0.02, draws=(1,)).query("method == 'gd'").assign(method="few")
    first, second = stats.contrasts(pd.concat([table, few]), [("gd", "random"), ("few", "random")]).to_dict("records")
    assert (second["note"], second["p"] < first["p"]) == ("one draw", True)
    assert first["p_holm"] == pytest.approx(2 * alone["p_holm"])


def test_what_was_not_declared_is_exploratory_and_gets_no_verdict():
    found = stats.contrasts(three_seeds())
    assert found["family"].tolist() == ["exploratory"] * 2
    assert found[["p_holm", "p_margin_holm"]].isna().all(axis=None)
    assert found["p"].notna().all()
    assert found[["verdict", "note"]].to_numpy().tolist() == [["", ""]] * 2


def test_an_ablated_value_is_compared_with_the_method_s_own():
    names = ["gd", "gd [t=0.5]", "pcl (transductive)", "pcl [t=1] (transductive)", "gr [t=2]", "random"]
    found = stats.contrasts(study(labelled=(1,), gain=dict.fromkeys(names, 0.0)))
    assert found[["method", "baseline"]].to_numpy().tolist() == [
        ["gd", "random"],
        ["gd [t=0.5]", "gd"],
        ["gr [t=2]", "random"],  # there is no gr
        ["pcl (transductive)", "random"],
        ["pcl [t=1] (transductive)", "pcl (transductive)"],
    ]


def test_the_protocol_declares_26_contrasts():
    plan = grid.expand(read_study("acdc"), "acdc", "laptop")
    assert results._declared(plan) == 26


@pytest.mark.parametrize(
    ("low", "high", "p_holm", "expected"),
    [
        (0.01, 0.05, 0.01, "helps"),
        (0.01, 0.05, 0.06, "not known"),  # the other tests of the family count, too
        (-0.05, -0.01, 0.01, "harms"),
        (-0.015, 0.015, 0.9, "no difference that matters"),
        (0.001, 0.015, 0.01, "no difference that matters"),
        (-0.02, 0.02, 0.9, "not known"),
        (-0.05, 0.10, 0.5, "not known"),
        (NAN, NAN, NAN, "not known"),
    ],
)
def test_verdicts(low, high, p_holm, expected):
    assert stats.verdict(low, high, p_holm) == expected


def test_a_verdict_needs_the_adjusted_p_of_its_own_question():
    assert stats.verdict(-0.015, 0.015, 0.9, 0.02, 0.06) == "not known"
    assert stats.verdict(0.001, 0.015, 0.01, 0.02, 0.06) == "not known"  # by its interval it does not matter
    assert stats.verdict(0.001, 0.025, 0.01, 0.02, 0.06) == "helps"
    assert stats.verdict(-0.015, 0.015, 0.9, 0.01) == "not known"


def test_coverage_is_what_the_committed_simulation_says():
    about = json.loads((paths.COMMITTED / "statistics" / "coverage.json").read_bytes())
    table = pd.DataFrame(about["rows"]).drop(columns=["patients x draws x seeds", "labels", "what"])
    text = stats.__doc__.replace("\n", " ")
    planned = table[table["kind"].isin(["planned", "folds of 20"])]
    assert planned["crossed interval"].between(2.5, 7).all()
    others = planned.dropna()[["crossed bootstrap", "bootstrap of patients alone"]]
    assert others.gt(planned["crossed interval"].dropna(), axis=0).loc[others.index].all(axis=None)
    assert max(about["families of 26 contrasts"].values()) <= 5 + 2 * (5 * 95 / 1000) ** 0.5  # of 1,000 studies
    assert f"of {about['found alike where nothing differs, all labels']} % of those with all labels" in text
    quoted = [line.split("|")[1:-1] for line in stats.__doc__.splitlines() if line.startswith("| ")][1:]
    kinds = dict([*table.groupby("kind")])
    assert {kind.split(":")[0].strip() for kind, *_ in quoted} == {*kinds}
    for kind, *cells in quoted:
        ends = kinds[kind.split(":")[0].strip()].drop(columns="kind").agg(["min", "max"]).T.to_numpy()
        assert [cell.strip() for cell in cells] == [f"{low} to {high}" if low == low else "" for low, high in ends]
    for number in about["families of 26 contrasts"].values():
        assert f"in {number} %" in text


def test_the_simulation_finds_what_misses():
    program = Path(__file__).with_name("interval_coverage.py")
    spec = importlib.util.spec_from_file_location("interval_coverage", program)
    interval_coverage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interval_coverage)
    studies = np.stack([np.full((4, 3, 2), 0.1), *np.random.default_rng(0).normal(size=(3, 4, 3, 2))])
    assert interval_coverage.misses(studies, interval_coverage.crossed) == 25.0  # the first does not vary, and is not 0
    random = np.random.default_rng(0)
    y = interval_coverage.scores(2000, (4, 3, 2), interval_coverage.FEW, random)
    assert y.shape == (2000, 4, 3, 2)
    assert y.var() == pytest.approx(0.1**2 + 0.08**2 + 0.02**2 + 0.03**2 + 0.05**2, rel=0.05)
    folds = interval_coverage.scores(2000, (50, 3, 2), interval_coverage.ALL, random, folds=True).mean(axis=1)
    assert folds.var() == pytest.approx(0.1**2 / 50 + 0.02**2 + 0.03**2 + 0.05**2 / 50, rel=0.05)
