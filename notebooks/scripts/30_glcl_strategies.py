# %% [markdown]
# # Which initialisation of encoder and decoder helps with few labels?
# **The first table of Chaitanya et al. (NeurIPS 2020), measured again: global and local contrast against no pre-training,
# with 1, 2 and 8 labelled subjects.** This notebook trains nothing; it reads the table of the study `glcl_strategies`.
#
# You will see: Dice against labelled subjects with intervals, the table, paired tests, the loss of every pre-training, and
# published numbers where they are verified. Seconds on a CPU. What is shown here was computed with the `smoke` profile on
# the phantom: it proves that every row runs, and means nothing else. The methods as published have no `laptop` rows yet.

# %%
import pandas as pd

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "glcl_strategies"  # a name under params/studies
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
# ### Surface distance and missed structures
# The 95th percentile Hausdorff distance, and how often a structure was missed altogether (then Dice is 0 and the distance
# is the image diagonal).

# %% tags=["nbval-check-output"]
results.distances

# %% [markdown]
# ### The published numbers beside ours
# Another setting (192 x 192 pixels, 10,001 steps) and second-hand: read in a later paper that quotes them.

# %%
published if len(published) else print("none for this data set")

# %% [markdown]
# ## Against no pre-training
# A method minus `random` on the same subjects, draws and seeds, with its 95 % interval. They are exploratory: no protocol
# declared them. Under `smoke` there are none.

# %%
print(results.tests)

# %% [markdown]
# ## The loss of every pre-training
# A loss that has settled says that pre-training is done, not that it helped.

# %%
figure = plots.pretraining_curves(results.pretraining)
results.save(figure, "pretraining_loss")
figure

# %% [markdown]
# ## What we see

# %%
print(results.findings)

# %% [markdown]
# ## Deviations
# *Deviation* from the released code of Chaitanya et al.:
#
# * `gd`: there a batch is 32 images of real slices (four volumes in two sets, four slices of each, every slice and one copy) and 16 zero images. Each
#   image has 36 negatives, zero images among them (which are anchors, too). Here there are only the 32 real images, and each has 24 negatives. In both,
#   half of the positives of a real image are of another volume.
#   Two changes were tried on development patients (`acdc_sets`; three draws, one seed). Positives between all four volumes, in place of two and two: Dice changed by
#   -.013 (-.079 to .052) with 1 labelled, by -.004 (-.031 to .023) with 8. Slices of six volumes, so 36 negatives as there, but all of real slices, and 48 images in place of 32:
#   Dice changed by -.010 (-.061 to .041) with 1 labelled, by -.004 (-.020 to .012) with 8. No change is seen, and one that matters is not excluded.
# * `gr`: the released code has it as comments only, so it cannot be run there.
# * Views pass the network one after the other, in the global and in the local stage, so batch norm sees each view apart. There all views of a batch
#   pass together, in `gd` with the zero images.
# * The running averages of batch norm go along to the next stage and into fine-tuning. There they restart.
# * Brightness and contrast are drawn for each image, there once for the whole batch (as TensorFlow 1 runs that code). Lengths in pixels are kept as shares of the image side: a crop
#   has 100/192 of it, there 100 pixels in every data set.
# * The global loss is a plain mean over pairs. There the sum over pairs is divided by the number of images.
# * `gd+ld`: the two views of a slice are compared in both directions, there only from the first to the second. The loss is the mean over all terms;
#   there the sum is divided by regions and maps.
# * Fine-tuning: no change of brightness and contrast. The released code computes such changes and drops them, so the effect is the same.
# * Profiles `smoke` and `laptop` (`params/profiles`): smaller images, fewer steps, another momentum of batch norm, the last step in place of the best on
#   validation. `smoke` has smaller networks, too, and fewer slices in a batch; `laptop` fine-tunes with another loss, rate, schedule and batch.
# * On ACDC: no bias field correction (N4). `benchmark` uses 77 patients, as the published list of 78 holds a validation patient.

# %% [markdown]
# ## What this does not show
# * Whether this initialisation is worth its time where fine-tuning uses the unlabelled scans itself: `42_which_method` asks that.
# * Which answer to "who is alike?" is best: here each method has its own batch and steps. The matched arm of `42_which_method` has one for all.
# * The published table: images, steps and fine-tuning differ, and it stands in a second-hand source.
