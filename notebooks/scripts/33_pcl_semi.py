# %% [markdown]
# # Does it help to call slices at near positions alike?
# **The semi-supervised setting of Zeng et al. (MICCAI 2021): folds, 2, 6 or 10 labelled patients (their own numbers are not verified), their
# network, SimCLR and partitions as in their code; rotation and PIRL are ours.** This notebook trains nothing; it reads the table of the study
# `pcl_semi`.
#
# You will see: Dice of random weights, rotation, PIRL, SimCLR, equal partitions and positions with intervals over all
# folds, paired tests, published numbers where they are verified. Seconds on a CPU. *Deviation*: the released code
# picks the best epoch on the fold it reports; here every fold is scored once, by the last step (`smoke`, `laptop`) or by
# the best step on validation subjects (`paper`). Their pre-training sees the images of the test fold: where the protocol does so, the method says
# "transductive". What is committed here was computed with the `smoke` profile, seconds per run: it proves that every
# row runs on one footing, its numbers mean little. For numbers, run the command with `--profile laptop` or `paper`.

# %%
import pandas as pd

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "pcl_semi"  # a name under params/studies
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
# Zeng et al.'s own table was not at hand; what is shown comes from papers that quote or repeat it, and from a user of their code.

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
# *Deviation* from the released code of Zeng et al., beside the choice of the epoch (at the top):
#
# * Views: the smooth noise of elastic fields comes from a coarse grid of nodes, of the strength that smoothing would leave; bilinear sampling, not
#   cubic; no random crop.
# * Loss: a plain mean. There it is multiplied by temperature / 0.07, which is 1.43 at a temperature of 0.1.
# * `pcl`: a difference of positions that equals t but for rounding counts as t. There the rounding decides.
#
# *Deviation* of the two that are not in their code:
#
# * `rotation` (Gidaris et al.): slices are changed in brightness and contrast before they are turned, not cropped and mirrored.
# * `pirl` (Misra & van der Maaten): InfoNCE, without the published sum of log(1 - h) over negatives; at most 1,024 negatives, not 32,000; no random crops.

# %% [markdown]
# ## What this does not show
# * The published numbers: Zeng et al. pool all slices of a fold into one Dice for each structure, take the best epoch on that fold, and pre-train on
#   every frame of the heart cycle. Here Dice is of each volume, then the mean: a small heart counts as much as a large one.
# * Scans of patients who were not there in pre-training, where the protocol is transductive (the method then says so).
# * How sure a fold is: folds share training subjects, and no interval can count that without bias.
