# %% [markdown]
# # Four answers to "who is alike?", on one footing
# **What no paper shows: views of a slice (SimCLR), partitions and regions (Chaitanya et al.), positions (Zeng et al.)
# and pseudo-classes (Zhang et al., an interpretation), with one network, one data set, one budget of iterations, the
# same splits and seeds.** This notebook trains nothing; it reads the table of the study
# `four_answers`.
#
# You will see: Dice against labelled subjects, ranks over all subjects and draws with intervals, paired tests, what
# each costs, and the matrix of positives that each uses on one batch. Seconds on a CPU. What is committed here is real
# cardiac MRI (ACDC, every draw of the papers' lists, 20 test patients) with the `laptop` profile, far smaller than the
# published settings: it compares the four answers at one small budget and reproduces none of the papers.

# %%
import pandas as pd
import torch
from IPython.display import display

from clseg import plots, stats
from clseg.pairs import cluster_pairs, instance_pairs, partition_pairs, position_pairs
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

# %% tags=["parameters"]
study: str = "four_answers"  # a name under params/studies
dataset: str = "acdc"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper: which of the study's results

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
# Bars are 95 % bootstrap intervals over test subjects; small points are single draws of labelled subjects. Published
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
# Numbers of other protocols, where they are verified.

# %%
published

# %% [markdown]
# ## Paired tests against no pre-training
# Wilcoxon's signed-rank test over test subjects, on draws that both have, corrected by Holm over the whole table. The
# median difference is in Dice, a method minus `random` on the same subject.

# %% tags=["nbval-check-output"]
print(results.tests)

# %% [markdown]
# ### Surface distance and missed structures
# The 95th percentile Hausdorff distance, and how often a structure was missed altogether (then Dice is 0 and the
# distance is the image diagonal).

# %%
results.distances

# %% [markdown]
# ## Ranks
# Of all methods on the same subject, with the same labelled subjects: 1 is the best. The mean over subjects, labelled and
# draws, with a 95 % bootstrap interval over subjects; `benchmark`, which has other labels, is left out.

# %%
few = results.table[results.table["method"] != "benchmark"]
figure = plots.ranks(few)
results.save(figure, "ranks")
figure

# %% tags=["nbval-check-output"]
print(stats.ranks(few).round(2).to_string(index=False))

# %% [markdown]
# ## What it costs
# Seconds of training per pre-training and per fine-tuning (on the machine of the provenance), and parameters that learn.

# %%
seconds = pd.Series(results.provenance["training_seconds_by_run"], name="seconds")
kind = seconds.index.str.replace(r"-(labelled|seed).*", "", regex=True)
seconds.groupby(kind).agg(["count", "mean", "min", "max"]).round(1)

# %% [markdown]
# ## Who is alike, on one batch
# Six slices of each of two volumes in two views: the same rows for every method. Blue is a positive, grey takes no part, the
# rest is negative. The pseudo-classes are only for the picture: here, three equal classes by brightness of a random number.

# %%
views, slices, volumes = 2, 6, 2
slice_id = torch.arange(slices * volumes).repeat(views)
place = torch.arange(slices).repeat(volumes).repeat(views)
view = torch.arange(views).repeat_interleave(slices * volumes)
position, partition = (place + 1) / slices, place // 2
generator = torch.Generator().manual_seed(0)
cluster = torch.randint(3, (slices * volumes,), generator=generator).repeat(views)
answers = {
    "gr: views of one slice": instance_pairs(slice_id),
    "gd: the same partition": partition_pairs(slice_id, partition, "gd", view),
    "pcl: near positions (t = 0.35)": position_pairs(position, 0.35),
    "ufc: one pseudo-class": cluster_pairs(slice_id, cluster),
}
for name, pairs in answers.items():
    display(plots.pairs_matrix(pairs, name))

# %% tags=["nbval-check-output"]
for name, pairs in answers.items():
    share = [mask.float().mean().item() for mask in (pairs.positive, pairs.negative)]
    print(f"{name}: {share[0]:.0%} of all pairs positive, {share[1]:.0%} negative")
