"""Every figure of the study: functions of tables and arrays that return a matplotlib figure.

Nothing goes through `pyplot`: no figure stays open, and none depends on what was drawn before. A figure that is the
last value of a notebook cell shows itself. A method has the same colour, marker and line in every figure: the colour is
that of its family (Okabe and Ito's palette, which colour-blind readers can tell apart), the marker its own in it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch
from matplotlib.ticker import MaxNLocator, NullLocator

from clseg import paths, stats
from clseg.config import RequestError

if TYPE_CHECKING:
    from clseg.pairs import Pairs

GREY, ORANGE, SKY, GREEN, YELLOW = "#767676", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK, BLACK = "#0072B2", "#D55E00", "#CC79A7", "#000000"
FAMILIES = {
    GREY: ["random"],
    BLUE: ["gd", "gr", "gd-"],
    RED: ["gd+lr", "gr+lr", "gd+ld", "lr"],
    GREEN: ["pcl", "pcl-partition"],
    PINK: ["ufc"],
    SKY: ["rotation", "inpainting", "context_restoration", "pirl"],
    ORANGE: ["mixup", "self_training", "adversarial", "gan_augmentation", "mean_teacher"],
    BLACK: ["benchmark", "gd+lr+mixup", "gd+lr+self_training", "pcl+lr", "ufc+lr"],
}
STYLES = {  # method -> colour, marker, line
    method: (colour, "osD^v"[place], ["-", "--", ":", "-.", (0, (1, 3))][place])
    for colour, methods in FAMILIES.items()
    for place, method in enumerate(methods)
}
UNKNOWN = (YELLOW, "P", "-")  # a method of one's own
STRUCTURES = [ORANGE, SKY, PINK, YELLOW, GREEN, RED, BLUE]  # contours of class 1, 2, ... on grey
TAGS = ("V", "V2")  # read in the source; read where another work quotes it. Nothing else is ever printed or drawn
PUBLISHED_COLUMNS = ["source", "study", "dataset", "method", "labelled", "metric", "value", "tag", "note"]
SMALL = 8  # points


class Figure(MatplotlibFigure):
    """A matplotlib figure that shows itself in a notebook without `pyplot`."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.draw_without_rendering()  # with axes of fixed aspect the layout needs two passes
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def _grid(panels: int, columns: int, width: float, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    """A figure of `panels` axes in rows of at most `columns`, `width` x `height` inches each."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = _figure(max(4.5, columns * width + 0.4), rows * height + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel().tolist()
    for axis in axes[panels:]:
        axis.remove()
    return figure, axes[:panels]


def _nothing(text: str) -> Figure:
    figure = _figure(4.5, 1)
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def _tidy(axes: Axes, grid: bool = True) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)
    if grid:
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
        axes.set_axisbelow(True)


def _array(values: Any) -> np.ndarray:
    """A tensor of any device, with or without gradient, or anything like an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def style(method: str) -> tuple[str, str, Any]:
    """Colour, marker and line of a method; an ablated value does not change them."""
    return STYLES.get(method.partition(" [")[0], UNKNOWN)


def _known_order(methods: Sequence[str]) -> list[str]:
    """Methods in the order of `FAMILIES`, others after them by name."""
    place = {method: number for number, method in enumerate(STYLES)}
    return sorted(set(methods), key=lambda method: (place.get(method.partition(" [")[0], len(place)), method))


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"


# --------------------------------------------------------------------------------------------------- published numbers


def published_for(dataset: str, study: str, path: Path = paths.PARAMS / "published.csv") -> pd.DataFrame:
    """Published Dice of a data set that may be shown beside a study: method, labelled, dice, tag, source, note.

    `labelled` is <NA> where the source does not say how many subjects a printed percentage stands for. The file's
    `study` may name several studies, separated by blanks.
    Raises `RequestError` for a file that is not such a table, and for any tag other than V and V2 anywhere in it.
    """
    try:
        table = pd.read_csv(
            path, dtype={"labelled": "Int64", "value": float}, keep_default_na=False, na_values={"labelled": ""}
        )
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(f"{path}: cannot be read as a table of published numbers: {reason}") from None
    if missing := [column for column in PUBLISHED_COLUMNS if column not in table.columns]:
        raise RequestError(f"{path}: column {missing[0]!r} is missing; the columns are {', '.join(PUBLISHED_COLUMNS)}")
    for line, tag in enumerate(table["tag"], start=2):
        if tag not in TAGS:
            raise RequestError(f"{path}, line {line}: tag {tag!r} is not printed, only V and V2 are; remove the row")
    beside = table["study"].str.split().map(lambda names: study in names)
    chosen = table[beside & (table["dataset"] == dataset) & (table["metric"] == "dice")]
    columns = ["method", "labelled", "dice", "tag", "source", "note"]
    return chosen.rename(columns={"value": "dice"})[columns].reset_index(drop=True)


# ------------------------------------------------------------------------------------------------------------- results


def _interval(axes: Axes, x: Any, rows: pd.DataFrame, method: str) -> None:
    """Means with their intervals; hollow where draws are missing that other methods have."""
    colour, marker, dashes = style(method)
    axes.vlines(x, rows["dice_low"], rows["dice_high"], color=colour, linewidth=1.6, zorder=3)
    axes.plot(x, rows["dice_mean"], color=colour, linestyle=dashes, linewidth=1.2, alpha=0.7, zorder=2)
    faces = ["white" if missing else colour for missing in rows["runs_missing"] > 0]
    axes.scatter(x, rows["dice_mean"], c=faces, edgecolors=colour, marker=marker, s=34, linewidths=1.4, zorder=4)


def _handle(method: str, label: str) -> Line2D:
    colour, marker, dashes = style(method)
    return Line2D([], [], color=colour, marker=marker, linestyle=dashes, markersize=5.5, label=label)


def label_curve(
    summary: pd.DataFrame, table: pd.DataFrame | None = None, published: pd.DataFrame | None = None
) -> Figure:
    """Dice against the number of labelled subjects: one line per method, with 95 % intervals over test subjects.

    `summary` is that of `stats.summary` for one study, data set and profile. With the tidy `table`, every draw of
    labelled subjects is a small point. `benchmark` is a dashed line across, with its interval as a band. `published`
    (`published_for`) adds a cross wherever a published number stands beside a cell of ours. Markers are hollow where
    draws are missing that other methods have. Bars stand side by side: only the ticks are numbers of subjects.
    Raises `ValueError` for several studies, data sets or profiles, and for a published tag other than V and V2.
    """
    place = summary[["study", "dataset", "profile"]].drop_duplicates()
    if len(place) != 1:
        raise ValueError(f"a label curve shows one study, data set and profile, not {len(place)}")
    if published is not None:
        if not published["tag"].isin(TAGS).all():
            raise ValueError("published numbers are drawn with tag V or V2 only")
        published = published.dropna(subset=["labelled"]).astype({"labelled": int})
    curves, ceiling = summary[summary["method"] != "benchmark"], summary[summary["method"] == "benchmark"]
    methods, counts = _known_order(curves["method"]), sorted(curves["labelled"].unique())
    gap = min(np.diff(np.log2(counts)), default=1.0)
    step = min(0.12, 0.75 * gap / max(1, len(methods)))  # in doublings: bars of neighbouring counts never meet
    draws = None if table is None else stats.per_draw(table)

    figure = _figure(7, 4)
    axes = figure.subplots()
    handles = []
    for number, method in enumerate(methods):
        shift = 2.0 ** (step * (number - (len(methods) - 1) / 2))
        rows = curves[curves["method"] == method].sort_values("labelled")
        _interval(axes, rows["labelled"] * shift, rows, method)
        handles.append(_handle(method, method))
        if draws is not None:
            own = draws[draws["method"] == method]
            x = own["labelled"] * shift * 2.0 ** (-0.35 * step)
            axes.scatter(x, own["dice"], s=7, color=style(method)[0], alpha=0.55, linewidths=0, zorder=2)
        if published is not None:
            beside = published[(published["method"] == method) & published["labelled"].isin(rows["labelled"])]
            x = beside["labelled"] * shift * 2.0 ** (0.4 * step)
            axes.scatter(x, beside["dice"], marker="x", s=30, color=style(method)[0], linewidths=1.4, zorder=5)
            if len(beside):
                tags = ", ".join(sorted(beside["tag"].unique()))
                handles[-1].set_label(f"{method} (× published, {tags})")
    for row in ceiling.itertuples():
        axes.axhspan(row.dice_low, row.dice_high, color=BLACK, alpha=0.08, linewidth=0)
        axes.axhline(row.dice_mean, color=BLACK, linestyle="--", linewidth=1.2)
        handles.append(Line2D([], [], color=BLACK, linestyle="--", label=f"benchmark ({row.labelled} labelled)"))
    if draws is not None:
        handles.append(Line2D([], [], color=GREY, marker=".", linestyle="none", markersize=4, label="one draw"))
    if (curves["runs_missing"] > 0).any():
        hollow = {"color": GREY, "marker": "o", "markerfacecolor": "white", "linestyle": "none", "markersize": 5.5}
        handles.append(Line2D([], [], **hollow, label="fewer draws than others"))

    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    if counts:
        axes.set_xlim(counts[0] * 2.0 ** (-0.6 * gap), counts[-1] * 2.0 ** (0.6 * gap))
        axes.set_xlabel(f"labelled subjects (draws of them: {_range(curves['n_draws'])})", fontsize=9)
    axes.set_ylabel("Dice (mean over test subjects)", fontsize=9)
    study, dataset, profile = place.iloc[0]
    about = f"{study}, {dataset}, profile {profile}"
    axes.set_title(f"{about}\n95 % intervals over n = {_range(summary['n_subjects'])} test subjects", fontsize=9)
    _tidy(axes)
    figure.legend(handles=handles, loc="outside right upper", fontsize=SMALL, frameon=False)
    return figure


def ablation(axes_table: pd.DataFrame, reference: pd.DataFrame | None = None) -> Figure:
    """One panel per axis of an ablation: Dice for each value, with 95 % intervals over test subjects.

    `axes_table` has the columns of `stats.summary` and axis (title), value, base (True for the method's own value,
    which is ringed and bold); `reference`, rows of the same summary, are dashed lines across.
    """
    if axes_table.empty:
        return _nothing("no finished run")
    titles = list(dict.fromkeys(axes_table["axis"]))
    figure, panels = _grid(len(titles), 4, 1.9, 2.1, sharey=True)
    several = axes_table["labelled"].nunique() > 1
    ring = {"marker": "o", "facecolors": "none", "edgecolors": BLACK, "linewidths": 1, "zorder": 5}
    handles: dict[str, Line2D] = {}
    lines: dict[str, Line2D] = {}
    for panel, title in zip(panels, titles, strict=True):
        rows = axes_table[axes_table["axis"] == title]
        numbers = pd.to_numeric(rows["value"], errors="coerce")  # "all" and other words after the numbers
        ordered = rows.assign(
            text=[_value_text(v) for v in rows["value"]], number=numbers, base=rows["base"].astype(bool)
        )
        ordered = ordered.sort_values(["number", "text"])
        ticks = {text: place for place, text in enumerate(dict.fromkeys(ordered["text"]))}
        series = list(ordered.groupby(["method", "labelled"]))
        for number, ((method, labelled), own) in enumerate(series):
            x = own["text"].map(ticks) + 0.14 * (number - (len(series) - 1) / 2)
            _interval(panel, x, own, method)
            panel.scatter(x[own["base"]], own["dice_mean"][own["base"]], s=110, **ring)
            label = f"{method}, {labelled} labelled" if several else method
            handles.setdefault(label, _handle(method, label))
        for row in () if reference is None else reference.itertuples():
            colour = style(row.method)[0]
            panel.axhline(row.dice_mean, color=colour, linestyle="--", linewidth=1.2)
            label = f"{row.method}, {row.labelled} labelled" if several or row.method == "benchmark" else row.method
            lines.setdefault(label, Line2D([], [], color=colour, linestyle="--", label=label))
        panel.set_xticks(range(len(ticks)), list(ticks))
        for text, tick in zip(ticks, panel.get_xticklabels(), strict=True):
            tick.set_fontweight("bold" if ordered["base"][ordered["text"] == text].any() else "normal")
        panel.set_xlim(-0.6, len(ticks) - 0.4)
        panel.set_title(title, fontsize=9)
        _tidy(panel)
    ringed = {"color": BLACK, "marker": "o", "markerfacecolor": "none", "linestyle": "none", "markersize": 9}
    shown = [*handles.values(), Line2D([], [], **ringed, label="the method's own value"), *lines.values()]
    figure.supylabel("Dice (mean over test subjects)", fontsize=9)
    counts = "" if several else f"{_range(axes_table['labelled'])} labelled, "
    about = f"{counts}draws: {_range(axes_table['n_draws'])}, n = {_range(axes_table['n_subjects'])} test subjects"
    figure.suptitle(f"{axes_table['dataset'].iloc[0]}, {about}, 95 % intervals over them", fontsize=9)
    figure.legend(handles=shown, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    return figure


def _value_text(value: Any) -> str:
    if value is None or value != value:  # None, or the NaN it became in a table
        return "all"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ------------------------------------------------------------------------------------------------------------ training


def _curve(axes: Axes, steps: pd.Series, values: pd.Series, colour: str) -> None:
    """Every value, faint, under a running median over a fortieth of the curve."""
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(steps, values.rolling(max(1, len(values) // 40), center=True, min_periods=1).median(), color=colour)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    _tidy(axes)


def training_curves(log: pd.DataFrame) -> Figure:
    """The log of one run, a panel for each column but `step`; of values measured now and then the best is ringed."""
    columns = [column for column in log.columns if column != "step"]
    figure, panels = _grid(len(columns), 3, 3.2, 2.4)
    for panel, column in zip(panels, columns, strict=True):
        measured = log[["step", column]].dropna()
        if len(measured) == len(log):
            _curve(panel, measured["step"], measured[column], BLUE)
        else:
            panel.plot(measured["step"], measured[column], color=GREEN, marker="o", markersize=3, linewidth=1)
            best = measured.loc[[measured[column].idxmax()]] if len(measured) else measured
            panel.scatter(best["step"], best[column], s=90, facecolors="none", edgecolors=BLACK, zorder=3)
            _tidy(panel)
        panel.set_title(column, fontsize=9)
        panel.set_xlabel("step", fontsize=SMALL)
    return figure


def pretraining_curves(log: pd.DataFrame) -> Figure:
    """The loss of every pre-training (columns step, loss, run), a panel each: their losses have scales of their own."""
    if log.empty:
        return _nothing("no pre-training")
    runs = list(dict.fromkeys(log["run"]))
    figure, panels = _grid(len(runs), 4, 2.1, 1.8)
    for panel, run in zip(panels, runs, strict=True):
        own = log[log["run"] == run]
        _curve(panel, own["step"], own["loss"], BLUE)
        panel.set_title(run.removeprefix("pretrain-"), fontsize=7)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("loss", fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------- pairs and gradients


def _group_ticks(axes: Axes, groups: Sequence[Any], lines: str) -> None:
    """Lines between, and names at, the runs of equal neighbours in `groups`."""
    names = [str(group) for group in _array(groups)]
    starts = [place for place in range(len(names)) if place == 0 or names[place] != names[place - 1]]
    middles = [(start + end - 1) / 2 for start, end in zip(starts, [*starts[1:], len(names)], strict=True)]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color=lines, linewidth=0.8)
        axes.axvline(start - 0.5, color=lines, linewidth=0.8)
    axes.set_xticks(middles, [names[start] for start in starts])
    axes.set_yticks(middles, [names[start] for start in starts])


def similarity_matrix(similarity: Any, title: str = "", groups: Sequence[Any] | None = None) -> Figure:
    """Cosine similarities [B, B] as colours from -1 (blue) to 1 (red); `groups` [B] names runs of neighbouring rows."""
    figure = _figure(4.8, 4)
    axes = figure.subplots()
    image = axes.imshow(_array(similarity), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    if groups is not None:
        _group_ticks(axes, groups, BLACK)
    axes.tick_params(labelsize=SMALL)
    axes.set_title(title, fontsize=10)
    bar = figure.colorbar(image, ax=axes, shrink=0.85)
    bar.set_label("cosine similarity", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def pairs_matrix(pairs: Pairs, title: str = "", groups: Sequence[Any] | None = None) -> Figure:
    """Who is alike in a batch: row i is anchor i, with its positives, negatives, what is neither, and their shares."""
    positive, negative = _array(pairs.positive), _array(pairs.negative)  # bool [B, B]
    kind = np.where(positive, 2, np.where(negative, 1, 0))
    np.fill_diagonal(kind, 3)
    colours = {"neither": "#E4E4E4", "negative": ORANGE, "positive": BLUE, "itself": BLACK}
    figure = _figure(5.4, 4)
    axes = figure.subplots()
    axes.imshow(kind, cmap=ListedColormap(list(colours.values())), vmin=-0.5, vmax=3.5, interpolation="nearest")
    if groups is not None:
        _group_ticks(axes, groups, "white")
    axes.tick_params(labelsize=SMALL)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("row of the batch")
    axes.set_ylabel("anchor")
    others = max(1, kind.size - len(kind))
    handles = [
        Patch(color=colour, label=name if name == "itself" else f"{name} ({np.sum(kind == number) / others:.0%})")
        for number, (name, colour) in enumerate(colours.items())
    ]
    figure.legend(handles=handles[::-1], loc="outside right upper", fontsize=SMALL, frameon=False)
    return figure


def gradient_picture(embedding: Any, gradient: Any, groups: Sequence[Any] | None = None, title: str = "") -> Figure:
    """Where a loss pulls embeddings of two dimensions: normalised points [B, 2] on the unit circle, an arrow each.

    An arrow is the negative `gradient` [B, 2] (the way of steepest descent); the longest has length 0.5 and the others
    are in proportion. Rows of one group share a colour. Raises `ValueError` for other shapes.
    """
    points, pull = _array(embedding).astype(float), -_array(gradient).astype(float)
    if points.ndim != 2 or points.shape[1] != 2 or pull.shape != points.shape:
        raise ValueError(f"embedding and gradient must both be [B, 2]: {points.shape}, {pull.shape}")
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    pull = 0.5 * pull / max(np.linalg.norm(pull, axis=1).max(), 1e-12)
    names = [""] * len(points) if groups is None else [str(group) for group in _array(groups)]
    palette = [BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY, BLACK]
    colours = {name: palette[number % len(palette)] for number, name in enumerate(dict.fromkeys(names))}
    of_row = [colours[name] for name in names]

    figure = _figure(5, 4)
    axes = figure.subplots()
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=GREY, linewidth=0.8))
    axes.scatter(*points.T, c=of_row, s=36, zorder=3)
    axes.quiver(*points.T, *pull.T, color=of_row, angles="xy", scale_units="xy", scale=1, width=0.008, zorder=2)
    axes.set(xlim=(-1.55, 1.55), ylim=(-1.55, 1.55), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    if groups is not None:
        handles = [Line2D([], [], color=c, marker="o", linestyle="none", label=name) for name, c in colours.items()]
        figure.legend(handles=handles, loc="outside right upper", fontsize=SMALL, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------------------- images


def volume_grid(
    images: Any,
    labels: Any | None = None,
    title: str = "",
    titles: Sequence[str] | None = None,
    class_names: Mapping[int, str] | None = None,
) -> Figure:
    """Slices [N, H, W] in reading order on one grey scale, with the outlines of the classes in `labels` [N, H, W].

    `titles` are those of the slices; `class_names` {class index: name} are the legend's.
    """
    images = _array(images).astype(float)
    labels = None if labels is None else _array(labels)
    low, high = np.percentile(images, [0.5, 99.5])
    height = 1.35 * images.shape[1] / images.shape[2] + (0.2 if titles is not None else 0)
    figure, panels = _grid(len(images), min(6, max(3, int(np.ceil(np.sqrt(len(images)))))), 1.35, height)
    for number, panel in enumerate(panels):
        panel.imshow(images[number], cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        panel.set_axis_off()
        if titles is not None:
            panel.set_title(titles[number], fontsize=SMALL)
        present = [] if labels is None else [index for index in np.unique(labels[number]) if index > 0]
        for index in present:
            mask = np.pad(labels[number] == index, 1)  # [H + 2, W + 2]: outlines close at the border
            rows, columns = (np.arange(-1, size - 1) for size in mask.shape)
            colour = STRUCTURES[(index - 1) % len(STRUCTURES)]
            panel.contour(columns, rows, mask, levels=[0.5], colors=colour, linewidths=1)
    figure.suptitle(title, fontsize=10)
    if class_names is not None:
        handles = [
            Line2D([], [], color=STRUCTURES[(index - 1) % len(STRUCTURES)], label=name)
            for index, name in class_names.items()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL, frameon=False)
    return figure
