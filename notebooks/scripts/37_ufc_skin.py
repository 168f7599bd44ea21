# %% [markdown]
# # Do pseudo-classes help where slices have no position?
# **The 2-D task of Zhang et al. (BIBM 2022), an interpretation: cluster contrast on photographs of skin lesions.**
# This notebook trains nothing; it reads the table of the study
# `ufc_skin`.
#
# You will see: Dice of random weights, rotation, `gr` (SimCLR), `weak_to_strong` and the two readings of cluster contrast with intervals
# and paired tests. Seconds on a CPU. The paper has no public code: network, clustering and loss are our reading of its
# abstract and figure. PH2 (200 images) stands in for their dermoscopy images, presumably ISIC 2018: `--dataset isic2018`. What is committed here was
# computed with the `smoke` profile, seconds per run: it proves that every row runs on one footing, its numbers mean
# little. For numbers, run the command with `--profile laptop` or `paper`.

# %%
import pandas as pd

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "ufc_skin"  # a name under params/studies
dataset: str = "ph2"  # a name under params/datasets
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
# No number of this paper is verified; shown are scale references of other work on ISIC, if there are any.

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
# of `ufc` and `ufc-negatives` are ours. Of the others:
#
# * `gr` (Chaitanya et al.): views pass the network one after the other; brightness and contrast are drawn for each image; crops are a share of the image
#   side. The released code has it as comments only.
# * `rotation` (Gidaris et al.): slices are changed in brightness and contrast before they are turned, not cropped and mirrored.
# * `weak_to_strong` (UniMatch): one strong view, not two; no dropped features; pixel-wise cross-entropy on the pseudo-labels, not Dice; the teacher is
#   a running average of the weights; no change of hue or saturation, though these images have colour; brightness is added, not multiplied; blur of up
#   to 1.5 pixels of the network's image, there 2 of 256.

# %% [markdown]
# ## What this does not show
# * The paper's result: its network, clustering and loss are our reading, and PH2 has 200 images where ISIC 2018 has 2,594.
# * What pseudo-classes mean on photographs: a cluster may be a camera or a colour of skin. `39_ufc_clusters` looks into clusters of volumes.
# * How much two experts differ on these photographs: each has one mask, so a small difference may be within what experts disagree on.
