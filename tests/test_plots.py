import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import rc_context
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgb
from scipy.cluster import hierarchy

from clseg import paths, plots, stats
from clseg.errors import RequestError
from clseg.study.files import read_methods

GAINS = {"random": 0.0, "gr": 0.02, "gd": 0.03, "gd+lr": 0.06}


def tidy(gains=GAINS, counts=(1, 2, 8), draws=(1, 2, 3), subjects=6, benchmark=77, seeds=(0, 1, 2)):
    """A made-up tidy table with a benchmark."""
    random, rows = np.random.default_rng(0), []
    cells = [*itertools.product(gains, counts, draws), *([("benchmark", benchmark, 1)] if benchmark else [])]
    for (method, labelled, draw), seed, subject in itertools.product(cells, seeds, range(subjects)):
        dice = 0.5 + 0.03 * labelled**0.5 + gains.get(method, 0.1) + random.normal(0, 0.03)
        place = {"study": "s", "dataset": "d", "profile": "laptop", "method": method, "labelled": labelled}
        found = {"dice": dice, "hd95": 5.0, "hd95_unit": "px", "missed": 0, "run": "r"}
        about = {"draw": draw, "seed": seed, "subject": f"p{subject}", "phase": "", "class_name": "c"}
        rows.append(place | about | found)
    return pd.DataFrame(rows)


def published(*rows):
    return pd.DataFrame(rows, columns=["method", "labelled", "dice", "tag"]).astype({"labelled": "Int64"})


def intervals(axes):
    """The bars of each line collection: [n, 3] x, low, high."""
    collections = [c for c in axes.collections if isinstance(c, LineCollection)]
    return [np.array([[s[0, 0], s[0, 1], s[1, 1]] for s in c.get_segments()]) for c in collections]


def points(axes, size):
    """The scatters of one marker size: [n, 2] each."""
    scatters = [c for c in axes.collections if isinstance(c, PathCollection) and c.get_sizes()[0] == size]
    return [np.asarray(c.get_offsets()) for c in scatters]


def means(axes):
    """The means of each line with intervals: [n, 2]."""
    return [container[0].get_xydata() for container in axes.containers]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def drawn(figure):
    """The figure after a real rendering, which is where warnings and layout errors come from."""
    figure.canvas.draw()
    return figure


# ---------------------------------------------------------------------------------------------------------- label curve


def test_label_curve_shows_every_mean_interval_and_draw():
    table = tidy()
    summary = stats.summary(table)
    figure = drawn(plots.label_curve(summary, table))
    (axes,) = figure.axes
    assert legend(figure) == ["random", "gr", "gd", "gd+lr", "benchmark (77 labelled)", "one draw"]
    bars, middles = intervals(axes), means(axes)
    draws = [scatter for scatter in points(axes, 14) if len(scatter)]  # the legend's is empty
    assert len(bars) == len(middles) == len(draws) == 4
    for method, bar, mean, draw in zip(["random", "gr", "gd", "gd+lr"], bars, middles, draws, strict=True):
        rows = summary[summary["method"] == method].sort_values("labelled")
        np.testing.assert_allclose(bar[:, 1:], rows[["dice_low", "dice_high"]])
        np.testing.assert_allclose(mean[:, 1], rows["dice_mean"])
        np.testing.assert_allclose(mean[:, 0], bar[:, 0])
        np.testing.assert_allclose(np.round(np.log2(mean[:, 0])), [0, 1, 3])  # nearest tick is its own
        expected = stats.per_draw(table)
        np.testing.assert_allclose(np.sort(draw[:, 1]), np.sort(expected[expected["method"] == method]["dice"]))


def test_budget_curve_shows_means_and_draws_of_each_number_of_labels():
    table = pd.concat(
        tidy({"random": 0.0, "weak_to_strong": 0.1}, counts=(1, 8), benchmark=0).assign(steps=steps)
        for steps in (250, 500)
    )
    figure = drawn(plots.budget_curve(table))
    assert [panel.get_title() for panel in figure.axes] == ["1 labelled", "8 labelled"]
    assert legend(figure) == ["random", "weak_to_strong"]
    for panel, count in zip(figure.axes, (1, 8), strict=True):
        for line, method in zip(panel.lines, ("random", "weak_to_strong"), strict=True):
            own = table[(table["labelled"] == count) & (table["method"] == method)]
            wanted = own.groupby("steps")["dice"].mean()
            np.testing.assert_allclose(line.get_xydata(), np.column_stack([wanted.index, wanted]))
        assert [len(draws) for draws in points(panel, 7)] == [6, 6]  # two budgets, three draws


