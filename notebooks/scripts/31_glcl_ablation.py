# %% [markdown]
# # Which choices matter?
# **One choice of Chaitanya et al. changed at a time, the others as published: temperature, partitions, batch size,
# unlabelled subjects, regions, decoder depth.** This notebook trains nothing; it reads the table of the study
# `glcl_ablation`.
#
# You will see: Dice for every value of every axis with intervals, beside the published choice and `random`. Seconds on a
# CPU. The paper's own ablation figures are not verified, so no published number is shown. What is committed here was computed with
# the `smoke` profile: it proves that every row runs, its numbers mean little.

# %%
from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import ablation_axes, read_results

# %% tags=["parameters"]
study: str = "glcl_ablation"  # a name under params/studies
dataset: str = "phantom"  # a name under params/datasets
profile: str = "smoke"  # smoke, laptop or paper: which of the study's results

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(results.about)

# %%
print(results.gaps)

# %% [markdown]
# ## One axis at a time
# The ringed value is the method's own, as published unless the study overrides it; the dashed line is `random`. Bars are 95 %
# intervals over test subjects, draws and seeds; none under `smoke`.

# %%
axes = ablation_axes(results)
figure = plots.ablation(axes, results.summary[results.summary["method"] == "random"])
results.save(figure, "ablation")
figure

# %% tags=["nbval-check-output"]
columns = ["axis", "value", "base", "method", "n_subjects", "n_draws", "dice_mean", "dice_low", "dice_high"]
print(axes[columns].round(2).dropna(axis="columns", how="all").to_string(index=False))

# %% [markdown]
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
# *Deviation* from the released code of Chaitanya et al., beside the choice that an axis changes: those that
# [30_glcl_strategies](30_glcl_strategies.ipynb) lists of `gd` and of the local stage (zero images and negatives in a batch, views through batch norm, running averages,
# intensities, the mean of the loss, profiles).

# %% [markdown]
# ## What this does not show
# * What two changed choices do together: one is changed at a time.
# * The best value of a choice: the values are scored on test subjects, so none may be chosen here. Settings of the study on ACDC were chosen on
#   development patients (`PROTOCOL.md`).
# * The size of a batch alone: with 4 slices a batch of `gd` is one volume, so no positive is of another volume.
# * That a choice without effect here has none elsewhere: with 2 labelled subjects and 3 draws only large effects can be seen.
