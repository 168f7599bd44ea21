# %% [markdown]
# # Slices that look alike to an auto-encoder
# **Cluster contrast asks nobody who is alike: an auto-encoder describes every slice, similar descriptions form a cluster, and slices
# of one cluster (a *pseudo-class*) shall have similar embeddings.**
#
# **This is an interpretation of Zhang et al. (2022).** Their code is not public, and what is known is the order of things: beta-VAE,
# hierarchical clusters, contrast between clusters, fine-tuning. Layers, β, linkage, number of clusters and the exact loss are ours.
#
# You will see: the idea of their figure on slices of the phantom, the loss as a slow loop and as a fast function, what the number of
# clusters and the linkage change, what the clusters turn out to be, and which other methods are special cases. Nothing is
# downloaded; half a minute on one CPU thread, and a GPU would not be noticed.

# %%
from math import log

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from clseg import plots
from clseg.cluster import clusters_of, features, linkage_matrix, pseudo_classes, purity
from clseg.data.prepare import prepare
from clseg.loop import Work
from clseg.losses import contrastive_loss
from clseg.models import UNet
from clseg.pairs import Pairs, cluster_pairs, instance_pairs
from clseg.settings import AutoencoderStage, ContrastStage, NetworkConfig
from clseg.stages.autoencoder import autoencoder
from clseg.stages.contrast import draw_batch
from clseg.stages.sampling import equal_partitions
from clseg.study.files import read_dataset
from clseg.study.parameters import read_parameters

# %% tags=["parameters"]
stage: str = "contrast"  # the kind of stage: this notebook is about this one
pairs: str = "cluster"  # who is alike: slices of one pseudo-class
clusters: int = 10  # k, where the hierarchy is cut
linkage: str = "ward"  # when two clusters are near: ward, average or complete
positives: str = "cluster"  # cluster (all of the pseudo-class) or view (its other slices are neither alike nor unlike)
slices: int = 12  # slices in a batch, before they are augmented
temperature: float = 0.1  # tau
denominator: str = "all"  # all (the positives are in the denominator, too) or pair

# %%
parameters = read_parameters(globals(), ContrastStage)
print(parameters.model_dump_json(indent=1))

# %% [markdown]
# ## The idea, in three steps
# **1. Describe.** A beta-VAE squeezes every slice into 32 numbers, the *features*, and makes the slice again from them. Nobody
# tells it what a heart is. Here it learns from 16 subjects in 600 steps.

# %%
about = read_dataset("phantom").model_copy(update={"options": {"subjects": 16}})
store = prepare(about, about.geometry["laptop"], progress=False)
rows = store.rows(store.subjects)

torch.manual_seed(0)
network = UNet(store.channels, store.num_classes, NetworkConfig())
settings = AutoencoderStage(stage="autoencoder", slices=parameters.slices)
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
# Look at what survives: the chest, its bright and dark parts and where they are. Look at what does not: of the heart no more
# than a grey cloud.
#
# **2. Cluster.** Every slice starts as a cluster of its own; the two nearest clusters are merged, again and again. That makes a
# tree, and a cut through it makes k clusters: the pseudo-classes.

# %%
earlier = {f"autoencoder.{name}": value for name, value in vae.state_dict().items()}  # as a run hands it on
work = Work(network, store, rows, 12, seed=0, earlier=earlier)
table, cluster = pseudo_classes(work, parameters)
described = features(work)
tree = linkage_matrix(described, parameters.linkage)
cut = tree[-parameters.clusters :][:2, 2].mean()  # between the merge that leaves k clusters and the next
plots.dendrogram(tree, cut, f"{len(rows)} slices, linkage {parameters.linkage}")

# %%
examples = [of_one.sample(4, random_state=0, replace=len(of_one) < 4) for _, of_one in table.groupby("cluster")][:4]
examples = pd.concat(examples)
plots.volume_grid(
    store.batch(examples["row"].to_numpy()).image[:, 0],
    title="four clusters (a row each), four slices of each: subject, position",
    titles=[f"{s[-3:]}, at {p:.1f}" for s, p in zip(examples["subject"], examples["position"], strict=True)],
)

# %% [markdown]
# The slices of a row are alike, no doubt: but *in what*? Read the titles and make a guess; we shall measure.
#
# **3. Contrast.** A batch of slices, two views of each: rows of one pseudo-class are alike, rows of others are not.
#
# ## Tiny tensors
# Six slices in three pseudo-classes of three, two and one, two views each, embeddings of two dimensions. There are two ways to
# read the figure of the paper: slices of the same pseudo-class are positives (`positives: cluster`), or they are only kept
# out of the negatives (`positives: view`). The package has both.

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
# ## What the loss sees and what it does

# %%
plots.similarity_matrix(embedding @ embedding.T, "tiny embeddings", groups=groups)

# %%
for name, alike in tiny.items():
    leaf = embedding.clone().requires_grad_()
    (arrows,) = torch.autograd.grad(contrastive_loss(leaf, alike, 0.5, "all"), leaf)
    display(plots.gradient_picture(embedding, arrows, groups=groups, title=f"positives: {name}, temperature 0.5"))