def test_label_curve_names_axes_counts_and_n():
    figure = plots.label_curve(stats.summary(tidy()))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "8"]
    assert axes.get_xticks().tolist() == [1, 2, 8]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "labelled subjects (draws of them: 3)"
    assert figure.get_supylabel() == "Dice (mean over test subjects)"
    assert (
        figure.get_suptitle() == "study s on d, profile laptop\n95 % intervals over 6 subjects, 1 to 3 draws, 3 seeds"
    )
    assert "one draw" not in legend(figure)
    smoke = plots.label_curve(stats.summary(tidy().assign(profile="smoke")))
    assert smoke.get_suptitle() == "study s on d, profile smoke\nno intervals: 6 subjects, 1 to 3 draws, 3 seeds"
    worded = plots.label_curve(stats.summary(tidy()), title="Dice of a heart", names={"gd": "the same part", "x": "y"})
    assert worded.get_suptitle().startswith("Dice of a heart\n95 % intervals")
    of_all = plots.label_curve(stats.summary(tidy().assign(study="")))  # as `clseg table` gives them
    assert of_all.get_suptitle().startswith("all runs on d, profile laptop\n")
    assert legend(worded) == ["random", "gr", "the same part", "gd+lr", "benchmark (77 labelled)"]


@pytest.mark.parametrize("counts", [(1, 2), (4, 5, 6, 7), (3,)])
def test_bars_never_overlap(counts):
    methods = ["random", "gr", "gd-", "gd", "gr+lr", "gd+lr", "gd+ld", "lr", "pcl"]
    figure = drawn(plots.label_curve(stats.summary(tidy(dict.fromkeys(methods, 0.0), counts))))
    (axes,) = figure.axes
    pixels = np.sort(axes.transData.transform(np.concatenate(intervals(axes))[:, :2])[:, 0])
    assert len(pixels) == len(methods) * len(counts)
    assert np.diff(pixels).min() > 3  # a bar is 1.6 points wide, 2.2 px
    places = np.concatenate([bar[:, 0] for bar in intervals(axes)])
    low, high = axes.get_xlim()
    assert low < places.min() <= places.max() < high


def test_benchmark_is_a_line_across_with_its_interval():
    summary = stats.summary(tidy())
    (axes,) = plots.label_curve(summary).axes
    row = summary[summary["method"] == "benchmark"].iloc[0]
    (line,) = [line for line in axes.lines if line.get_linestyle() == "--" and set(line.get_xdata()) == {0, 1}]
    assert line.get_ydata() == pytest.approx([row["dice_mean"]] * 2)
    (band,) = axes.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((row["dice_low"], row["dice_high"]))


def test_cells_with_fewer_draws_are_hollow():
    table = tidy()
    table = table[~((table["method"] == "gd") & (table["labelled"] == 2) & (table["draw"] == 3))]
    figure = plots.label_curve(stats.summary(table))
    assert legend(figure)[-2] == "fewer runs than others"
    hollow = [line.get_xydata() for line in figure.axes[0].lines if line.get_markerfacecolor() == "white"]
    assert [len(shown) for shown in hollow] == [0, 0, 1, 0]  # random, gr, gd, gd+lr
    np.testing.assert_allclose(hollow[2][0], means(figure.axes[0])[2][1])


def bars_of(axes):
    """Whether each bar of the lines with intervals is dotted."""
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    return [[dashes is not None for _, dashes in bar.get_linestyle()] for bar in bars]


