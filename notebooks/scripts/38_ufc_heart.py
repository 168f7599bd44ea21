# %% [markdown]
# # Do pseudo-classes help on volumes?
# **The 3-D task of Zhang et al. (BIBM 2022), an interpretation: cluster contrast on blocks of slices with a 3-D
# U-Net, beside the other answers in 3-D.** This notebook trains nothing; it reads the table of the study
# `ufc_heart`.
#
# You will see: Dice of a 3-D U-Net from random weights, `gr` (SimCLR), partitions, positions and the two readings of cluster
# contrast, with intervals and paired tests. Seconds on a CPU. The paper has no public code: network, clustering and
# loss are our reading of its abstract and figure. It uses whole-heart CT, presumably MM-WHS: `--dataset mmwhs_ct`. What is committed here was
# computed with the `smoke` profile, seconds per run: it proves that every row runs on one footing, its numbers mean
# little. For numbers, run the command with `--profile laptop` or `paper`.
#
# One thing to know before reading the numbers: on slices of the phantom a pseudo-class is mostly a group of patients
# (`39_ufc_clusters` and lesson 13 measure it, in 2-D), so there `ufc` nearly says "slices of one patient are alike".

# %%
import pandas as pd

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "ufc_heart"  # a name under params/studies
dataset: str = "phantom"  # a name under params/datasets
profile: str = "smoke"  # smoke, laptop or paper: which of the study's results

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(results.about)

# %% [markdown]
# ## What is missing
# Cells of the study's grid that have no finished run, and the command that makes them.

# %%
print(results.gaps)

# %% [markdown]
# ## Dice against labelled subjects
# Bars are 95 % intervals over test subjects, draws and seeds (`clseg/stats.py`; none under `smoke`); small points are single draws. Published
# numbers appear only where they are verified (tags V and V2 in `params/published.csv`), with their source.

# %%
published = plots.published_for(dataset, study)
figure = plots.label_curve(results.summary, results.table, published)
results.save(figure, "dice_against_labelled")
figure

# %% tags=["nbval-check-output"]
print(results.dice)

# %% [markdown]
# ### The published numbers beside ours
# No number of this paper is verified. What is shown are re-runs of other methods by MACL, in 2-D: another protocol.

# %%
published if len(published) else print("none for this data set")

# %% [markdown]
# ## Against no pre-training
# A method minus `random` on the same subjects, draws and seeds, with its 95 % interval. They are exploratory: no protocol
# declared them. Under `smoke` there are none.

# %%
print(results.tests)

# %% [markdown]
# ### Surface distance and missed structures
# The 95th percentile Hausdorff distance, and how often a structure was missed altogether (then Dice is 0 and the
# distance is the image diagonal).

# %% tags=["nbval-check-output"]
results.distances

# %% [markdown]
# ## What we see

# %%
print(results.findings)

# %% [markdown]
# ## Deviations
# *Deviation*: no code of Zhang et al. is public, so what deviates from it cannot be listed: auto-encoder, clustering, loss and settings
# of `ufc` and `ufc-negatives` are ours. The methods `gr`, `gd` (Chaitanya et al.) and `pcl` (Zeng et al.) were published for slices: networks and views in
# 3-D are ours. Besides:
#
# * `gr`, `gd`: no zero images in a batch, views pass the network apart, brightness and contrast are drawn for each image; all in `30_glcl_strategies`.
# * `pcl`: elastic fields come from a coarse grid of nodes; linear sampling, not cubic; no random crop; the loss is not multiplied by
#   temperature / 0.07; a difference of positions that equals t but for rounding counts as t.

# %% [markdown]
# ## What this does not show
# * The paper's result: its network, clustering and loss are our reading, and the whole-heart CT is not here.
# * Full volumes: blocks of slices at low resolution are what a CPU can do.
# * That pseudo-classes are what helps or harms: on the phantom they are mostly groups of patients, so the method nearly says "slices of one
#   patient are alike".
