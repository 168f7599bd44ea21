# %% [markdown]
# # What does one more run cost?
# **Speed and memory of every part that a study goes through, each against peers measured in the same run on the same machine,
# with its goal: met, or missed by how much and why.** This notebook measures nothing; it reads `paper_figures/benchmarks`.
#
# You will see: every goal at a glance, the numbers behind it, what misses and why, and how cost grows with slices, pixels,
# volumes and runs. Seconds on a CPU. `make bench` measures anew, in about twenty minutes on a machine with nothing else to do.
#
# A ratio below 1 is in our favour. It is the median of the ratios of at least five rounds, in which all contenders were timed
# in turn, with the lowest and the highest; what was counted and not timed (memory of tensors) has one.

# %%
import json

import pandas as pd
from IPython.display import display
from matplotlib.ticker import NullFormatter

from clseg import paths, plots

names = [
    "kernel",
    "augmentation",
    "iteration",
    "preparing",
    "grid_cost",
    "scanning",
    "memory",
    "low_precision",
    "study",
    "speedrun",
]
places = [root / "paper_figures" / "benchmarks" for root in (paths.out_root(), paths.PROJECT)]
folder = next((place for place in places if place.is_dir()), places[-1])
about = {file.stem: json.loads(file.read_bytes()) for file in sorted(folder.glob("*.json"))}
for name in (name for name in [*names, "growth"] if name not in about):
    print(f"{name} is not measured: python tests/benchmarks {name}")
for name in (name for name, one in about.items() if one["quick"]):
    print(f"{name} holds a quick trial of the smallest sizes: its numbers say nothing about speed")

# %% [markdown]
# ## Every goal at a glance
# `times` is the measured number over the goal: up to 1 the goal is met.

# %%
rows = pd.DataFrame([{"benchmark": name} | row for name in names if name in about for row in about[name]["rows"]])
goals = rows[rows["goal"].notna()].astype({"met": bool}).assign(times=lambda table: table["value"] / table["goal"])
goals["verdict"] = goals["met"].map({True: "met", False: "missed"})


@plots.styled
def at_a_glance(goals):
    """One bar per goal, from 1 to the measured number over the goal, on a logarithmic axis."""
    figure = plots.Figure(figsize=(11, 0.6 + 0.27 * len(goals)))
    axes = figure.subplots()
    labels = (goals["benchmark"] + ": " + goals["case"])[::-1]
    times = goals["times"][::-1]
    colours = [plots.GREEN if met else plots.RED for met in goals["met"][::-1]]
    axes.barh(range(len(times)), times - 1, left=1, color=colours, height=0.7)
    axes.axvline(1, color=plots.BLACK, linewidth=0.8)
    axes.set_yticks(range(len(times)), labels)
    axes.set(xscale="log", xlabel="measured over goal", ylim=(-0.7, len(times) - 0.3))
    axes.grid(axis="x")
    axes.grid(False, axis="y")
    return figure


at_a_glance(goals)

# %% tags=["nbval-check-output"]
columns = ["case", "value", "low", "high", "n", "unit", "peer", "goal", "times", "verdict"]
for name, table in goals.groupby("benchmark", sort=False):
    print(f"{about[name]['title']}\ngoal: {about[name]['goal']}")
    print(table[columns].fillna("").to_string(index=False, float_format="{:.3g}".format), end="\n\n")

# %% tags=["nbval-check-output"]
met = goals.groupby("benchmark", sort=False)["met"].agg(["sum", "count"])
print(f"{met['sum'].sum()} of {met['count'].sum()} goals are met")
print(met.rename(columns={"sum": "met", "count": "goals"}).to_string())

# %% [markdown]
# ## What misses its goal, and why