def test_intervals_of_too_few_subjects_draws_or_seeds_are_dotted():
    table = tidy({"random": 0.0, "gd": 0.1})
    whole = plots.label_curve(stats.summary(table))
    assert bars_of(whole.axes[0]) == [[False] * 3] * 2
    assert not any("dotted" in text for text in legend(whole))
    two = table[~((table["method"] == "gd") & (table["labelled"] == 2) & (table["draw"] == 3))]
    figure = plots.label_curve(stats.summary(two))
    assert bars_of(figure.axes[0]) == [[False] * 3, [False, True, False]]  # random, gd
    assert legend(figure)[-1] == "dotted: too few subjects, draws or seeds"
    for few in (table[table["seed"] == 0], table[table["subject"].isin(sorted(set(table["subject"]))[:2])]):
        assert bars_of(plots.label_curve(stats.summary(few)).axes[0]) == [[True] * 3] * 2


def test_published_numbers_stand_only_beside_cells_of_ours():
    rows = published(("gd+lr", 1, 0.725, "V2"), ("gd+lr", 4, 0.8, "V2"), ("pcl", 1, 0.9, "V"), ("gd", None, 0.5, "V2"))
    figure = drawn(plots.label_curve(stats.summary(tidy()), None, rows))
    crosses = np.concatenate(points(figure.axes[0], 30))
    assert crosses.shape == (1, 2)
    assert crosses[0, 1] == 0.725
    assert round(np.log2(crosses[0, 0])) == 0
    assert [text for text in legend(figure) if "published" in text] == ["gd+lr (× published, other protocol, V2)"]


@pytest.mark.parametrize("tag", ["U", "I", "v", ""])
def test_other_tags_are_never_drawn(tag):
    with pytest.raises(ValueError, match="V or V2 only"):
        plots.label_curve(stats.summary(tidy()), None, published(("gd", 1, 0.7, tag)))


def test_published_numbers_stand_beside_a_method_with_a_remark():
    table = tidy({"random": 0.0, "pcl (transductive)": 0.1}, (1, 2), benchmark=0)
    figure = drawn(
        plots.label_curve(stats.summary(table), None, published(("pcl", 1, 0.7, "V"), ("random", 2, 0.6, "V")))
    )
    assert [len(crosses) for crosses in points(figure.axes[0], 30)] == [1, 1]


def test_label_curve_refuses_to_mix_profiles():
    table = tidy()
    both = stats.summary(pd.concat([table, table.assign(profile="paper")]))
    with pytest.raises(ValueError, match="not 2"):
        plots.label_curve(both)


def test_of_many_methods_each_has_a_panel_with_random():
    methods = [*list(plots.STYLES)[: plots.ON_ONE_AXIS], "mine"]
    table = tidy(dict.fromkeys(methods, 0.0), (1, 2))
    rows = published(("gd+lr", 1, 0.725, "V2"), ("random", 2, 0.6, "V"))
    figure = drawn(plots.label_curve(stats.summary(table), table, rows))
    titles = [axes.get_title() for axes in figure.axes]
    of_lr = "gd+lr\n(× published, other protocol, V2)"
    assert titles == [of_lr if m == "gd+lr" else m for m in methods if m != "random"]
    assert legend(figure) == ["random (× published, other protocol, V)", "benchmark (77 labelled)", "one draw"]
    summary = stats.summary(table).set_index(["method", "labelled"])["dice_mean"]
    for axes, method in zip(figure.axes, methods[1:], strict=True):
        random, own = means(axes)
        np.testing.assert_allclose(random[:, 1], summary["random"])
        np.testing.assert_allclose(own[:, 1], summary[method])
        assert axes.get_ylim() == figure.axes[0].get_ylim()
    few = tidy(dict.fromkeys(methods[: plots.ON_ONE_AXIS], 0.0), (1,), (1,))
    assert len(plots.label_curve(stats.summary(few)).axes) == 1


def test_label_curve_of_little():
    one = stats.summary(tidy({"random": 0}, (2,), (1,), subjects=1, benchmark=0))  # no interval
    drawn(plots.label_curve(one))
    drawn(plots.label_curve(stats.summary(tidy({}))))  # the benchmark alone


# --------------------------------------------------------------------------------------------------------------- styles


CORE = ["random", "gr", "gd", "gd+lr", "pcl", "ufc", "weak_to_strong", "benchmark"]


