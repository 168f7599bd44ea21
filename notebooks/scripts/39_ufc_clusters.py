# %% [markdown]
# # How many pseudo-classes?
# **Hierarchical clusters of auto-encoder features (Zhang et al., BIBM 2022, an interpretation): what is in a cluster, and what the
# number of clusters does to the segmentation.** Dice comes from the table of the study `ufc_clusters`, clusters and
# dendrogram from its pre-training.
#
# You will see: who is in a cluster, the dendrogram with its cut, purity of the clusters against position, structures and patients, and Dice
# against the number of clusters and the linkage. How the paper cuts its hierarchy is not known: it has no public code. Shown are real scans:
# ACDC, 52 patients to pre-train on, 2 labelled, 20 tested, three draws, one seed.

# %%
from functools import cache

import numpy as np
import pandas as pd
from IPython.display import display

from clseg import cluster, plots
from clseg.data.store import Store
from clseg.study import grid, runs
from clseg.study.files import read_study
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import ablation_axes, read_results

# %% tags=["parameters"]
study: str = "ufc_clusters"  # a name under params/studies
dataset: str = "acdc"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(results.about)
print(results.gaps)

# %% [markdown]
# ## What is in a cluster
# Clusters need the images and the weights of the pre-training. So what is shown of them is kept beside the study's tables: in `clusters.csv` (a row per
# slice) and `linkage.csv` (a row per merge). Where these are missing, this notebook makes them, after the pre-training if that is missing, too (seconds under
# `smoke`, a quarter of an hour under `laptop`). Whoever changes how they are made, deletes them first. Pictures of slices of a cluster are in lesson
# [13_cluster_contrast](13_cluster_contrast.ipynb), of the phantom.

# %%
COUNTS = 2, 5, 10, 20, 40  # of clusters
plan = grid.expand(read_study(study), dataset, profile)
run = next(r for r in plan.finetune if r.method == "ufc").parent
stage = run.experiment.stages[run.parameters.stage]


@cache
def opened() -> tuple[Store, np.ndarray]:
    """The slices, and the features of those that were pre-trained on."""
    store = runs.open_store(runs.do(run).experiment, progress=False)
    return store, cluster.features(runs.stage_work(run, store, runs.split_of(run, store)))


def clustered() -> pd.DataFrame:
    """A row per slice: its cluster, also for other numbers of clusters, and which structures it shows, by a number."""
    store, features = opened()
    table = run.read("clusters")
    labels = np.asarray(store.labels[table["row"].to_numpy()])
    table["anatomy"] = sum((labels == k).any(axis=(1, 2)).astype(int) << k for k in store.class_names)
    for count in COUNTS:
        table[f"of {count}"] = cluster.clusters_of(features, stage.model_copy(update={"clusters": count}))
    return table[["subject", "position", "cluster", "anatomy", *(f"of {n}" for n in COUNTS)]].assign(run=run.name)


def merged() -> pd.DataFrame:
    """A row per merge: SciPy's linkage."""
    matrix = cluster.linkage_matrix(opened()[1], stage.linkage)
    return pd.DataFrame(matrix, columns=["first", "second", "distance", "slices"]).assign(run=run.name)


found = results.kept("clusters", [run], clustered)
print(f"{len(found)} slices in {found['cluster'].nunique()} clusters, {stage.linkage} linkage")
found.groupby("cluster").agg(
    slices=("subject", "size"), subjects=("subject", "nunique"), position=("position", "mean")
).round(2).T

# %% [markdown]
# ## The hierarchy and its cut

# %%
linkage = results.kept("linkage", [run], merged).drop(columns="run").to_numpy()
clusters = found["cluster"].nunique()
figure = plots.dendrogram(linkage, linkage[-clusters:][:2, 2].mean(), "features of a beta-VAE")
results.save(figure, "dendrogram")
figure

# %% [markdown]
# ## Purity
# The share of slices that belong to the most frequent group of their cluster: groups are quarters of the position, the set of
# structures that the slice shows, and the subject. With as many clusters as slices purity is 1, so it is shown for every number of clusters
# beside that of clusters drawn at random.

# %% tags=["nbval-check-output"]
quarter = np.minimum((found["position"].to_numpy() * 4).astype(int), 3)
groups = {"position": quarter, "anatomy": found["anatomy"], "subject": found["subject"]}
rng, table = np.random.default_rng(0), []
for count in COUNTS:
    numbers = found[f"of {count}"].to_numpy()
    chance, row = rng.permutation(numbers), {"k": count}
    for name, truth in groups.items():
        row |= {name: cluster.purity(numbers, truth), f"{name} (shuffled)": cluster.purity(chance, truth)}
    table.append(row)
purity = pd.DataFrame(table).round(2).set_index("k")
print(purity.reset_index().to_string(index=False))

# %% [markdown]
# Where purity of the subject grows far above that of shuffled clusters and that of position does not, clusters are groups of patients: cluster contrast
# says that slices of one patient are alike, nearly the opposite of partitions and positions. Lesson
# [13_cluster_contrast](13_cluster_contrast.ipynb) looks into that. A group that nearly all slices belong to makes any cluster pure.
#
# ## Dice against the number of clusters, and against the linkage

# %%
axes = ablation_axes(results)
figure = plots.ablation(axes, results.summary[results.summary["method"].isin(["random", "gr"])])
results.save(figure, "ablation")
display(figure)

# %% tags=["nbval-check-output"]
columns = ["method", "labelled", "n_subjects", "n_draws", "dice_mean", "dice_low", "dice_high"]
print(results.summary[columns].round(2).dropna(axis="columns", how="all").to_string(index=False))

# %% [markdown]
# ## What we see

# %% tags=["nbval-check-output"]
own, patients = purity.loc[stage.clusters], found.groupby("cluster")["subject"].nunique()
print(
    f"With {stage.clusters} clusters a cluster holds slices of {patients.min()} to {patients.max()} of the {found['subject'].nunique()} subjects. "
    "Purity, and that of shuffled clusters:"
)
for name in groups:
    print(f"  {name}: {own[name]:.2f}, {own[f'{name} (shuffled)']:.2f}")
print(f"Dice, {results.findings}")

# %% [markdown]
# ## Deviations
# *Deviation*: no code of Zhang et al. is public, so what deviates from it cannot be listed. The auto-encoder has the layers of Higgins et al.
# (ICLR 2017, those for CelebA without their hidden linear one); slices are clustered once, before the contrast; loss and settings are ours. `gr`
# deviates from the code of Chaitanya et al. as `30_glcl_strategies` says.

# %% [markdown]
# ## What this does not show
# * The best number of clusters: the values are scored on test subjects, so none may be chosen here.
# * Other features: an auto-encoder that is trained longer, or with other weight on its two losses, may cluster otherwise.
# * Other seeds, and other numbers of labelled patients.
# * What is the method and what the machine: plain training (`random`) ran on a GPU, all else on CPUs.
# * Clusters of another machine: the auto-encoder whose clusters are shown was trained for this notebook's tables. `matched-ufc` of
#   [42_which_method](42_which_method.ipynb) has the same settings of auto-encoder and clusters, and trained its own.
# * How the paper cuts its hierarchy: it has no public code.
