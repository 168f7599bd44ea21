# %% [markdown]
# # Does positional pre-training survive a change of data set?
# **The transfer setting of Zeng et al. (MICCAI 2021): pre-trained on one data set, fine-tuned on few labelled
# subjects of another.** This notebook trains nothing; it reads the table of the study
# `pcl_transfer`.
#
# You will see: Dice on MS-CMRSeg after pre-training on ACDC, with intervals and paired tests. Seconds on a CPU. The
# published pairs are CHD to MM-WHS CT and ACDC to HVSMR: the same study with `--dataset mmwhs_ct --set
# study.pretrain_dataset=chd` and `--dataset hvsmr`. What is committed here was computed with the `smoke` profile,
# seconds per run: it proves that every row runs on one footing, its numbers mean little. For numbers, run the command
# with `--profile laptop` or `paper`.

# %%
import pandas as pd

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "pcl_transfer"  # a name under params/studies
dataset: str = "mscmr"  # a name under params/datasets
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
# Other protocols: re-runs by MACL, pre-trained on other data (the note says on which); for MS-CMRSeg there is none.

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
# *Deviation* from the released code of Zeng et al. (`simclr`, `pcl-partition`, `pcl`): those that [33_pcl_semi](33_pcl_semi.ipynb) lists, of `rotation` and `pirl`, too.
# From the sources of the others:
#
# * `gr`, `gd` (Chaitanya et al.): no zero images in a batch, views pass the network apart, brightness and contrast are drawn for each image; all in
#   `30_glcl_strategies`. Here they have the network of Zeng et al.
# * `ufc`: no code of Zhang et al. is public, so what deviates from it cannot be listed.

# %% [markdown]
# ## What this does not show
# * Transfer between the published pairs of data sets: they need CHD or HVSMR.
# * The published pre-training: here ACDC means the 52 patients of the list of Chaitanya et al.; Zeng et al. took all frames of all 100.
# * What a pre-training on the target's own unlabelled scans would give: that is a row of `33_pcl_semi`, on other data.
# * Transfer to another organ or modality: both data sets here are MRI of the heart.