def test_looks_are_fixed_and_tell_methods_apart():
    core = plots.looks(CORE)
    for part in range(2):  # colour, marker
        assert len({look[part] for look in core.values()}) == len(CORE)
    assert core["gd"] == plots.looks(["gd"])["gd"] == (plots.BLUE, "D", "-")
    more = [f"{arm}{name}{end}" for name in CORE[1:6] for arm in ("", "matched-") for end in ("", "+weak_to_strong")]
    own = ["mine", "yours", "gd [stages.0.temperature=0.5]", "gd [stages.0.temperature=1.0]", "e", "f", "g"]
    everything = plots.looks([*plots.STYLES, *more, *own])
    in_grey = [str(look[1:]) for look in everything.values()]
    assert len(set(in_grey)) == len(in_grey) == len({*plots.STYLES, *more, *own})
    assert {look[0] for name, look in everything.items() if name in own} == {colour for colour, _ in plots.OWN}
    warm, hot = (everything[f"gd [stages.0.temperature={value}]"] for value in (0.5, 1.0))
    assert all(one != other for one, other in zip(warm, hot, strict=True)), "colour, marker and line differ"
    assert everything["matched-gd"] == (plots.BLUE, "D", "--")
    assert everything["gd+weak_to_strong"] == (plots.BLUE, "D", "-.")
    assert everything["matched-gd+weak_to_strong"][:2] == (plots.BLUE, "D")
    assert plots.looks(["pcl (transductive)"])["pcl (transductive)"] == core["pcl"]


def test_looks_come_in_the_order_of_families():
    names = ["mine", "matched-gd+weak_to_strong", "weak_to_strong", "matched-gd", "gd", "matched-gr", "random"]
    assert [*plots.looks(names)] == [
        *("random", "matched-gr", "gd", "matched-gd", "weak_to_strong", "mine"),
        "matched-gd+weak_to_strong",
    ]


def test_every_method_of_the_project_has_a_family():
    plain = {name.removeprefix("matched-").removesuffix("+weak_to_strong") for name in read_methods()}
    assert plain <= set(plots.STYLES)


def test_families_differ_for_colour_blind_readers():
    """Smallest distance of the palette's colours, as seen without red or green cones (Vienot et al. 1999)."""
    blind = np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]])  # linear RGB, no L cones
    linear = np.array([to_rgb(colour) for colour, _ in (*plots.FAMILIES, *plots.OWN)]) ** 2.2
    seen = np.clip(linear @ blind.T, 0, 1) ** (1 / 2.2)
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(len(seen))
    assert distance.min() > 0.1


# ------------------------------------------------------------------------------------------------------------- ablation


def ablation_table():
    methods = {"gd": 0, "gd [t=0.5]": 0.05, "gd [t=0.01]": -0.05, "gd+lr": 0.1, "gd+lr [a=9]": 0.08, "random": -0.1}
    summary = stats.summary(tidy(methods, (2,), benchmark=0)).set_index("method")
    where = {
        "gd [t=0.5]": ("temperature", 0.5),
        "gd": ("temperature", 0.1),
        "gd [t=0.01]": ("temperature", 0.01),
        "gd+lr [a=9]": ("regions", 9),
        "gd+lr": ("regions", None),
    }
    rows = summary.loc[list(where)].assign(
        axis=[axis for axis, _ in where.values()],
        value=pd.Series([value for _, value in where.values()], index=list(where), dtype=object),
        base=[name in ("gd", "gd+lr") for name in where],
        method=["gd", "gd", "gd", "gd+lr", "gd+lr"],
    )
    return rows.reset_index(drop=True), summary.loc[["random"]].reset_index()


def test_ablation_has_a_panel_per_axis_with_ordered_values_and_intervals():
    table, random = ablation_table()
    figure = drawn(plots.ablation(table, random))
    temperature, regions = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["temperature", "regions"]
    assert [label.get_text() for label in temperature.get_xticklabels()] == ["0.01", "0.1", "0.5"]
    assert [label.get_text() for label in regions.get_xticklabels()] == ["9", "all"]
    rows = table[table["axis"] == "temperature"].sort_values("value")
    (bars,) = intervals(temperature)
    np.testing.assert_allclose(bars, np.column_stack([range(3), rows["dice_low"], rows["dice_high"]]))
    (ring,) = points(temperature, 110)
    np.testing.assert_allclose(ring, [[1, rows["dice_mean"].iloc[1]]])
    for axes in figure.axes:
        assert axes.lines[-1].get_ydata() == pytest.approx([random["dice_mean"].iloc[0]] * 2)
    assert legend(figure) == ["gd, 2 labelled", "gd+lr, 2 labelled", "the method unchanged", "random, 2 labelled"]


