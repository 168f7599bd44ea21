# %% [markdown]
# # Slices that look alike to an auto-encoder
# **Cluster contrast asks nobody who is alike: an auto-encoder describes every slice, similar descriptions form a cluster, and slices
# of one cluster (a *pseudo-class*) should have similar embeddings.**
#
# **This is an interpretation of Zhang et al. (2022).** Their code is not public. What is known is the order of things: beta-VAE,
# hierarchical clusters, contrast between clusters, fine-tuning. Layers, β, linkage, number of clusters and the exact loss are ours.
#
# **Goals.** After this lesson you can (1) say how pseudo-classes are made, (2) find out what they hold, with purity, (3) say
# which methods you get with one cluster and with as many clusters as slices.
#
# **You need** [04_infonce](04_infonce.ipynb) for the loss and [10_global_contrast](10_global_contrast.ipynb) for pairs. **About 40
# minutes** (50 with what is marked *optional*), one of them computing. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display
from ipywidgets import interact

from clseg import plots
from clseg.cluster import clusters_of, features, linkage_matrix, pseudo_classes, purity
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import Work
from clseg.losses import contrastive_loss
from clseg.models import UNet
from clseg.pairs import Pairs, cluster_pairs, instance_pairs
from clseg.settings import AutoencoderStage, ContrastStage, Geometry, NetworkConfig
from clseg.stages.autoencoder import autoencoder
from clseg.stages.contrast import draw_batch
from clseg.stages.sampling import equal_partitions

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# What this lesson is about, as one object. Change `clusters` or `linkage`, run all cells again, and see what follows.

# %%
stage = ContrastStage(
    pairs="cluster",  # who is alike: slices of one pseudo-class
    clusters=10,  # k, where the hierarchy is cut
    linkage="ward",  # when two clusters are near: ward, average or complete
    positives="cluster",  # cluster (all of the pseudo-class) or view (its other slices are neither alike nor unlike)
    slices=12,  # slices in a batch, before they are augmented
    temperature=0.1,  # tau
    denominator="all",  # all (the positives are in the denominator, too) or pair
)

# %% [markdown]
# ## The idea, in three steps
# **1. Describe.** An *auto-encoder* is two networks: one makes a few numbers of an image, the other makes the image again from them. A
# *VAE* adds noise to these numbers while it learns, and keeps them near 0; in a *beta-VAE* the number β says how strongly (here β = 1, ours). Here 32 numbers,
# the *features*, describe a slice. Nobody tells the network what a heart is. It learns from 16 subjects in 600 steps.

# %%
store = prepare(phantom_dataset(subjects=16), Geometry(size=[64, 64], spacing_mm=3.2), progress=False)
rows = store.rows(store.subjects)

torch.manual_seed(0)
network = UNet(store.channels, store.num_classes, NetworkConfig())
settings = AutoencoderStage(stage="autoencoder", slices=stage.slices)
training = autoencoder(Work(network, store, rows, settings.slices, seed=0), settings)
vae, losses = training.learning["autoencoder"], []
optimiser = torch.optim.Adam(vae.parameters(), settings.learning_rate)
for step in range(600):
    loss = training.step_loss(step)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())

shown = store.batch(rows[8::25][:6]).image
with torch.no_grad():
    restored = vae.decode(vae.encode(shown)[0])
print(f"loss per pixel: {np.mean(losses[:10]):.3f} in the first 10 steps, {np.mean(losses[-10:]):.3f} in the last 10")
plots.volume_grid(
    torch.stack([shown, restored], dim=1).flatten(0, 1)[:, 0],
    title="six slices, each beside what 32 numbers keep of it",
    titles=["slice", "restored"] * 6,
)

# %% [markdown]
# Look at what survives: the chest, its bright and dark parts and where they are. Of the heart its place and rough size survive, its
# walls do not.
#
# **2. Cluster.** Every slice starts as a cluster of its own; the two nearest clusters are merged, again and again. That makes a
# tree, and a cut through it makes k clusters: the pseudo-classes. How near are two *clusters*? That rule is the *linkage*. `average`: the mean
# distance of a slice of one and a slice of the other. `complete`: the largest such distance. `ward`: how much the squared distances to the
# means of the clusters grow by the merge.

