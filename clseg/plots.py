"""Every figure of the study: functions of tables and arrays that return a matplotlib figure, which shows itself.

Nothing goes through `pyplot`: no figure stays open, and none depends on what was drawn before. A method looks the same
in every figure (`looks`): its colour and marker are those of its family (Okabe and Ito's colours, which colour-blind
readers can tell apart), its line is its own, so that grey print tells all of them apart, too.
"""

import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.container import Container
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Patch, Rectangle
from matplotlib.style import context as style_context
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from scipy.cluster import hierarchy

from clseg import paths, stats
from clseg.errors import RequestError

GREY, ORANGE, SKY, GREEN, YELLOW = "#767676", "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK, BLACK, INDIGO = "#0072B2", "#D55E00", "#CC79A7", "#000000", "#332288"
FAMILIES = {  # colour, marker: methods
    (GREY, "o"): ["random"],
    (INDIGO, "s"): ["gr", "simclr"],
    (BLUE, "D"): ["gd", "gd-"],
    (RED, "^"): ["gd+lr", "gr+lr", "gd+ld", "lr"],
    (GREEN, "v"): ["pcl", "pcl-partition"],
    (PINK, "P"): ["ufc", "ufc-negatives"],
    (SKY, "X"): ["rotation", "inpainting", "context_restoration", "pirl"],
    (ORANGE, "p"): ["weak_to_strong", "mean_teacher", "mixup", "self_training", "adversarial", "gan_augmentation"],
    (BLACK, "h"): ["benchmark", "gd+lr+mixup", "gd+lr+self_training", "pcl+lr", "ufc+lr"],
}
LINES = ["-", ":", (0, (1, 3)), (0, (7, 1, 1, 1)), (0, (7, 1, 1, 1, 1, 1)), (0, (9, 2))]  # of a family's methods
MATCHED, CONSISTENT, BOTH = "--", "-.", (0, (3, 1, 1, 1, 1, 1))  # the matched arm; + weak_to_strong; both
STYLES = {  # method -> colour, marker, line
    method: (*look, line) for look, methods in FAMILIES.items() for method, line in zip(methods, LINES, strict=False)
}
OWN = [("#882255", "<"), ("#44AA99", ">"), ("#999933", "d"), ("#661100", "H")]  # of methods that are in no family
ON_ONE_AXIS = 9  # methods; of more, each has a panel
STRUCTURES = [BLUE, ORANGE, SKY, PINK, YELLOW, GREEN, RED]  # contours of class 7, 1, 2, ... on grey
OF_STRUCTURES = ListedColormap([*STRUCTURES[1:], STRUCTURES[0]])  # of classes 1 to 7
GROUPS = [BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY, BLACK]  # subjects, partitions, clusters
TAGS = ("V", "V2")  # read in the source; read where another work quotes it. Nothing else is ever printed or drawn
PUBLISHED_COLUMNS = ["source", "study", "dataset", "method", "labelled", "metric", "value", "tag", "note"]
STYLE: Any = {
    **{"figure.constrained_layout.use": True, "font.size": 12, "lines.linewidth": 1.2, "lines.markersize": 5.5},
    **dict.fromkeys(["axes.titlesize", "axes.labelsize", "figure.titlesize", "figure.labelsize"], 12),
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.linewidth": 0.5, "grid.alpha": 0.4, "axes.axisbelow": True},
    **{"image.interpolation": "nearest", "figure.dpi": 150},
}
ROOM = 1.4  # times the sizes below, which were drawn for small print
styled = style_context(["default", STYLE])  # whatever a user's own matplotlibrc says
MaybeTable = pd.DataFrame | None


class Figure(MatplotlibFigure):
    """A matplotlib figure that shows itself in a notebook without `pyplot`."""

    draw = styled(MatplotlibFigure.draw)  # ticks are made when they are first drawn

    @styled
    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.draw_without_rendering()  # with axes of fixed aspect the layout needs two passes
        self.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def _panels(count: int, columns: int, width: float, height: float, **shared: bool) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes in rows of at most `columns`, `width` x `height` inches each."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.0, columns * width * ROOM + 0.5), rows * height * ROOM + 0.6))
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel().tolist()
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]