def test_ablation_tells_numbers_of_labelled_subjects_apart():
    table, _ = ablation_table()
    figure = drawn(plots.ablation(pd.concat([table, table.assign(labelled=8)])))
    assert legend(figure)[:2] == ["gd, 2 labelled", "gd, 8 labelled"]
    two, eight = intervals(figure.axes[0])
    assert (np.abs(two[:, 0] - eight[:, 0]) > 0.1).all()
    lines = [container[0].get_linestyle() for container in figure.axes[0].containers]
    assert lines == ["-", ":"]


def test_ablation_without_runs_says_so():
    table, _ = ablation_table()
    assert plots.ablation(table.iloc[:0]).texts[0].get_text() == "no finished run"


# ------------------------------------------------------------------------------------------------------------- training


def test_training_curves_have_a_panel_per_column():
    log = pd.DataFrame({"step": range(1, 101), "loss": np.linspace(2, 1, 100)})
    log["validation"] = [value / 100 if value % 10 == 0 else np.nan for value in (*range(1, 91), *range(10, 0, -1))]
    figure = drawn(plots.training_curves(log))
    loss, validation = figure.axes
    assert [loss.get_title(), validation.get_title()] == ["loss", "validation"]
    np.testing.assert_allclose(loss.lines[0].get_ydata(), log["loss"])
    assert validation.lines[0].get_xdata().tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 90, 91]
    np.testing.assert_allclose(np.asarray(validation.collections[0].get_offsets()), [[90, 0.9]])
    assert len(plots.training_curves(log[["step", "loss"]]).axes) == 1


def test_training_curves_of_one_step():
    drawn(plots.training_curves(pd.DataFrame({"step": [1], "loss": [0.5], "validation": [np.nan]})))


def test_pretraining_curves_have_a_panel_per_run():
    log = pd.concat(
        [
            pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]}).assign(stage=f"contrast gd, seed {n}")
            for n in range(5)
        ]
    )
    figure = drawn(plots.pretraining_curves(log))
    assert [axes.get_title() for axes in figure.axes] == [f"contrast gd, seed {n}" for n in range(5)]
    assert plots.pretraining_curves(log.iloc[:0]).texts[0].get_text() == "no pre-training"


# --------------------------------------------------------------------------------------------- pairs, gradients, images


def test_similarity_matrix_keeps_values_and_marks_groups():
    similarity = torch.linspace(-1, 1, 25, requires_grad=True).reshape(5, 5)
    axes, bar = drawn(plots.similarity_matrix(similarity, "title", ["a", "a", "b", "b", "b"])).axes
    np.testing.assert_allclose(axes.images[0].get_array(), similarity.detach())
    assert axes.images[0].get_clim() == (-1, 1)
    assert axes.get_xticks().tolist() == [0.5, 3]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [line.get_ydata()[0] for line in axes.lines[::2]] == [1.5]
    assert bar.get_ylabel() == "cosine similarity"


def test_pairs_matrix_tells_positive_negative_neither_and_self():
    positive = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    negative = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    figure = drawn(plots.pairs_matrix(SimpleNamespace(positive=positive, negative=negative)))
    image = figure.axes[0].images[0]
    assert image.get_array().tolist() == [[3, 2, 1], [2, 3, 0], [1, 1, 3]]
    assert legend(figure) == ["itself", "positive (33%)", "negative (50%)", "neither (17%)"]
    colours = [to_hex(image.cmap(image.norm(kind))) for kind in range(4)]
    patches = [to_hex(patch.get_facecolor()) for patch in figure.legends[0].get_patches()]
    assert colours == patches[::-1]


