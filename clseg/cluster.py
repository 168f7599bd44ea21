"""Auto-encoder features to pseudo-classes.

Zhang et al. cluster the features of a beta-VAE hierarchically and take the clusters for classes; how, where the tree is
cut and whether this is repeated during training are not known. Here: agglomerative clustering, once, before the
contrast, cut at a number of clusters or at a distance.
"""

import numpy as np
import pandas as pd
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import cdist
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor

from clseg.errors import RequestError
from clseg.loop import Work, step_generator
from clseg.models import BetaVAE
from clseg.settings import ContrastStage

PREFIX = "autoencoder."  # of its weights
BATCH = 64
LARGEST = 20_000  # slices that are clustered at once: the distances of n slices take 4 n² bytes, here 1.6 GB


@torch.no_grad()
def features(work: Work) -> np.ndarray:
    """The mean μ of every slice's features [n, latent] float64, slices as they are (3-D: the centre of the plane), by
    the auto-encoder among the weights of an earlier stage. Raises `RequestError` where there is none."""
    weights = {name.removeprefix(PREFIX): value for name, value in work.earlier.items() if name.startswith(PREFIX)}
    if not weights:
        raise RequestError("stages: pairs 'cluster' need the weights of an autoencoder stage; put one before them")
    store, rows = work.store, work.rows
    autoencoder = BetaVAE(store.channels, store.size, weights["decoder.0.weight"].shape[1]).to(work.device)
    autoencoder.load_state_dict(weights)
    images = (store.batch(rows[k : k + BATCH], work.device).image for k in range(0, len(rows), BATCH))
    return np.concatenate([autoencoder.encode(image)[0].cpu().double().numpy() for image in images])


def linkage_matrix(feature: np.ndarray, linkage: str = "ward") -> np.ndarray:
    """Which clusters are merged, at what distance: SciPy's linkage [n - 1, 4] of features [n, latent]."""
    return hierarchy.linkage(feature, linkage)


def clusters_of(feature: np.ndarray, stage: ContrastStage) -> np.ndarray:
    """The cluster of every row of features [n, latent], int64 [n], numbered by their first row.

    Merges the two nearest clusters until `stage.clusters` are left, or, where `stage.cluster_distance` is given, until
    none are nearer than that. Of more than 20,000 rows a random 20,000 are clustered and each other row joins the
    cluster with the nearest mean. Raises `RequestError` for fewer rows than clusters, or a single cluster.
    """
    n, distance = len(feature), stage.cluster_distance
    count = stage.clusters if distance is None else None
    if n < (count or 2):
        raise RequestError(f"stages: {n} slices do not make {count or 2} clusters; lower clusters or add subjects")
    sample = np.sort(torch.randperm(n, generator=step_generator(0, "clusters", 0))[:LARGEST].numpy())
    clustering = AgglomerativeClustering(count, linkage=stage.linkage, distance_threshold=distance)
    of_sample = clustering.fit_predict(feature[sample])
    if clustering.n_clusters_ == 1:
        raise RequestError(f"stages: at cluster_distance {distance:g} all slices are one cluster; lower it")
    cluster = np.empty(n, np.int64)
    cluster[sample], others = of_sample, np.setdiff1d(np.arange(n), sample)
    if len(others):
        print(f"{len(sample)} of {n} slices were clustered, each other slice joined the cluster with the nearest mean")
        means = pd.DataFrame(feature[sample]).groupby(of_sample).mean().to_numpy()  # [k, latent]
        cluster[others] = cdist(feature[others], means).argmin(axis=1)
    return pd.factorize(cluster)[0]


def pseudo_classes(work: Work, stage: ContrastStage) -> tuple[pd.DataFrame, Tensor]:
    """The pseudo-class of every slice in `work.rows`; raises as `features` and `clusters_of`.

    Returns the table (row, subject, phase, slice, position, cluster) that is recorded with the run, and the clusters
    as int64 [N] for all N slices of the store, -1 for slices that are not in `rows`, on the CPU.
    """
    store, rows = work.store, work.rows
    cluster = torch.full((len(store.slices),), -1)
    cluster[rows] = torch.from_numpy(clusters_of(features(work), stage))
    slices = store.slices.iloc[rows]
    table = store.volumes.iloc[slices["volume"]][["subject", "phase"]].set_index(slices.index)
    table = table.join(slices[["slice", "position"]]).assign(cluster=cluster[rows].numpy())
    return table.rename_axis("row").reset_index(), cluster


def purity(cluster: np.ndarray, labels: np.ndarray) -> float:
    """Share of the slices whose label is the most frequent one of their cluster: Σ_c max_l |c ∩ l| / n.

    From the share of the most frequent label (one cluster) to 1 (one slice each): it grows with the number of clusters
    whatever they hold, so compare it with that of shuffled clusters.
    """
    return pd.crosstab(np.asarray(cluster), np.asarray(labels)).max(axis=1).sum() / len(cluster)
