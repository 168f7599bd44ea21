# %% [markdown]
# # Start here
# **Masks of medical images are expensive, images are not. Contrastive pre-training learns from images alone, by one question: who
# is alike? This notebook is the map of the course, and asks on a small example whether pre-training gains anything.**
#
# ## Three ways through
# **You study or teach** (seven hours, eight with what is marked *optional*, and three and a half for the exercises; nothing to download, a laptop is enough; each
# lesson runs on its own):
#
# | lesson | question | minutes | exercises |
# |---|---|---|---|
# | [02_few_labels](02_few_labels.ipynb) | What can be learned from few labels, and how is it measured? | 45 | [90](90_few_labels.ipynb) |
# | [04_infonce](04_infonce.ipynb) | What does "alike" mean to a network? | 40 | [91](91_infonce.ipynb) |
# | [10_global_contrast](10_global_contrast.ipynb) | Which slices are alike? | 45 (65) | [92](92_global_contrast.ipynb) |
# | [11_local_contrast](11_local_contrast.ipynb) | Which regions are alike? | 40 (55) | [93](93_local_contrast.ipynb) |
# | [12_positional_contrast](12_positional_contrast.ipynb) | How near is alike? | 40 (60) | [94](94_positional_contrast.ipynb) |
# | [13_cluster_contrast](13_cluster_contrast.ipynb) | What if an auto-encoder decides? | 40 (50) | [95](95_cluster_contrast.ipynb) |
# | [14_semi_supervised](14_semi_supervised.ipynb) | Can unlabelled images help *during* fine-tuning? | 40 | [96](96_semi_supervised.ipynb) |
# | [15_end_to_end](15_end_to_end.ipynb) | Your own question, from pre-training to one paragraph | 60 | in it |
# | [16_your_method](16_your_method.ipynb) | Your own answer to "who is alike?" | 50 | in it |
#
# Teachers find order, hints and projects in [TEACHING.md](../TEACHING.md), and all terms in [GLOSSARY.md](../GLOSSARY.md).
#
# **You do research** (an hour to see it all): [01_data](01_data.ipynb) (5 minutes) and this notebook (5), then the answer of this study,
# [42_which_method](42_which_method.ipynb) (10), and the papers' tables on one footing: [30_glcl_strategies](30_glcl_strategies.ipynb), [31_glcl_ablation](31_glcl_ablation.ipynb), [33_pcl_semi](33_pcl_semi.ipynb),
# [37_ufc_skin](37_ufc_skin.ipynb) (5 each); your own study: [41_study](41_study.ipynb); what happens in one run: [20_pretrain](20_pretrain.ipynb),
# [21_finetune](21_finetune.ipynb); what it costs: [40_benchmarks](40_benchmarks.ipynb). The command line is in the [README](../README.md).
#
# **You have scans of your own** (20 minutes to a first result): [03_your_data](03_your_data.ipynb) checks the folder, pre-trains, fine-tunes and segments. Read
# [02_few_labels](02_few_labels.ipynb) before you believe a number.
#
# ## The example: does pre-training help when few subjects are labelled?
# Segmentation of a cardiac phantom with 1, 2 and 4 labelled subjects, with and without contrastive pre-training. `make study` made the
# table; the cells below read it and train nothing. Seconds on a CPU. The phantom is a model, not a patient:
# [42_which_method](42_which_method.ipynb) asks the same on real cardiac MRI.

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
print(results.gaps)

# %% [markdown]
# ## Dice against labelled subjects
# Each line is a method, each bar a 95 % interval over test subjects and draws, each small point one draw of labelled
# subjects; the dashed line is the ceiling, all subjects labelled. A dotted bar is of too few subjects, draws or seeds to say how others would differ.
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
# Each method minus `random` on the same subjects and draws, with a 95 % interval over both. Nothing was declared before the numbers
# were there, so these are explorations, not tests. The seed is the same everywhere: another one may differ.

# %% tags=["nbval-check-output"]
print(results.tests)

# %% [markdown]
# An interval that holds 0 allows both: a gain and a loss. Most do so here, with so few draws, one seed and a small example.
#
# Now choose a way above. If in doubt: [02_few_labels](02_few_labels.ipynb).
