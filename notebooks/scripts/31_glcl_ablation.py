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
# *Deviation* from the released code of Chaitanya et al., beside the choice that an axis changes:
#
# * `gd`: there a batch is 32 images of real slices (four volumes in two sets, four slices of each, every slice and one copy) and 16 zero images. Each
#   image has 36 negatives, zero images among them (which are anchors, too). Here there are only the 32 real images, and each has 24 negatives. In both,
#   half of the positives of a real image are of another volume.
# * Views pass the network one after the other, in the global and in the local stage, so batch norm sees each view apart. There all views of a batch
#   pass together, in `gd` with the zero images.
# * The running averages of batch norm go along to the next stage and into fine-tuning. There they restart.
# * Brightness and contrast are drawn for each image, there once for the whole batch (as TensorFlow 1 runs that code). Lengths in pixels are kept as shares of the image side: a crop
#   has 100/192 of it, there 100 pixels in every data set.
# * The global loss is a plain mean over pairs. There the sum over pairs is divided by the number of images.
# * Fine-tuning: no change of brightness and contrast. The released code computes such changes and drops them, so the effect is the same.
# * On ACDC: no bias field correction (N4).
# * Profiles `smoke` and `laptop` (`params/profiles`): smaller images, fewer steps, another momentum of batch norm, the last step in place of the best on
#   validation. `smoke` has smaller networks, too, and fewer slices in a batch; `laptop` fine-tunes with another loss, rate, schedule and batch.

# %% [markdown]
# ## What this does not show
# * What two changed choices do together: one is changed at a time.
# * The best value of a choice: the values are scored on test subjects, so none may be chosen here. Settings of the study on ACDC were chosen on
#   development patients (`PROTOCOL.md`).
# * The size of a batch alone: with 4 slices a batch of `gd` is one volume, so no positive is of another volume.
# * That a choice without effect here has none elsewhere: with 2 labelled subjects and 3 draws only large effects can be seen.
