# %% [markdown]
# # Where do slices lie?
# **Embeddings of the same slices by random weights and after three pre-trainings (after Zeng et al., MICCAI 2021): does position order
# them, or does the patient?** The embeddings come from the pre-trainings of the study `pcl_embedding`; what is missing is done here first, which
# takes seconds under `smoke`.
#
# With profile `smoke` (that is what is committed here) these are encoders that were trained for seconds: they show that the notebook works, and
# nothing about the methods. For numbers, run `clseg run pcl_embedding --dataset acdc --profile laptop`: about 70 minutes on one core (`--dry-run`
# estimates it for yours). How much of position the trained encoders of the study on ACDC hold is in `42_which_method` (`position_r2`).
#
# You will see: a t-SNE of the encoder's features, coloured by position and by patient, for random weights, SimCLR, equal
# partitions and positions, and two numbers that do not depend on a t-SNE: whether the nearest slice of another patient has a near
# position, and whether the nearest slice at all is of the same patient. Whether they published such a figure is not known here.

# %%
import numpy as np
import pandas as pd
from sklearn.manifold import TSNE

from clseg import plots, probe, stats
from clseg.study import grid, runs
from clseg.study.files import read_study
from clseg.study.parameters import FigureParameters, read_parameters

# %% tags=["parameters"]
study: str = "pcl_embedding"  # a name under params/studies
dataset: str = "phantom"  # a name under params/datasets
profile: str = "smoke"  # smoke, laptop or paper

# %%
parameters = read_parameters(globals(), FigureParameters)
plan = grid.expand(read_study(study), dataset, profile)
pretrained = {run.method: runs.do(run.parent) for run in plan.finetune}
first = plan.finetune[0]
store = runs.open_store(first.experiment, progress=False)
split = runs.split_of(first, store)

# %% tags=["nbval-check-output"]
print(f"{len(pretrained)} pre-trainings; {len(split.test)} subjects of the test fold are shown")

# %% [markdown]
# ## The features
# The encoder's deepest feature map, averaged over its pixels, of every slice of the test fold. Batch norm uses the running averages
# that came with the pre-trained weights.

# %%
rows = store.rows(split.test)
slices = store.slices.loc[rows]
subject, position = store.volumes["subject"].loc[slices["volume"]].to_numpy(), slices["position"].to_numpy()

networks = {"random": runs.build_network(plan.pretrain[0], store)}  # as a first stage starts
networks |= {run.method: runs.build_network(run, store) for run in plan.finetune}
embedded = {name: probe.features(network.encoder, store, rows) for name, network in networks.items()}

# %%
panels = {
    name: TSNE(perplexity=min(20, len(rows) // 4), init="pca", random_state=0).fit_transform(values)
    for name, values in embedded.items()
}
figure = plots.embedding(panels, {"position": position, "subject": subject})
figure

# %% [markdown]
# A t-SNE shows who is near, not how far. So the same question in numbers, in the space of the features: by cosine, for every
# slice, the nearest slice of *another* subject, and the nearest of all.

# %%
table = pd.DataFrame(
    {name: probe.nearest(values, position, subject) for name, values in embedded.items()},
    index=["position off by", "nearest is same subject"],
).T
by_chance = np.abs(position[:, None] - position[None, :])[subject[:, None] != subject[None, :]].mean()
print(table.round(2).to_string())

# %% tags=["nbval-check-output"]
print(f"a random slice of another subject is off by {by_chance:.2f}")

# %% [markdown]
# "position off by" is the mean distance in position (0 to 1) to the nearest slice of another subject: small where position
# orders the slices. The other column says how much the subject itself decides. Compare with the random weights, and with a random slice.
#
# With profile `smoke` these are encoders that were trained for 20 steps: where their numbers are worse than those of random weights, or near those of a
# random slice, this says nothing about the methods.
#
# ## What we see
# Exploratory, of one seed and one fold, so without intervals. Under `smoke` there is nothing to see.

# %%
if why := stats.why_no_tests(pd.DataFrame({"profile": [plan.profile]})):
    print(why)
else:
    off, same = table.loc["random"]
    print(f"position off by: {by_chance:.2f} for a random slice")
    print(f"random weights: position off by {off:.2f}, nearest is same subject {same:.2f}")
    for name, row in table.drop(index="random").iterrows():
        change, of_subject = row - table.loc["random"]
        print(f"{name}, minus random weights: position off by {change:+.2f}, nearest is same subject {of_subject:+.2f}")

# %% [markdown]
# ## Deviations
# *Deviation* from the released code of Zeng et al.: those that [33_pcl_semi](33_pcl_semi.ipynb) lists of views, loss and `pcl`.

# %% [markdown]
# ## What this does not show
# * That an embedding that is ordered by position segments better: these are features, not Dice. `33_pcl_semi` has the Dice.
# * Distances: a t-SNE keeps neighbours, not how far groups lie apart. Compare the two numbers of the table, not the pictures.
# * One seed and one fold: another seed gives another picture, and somewhat other numbers.