def test_gradient_picture_points_downhill_from_the_circle():
    embedding = torch.tensor([[2.0, 0.0], [0.0, 0.5]], requires_grad=True)
    gradient = torch.tensor([[0.0, 3.0], [1.5, 0.0]])
    figure = drawn(plots.gradient_picture(embedding, gradient, ["a", "b"]))
    axes = figure.axes[0]
    arrows = axes.collections[-1]
    np.testing.assert_allclose(np.concatenate(points(axes, 36)), [[1, 0], [0, 1]])
    shown = [to_hex(c.get_facecolor()[0]) for c in axes.collections[:2]]
    assert shown == [to_hex(colour) for colour in arrows.get_facecolor()] == [plots.BLUE.lower(), plots.RED.lower()]
    np.testing.assert_allclose(np.column_stack([arrows.U, arrows.V]), [[0, -0.5], [-0.25, 0]], atol=1e-12)
    assert legend(figure) == ["a", "b"]
    drawn(plots.gradient_picture(embedding, 0 * gradient))
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        plots.gradient_picture(torch.ones(2, 3), torch.ones(2, 3))


def test_volume_grid_outlines_every_class_in_every_tile():
    images, labels = np.random.default_rng(0).normal(size=(5, 12, 16)), np.zeros((5, 12, 16), int)
    labels[0, 3:6, 3:6], labels[0, 8:11, 8:11], labels[1] = 1, 2, 1
    titles = [f"slice {n}" for n in range(5)]
    figure = drawn(plots.volume_grid(images, labels, "volume", titles, {1: "ventricle", 2: "atrium"}))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == titles
    assert legend(figure) == ["ventricle", "atrium"]
    low, high = np.percentile(images, [0.5, 99.5])
    picture, down, across, first = axes.images[0].get_array(), 12 + 3, 16 + 1, (3, 1)  # three tiles in a row, two rows
    assert picture.shape == (2 * down + 1, 3 * across + 1)
    for n in range(5):
        y, x = first[0] + n // 3 * down, first[1] + n % 3 * across
        np.testing.assert_allclose(picture[y : y + 12, x : x + 16], ((images[n] - low) / (high - low)).clip(0, 1))
    assert (picture[:, 0] == 1).all()
    assert (picture[:3] == 1).all()
    ventricle, atrium = axes.collections
    assert [to_hex(c.get_edgecolor()[0]) for c in (ventricle, atrium)] == [c.lower() for c in plots.STRUCTURES[1:3]]
    outlines = [outline for path in ventricle.get_paths() for outline in path.to_polygons()]
    bounds = sorted([*outline.min(axis=0), *outline.max(axis=0)] for outline in outlines)  # of a filled slice, too
    assert bounds == [pytest.approx([3.5, 5.5, 6.5, 8.5]), pytest.approx([17.5, 2.5, 33.5, 14.5])]
    assert not drawn(plots.volume_grid(torch.from_numpy(images))).legends
    photographs = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 9))
    (axes,) = drawn(plots.volume_grid(photographs)).axes
    low, high = np.percentile(photographs, [0.5, 99.5])
    colours = ((photographs[1].transpose(1, 2, 0) - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(axes.images[0].get_array()[1:9, 11:20], colours)


# --------------------------------------------------------------------- thresholds, ranks, embeddings and clusters


def test_threshold_curve_shows_dice_over_the_share_of_positives():
    dice = pd.DataFrame({"dice_mean": [0.7, 0.6], "dice_low": [0.65, 0.6], "dice_high": [0.8, 0.61]})
    table = dice.assign(value=[0.35, 0.1], share=[0.6, 0.2])
    above, below = drawn(plots.threshold_curve(table)).axes
    np.testing.assert_allclose(intervals(above)[0], [[0.1, 0.6, 0.61], [0.35, 0.65, 0.8]])
    np.testing.assert_allclose(means(above)[0], [[0.1, 0.6], [0.35, 0.7]])
    np.testing.assert_allclose(below.lines[0].get_xydata(), [[0.1, 0.2], [0.35, 0.6]])
    assert above.get_xlim() == below.get_xlim()


def test_a_contrast_is_a_line_with_its_interval_and_verdict():
    found = stats.contrasts(tidy({"random": 0.0, "gd": 0.2, "gr": 0.0}), [("gd", "random"), ("gr", "random")])
    figure = drawn(plots.forest(found))
    assert [axes.get_title("left") for axes in figure.axes] == ["1 labelled", "2 labelled", "8 labelled"]
    assert figure.get_suptitle() == "95 % intervals over 6 subjects, 3 draws, 3 seeds"
    for axes, (_, own) in zip(figure.axes, found.groupby("labelled"), strict=True):
        assert [label.get_text() for label in axes.get_yticklabels()] == ["gd − random", "gr − random"]
        assert axes.yaxis.get_inverted()
        for place, row in enumerate(own.itertuples()):
            bar, mean = axes.lines[1 + 2 * place : 3 + 2 * place]
            assert bar.get_xdata().tolist() == [row.low, row.high]
            assert mean.get_xydata().tolist() == [[row.difference, place]]
            assert (mean.get_markerfacecolor() == "white") == (row.verdict == "not known")
        assert [text.get_text() for text in axes.texts] == ["helps (by more than 0.02)", "not known"]
        assert axes.patches[0].get_x() == -0.02
        assert axes.patches[0].get_width() == pytest.approx(0.04)
    assert "no contrast" in drawn(plots.forest(found.iloc[:0])).texts[0].get_text()


def test_a_contrast_of_one_seed_is_dotted():
    found = stats.contrasts(tidy({"random": 0.0, "gd": 0.2}, (1,), seeds=(0,)), [("gd", "random")])
    (axes,) = drawn(plots.forest(found)).axes
    assert axes.lines[1].is_dashed()
    assert [text.get_text() for text in axes.texts] == ["not known (one seed)"]


def test_embedding_has_a_column_per_method_and_a_row_per_colouring():
    random = np.random.default_rng(0)
    clouds = {"random": random.normal(size=(30, 2)), "pcl": torch.from_numpy(random.normal(size=(30, 2)))}
    position, subject = np.linspace(0, 1, 30), np.array([f"p{n % 3}" for n in range(30)])
    figure = drawn(plots.embedding(clouds, {"position": position, "subject": subject}))
    *panels, bar = figure.axes
    assert [axes.get_title() for axes in panels] == ["random", "pcl", "", ""]
    assert [axes.get_ylabel() for axes in panels] == ["position", "", "subject", ""]
    np.testing.assert_allclose(points(panels[1], 9)[0], clouds["pcl"])
    np.testing.assert_allclose(panels[0].collections[0].get_array(), position)
    assert [len(cloud) for cloud in points(panels[2], 9)] == [10, 10, 10]
    np.testing.assert_allclose(points(panels[2], 9)[1], clouds["random"][1::3])
    assert [text.get_text() for text in panels[3].get_legend().get_texts()] == ["p0", "p1", "p2"]
    assert bar.get_ylim() == (0, 1)
    many = drawn(plots.embedding({"pcl": clouds["pcl"]}, {"subject": np.arange(30)})).axes[0]
    looks = {(to_hex(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in many.collections}
    assert (len(looks), many.get_legend()) == (30, None)  # none looks like another


def test_dendrogram_is_cut_where_it_says():
    centres = np.repeat([[0.0, 0.0], [10.0, 0.0], [0.0, 30.0]], 50, axis=0)
    linkage = hierarchy.linkage(centres + np.random.default_rng(0).normal(0, 0.1, centres.shape), "ward")
    (axes,) = drawn(plots.dendrogram(linkage, 20.0)).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cut at 20: 3 clusters"]
    assert axes.lines[-1].get_ydata() == [20.0, 20.0]
    leaves = [label.get_text() for label in axes.get_xticklabels()]
    assert len(leaves) == 40
    assert sum(int(leaf.strip("()")) if "(" in leaf else 1 for leaf in leaves) == 150
    colours = {to_hex(colour) for links in axes.collections for colour in links.get_edgecolor()}
    assert colours == {plots.BLUE.lower(), plots.ORANGE.lower(), plots.GREY.lower()}  # in turn, and grey above the cut


# ------------------------------------------------------------------------------------------------- figures as such


def test_figures_show_themselves_small_without_pyplot():
    """In a fresh interpreter: no pyplot is imported, so no state is shared; the same table gives the same bytes."""
    code = """
import sys, pandas as pd
from clseg import plots
log = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0]})
first, second = (plots.training_curves(log)._repr_png_() for _ in range(2))
assert first == second and first.startswith(b"\\x89PNG") and len(first) < 60_000
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=paths.PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_figures_of_a_study_are_small():
    table = tidy()
    assert len(plots.label_curve(stats.summary(table), table)._repr_png_()) < 100_000


# ---------------------------------------------------------------------------------------------------- published numbers


def write(path, *rows):
    pd.DataFrame(rows, columns=plots.PUBLISHED_COLUMNS).to_csv(path, index=False)
    return path


ROW = ["Paper", "one two", "acdc", "gd", 1, "dice", 0.7, "V", "note"]


def test_published_rows_are_chosen_by_data_set_and_study(tmp_path):
    other = [["Paper", "three", *ROW[2:]], [*ROW[:2], "mmwhs", *ROW[3:]], [*ROW[:5], "hd95", *ROW[6:]]]
    path = write(tmp_path / "p.csv", ROW, *other, [*ROW[:4], None, *ROW[5:]])
    found = plots.published_for("acdc", "two", path)
    assert found.columns.tolist() == ["method", "labelled", "dice", "tag", "source", "note"]
    assert found["dice"].tolist() == [0.7, 0.7]
    assert found["labelled"].tolist() == [1, pd.NA]
    assert plots.published_for("acdc", "tw", path).empty


@pytest.mark.parametrize("tag", ["U", "I", "", "v2", "NA"])
def test_published_refuses_other_tags_wherever_they_are(tmp_path, tag):
    path = write(tmp_path / "p.csv", ROW, ["Paper", "three", "else", *ROW[3:7], tag, ""])
    with pytest.raises(RequestError, match=r"p\.csv, line 3: tag") as error:
        plots.published_for("acdc", "one", path)
    assert repr(tag) in str(error.value)


def test_published_file_that_is_none(tmp_path):
    with pytest.raises(RequestError, match=r"absent\.csv"):
        plots.published_for("acdc", "one", tmp_path / "absent.csv")
    (tmp_path / "p.csv").write_text("source,study\na,b\n", encoding="utf-8")
    with pytest.raises(RequestError, match=r"p\.csv: .* not found: .*'dataset'"):
        plots.published_for("acdc", "one", tmp_path / "p.csv")
    with pytest.raises(RequestError, match=r"p\.csv: cannot be read"):
        plots.published_for("acdc", "one", write(tmp_path / "p.csv", [*ROW[:6], "high", *ROW[7:]]))


def test_the_published_numbers_of_the_project():
    strategies = plots.published_for("acdc", "glcl_strategies").set_index(["method", "labelled"])["dice"]
    assert strategies.to_dict() == {("gr", 8): 0.847, ("gd+lr", 1): 0.725, ("gd+lr", 2): 0.789, ("gd+lr", 8): 0.872}
    comparison = plots.published_for("acdc", "glcl_comparison")
    assert set(comparison["tag"]) == {"V", "V2"}
    assert comparison["dice"].between(0.5, 1).all()
    assert not plots.published_for("mmwhs_ct", "glcl_comparison").empty
    assert plots.published_for("mmwhs_mr", "glcl_comparison")["labelled"].isna().all()
    user = plots.published_for("acdc", "pcl_semi").dropna(subset="labelled")
    assert user[["method", "labelled", "dice", "tag"]].to_numpy().tolist() == [
        ["random", 6, 0.7883, "V"],
        ["pcl", 6, 0.8421, "V"],
        ["pcl", 6, 0.7858, "V"],
    ]
    assert plots.published_for("isic2018", "ufc_skin")["dice"].between(0.85, 0.91).all()
    everything = pd.read_csv(paths.PARAMS / "published.csv")
    assert set(everything["dataset"]) <= {path.stem for path in paths.PARAMS.glob("datasets/*.yaml")}
    assert set(everything["study"].str.split().sum()) <= {path.stem for path in paths.PARAMS.glob("studies/*.yaml")}
    of_others = {"gcl", "macl", "unimatch", "crossmatch", "bcp"}
    assert set(everything["method"]) - of_others <= set(plots.STYLES)
    assert not everything.duplicated(["source", "dataset", "method", "labelled", "value"]).any()


def test_what_a_user_s_matplotlibrc_says_changes_no_figure():
    """LaTeX, which may not be there, above all."""
    picture = torch.eye(4)[None]
    with rc_context({"text.usetex": True, "figure.autolayout": True, "savefig.dpi": 30, "font.size": 40}):
        theirs = plots.volume_grid(picture, picture.long(), "title")._repr_png_()
    assert theirs == plots.volume_grid(picture, picture.long(), "title")._repr_png_()
