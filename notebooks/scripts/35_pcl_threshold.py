# %% [markdown]
# # How near is alike?
# **The threshold of positional contrast (Zeng et al., MICCAI 2021): Dice, and the share of pairs that count as alike, against
# t.** This notebook trains nothing; it reads the table of the study `pcl_threshold`.
#
# You will see: both curves with intervals (none under `smoke`), the table, and the cost of a threshold that calls nearly everything alike. Seconds
# on a CPU. The authors' own values are 0.35 for ACDC and 0.1 for CHD; whether they published such a figure is not known here. What is
# committed here was computed with the `smoke` profile: it proves that every row runs, its numbers mean little.

# %%
import torch

from clseg import plots
from clseg.pairs import position_pairs
from clseg.study import runs
from clseg.study.parameters import FigureParameters, read_parameters, resolve
from clseg.study.results import ablation_axes, read_results

# %% tags=["parameters"]
study: str = "pcl_threshold"  # a name under params/studies
dataset: str = "phantom"  # a name under params/datasets
profile: str = "smoke"  # smoke, laptop or paper: which of the study's results

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(results.about)
print(results.gaps)

# %% [markdown]
# ## Share of positive pairs
# Of all pairs of different slices of the data set, how many lie nearer than t? It depends on nothing but the positions.

# %%
axes = ablation_axes(results)
store = runs.open_store(resolve(dataset, profile, "pcl"), progress=False)
position = torch.from_numpy(store.slices["position"].to_numpy(copy=True))


def share(threshold):
    positive = position_pairs(position, threshold).positive
    return positive.sum().item() / (len(position) * (len(position) - 1))


curve = axes[["value", "base", "n_subjects", "n_draws", "dice_mean", "dice_low", "dice_high"]].copy()
curve["share"] = [share(value) for value in curve["value"]]
curve = curve.sort_values("value")

# %%
figure = plots.threshold_curve(curve, f"{study}, {dataset}, profile {profile}")
results.save(figure, "threshold")
figure

# %% tags=["nbval-check-output"]
print(curve.round(2).dropna(axis="columns", how="all").to_string(index=False))

# %% [markdown]
# `base` marks the value of the data set's own file (`params/datasets`). At a share near one nothing is left to tell apart; at a
# share near zero positional contrast is SimCLR, for then only the views of one slice are alike.
#
# ## Each value against the method's own
# A changed value minus the method's own, and a method as it is minus `random`: on the same subjects, draws and seeds, with 95 %
# intervals. They are exploratory: no protocol declared them. Under `smoke` there are none.

# %%
print(results.tests)

# %% [markdown]
# ## All means

# %% tags=["nbval-check-output"]
print(results.dice)

# %% [markdown]
# ## What we see

# %%
print(results.findings)

# %% [markdown]
# ## Deviations
# *Deviation* from the released code of Zeng et al.: those that [33_pcl_semi](33_pcl_semi.ipynb) lists of views, loss and `pcl`.

# %% [markdown]
# ## What this does not show
# * The best threshold: the values are scored on test subjects, so none may be chosen here.
# * What a threshold does on volumes of hundreds of slices: on a heart of ten slices a step of .1 is one slice.
# * Whether the pre-training learned much: at a large threshold the loss has little to tell apart. `20_pretrain` prints its floor and bound.