# %%
earlier = {f"autoencoder.{name}": value for name, value in vae.state_dict().items()}  # as a run hands it on
work = Work(network, store, rows, 12, seed=0, earlier=earlier)
table, cluster = pseudo_classes(work, stage)
described = features(work)
tree = linkage_matrix(described, stage.linkage)
cut = tree[-stage.clusters :][:2, 2].mean()  # between the merge that leaves k clusters and the next
plots.dendrogram(tree, cut, f"{len(rows)} slices, merged until {stage.clusters} clusters are left ({stage.linkage})")

# %%
examples = [of_one.sample(4, random_state=0, replace=len(of_one) < 4) for _, of_one in table.groupby("cluster")][:4]
examples = pd.concat(examples)
plots.volume_grid(
    store.batch(examples["row"].to_numpy(copy=True)).image[:, 0],
    title="four clusters (a row each), four slices of each: subject, position",
    titles=[f"{s[-3:]}, at {p:.1f}" for s, p in zip(examples["subject"], examples["position"], strict=True)],
)

# %% [markdown]
# The slices of a row look alike in some way: but *in what*? Read the titles and make a guess. Then we measure.
#
# Here are all slices: a row is a patient, a column the number of a slice, a colour a pseudo-class. Change k.


# %%
def map_of_clusters(k=stage.clusters):
    """The pseudo-class of every slice, patients below each other."""
    found = clusters_of(described, stage.model_copy(update={"clusters": k}))
    picture = np.full((len(store.subjects), table["slice"].max() + 1), np.nan)
    picture[table["subject"].map(list(store.subjects).index), table["slice"]] = found
    _, axis = plt.subplots(figsize=(9, 6))
    axis.imshow(picture, cmap="tab20", vmin=0, vmax=19, aspect="auto")
    for (row, column), number in np.ndenumerate(picture):
        if not np.isnan(number):
            axis.text(column, row, int(number), ha="center", va="center")
    axis.set(xlabel="slice, base to apex", ylabel="patient", title=f"which of {k} pseudo-classes each slice is in")
    axis.set_xticks(range(picture.shape[1]))
    axis.grid(False)
    plt.show()


map_of_clusters()

# %% tags=["slider"]
_ = interact(map_of_clusters, k=(2, 20))

# %% [markdown]
# **3. Contrast.** A batch of slices, two views of each: rows of one pseudo-class are alike, rows of others are not.
#
# ## Tiny tensors
# Six slices in three pseudo-classes of three, two and one, two views each, embeddings of two dimensions. The figure of the paper
# draws slices of the same pseudo-class as positives (`positives: cluster`); its abstract promises that they are no negatives
# (`positives: view`), and a better choice of positives. The package has both.

# %%
degrees = torch.tensor([10.0, 30.0, 60.0, 75.0, 150.0, 165.0, 95.0, 110.0, 190.0, 215.0, 300.0, 320.0]).double()
embedding = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)  # [12, 2], of length 1
slice_id = torch.arange(6).repeat_interleave(2)
pseudo_class = torch.tensor([0, 0, 0, 1, 1, 2]).repeat_interleave(2)
of_cluster = cluster_pairs(slice_id, pseudo_class)
tiny = {"cluster": of_cluster, "view": Pairs(instance_pairs(slice_id).positive, of_cluster.negative)}
groups = [f"class {c}" for c in pseudo_class.tolist()]
for name, alike in tiny.items():
    display(plots.pairs_matrix(alike, f"positives: {name}", groups=groups))

# %% [markdown]
# ## The loss, slowly
# With $s_{ij}=\cos(z_i,z_j)/\tau$, positives $P_i$ and negatives $N_i$, mean over the anchors $i$:
# $$\mathcal L_i=-\frac1{|P_i|}\sum_{j\in P_i}\Big[s_{ij}-\log\sum_{k\in P_i\cup N_i}e^{s_{ik}}\Big]$$


# %%
def slow_loss(embedding, alike, temperature):
    """The formula, word for word, in float64."""
    z = [vector / vector.norm() for vector in embedding.double()]
    s = [[z_i @ z_j / temperature for z_j in z] for z_i in z]
    terms = []
    for i in range(len(z)):
        P = [j for j in range(len(z)) if alike.positive[i, j]]
        N = [k for k in range(len(z)) if alike.negative[i, k]]
        denominator = sum(s[i][k].exp() for k in P + N)
        terms.append(-sum(s[i][j] - torch.log(denominator) for j in P) / len(P))
    return sum(terms) / len(terms)