def _legend(owner: Any, axes: Iterable[Axes], **where: Any) -> None:
    """What is labelled in `axes`, each label once, methods first."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels, handles = zip(*sorted(found.items(), key=lambda item: not isinstance(item[1], Container)), strict=True)
    owner.legend(handles, labels, **where)


@styled
def _nothing(text: str) -> Figure:
    figure = Figure(figsize=(4.5, 1))
    figure.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def _array(values: Any) -> np.ndarray:
    """A tensor of any device, with or without gradient, or anything like an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def _parts(method: str) -> tuple[bool, int, bool, str]:
    """How figures order methods: weak_to_strong after a pre-training last, families, the matched arm behind its own."""
    name = method.partition(" (")[0]
    base = name.removesuffix("+weak_to_strong").removeprefix("matched-")
    place = [*STYLES].index(base) if base in STYLES else len(STYLES)
    return name.endswith("+weak_to_strong"), place, name.startswith("matched-"), method


def looks(methods: Iterable[str]) -> dict[str, tuple[str, str, Any]]:
    """Colour, marker and line of every method of a figure, in the order of its legend.

    A method of the matched arm, or followed by weak_to_strong, has colour and marker of its base, and a line that says
    which. Those in no family (one's own, ablated values) have others, line and colour both, in the order of their
    names: so they are the same in all figures of the same methods. A remark in parentheses changes nothing.
    """
    found, others = {}, 0
    for method in sorted(set(methods), key=_parts):
        consistent, place, matched, _ = _parts(method)
        if place < len(STYLES):
            colour, marker, line = [*STYLES.values()][place]
            arm = {(True, False): MATCHED, (False, True): CONSISTENT, (True, True): BOTH}.get((matched, consistent))
            found[method] = colour, marker, arm or line
        else:
            found[method] = *OWN[others % len(OWN)], LINES[(others + others // len(OWN)) % len(LINES)]
            others += 1
    return found


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _over(table: pd.DataFrame) -> str:
    """What the intervals of a table are over, in words."""
    numbers = {name: _range(table[f"n_{name}"]) for name in stats.FACTORS}
    counts = [f"{n} {name.removesuffix('s') if n == '1' else name}" for name, n in numbers.items()]
    return f"{'95 % intervals over' if (table['interval_over'] != '').any() else 'no intervals:'} {', '.join(counts)}"


def published_for(dataset: str, study: str, path: Path = paths.PARAMS / "published.csv") -> pd.DataFrame:
    """Published Dice of a data set that may be shown beside a study: method, labelled, dice, tag, source, note.

    `labelled` is <NA> where the source does not say how many subjects a printed percentage stands for; `study` of the
    file may name several. Raises `RequestError` for a file that is no such table, or has a tag other than V and V2.
    """
    columns: Any = {"usecols": PUBLISHED_COLUMNS, "dtype": {"labelled": "Int64", "value": float}}
    try:
        table = pd.read_csv(path, keep_default_na=False, na_values={"labelled": ""}, **columns)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise RequestError(f"{path}: cannot be read as a table of published numbers: {reason}") from None
    for line, tag in enumerate(table["tag"], start=2):
        if tag not in TAGS:
            raise RequestError(f"{path}, line {line}: tag {tag!r} is not printed, only V and V2 are; remove the row")
    beside = table["study"].str.split().map(lambda names: study in names)
    chosen = table[beside & (table["dataset"] == dataset) & (table["metric"] == "dice")].reset_index(drop=True)
    return chosen.rename(columns={"value": "dice"})[["method", "labelled", "dice", "tag", "source", "note"]]


def _errors(rows: pd.DataFrame) -> np.ndarray:
    """Distances of the ends of the intervals from the means [2, n]; rounding may put an end beyond the mean."""
    return rows[["dice_low", "dice_high"]].sub(rows["dice_mean"], axis=0).abs().to_numpy().T


def _intervals(axes: Axes, x: pd.Series, rows: pd.DataFrame, look: tuple[str, str, Any], label: str) -> None:
    """Means with their intervals: dotted where they lack something (`stats.lacks`); hollow where runs are missing
    that other methods have."""
    colour, marker, line = look
    about = {"color": colour, "marker": marker, "zorder": 3}
    bars = axes.errorbar(x, rows["dice_mean"], yerr=_errors(rows), linestyle=line, elinewidth=2, label=label, **about)
    bars[2][0].set_linestyle([_bar(note) for note in rows["note"]])
    hollow = rows["runs_missing"] > 0
    axes.plot(x[hollow], rows["dice_mean"][hollow], linestyle="none", markerfacecolor="white", **about | {"zorder": 5})


def _bar(note: str) -> Any:
    return (0, (1, 1)) if note.startswith(("one", "two")) else "-"


def _lacking(axes: Axes, notes: pd.Series) -> None:
    """The legend of dotted bars."""
    if any(_bar(note) != "-" for note in notes):
        axes.plot(
            [], [], color=GREY, linewidth=2, linestyle=_bar("one"), label="dotted: too few subjects, draws or seeds"
        )


@styled
def label_curve(
    summary: pd.DataFrame,
    table: MaybeTable = None,
    published: MaybeTable = None,
    title: str = "",
    names: Mapping[str, str] | None = None,
) -> Figure:
    """Dice against the number of labelled subjects: one line per method, with 95 % intervals (`stats.summary`).

    `summary` is of one study, data set and profile; of more than `ON_ONE_AXIS` methods each has a panel,
    with `random`. Small points are the draws of the tidy `table`, a dashed line with a band is `benchmark`, a
    cross a number of `published` (`published_for`) for a cell of ours, a hollow marker a cell with fewer runs than
    others, a dotted bar an interval of too few subjects, draws or seeds. `title` is instead of study, data set and
    profile, `names` are methods in other words. Raises `ValueError` for several studies, data sets or profiles, and for
    a published tag but V and V2.
    """
    place, names = summary[["study", "dataset", "profile"]].drop_duplicates(), names or {}
    if len(place) != 1:
        raise ValueError(f"a label curve shows one study, data set and profile, not {len(place)}")
    nothing = pd.DataFrame(columns=["method", "labelled", "dice", "tag"])
    draws = nothing if table is None else stats.per_draw(table)
    published = nothing if published is None else published
    if not published["tag"].isin(TAGS).all():
        raise ValueError("published numbers are drawn with tag V or V2 only")
    curves, ceiling = summary[summary["method"] != "benchmark"], summary[summary["method"] == "benchmark"]
    look_of = looks(curves["method"])
    groups, several = [[*look_of]], len(look_of) > ON_ONE_AXIS
    if several:
        groups = [[m for m in look_of if m in ("random", own)] for own in look_of if own != "random"]
    counts = sorted(curves["labelled"].unique())
    gap = min(np.diff(np.log2(counts)), default=1.0)  # in doublings, as is the step: bars of neighbours never meet
    step = min(0.3 if several else 0.12, 0.6 * gap / max(1, len(groups[0])))
    figure, panels = _panels(len(groups), 4, *(2.0, 1.6) if several else (6.6, 3.6), sharey=True)
    for panel, members in zip(panels, groups, strict=True):
        for number, method in enumerate(members):
            shift, colour = 2.0 ** (step * (number - (len(members) - 1) / 2)), look_of[method][0]
            rows = curves[curves["method"] == method].sort_values("labelled")
            plain = method.partition(" (")[0]  # without a remark
            beside = published[(published["method"] == plain) & published["labelled"].isin(rows["labelled"])]
            tags = f"(× published, other protocol, {', '.join(sorted(beside['tag'].unique()))})" if len(beside) else ""
            if named := several and method == members[-1]:
                panel.set_title(f"{names.get(method, method)}\n{tags}".strip(), fontweight="bold", color=colour)
            label = "_" if named else f"{names.get(method, method)} {tags}".strip()
            _intervals(panel, rows["labelled"] * shift, rows, look_of[method], label)
            cross, dot = {"marker": "x", "s": 30, "linewidths": 1.4}, {"s": 14, "alpha": 0.6, "linewidths": 0}
            for points, aside, look in (beside, 0.4, cross), (draws[draws["method"] == method], -0.35, dot):
                x = points["labelled"].astype(float) * shift * 2.0 ** (aside * step)
                panel.scatter(x, points["dice"], color=colour, zorder=4, **look)
        for row in ceiling.itertuples():
            panel.axhspan(row.dice_low, row.dice_high, color=BLACK, alpha=0.08, linewidth=0)
            panel.axhline(row.dice_mean, color=BLACK, linestyle="--", label=f"benchmark ({row.labelled} labelled)")
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, [str(count) for count in counts])
        panel.xaxis.set_minor_locator(NullLocator())
        if counts:
            panel.set_xlim(counts[0] * 2.0 ** (-0.6 * gap), counts[-1] * 2.0 ** (0.6 * gap))
    if len(draws):
        panel.scatter([], [], s=14, color=GREY, label="one draw")
    if (curves["runs_missing"] > 0).any():
        panel.scatter([], [], s=30, facecolors="white", edgecolors=GREY, label="fewer runs than others")
    _lacking(panel, curves["note"])
    columns = 2 if any(len(names.get(method, method)) > 24 for method in look_of) else 3
    under = {"loc": "outside lower center", "ncols": columns}
    _legend(figure, panels, **{"loc": "outside right upper"} if several else under)
    below = f"labelled subjects (draws of them: {_range(curves['n_draws'])})" if counts else ""
    (figure.supxlabel if several else panels[0].set_xlabel)(below)
    figure.supylabel("Dice (mean over test subjects)")
    study, dataset, profile = place.iloc[0]
    title = title or f"{f'study {study}' if study else 'all runs'} on {dataset}, profile {profile}"
    figure.suptitle(f"{title}\n{_over(summary)}")
    return figure


@styled
def budget_curve(table: pd.DataFrame) -> Figure:
    """Dice against fine-tuning steps, a panel for each number of labelled subjects, to see where more gain nothing.

    `table`: tidy rows with a column `steps`. Lines are means, small points the draws; no intervals, for the question is
    how the mean grows.
    """
    draws = table.groupby(["labelled", "method", "steps", "draw"])["dice"].mean().reset_index()
    counts, look_of = sorted(draws["labelled"].unique()), looks(draws["method"])
    steps = sorted(draws["steps"].unique())
    figure, panels = _panels(len(counts), 2, 4.0, 2.6)
    for panel, count in zip(panels, counts, strict=True):
        for method, own in draws[draws["labelled"] == count].groupby("method"):
            colour, marker, line = look_of[method]
            mean = own.groupby("steps")["dice"].mean()
            panel.plot(mean.index, mean, color=colour, marker=marker, linestyle=line, label=method)
            panel.scatter(own["steps"], own["dice"], s=7, alpha=0.55, color=colour, linewidths=0)
        panel.set_xscale("log", base=2)
        panel.set_xticks(steps, [str(step) for step in steps], rotation=90)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(xlabel="fine-tuning steps", ylabel="Dice", title=f"{count} labelled")
    _legend(figure, panels, loc="outside right upper")
    return figure


@styled
def ablation(axes_table: pd.DataFrame, reference: MaybeTable = None) -> Figure:
    """One panel per axis of an ablation: Dice for each value, with 95 % intervals (`stats.summary`).

    `axes_table` is a `stats.summary` with axis (title), value, base (True for the method unchanged, which is ringed);
    `reference`, rows of the same summary, are dashed lines across.
    """
    if axes_table.empty:
        return _nothing("no finished run")
    titles = list(dict.fromkeys(axes_table["axis"]))
    figure, panels = _panels(len(titles), 4, 1.9 if len(titles) > 1 else 5.0, 2.1, sharey=True)
    look_of = looks([*axes_table["method"], *(() if reference is None else reference["method"])])
    lines = {count: LINES[n % len(LINES)] for n, count in enumerate(sorted(set(axes_table["labelled"])))}
    for panel, title in zip(panels, titles, strict=True):
        rows = axes_table[axes_table["axis"] == title]
        text = rows["value"].map(lambda v: f"{v:g}" if isinstance(v, float) else str(v), na_action="ignore")
        number = pd.to_numeric(rows["value"], errors="coerce")  # "all" and other words after the numbers
        rows = rows.assign(text=text.fillna("all"), number=number).sort_values(["number", "text"])
        ticks = {text: place for place, text in enumerate(rows["text"].unique())}
        series = list(rows.groupby(["method", "labelled"]))
        for place, ((method, labelled), own) in enumerate(series):
            x = own["text"].map(ticks) + 0.14 * (place - (len(series) - 1) / 2)
            _intervals(panel, x, own, (*look_of[method][:2], lines[labelled]), f"{method}, {labelled} labelled")
            look = {"s": 110, "facecolors": "none", "edgecolors": BLACK, "zorder": 5}
            base = own["base"].astype(bool)
            if base.any():
                panel.scatter(x[base], own["dice_mean"][base], label="the method unchanged", **look)
        for row in () if reference is None else reference.itertuples():
            label = f"{row.method}, {row.labelled} labelled"
            panel.axhline(row.dice_mean, label=label, color=look_of[row.method][0], linestyle="--")
        panel.set_xticks(range(len(ticks)), list(ticks))
        panel.set(xlim=(-0.6, len(ticks) - 0.4), title=title)
    for panel in panels[::4]:
        panel.set_ylabel("Dice")
    _lacking(panels[0], axes_table["note"])
    figure.suptitle(f"{axes_table['dataset'].iloc[0]}\n{_over(axes_table)}")
    _legend(figure, panels, loc="outside lower center", ncols=max(2, min(4, len(panels))))
    return figure


@styled
def threshold_curve(table: pd.DataFrame, title: str = "") -> Figure:
    """Dice (dice_mean, _low, _high) and, under it, the share of positive pairs against the threshold t (value)."""
    rows = table.sort_values("value")
    figure, (dice, share) = _panels(2, 1, 4.6, 1.8, sharex=True)
    dice.errorbar(rows["value"], rows["dice_mean"], yerr=_errors(rows), color=GREEN, marker="o", elinewidth=1.6)
    share.plot(rows["value"], rows["share"], color=BLUE, marker="s")
    dice.set(ylabel="Dice", title=title)
    share.set(ylabel="positive pairs", ylim=(0, 1), xlabel="threshold t")
    share.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


@styled
def forest(contrasts: pd.DataFrame, margin: float = stats.MARGIN) -> Figure:
    """Differences of Dice between two methods, with 95 % intervals and verdicts; a panel for each number of labels.

    contrasts: `stats.contrasts`. Grey: differences that do not matter. Filled: there is a verdict; hollow: there is
    none. Dotted: an interval of too few subjects, draws or seeds.
    """
    if contrasts.empty:
        return _nothing("no contrast has a common run")
    look_of, groups = looks(contrasts["method"]), [own for _, own in contrasts.groupby("labelled")]
    sizes = [len(own) + 0.6 for own in groups]
    figure = Figure(figsize=(11, 0.36 * sum(sizes) + 0.35 * len(groups) + 1.2))
    panels = figure.subplots(len(groups), 1, sharex=True, squeeze=False, height_ratios=sizes).ravel()
    for panel, own in zip(panels, groups, strict=True):
        panel.axvspan(-margin, margin, color=GREY, alpha=0.2, linewidth=0, label=f"within {margin:g}: does not matter")
        panel.axvline(0, color=BLACK, linewidth=0.8)
        for place, row in enumerate(own.itertuples()):
            colour, marker, _ = look_of[row.method]
            filled = {"markerfacecolor": "white"} if row.verdict in ("", "not known") else {}
            panel.plot([row.low, row.high], [place, place], color=colour, linewidth=2, linestyle=_bar(row.note))
            panel.plot(row.difference, place, color=colour, marker=marker, markersize=8, **filled)
            panel.annotate(
                stats.in_words(row.verdict, row.note), (1.01, place), xycoords=("axes fraction", "data"), va="center"
            )
        panel.set_yticks(range(len(own)), [f"{row.method} \N{MINUS SIGN} {row.baseline}" for row in own.itertuples()])
        panel.set_ylim(len(own) - 0.4, -0.6)
        panel.set_title(f"{own['labelled'].iloc[0]} labelled", loc="left", fontweight="bold")
        panel.grid(axis="x")
    _lacking(panels[0], contrasts["note"])
    panels[-1].set_xlabel("difference of Dice")
    figure.suptitle(_over(contrasts))
    _legend(figure, panels, loc="outside lower center", ncols=2)
    return figure


def _curves(curves: Mapping[str, pd.DataFrame], columns: int, width: float, height: float) -> Figure:
    """A panel per table of steps and values, under a running median over a fortieth of them; see `training_curves`."""
    figure, panels = _panels(len(curves), columns, width, height)
    for panel, (title, curve) in zip(panels, curves.items(), strict=True):
        steps, values = curve.dropna().to_numpy(dtype=float).T
        if len(values) == len(curve):
            smooth = pd.Series(values).rolling(max(1, len(values) // 40), center=True, min_periods=1).median()
            panel.plot(steps, values, color=BLUE, linewidth=0.6, alpha=0.35)
            panel.plot(steps, smooth, color=BLUE, linewidth=1.5)
        else:
            panel.plot(steps, values, color=GREEN, marker="o", markersize=3, linewidth=1)
            best = np.argsort(-values, kind="stable")[:1]
            panel.scatter(steps[best], values[best], s=90, facecolors="none", edgecolors=BLACK, zorder=3)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.set_title(title)
    figure.supxlabel("step")
    return figure


@styled
def training_curves(log: pd.DataFrame) -> Figure:
    """The log of one run, a panel for each column but `step`; of values measured now and then the best is ringed."""
    return _curves({column: log[["step", column]] for column in log.columns.drop("step")}, 3, 3.2, 2.4)


@styled
def pretraining_curves(log: pd.DataFrame) -> Figure:
    """The loss of every pre-training (step, loss, and in stage its name), a panel each, with a scale of its own."""
    if log.empty:
        return _nothing("no pre-training")
    figure = _curves(dict(iter(log.groupby("stage", sort=False)[["step", "loss"]])), 4, 2.1, 1.8)
    figure.supylabel("loss")
    return figure


def _matrix(values: np.ndarray, width: float, title: str, groups: Any, lines: str, **look: Any) -> tuple[Figure, Axes]:
    """A matrix [B, B] in colours, with lines between, and names at, the runs of equal neighbours in `groups` [B]."""
    figure, (axes,) = _panels(1, 1, width, 3.6)
    axes.grid(False)
    axes.spines[:].set_visible(True)
    axes.imshow(values, **look)
    if groups is not None:
        names = pd.Series(_array(groups)).astype(str)
        starts = np.flatnonzero(names != names.shift())
        for start in starts[1:]:
            axes.axhline(start - 0.5, color=lines, linewidth=0.8)
            axes.axvline(start - 0.5, color=lines, linewidth=0.8)
        middles = (starts + np.append(starts[1:], len(names)) - 1) / 2
        axes.set_xticks(middles, names[starts])
        axes.set_yticks(middles, names[starts])
    axes.set_title(title)
    return figure, axes


@styled
def similarity_matrix(similarity: Any, title: str = "", groups: Any = None) -> Figure:
    """Cosine similarities [B, B] as colours from -1 (blue) to 1 (red); `groups` [B] names runs of neighbouring rows."""
    figure, axes = _matrix(_array(similarity), 4.4, title, groups, BLACK, cmap="RdBu_r", vmin=-1, vmax=1)
    figure.colorbar(axes.images[0], ax=axes, shrink=0.85, label="cosine similarity")
    return figure


@styled
def pairs_matrix(pairs: Any, title: str = "", groups: Any = None) -> Figure:
    """Who is alike in a batch: row i is anchor i of `Pairs`, with positives, negatives, neither, and their shares."""
    kind = np.where(_array(pairs.positive), 2, 1 * _array(pairs.negative))  # bool [B, B] each
    np.fill_diagonal(kind, 3)
    colours = {"neither": "#E4E4E4", "negative": ORANGE, "positive": BLUE, "itself": BLACK}
    look = {"cmap": ListedColormap(list(colours.values())), "vmin": -0.5, "vmax": 3.5}
    figure, axes = _matrix(kind, 5, title, groups, "white", **look)
    axes.set(xlabel="row of the batch", ylabel="anchor")
    shares = [f" ({np.sum(kind == number) / max(1, kind.size - len(kind)):.0%})" for number in range(3)]
    about = zip(colours.items(), [*shares, ""], strict=True)
    handles = [Patch(color=colour, label=name + share) for (name, colour), share in about]
    figure.legend(handles=handles[::-1], loc="outside right upper")
    return figure


def _groups(axes: Axes, points: np.ndarray, names: np.ndarray, size: float) -> np.ndarray:
    """Points [n, 2] with a colour and marker per group; returns the colours [n]."""
    colours = np.empty(len(points), dtype=object)
    for number, name in enumerate(np.unique(names)):
        own = names == name
        colours[own] = GROUPS[number % len(GROUPS)]
        marker = "os^D"[number // len(GROUPS) % 4]
        axes.scatter(*points[own].T, s=size, color=colours[own], marker=marker, linewidths=0, zorder=3, label=str(name))
    return colours


@styled
def gradient_picture(embedding: Any, gradient: Any, groups: Any = None, title: str = "") -> Figure:
    """Where a loss pulls embeddings [B, 2]: normalised points on the unit circle, coloured by `groups` [B].

    An arrow is the negative `gradient` [B, 2], the longest of length 0.5. Raises `ValueError` for other shapes.
    """
    points, pull = _array(embedding).astype(float), -_array(gradient).astype(float)
    if points.ndim != 2 or points.shape[1] != 2 or pull.shape != points.shape:
        raise ValueError(f"embedding and gradient must both be [B, 2]: {points.shape}, {pull.shape}")
    points = points / np.linalg.norm(points, axis=1, keepdims=True)
    pull = 0.5 * pull / max(np.linalg.norm(pull, axis=1).max(), 1e-12)
    figure, (axes,) = _panels(1, 1, 4.3, 3.6)
    axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=GREY, linewidth=0.8))
    names = np.full(len(points), "") if groups is None else _array(groups)
    colours = _groups(axes, points, names, 36).tolist()
    axes.quiver(*points.T, *pull.T, color=colours, angles="xy", scale_units="xy", scale=1, width=0.008, zorder=2)
    axes.set(xlim=(-1.55, 1.55), ylim=(-1.55, 1.55), aspect="equal", title=title)
    axes.set_axis_off()
    if groups is not None:
        _legend(figure, [axes], loc="outside right upper")
    return figure


@styled
def embedding(panels: Mapping[str, Any], colourings: Mapping[str, Any]) -> Figure:
    """Embeddings in two dimensions (t-SNE): a column for each of `panels` (points [n, 2]), a row per colouring [n].

    Floats (positions) have a colour bar, others (subjects, clusters) colours and markers, and a legend of up to ten.
    """
    figure, axes = _panels(len(panels) * len(colourings), len(panels), 2, 2)
    for start, (name, values) in enumerate(colourings.items()):
        row, values = axes[start * len(panels) :][: len(panels)], _array(values)
        continuous = values.dtype.kind == "f"
        for panel, (title, points) in zip(row, panels.items(), strict=True):
            if continuous:
                panel.scatter(*_array(points).T, c=values, s=9, linewidths=0)
            else:
                _groups(panel, _array(points), values, 9)
            panel.set(xticks=[], yticks=[], title=title if start == 0 else "", box_aspect=1)
            panel.spines[:].set(visible=True, color=GREY, linewidth=0.5)
        row[0].set_ylabel(name)
        if continuous:
            figure.colorbar(panel.collections[0], ax=row)
        elif len(np.unique(values)) <= 10:
            _legend(panel, [panel], loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@styled
def dendrogram(linkage: np.ndarray, cut: float, title: str = "") -> Figure:
    """The upper 40 leaves of a hierarchical clustering, `linkage` [n - 1, 4] as SciPy's, cut at the height `cut`."""
    figure, (axes,) = _panels(1, 1, 7, 3)
    look = {"color_threshold": cut, "above_threshold_color": GREY, "leaf_rotation": 90, "leaf_font_size": 12}
    hierarchy.set_link_color_palette([BLUE, ORANGE])  # in turn, so that neighbours differ
    hierarchy.dendrogram(linkage, p=40, truncate_mode="lastp", ax=axes, **look)
    hierarchy.set_link_color_palette(None)
    label = f"cut at {cut:.3g}: {np.sum(linkage[:, 2] > cut) + 1} clusters"
    axes.axhline(cut, color=BLACK, linestyle="--", label=label)
    axes.set(title=title, xlabel="(slices merged in a leaf)", ylabel="distance")
    _legend(axes, [axes], loc="upper right")
    return figure


@styled
def volume_grid(images: Any, labels: Any = None, title: str = "", titles: Any = (), class_names: Any = None) -> Figure:
    """Slices in reading order on one scale, tiles of one picture, with the outlines of the classes.

    `images` [N, H, W], [N, C, H, W] (the first channel, or colours where C = 3) or blocks [N, C, D, H, W] (the middle
    slice); `labels` the same without C; `titles` of the slices; `class_names` {class index: name} of the legend.
    """
    images = _array(images).astype(float)
    images = images[:, :, images.shape[2] // 2] if images.ndim == 5 else images
    if images.ndim == 4:
        images = np.moveaxis(images, 1, -1) if images.shape[1] == 3 else images[:, 0]
    low, high = np.percentile(images, [0.5, 99.5])
    images = np.clip((images - low) / max(high - low, 1e-12), 0, 1)
    labels = np.zeros(images.shape[:3], int) if labels is None else _array(labels)
    labels = labels[:, labels.shape[1] // 2] if labels.ndim == 4 else labels
    (count, height, width), inch = images.shape[:3], images.shape[2] / 1.35  # in pixels
    columns, gap = min(count, 6, max(3, math.ceil(math.sqrt(count)))), math.ceil(0.05 * inch)
    down, across = height + (math.ceil(0.2 * inch) if len(titles) else gap), width + gap  # from tile to tile
    sides = math.ceil(count / columns) * down + gap, columns * across + gap
    picture, outlined = np.ones((*sides, *images.shape[3:])), np.zeros(sides, int)
    corners = [((n // columns + 1) * down - height, n % columns * across + gap) for n in range(count)]
    for (y, x), image, label in zip(corners, images, labels, strict=True):
        tile = slice(y, y + height), slice(x, x + width)
        picture[tile], outlined[tile] = image, label
    figure, (panel,) = _panels(1, 1, sides[1] / inch, sides[0] / inch)
    panel.imshow(picture, cmap="gray", vmin=0, vmax=1)
    panel.set_axis_off()
    for (y, x), name in zip(corners, titles, strict=False):
        panel.text(x + width / 2, y - 1, name, ha="center", va="bottom")
    for index in np.unique(outlined[outlined > 0]):
        panel.contour(outlined == index, colors=STRUCTURES[index % 7], levels=[0.5], linewidths=1)
    figure.suptitle(title)
    if class_names is not None:
        handles = [Line2D([], [], color=STRUCTURES[index % 7], label=name) for index, name in class_names.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


@styled
def unet(down: Any, up: Any, image: Any, label: Any) -> Figure:
    """A U-Net from a slice to its classes: a box for each stack of maps, as wide as it has channels, as high as a map.

    `down`: feature maps [1, C, H, W] of the encoder, the finest first; `up`: of the decoder, the finest last. `image`
    and `label` [H, W] stand before and after them.
    """
    bottom, last = len(down) - 1, len(down) + len(up) - 1
    figure = Figure(figsize=(10, 4.2))
    panel = figure.subplots()
    for place, maps in enumerate([*down, *up]):
        (_, channels, height, width), level = maps.shape, min(place, last - place)
        box = 0.6 * channels / down[bottom].shape[1], height / down[0].shape[2]
        colour = BLUE if place <= bottom else RED
        panel.add_patch(Rectangle((place - box[0] / 2, -level - box[1] / 2), *box, color=colour, alpha=0.55))
        said = f"{channels} × {height} × {width}"
        panel.text(place, -level - box[1] / 2 - 0.05, said, ha="center", va="top")
        if place > bottom:
            skip = {"arrowstyle": "->", "linestyle": "--"}
            panel.annotate("", (place - 0.3, -level), (last - place + 0.3, -level), arrowprops=skip)
    for left, classes, title in [(-1.75, None, "slice"), (last + 0.75, label, "what it should say")]:
        extent = left, left + 1, -0.5, 0.5
        panel.imshow(_array(image), cmap="gray", extent=extent)
        if classes is not None:
            panel.imshow(np.ma.masked_equal(_array(classes), 0), cmap=OF_STRUCTURES, vmin=1, vmax=7, extent=extent)
        panel.text(left + 0.5, 0.6, title, ha="center")
    panel.text(0.4 * bottom, -bottom - 0.2, "encoder", color=BLUE, ha="center")
    panel.text(last - 0.4 * bottom, -bottom - 0.2, "decoder", color=RED, ha="center")
    panel.set(xlim=(-2, last + 2.2), ylim=(-bottom - 0.7, 0.9), aspect="auto")
    panel.set_axis_off()
    return figure