# %% [markdown]
# One slice of class 0 lies at 150 degrees, beyond a slice of class 1. With `cluster` it is called home, past the slice in between,
# while those near 0 come to meet it. With `view` nobody calls: the negatives push class 0 apart, and a slice is drawn to
# its own other view only.
#
# ## What are the clusters?
# *Purity*: the share of slices whose label is the most frequent one of their cluster. It rises with the number of clusters whatever
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
figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for axis, (label, values) in zip(axes, labels.items(), strict=True):
    for (kind, of_kind), colour in zip(kinds.items(), (plots.PINK, plots.GREEN), strict=True):
        found = [clusters_of(of_kind, parameters.model_copy(update={"clusters": k})) for k in counts]
        axis.plot(counts, [purity(c, values) for c in found], "o-", color=colour, label=kind)
        axis.plot(counts, [purity(c[shuffle], values) for c in found], "--", color=colour)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="clusters k", xticks=counts, xticklabels=counts, ylim=(0, 1.02))
    axis.set_title(label, fontsize=9)
axes[0].set_ylabel("purity")
axes[0].legend(fontsize=7, loc="upper left")
plt.show()

# %% [markdown]
# **The clusters are the patients.** With 16 clusters, as many as subjects, each cluster is a subject; position and heart are hardly
# better than chance until the clusters are smaller than a volume. It is no fault of the clustering: most of an image is chest, and
# what makes two images differ most is whose chest it is and how the scanner shows it. The auto-encoder reconstructs exactly that.
# So on volumes cluster contrast says "slices of one patient are alike", nearly the opposite of `gd` and `pcl`. On photographs,
# one per patient, this cannot happen: look at the purity before you believe in a pseudo-class.
#
# The green line takes the mean of each subject off its features before they are clustered. What is left is where in the body the
# slice is and how large the heart: pseudo-classes across patients. (This is not in the paper, nor in the package.)
#
# ## What the linkage changes

# %%
report = []
for kind, of_kind in kinds.items():
    for rule in ("ward", "average", "complete"):
        found = clusters_of(of_kind, parameters.model_copy(update={"linkage": rule}))
        same = found[:, None] == found
        row = {"clustered": kind, "linkage": rule, "largest cluster": np.bincount(found).max()}
        row["pairs alike"] = (same.sum() - len(same)) / (same.size - len(same))
        row |= {f"{label.partition(' ')[0]} purity": purity(found, values) for label, values in labels.items()}
        report.append(row)
pd.DataFrame(report).set_index(["clustered", "linkage"]).round(2)

# %% [markdown]
# Little, as long as the groups are patients: they are so far apart that every rule finds them. Without the means there are no gaps,
# and `average` leaves one giant and crumbs, so that many more pairs of a batch are positives; `ward` keeps the sizes even.
#
# ## What contains what
# The batch of a step, with other answers to "who is alike". The same random embeddings go through the loss each time.

# %% tags=["nbval-check-output"]
every = torch.arange(len(store.slices))


def batch_pairs(cluster=None, **changes):
    return draw_batch(work, parameters.model_copy(update=changes), 0, cluster)[1]


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
# Whoever chooses k chooses between SimCLR (k = number of slices) and "all are alike" (k = 1).
#
# ## Exercise: the least loss
# A batch of 12 slices, four each of three pseudo-classes, two views. The encoder has learned all there is to learn: rows of a
# pseudo-class have one and the same embedding, and the other two classes are so far away that their part of the denominator is
# nothing. What is the loss (`denominator="all"`, `positives="cluster"`)? It is not 0.

# %%
answer = None  # your number


# %%
def check(answer):
    if answer is None:
        return "not answered yet"
    of_row = torch.arange(3).repeat_interleave(4).repeat(2)
    perfect = cluster_pairs(torch.arange(12).repeat(2), of_row)
    truth = contrastive_loss(torch.eye(3)[of_row], perfect, 0.01, "all").item()
    wrong = {
        0.0: "the positives are in the denominator, all of them",
        log(8): "nearly: an anchor is not its own positive",
        log(4): "each slice has two views, and both are rows",
        log(3): "each slice has two views, and both are rows",
        log(23): "that is the loss before training, when all 24 rows are alike",
    }
    if abs(answer - truth) < 0.01:
        return "right"
    near = [hint for value, hint in wrong.items() if abs(answer - value) < 0.01]
    return near[0] if near else "no: how many terms of the denominator are left, and how large are they?"


check(answer)

# %% [markdown]
# <details><summary><b>Solution</b> (try first)</summary>
#
# An anchor has 4 · 2 − 1 = 7 positives, and each has the similarity 1 of the anchor with itself. So every bracket is
# $\frac1\tau-\log(7e^{1/\tau})=-\log 7$, and the loss is $\log 7\approx 1.95$, whatever the temperature. Larger clusters
# have a larger least loss: curves of different k cannot be compared.
# </details>
#
# The same in code, checked:

# %% tags=["nbval-check-output"]
print(f"log(4 * 2 - 1) = {log(4 * 2 - 1):.3f}: {check(log(4 * 2 - 1))}")