# %%
reasons = {
    "augmentation": "at 96 pixels a batch is so quick that the interpolation itself, PyTorch's `grid_sample`, takes about half "
    "of the time",
    "iteration": "what is left is the drawing of two views, the log and the checkpoint",
    "preparing": "normalising needs percentiles of every volume, and resampling a pass over it",
    "grid_cost": "what is left is papermill with a kernel of its own, the pictures of the worker notebook, and the start of the warm process",
    "scanning": "the resolved parameters of every run are validated again",
    "memory": "a worker has the kernel and the plotting library loaded besides",
    "study": "most of it is training",
}
for name, table in goals[~goals["met"]].groupby("benchmark", sort=False):
    print(f"{name}: {reasons.get(name, 'not looked into')}")
    for row in table.itertuples():
        print(f"    {row.case}: {row.times:.2f} times the goal")

# %% [markdown]
# ## All numbers
# Medians of every contender; rows without a goal are there for comparison.

# %%
for name in (name for name in names if name in about):
    print(about[name]["title"])
    shown = [
        {"case": row["case"], "value": row["value"], "unit": row["unit"], "peer": row["peer"] or ""}
        | {f"{who}, {row['medians_unit']}": median for who, median in row.get("medians", {}).items()}
        for row in about[name]["rows"]
    ]
    display(pd.DataFrame(shown).set_index("case").map(lambda v: f"{v:.3g}" if isinstance(v, float) else v).fillna(""))

# %% [markdown]
# ## How cost grows
# Each line on doubly logarithmic axes; its slope is the exponent: 1 where twice the size costs twice as much, 2 where it costs
# four times as much. A store of many volumes is memory-mapped, so what it takes is its tables. Phantoms were computed and
# prepared up to the size shown; larger stores hold them again and again under other names.

# %%
growth = pd.DataFrame(about["growth"]["rows"]) if "growth" in about else pd.DataFrame()


@plots.styled
def how_cost_grows(growth):
    """A panel per series and unit; a line for everything that was measured, named with its exponent."""
    points = growth[growth["size"].notna()]
    slope = growth[growth["size"].isna()].set_index(["series", "what"])["value"]
    panels = list(points.groupby(["series", "unit"], sort=False))
    figure = plots.Figure(figsize=(12, 4 * -(-len(panels) // 2)))
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).ravel()
    for panel, ((series, unit), table) in zip(axes, panels, strict=False):
        for (what, line), colour in zip(table.groupby("what", sort=False), plots.STRUCTURES, strict=False):
            label = f"{what}, exponent {slope.get((series, what), float('nan')):.2f}"
            panel.plot(line["size"], line["value"], marker="o", markersize=3, color=colour, label=label)
        panel.set(xscale="log", yscale="log", xlabel=series, ylabel=unit)
        sizes = sorted(table["size"].unique())
        panel.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], rotation=90)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1))
    for panel in axes[len(panels) :]:
        panel.remove()
    return figure


how_cost_grows(growth) if len(growth) else None

# %% tags=["nbval-check-output"]
if len(growth):
    points = growth[growth["size"].notna()].astype({"size": int})
    slope = growth[growth["size"].isna()].rename(columns={"value": "exponent"})[["series", "what", "exponent"]]
    ends = points.groupby(["series", "what", "unit"], sort=False)[["size", "value"]].agg(["first", "last"])
    ends.columns = [f"{end} {column}" for column, end in ends.columns]
    print(ends.reset_index().merge(slope, how="left").to_string(index=False, float_format="{:.3g}".format))

# %% [markdown]
# ## Did speed change the results?
# Kernels and views that are computed in another order round otherwise: embeddings, losses and gradients agree with slow float64
# references as before, views differ by at most 0.000015 of the image range, labels not at all. Training enlarges such
# differences, and the table says by how much. It compares the same 24 fine-tunings before (commit ece8f66) and after (ac7eaf8),
# phantom, profile `smoke`, two labelled subjects, six seeds; Dice averaged over 16 test subjects and three structures. Repeat with
# `clseg run glcl_comparison --dataset phantom --profile smoke --set study.methods=[random,gd,gd+lr,pcl] --set study.labelled=[2] --set
# study.draws=[1] --set study.seeds=[0,1,2,3,4,5]` at either commit. The runs
# are of `smoke`, so there is no test and no interval: mean and standard deviation describe these runs alone.