# %% tags=["nbval-check-output"]
for name, alike in tiny.items():
    slow, fast = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    slow_value, fast_value = slow_loss(slow, alike, 0.1), contrastive_loss(fast, alike, 0.1, "all")
    slow_value.backward()
    fast_value.backward()
    apart = max((slow_value - fast_value).abs(), (slow.grad - fast.grad).abs().max())
    print(f"{name}: slow {slow_value:.4f}, fast {fast_value:.4f}, the same within 1e-10: {bool(apart < 1e-10)}")

# %% [markdown]
# `view` asks for less, so its loss is smaller: never compare the two. If all positives coincide and the negatives are far, each positive has
# the share $1/|P_i|$ of the denominator. So the least loss of `cluster` is the mean of $\log|P_i|$, here 1.2; that of `view` is 0.
#
# ## Optional: what the loss sees and what it does

# %%
plots.similarity_matrix(embedding @ embedding.T, "cosine of every two of the twelve rows", groups=groups)

# %%
for name, alike in tiny.items():
    leaf = embedding.clone().requires_grad_()
    (arrows,) = torch.autograd.grad(contrastive_loss(leaf, alike, 0.5, "all"), leaf)
    display(plots.gradient_picture(embedding, arrows, groups=groups, title=f"positives: {name}, temperature 0.5"))

# %% [markdown]
# Angles are counted from the right: 0 degrees is right, 90 is up. One slice of class 0 has its views at 150 and 165 degrees, beyond a slice
# of class 1. With `cluster` the rest of its class draws it back, past the slice in between, and the points near 0 move towards it. With
# `view` nothing pulls it to its class: each slice is drawn to its own other view, and the negatives push. The other two slices of class 0
# come a little nearer to each other; that one hardly moves.
#
# ## What are the clusters?
# *Purity*: the share of slices whose label is the most frequent one of their cluster. It tends to rise with the number of clusters whatever
# they hold (with one slice each it is 1), so the dashed line shows the same clusters with the slices shuffled. Three labels
# that the auto-encoder never saw: whose slice it is, which quarter of the volume, and whether the heart is small, medium or large in it.

# %%
heart = (store.labels[rows] > 0).sum(axis=(1, 2))
labels = {
    "subject": table["subject"].to_numpy(),
    "position (quarter)": equal_partitions(store, rows, 4).numpy(),
    "heart (small, medium, large)": np.digitize(heart, np.quantile(heart, [1 / 3, 2 / 3])),
}
own_mean = pd.DataFrame(described).groupby(labels["subject"]).transform("mean").to_numpy()
kinds = {"features": described, "features minus the subject's mean": described - own_mean}
counts, shuffle = (2, 4, 8, 16, 32, 64), np.random.default_rng(0).permutation(len(rows))
figure, axes = plt.subplots(1, 3, figsize=(12, 5), sharey=True, layout="constrained")
for axis, (label, values) in zip(axes, labels.items(), strict=True):
    for (kind, of_kind), colour in zip(kinds.items(), (plots.PINK, plots.GREEN), strict=True):
        found = [clusters_of(of_kind, stage.model_copy(update={"clusters": k})) for k in counts]
        axis.plot(counts, [purity(c, values) for c in found], "o-", color=colour, label=kind)
        axis.plot(counts, [purity(c[shuffle], values) for c in found], "--", color=colour, label=f"{kind}, shuffled")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="clusters k", xticks=counts, xticklabels=counts, ylim=(0, 1.02))
    axis.set_title(label)
axes[0].set_ylabel("purity")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# **The clusters are the patients.** With 16 clusters, as many as subjects, each cluster is a subject. Up to 16 clusters position is even below its
# dashed line: a cluster of whole patients holds all quarters about equally, a random group has more of one by luck. With 64 it is above: then a cluster
# is a piece of one patient. It is no fault of the clustering. A likely reason: most of an image is chest, and what makes two images differ most is whose chest
# it is. Images cropped to the heart would test that.
# So on the phantom cluster contrast says "slices of one patient are alike", nearly the opposite of `gd` and `pcl`. On photographs,
# one per patient, this cannot happen, but a cluster may be a camera or a colour of skin: look at the purity before you believe in a
# pseudo-class.
#
# The green line takes the mean of each subject off its features before they are clustered. What is left is mostly where in the body the
# slice is and how large the heart: for a small k, pseudo-classes across patients. (This is not in the paper, nor in the package.)
#
# ## Optional: what the linkage changes

