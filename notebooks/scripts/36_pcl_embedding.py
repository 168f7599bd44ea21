# %% [markdown]
# # Where do slices lie?
# **Embeddings of the same slices by random weights and after three pre-trainings (after Zeng et al., MICCAI 2021): does position order
# them, or does the patient?** The encoders are those of the study `pcl_embedding`: SimCLR, equal partitions and positions, pre-trained on
# real scans (ACDC) with profile `laptop`, each about half an hour on one core. As in the released code of Zeng et al. they saw the scans of the test fold, too, but no label ("transductive").
#
# You will see: a t-SNE of the encoder's features, coloured by position and by patient, and three numbers that do not depend on a t-SNE: whether
# the nearest slice of another patient has a near position, whether the nearest slice at all is of the same patient, and how much of position a
# linear map reads off the features. Whether Zeng et al. published such a figure is not known here.
#
# Features need images and weights, which do not come with the project. So what is shown of them is kept beside the study's tables, in `embedding.csv`, with a
# row per slice; where that is missing, this notebook makes it, after the pre-trainings if they are missing, too (seconds under `smoke`). Whoever changes how it is made,
# deletes it first.

# %%
import numpy as np
import pandas as pd
from sklearn.manifold import TSNE

from clseg import plots, probe, stats
from clseg.study import grid, runs
from clseg.study.files import read_study
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

# %% tags=["parameters"]
study: str = "pcl_embedding"  # a name under params/studies
dataset: str = "acdc"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(results.about)
print(results.gaps)

# %% [markdown]
# ## The features
# The encoder's deepest feature map, averaged over its pixels, of every slice of the test fold. Batch norm uses the running averages
# that came with the pre-trained weights.

# %%
plan = grid.expand(read_study(study), dataset, profile)


def embedded() -> pd.DataFrame:
    """A row per network and slice of the test fold: where it lies, and what its nearest slices are."""
    first, names, tables = plan.finetune[0], ["run", "network", "subject", "position"], []
    networks = {("", "random"): plan.pretrain[0]}  # as a first stage starts
    networks |= {(runs.do(run.parent).name, run.method): run for run in plan.finetune}
    store = runs.open_store(first.experiment, progress=False)
    rows = store.rows(runs.split_of(first, store).test)
    subject, position = probe.subject_of(store, rows), store.slices["position"].to_numpy()[rows]
    for (name, network), run in networks.items():
        feature = probe.features(runs.build_network(run, store).encoder, store, rows)
        table = pd.DataFrame(dict(zip(names, (name, network, subject, position), strict=True)))
        table["off"], table["same"] = probe.nearest(feature, position, subject)
        table["predicted"] = probe.linear_prediction(feature, position, subject)
        near = TSNE(perplexity=min(20, len(rows) // 4), init="pca", random_state=0)
        table[["x", "y"]] = near.fit_transform(feature)
        tables.append(table)
    return pd.concat(tables, ignore_index=True).round(4)


table = results.kept("embedding", plan.pretrain, embedded)
networks = dict(list(table.groupby("network", sort=False)))
random = networks["random"].reset_index()
print(f"{len(random)} slices of {random['subject'].nunique()} patients of the test fold, {len(networks)} networks")

# %%
panels = {name: own[["x", "y"]] for name, own in networks.items()}
figure = plots.embedding(panels, {"position": random["position"], "subject": random["subject"]})
results.save(figure, "embedding")
figure

# %% [markdown]
# A t-SNE shows who is near, not how far. So the same question in numbers, in the space of the features:
#
# * *position off by*: the mean distance in position (0 to 1) from a slice to the nearest slice, by cosine, of *another* patient: small where
#   position orders the slices;
# * *same patient*: the share of slices whose nearest slice of all is of the same patient: large where the slices of one patient lie together;
# * *position_r2*: the share of the variance of position that a ridge regression on the features explains, for patients whom it was not
#   fitted to: what the features hold of position, whether or not it orders them. `20_pretrain` and `42_which_method` have the same linear probe, there for
#   patients whom the encoder never saw.

# %% tags=["nbval-check-output"]
numbers = pd.DataFrame(
    {
        name: {
            "position off by": own["off"].mean(),
            "same patient": own["same"].mean(),
            "position_r2": 1 - ((own["position"] - own["predicted"]) ** 2).mean() / own["position"].var(ddof=0),
        }
        for name, own in networks.items()
    }
).T
print(numbers.round(2).to_string())

# %% tags=["nbval-check-output"]
position, subject = random["position"].to_numpy(), random["subject"].to_numpy()
by_chance = np.abs(position[:, None] - position[None, :])[subject[:, None] != subject[None, :]].mean()
print(f"a random slice of another patient is off by {by_chance:.2f}")

# %% [markdown]
# ## What we see
# Exploratory, of one seed and one fold: so no intervals, but the number of patients in whom a network is better than random weights.

# %%
if why := stats.why_no_tests(pd.DataFrame({"profile": [plan.profile]})):
    print(why)
else:
    off, same, r2 = numbers.loc["random"]
    print(f"a random slice: position off by {by_chance:.2f}")
    print(f"random weights: position off by {off:.2f}, same patient {same:.2f}, position_r2 {r2:.2f}")
    of_patient = table.pivot_table(index="subject", columns="network", values="off")
    for name, (off, same, r2) in numbers.drop(index="random").iterrows():
        nearer = (of_patient[name] < of_patient["random"]).sum()
        words = f"position off by {off:.2f} (less than random weights in {nearer} of {len(of_patient)} patients)"
        print(f"{name}: {words}, same patient {same:.2f}, position_r2 {r2:.2f}")

# %% [markdown]
# ## Deviations
# *Deviation* from the released code of Zeng et al.: those that [33_pcl_semi](33_pcl_semi.ipynb) lists of views, loss and `pcl`.

# %% [markdown]
# ## What this does not show
# * That an embedding that is ordered by position segments better: these are features, not Dice. `33_pcl_semi` is for Dice; `42_which_method` has it for
#   matched pre-trainings, with `position_r2` beside it.
# * Distances: a t-SNE keeps neighbours, not how far groups lie apart. Compare the numbers, not the pictures.
# * New patients: the encoders saw these scans in pre-training.
# * One seed and one fold: another seed gives another picture, and somewhat other numbers.