# %%
rounding = pd.read_csv(folder / "rounding.csv")
rounding["change"] = rounding["dice_after"] - rounding["dice_before"]
spread = rounding.groupby("method")[["dice_before", "dice_after", "change"]].agg(["mean", "std"])
spread.columns = [f"{what}, {'mean' if how == 'mean' else 'SD over seeds'}" for what, how in spread.columns]
display(spread.round(3))

# %% [markdown]
# ## What we see
# A ratio is ours over that of the fastest peer that was measured with it; in brackets the least and the greatest of all rounds. What is not measured here is left out.


# %% tags=["nbval-check-output"]
def told(label, benchmark, case=""):
    """Prints the ratios of the rows of a benchmark whose case has some words, and what single rounds reached."""
    found = rows[(rows["benchmark"] == benchmark) & rows["case"].str.contains(rf"\b{case}")]
    if len(found):
        least, most = found["value"].min(), found["value"].max()
        numbers = f"{least:.3g}" if len(found) == 1 else f"{least:.3g} to {most:.3g} in {len(found)} cases"
        print(f"{label}: {numbers} ({found['low'].min():.3g} to {found['high'].max():.3g})")


print(f"{goals['met'].sum()} of {len(goals)} goals are met.")
for row in goals[~goals["met"]].itertuples():
    print(f"Missed: {row.benchmark}, {row.case}: {row.value:.3g} {row.unit}; the goal was {row.goal:.3g}.")
told("Time of the contrastive loss, 24 to 4,096 rows, many positives", "kernel", "many positives: time")
for size in (24, 48, 64, 128, 256, 1024, 4096):
    told(f"the same with one positive, {size:,} rows", "kernel", f"{size} rows, one positive: time")
told("Its peak memory, many positives", "kernel", "many positives: peak memory")
told("Its peak memory, one positive", "kernel", "one positive: peak memory")
for size in (96, 192, 352):
    for peer in ("monai", "batchgenerators"):
        told(
            f"Time of a view of {size} x {size} pixels, against {peer}",
            "augmentation",
            f"{size} px: time per view, {peer}",
        )
told("Time of a step of pre-training, against a forward and backward pass", "iteration", "time per step$")
told("A step in bf16 on a processor without it, against torch's bf16", "low_precision", "autocast")
told("the same, against float32", "low_precision", "float32")
for row in growth[growth["size"].isna()].itertuples() if len(growth) else ():
    print(f"Exponent of {row.what}, by {row.series}: {row.value:.2f}")
change = rounding["change"]
print(
    f"Dice of {len(change)} runs, after minus before the other order of sums: {change.mean():+.3f}, SD {change.std():.3f}"
)

# %% [markdown]
# ## What this does not show
# * Speed elsewhere: all was measured on machines with two CPU cores, one thread in a process, and nothing on a GPU. Benchmarks are of different
#   machines and versions of the code: compare inside one, not between two.
# * Other versions or settings of the peers: each was measured in the version below, with the settings in `tests/benchmarks`.
# * That every round meets a goal: goals are of medians, and some ranges reach beyond theirs. Rows with n = 1 have no range.
# * That speed did not change the results at all: runs of `smoke` are short, and 24 differences that vary as much as these cannot exclude a small change.

# %% [markdown]
# ## How it was measured

# %%
for name, one in about.items():
    made = one["provenance"]
    peers = ", ".join(f"{peer} {version}" for peer, version in one["peers"].items()) or "none"
    missing = f"; not installed: {', '.join(one['missing_peers'])}" if one["missing_peers"] else ""
    machine = f"{made['platform']}, {made['cpus']} cores, {one['threads']} thread, torch {made['packages']['torch']}"
    print(f"{name}: {machine}, {one['seconds']:.0f} s\n    peers: {peers}{missing}")
    for note in one["notes"]:
        print(f"    {note}")
