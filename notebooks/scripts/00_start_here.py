# %% [markdown]
# # Start here: does pre-training help when few subjects are labelled?
# **One table, one chart, one test: segmentation of a cardiac phantom with 1, 2 and 4 labelled subjects, with and without
# contrastive pre-training.** `make study` made them; this notebook reads them and trains nothing.
#
# You will see: Dice against the number of labelled subjects with intervals, the paired test against `random`, and where
# every number comes from. Seconds on a CPU. The phantom is a model, not a patient: `30_glcl_strategies` shows the same on
# real cardiac MRI.

# %%
from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

# %% tags=["parameters"]
study: str = "quickstart"  # a name under params/studies
dataset: str = "phantom"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper: which of the study's results

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(f"{results.shown}\nmade by: {results.provenance['command']}")
print(
    f"{results.provenance['runs']['done']} runs, {results.provenance['training_seconds'] / 60:.0f} minutes of training"
)
print("missing:", *(results.missing or ["nothing"]))

# %% [markdown]
# ## Dice against labelled subjects
# Each line is a method, each bar a 95 % bootstrap interval over the test subjects, each small point one draw of labelled
# subjects; the dashed line is the ceiling, all subjects labelled.
#
# * `random`: no pre-training.
# * `gd`: the encoder is pre-trained so that slices of the same part of any volume are alike.
# * `gd+lr`: then the decoder, so that a region of a slice is like itself in another view and unlike its neighbours.

# %%
figure = plots.label_curve(results.summary, results.table)
results.save(figure, "dice_against_labelled")
figure

# %% [markdown]
# ## The same as a table
# `dice_low` and `dice_high` bound the interval; `dice_sd_draws` is the standard deviation between draws: with so few
# labelled subjects it matters a great deal which ones they are. `missed` counts structures that were not found at all.

# %% tags=["nbval-check-output"]
columns = [
    "method",
    "labelled",
    "n_subjects",
    "n_draws",
    "dice_mean",
    "dice_low",
    "dice_high",
    "dice_sd_draws",
    "missed",
]
print(results.summary[columns].round(2).to_string(index=False))

# %% [markdown]
# ## Is the difference more than chance?
# Wilcoxon's signed-rank test over test subjects, paired with `random` on the same draws, corrected by Holm for the number
# of methods. A positive median difference is in favour of the method.

# %% tags=["nbval-check-output"]
columns = ["method", "labelled", "n_subjects", "n_runs", "median_difference", "p_holm"]
comparison = results.comparison[columns].round(3)
print(comparison.assign(p_holm=results.comparison["p_holm"].map("{:.1e}".format)).to_string(index=False))

# %% [markdown]
# ## Where to go from here
# | notebook | question |
# |---|---|
# | `01_data` | What do the networks see? |
# | `10_global_contrast` | Which slices are alike, and what does the loss do with that? |
# | `11_local_contrast` | Which regions are alike? |
# | `20_pretrain`, `21_finetune` | What happens in one run? |
# | `30_glcl_strategies` | Which initialisation helps, on real cardiac MRI? |
# | `31_glcl_ablation` | Which choices matter? |
