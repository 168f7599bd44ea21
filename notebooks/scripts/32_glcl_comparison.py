# %% [markdown]
# # Are contrastive pairs better than other ways to use unlabelled scans?
# **The second table of Chaitanya et al. (NeurIPS 2020): pretext tasks, semi-supervised methods and augmentation,
# against and together with contrastive pre-training.** This notebook trains nothing; it reads the table of the study
# `glcl_comparison`.
#
# You will see: Dice of every method against labelled subjects with intervals, paired tests against no pre-training,
# published numbers where they are verified. Seconds on a CPU. What is committed here was computed with the `smoke`
# profile, seconds per run: it proves that every row runs on one footing, its numbers mean little. For numbers, run
# the command with `--profile laptop` or `paper`.

# %%
import pandas as pd

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "glcl_comparison"  # a name under params/studies
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
# The authors' table as a later paper quotes it (IDEAL), and independent re-runs (MACL) in another code base and
# protocol. Chaitanya et al. used 192 x 192 pixels and 10,001 steps; MACL another network, another split and other data to
# pre-train on.

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
# *Deviation* from the released code of Chaitanya et al., in `gr` and `gd+lr`: those that [30_glcl_strategies](30_glcl_strategies.ipynb) lists (zero images and
# negatives in a batch, views through batch norm, running averages, intensities, the mean of the loss, profiles).
#
# *Deviation* from the sources of the others. Of `rotation`, `inpainting` and `context_restoration` the code of Chaitanya et al. has helpers that make
# the inputs, but no loss and no script:
#
# * `rotation` (Gidaris et al.): slices are changed in brightness and contrast before they are turned, not cropped and mirrored.
# * `inpainting` (Pathak et al.): no adversarial loss, no tenfold weight along the seam of the box.
# * `context_restoration` (Chen et al.): all patches are disjoint, not only the two of a pair. They are scaled with the image, and have 4 pixels a side
#   or more.
# * `self_training` (Bai et al.): predicted labels are not refined by a conditional random field.
# * `gan_augmentation` (Chaitanya et al., 2019): both generators and the segmenter are trained together, not one after the other; one discriminator;
#   smaller networks.
# * `adversarial` (Zhang et al., MICCAI 2017): both networks learn in one step through gradient reversal, there in turns; a smaller discriminator.
# * `pcl` (Zeng et al.): elastic fields come from a coarse grid of nodes; bilinear sampling, not cubic; no random crop; the loss is not multiplied by
#   temperature / 0.07; a difference of positions that equals t but for rounding counts as t.
# * `ufc`: no code of Zhang et al. is public, so what deviates from it cannot be listed. Auto-encoder, clustering, loss and settings are ours.
# * Ramps and warm-ups are shares of the steps. Nothing of all this was tuned yet: `acdc_rivals` is to try six settings of six of
#   the rivals (not of `inpainting`, `adversarial`, `gan_augmentation`).

# %% [markdown]
# ## What this does not show
# * What each rival could do with settings of its own: ramps and patches are scaled with steps and image side, and not tuned for this data set.
# * A comparison at equal cost: consistency and self-training see more slices in each step of fine-tuning, pre-trainings before it.
# * The published table: images, steps and fine-tuning differ, and it stands in a second-hand source.
# * `pcl` beside the others under profile `paper`: there it has the network, images, loss and both phases of Zeng et al. Compare it with `random` of `33_pcl_semi`.
