# %% [markdown]
# # Which choices matter?
# **One choice of Chaitanya et al. changed at a time, the others as published: temperature, partitions, batch size,
# unlabelled subjects, regions, decoder depth.** This notebook trains nothing; it reads the table of the study
# `glcl_ablation`.
#
# You will see: Dice for every value of every axis with intervals, beside the published choice and `random`. Seconds on a
# CPU. The paper's own ablation figures are not verified, so no published number is shown.

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
print(f"{results.shown}\nmade by: {results.provenance['command']}")
print(
    f"{results.provenance['runs']['done']} runs, {results.provenance['training_seconds'] / 60:.0f} minutes of training"
)
if profile == "smoke":
    print(
        "\nsmoke profile: a handful of steps on 32 x 32 pixels; it proves that every cell runs, its numbers mean nothing"
    )

# %%
print(results.gaps)

# %% [markdown]
# ## One axis at a time
# The ringed value is the method's own, as published unless the study overrides it; the dashed line is `random`. Bars are 95 % bootstrap intervals over test subjects.

# %%
axes = ablation_axes(study, dataset, profile, results.summary)
figure = plots.ablation(axes, results.summary[results.summary["method"] == "random"])
results.save(figure, "ablation")
figure

# %% tags=["nbval-check-output"]
columns = ["axis", "value", "base", "method", "n_subjects", "n_draws", "dice_mean", "dice_low", "dice_high"]
print(axes[columns].round(2).to_string(index=False))

# %% [markdown]
# ## Paired tests against no pre-training
# Wilcoxon's signed-rank test over test subjects, corrected by Holm for the number of rows.

# %% tags=["nbval-check-output"]
columns = ["method", "labelled", "n_subjects", "n_runs", "median_difference", "p_holm"]
comparison = results.comparison[columns].round(3)
print(comparison.assign(p_holm=results.comparison["p_holm"].map("{:.1e}".format)).to_string(index=False))