# %%
report = []
for kind, of_kind in kinds.items():
    for rule in ("ward", "average", "complete"):
        found = clusters_of(of_kind, stage.model_copy(update={"linkage": rule}))
        same = found[:, None] == found
        row = {"clustered": kind, "linkage": rule, "largest cluster": np.bincount(found).max()}
        row["pairs alike"] = (same.sum() - len(same)) / (same.size - len(same))
        row |= {f"{label.partition(' ')[0]} purity": purity(found, values) for label, values in labels.items()}
        report.append(row)
pd.DataFrame(report).set_index(["clustered", "linkage"]).round(2)

# %% [markdown]
# Little, as long as the groups are patients: they are so far apart that every rule finds them. Without the means there are no gaps,
# and `average` leaves one very large cluster and many tiny ones, so that many more pairs of slices are positives. `ward` and `complete`
# avoid that. (Your last digits will differ: the auto-encoder is another one on another machine.)
#
# ## What contains what
# The batch of a step, with other answers to "who is alike". The same random embeddings go through the loss each time.

# %% tags=["nbval-check-output"]
every = torch.arange(len(store.slices))


def batch_pairs(cluster=None, **changes):
    return draw_batch(work, stage.model_copy(update=changes), 0, cluster)[1]


drawn = {
    "one slice per cluster": batch_pairs(every),
    "instance (SimCLR)": batch_pairs(pairs="instance"),
    "the quarters as clusters": batch_pairs(equal_partitions(store, every.numpy(), 4)),
    "partition gcl (baseline of Zeng et al.)": batch_pairs(pairs="partition", strategy="gcl"),
    "one cluster": batch_pairs(torch.zeros_like(every)),
    "position with t = ∞ (Zeng et al.)": batch_pairs(pairs="position", threshold=float("inf")),
}
random = torch.randn(24, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
names = list(drawn)
for one, other in zip(names[::2], names[1::2], strict=True):
    equal = torch.equal(drawn[one].positive, drawn[other].positive)
    values = [contrastive_loss(random, drawn[name], 0.5, "all").item() for name in (one, other)]
    print(f"{one} = {other}: {equal}, loss {values[0]:.4f} and {values[1]:.4f}")

# %% [markdown]
# Whoever chooses k chooses between SimCLR (k = number of slices) and "all are alike" (k = 1; the package asks for 2 at least, for with one
# cluster there are no negatives, and a collapsed network is perfect).
#
# ## What to notice
# * Nobody told the auto-encoder what matters. What fills the image may win: here the chest.
# * Purity without the shuffled clusters beside it says nothing.
# * The least loss grows with the size of the clusters ($\log|P_i|$): curves of different k must not be compared.
#
# ## Summary
# * Describe (beta-VAE), cluster (a tree, cut at k), contrast (slices of one cluster are alike).
# * On the phantom, with k up to the number of patients, a cluster is one or a few whole patients: nearly the opposite of `gd` and `pcl`.
#   On scans of patients: measure. On ACDC each of ten clusters holds slices of 2 to 16 of the 52 patients, and they hardly follow position
#   ([39_ufc_clusters](39_ufc_clusters.ipynb)). The mean gain there was about that of the other three answers; whether it helps plain fine-tuning with few labels is
#   not known, before weak-to-strong it helps with 1 and 2 ([42_which_method](42_which_method.ipynb), `matched-ufc`).
# * Without the mean of each patient, clusters follow position and the size of the heart.
# * The linkage matters where there are no gaps: `average` may leave one very large cluster.
# * One slice per cluster is SimCLR; one cluster makes all alike.
#
# ## Exercises
# [95_cluster_contrast](95_cluster_contrast.ipynb): the least loss, purity in code, the two ends, and four statements.
#
# ## Where to read on
# * Next lesson: [14_semi_supervised](14_semi_supervised.ipynb), unlabelled images *during* fine-tuning. On skin photographs and in 3-D:
#   [37_ufc_skin](37_ufc_skin.ipynb), [38_ufc_heart](38_ufc_heart.ipynb); Dice against the number of clusters: [39_ufc_clusters](39_ufc_clusters.ipynb).
# * The code: `clseg/cluster.py` and `clseg/stages/autoencoder.py`.
# * Y. Zhang et al., BIBM 2022, [arXiv:2211.08557](https://arxiv.org/abs/2211.08557).
# * I. Higgins et al., *beta-VAE*, ICLR 2017, [openreview.net/forum?id=Sy2fzU9gl](https://openreview.net/forum?id=Sy2fzU9gl).
