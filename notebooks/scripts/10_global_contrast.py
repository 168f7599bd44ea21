# %% [markdown]
# # Which slices are alike?
# **Global contrast trains an encoder without labels: slices that are alike get similar embeddings, all others different
# ones. Everything depends on the answer to one question: who is alike?**
#
# **Goals.** After this lesson you can (1) say what three answers, named `gr`, `gd-` and `gd`, call alike, and what each gets wrong, (2) compute the loss of a
# batch and its first value, (3) test whether an encoder has learned anatomy or has remembered its patients.
#
# **You need** [04_infonce](04_infonce.ipynb) for the loss, and [02_few_labels](02_few_labels.ipynb) for encoder and Dice. **About 45
# minutes** (65 with what is marked *optional*), one of them computing. Nothing is downloaded. The code of long cells can be skipped. The idea is that of Fig. 1 (i) of Chaitanya et al. (2020).

# %%
from math import log

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from ipywidgets import interact

from clseg import augment, plots
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import Work, step_generator
from clseg.losses import contrastive_loss
from clseg.models import UNet
from clseg.pairs import instance_pairs, partition_pairs
from clseg.settings import ContrastStage, Geometry, NetworkConfig
from clseg.stages.contrast import contrast, draw_batch
from clseg.stages.sampling import partition_slices, random_slices

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# What this lesson is about, as one object. Change a value, run all cells again, and see what follows.

# %%
stage = ContrastStage(
    pairs="partition",  # who is alike: instance (views of a slice) or partition (the same part of any volume)
    strategy="gd",  # of the partition pairs: gd- or gd
    partitions=4,  # S, equal parts of a volume
    set_of=None,  # positives between all volumes of a batch; 2: between two and two, as Chaitanya et al. have it
    slices=12,  # slices in a batch, before they are augmented
    temperature=0.1,  # tau
    denominator="pair",  # pair (Chaitanya et al.) or all (the positives are in the denominator, too)
)

# %% [markdown]
# ## The idea in one picture
# Nobody has labelled these slices. But a *volume* (the scan of one subject) is not a bag of slices: it runs from the base of the heart (the top,
# where the vessels are) to its apex (the tip), in every subject. So cut every volume into S equal parts, the *partitions*, and take one slice of each.

# %%
phantom = phantom_dataset(subjects=24)
store = prepare(phantom, Geometry(size=[64, 64], spacing_mm=3.2), progress=False)
training, held_out = store.subjects[:16], store.subjects[16:]
rows = store.rows(training)

chosen, partition = partition_slices(store, rows, stage.partitions, stage.slices, step_generator(0, "idea", 0))
batch = store.batch(chosen)
plots.volume_grid(
    batch.image[:, 0],
    batch.label,
    title="one slice per partition of every volume",
    titles=[f"volume {v}, partition {p}" for v, p in zip(batch.volume, partition, strict=True)],
    class_names=store.class_names,
)

# %% [markdown]
# Look down a column (with S = 4 a row is a volume): other patients, other scanners, and yet the same part of the heart. Look
# along a row: one patient, and the heart changes. Global contrast says: **a column is alike, a row is not.** The outlines are
# there for you; no network sees them in this notebook. Three answers to "who is alike?" go by short names:
#
# | name | positives | negatives |
# |---|---|---|
# | `gr` | views of one slice (SimCLR, the method of lesson 04) | all other slices |
# | `gd-` | views of one slice | slices of other partitions; the rest of its own partition is neither |
# | `gd` | views of one slice, and the same partition of other volumes | slices of other partitions |
#
# Now one anchor (black frame) and all slices of three volumes. Blue is a positive, orange a negative, grey is neither. (A batch has one
# slice of each partition of a volume, so the blue neighbour in the anchor's own row is never in one batch with it.) A volume whose number of
# slices is no multiple of S has slices that belong to no partition.


# %%
def who_is_alike(partitions=4, strategy="gd"):
    """Three volumes, a row each: the anchor, its positives and negatives."""
    shown = store.batch([row for volume in (0, 1, 2) for row in store.volume_rows(volume)])
    place = torch.from_numpy(store.slices["slice"].to_numpy()[shown.row])
    length = torch.from_numpy(store.slices["slices_in_volume"].to_numpy()[shown.row]) // partitions
    partition = place // length  # as they are drawn: what is left over has the number `partitions` or more
    alike = partition_pairs(shown.row, partition, strategy)
    anchor = 4
    _, axis = plt.subplots(figsize=(10, 3.4))
    for row, picture in enumerate(shown.image[:, 0]):
        colour = plots.BLUE if alike.positive[anchor, row] else plots.ORANGE if alike.negative[anchor, row] else "0.6"
        colour = plots.BLACK if row == anchor else "0.6" if partition[row] >= partitions else colour
        x, y = place[row].item(), -shown.volume[row].item() * 1.15
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1.5, extent=(x + 0.06, x + 0.94, y + 0.06, y + 0.94))
        axis.add_patch(plt.Rectangle((x + 0.06, y + 0.06), 0.88, 0.88, fill=False, edgecolor=colour, linewidth=4))
    axis.set(xlim=(0, place.max() + 1), ylim=(-2.4, 1.05), aspect="equal", title=f"{strategy}, {partitions} partitions")
    axis.set_axis_off()
    plt.show()


who_is_alike(4, "gd")

# %% tags=["slider"]
_ = interact(who_is_alike, partitions=[2, 3, 4, 6], strategy=["gd", "gd-"])

# %% [markdown]
# Change S in the menu above: where do borders cut between slices that look the same? (With
# 6 nearly everywhere.) With `gd-` (only the views of the anchor are its positives, and they
# are not drawn here) no slice is blue, and the anchor's partition turns grey.
#
# Is the rule true? The masks can tell. If $a_k$ and $b_k$ are the areas of structure $k$ in two slices, then
# $2\sum_k\min(a_k,b_k)\,/\,\sum_k(a_k+b_k)$ is the Dice that their masks would have if every structure of one could be moved
# onto that of the other. We take it over pairs of slices **of different volumes** in many batches.

# %%
area = torch.stack([torch.from_numpy((store.labels == index).sum(axis=(1, 2))) for index in store.class_names], dim=1)


def between_volumes(setting, batches=50, rows=rows):
    """Pairs of slices of different volumes in many batches: alike or not, how far apart, how similar their masks."""
    tables = []
    for step in range(batches):
        generator = step_generator(0, "contrast", step)
        if setting.pairs == "instance":
            slice_id = torch.from_numpy(random_slices(rows, setting.slices, generator))
            partition, alike = torch.zeros_like(slice_id), instance_pairs(slice_id)
        else:
            chosen, partition = partition_slices(store, rows, setting.partitions, setting.slices, generator)
            slice_id = torch.from_numpy(chosen)
            alike = partition_pairs(slice_id, partition, setting.strategy)
        known = store.batch(slice_id.numpy())
        i, j = torch.where(known.volume[:, None] != known.volume[None, :])
        a, b = area[slice_id[i]], area[slice_id[j]]  # [pairs, K]
        columns = {
            "positive": alike.positive[i, j],
            "negative": alike.negative[i, j],
            "partitions_apart": (partition[i] - partition[j]).abs(),
            "distance": (known.position[i] - known.position[j]).abs(),
            "overlap": 2 * torch.minimum(a, b).sum(dim=1) / (a + b).sum(dim=1),
        }
        tables.append(pd.DataFrame({name: values.numpy() for name, values in columns.items()}))
    return pd.concat(tables, ignore_index=True)


all_volumes = ContrastStage(
    pairs="partition", set_of=None
)  # 12 slices; `gd` as published has 16, in sets of two volumes
seen = between_volumes(all_volumes)
for apart, of_both in seen.groupby("partitions_apart"):
    print(f"{apart} partitions apart: overlap {of_both['overlap'].mean():.2f}")

# %% [markdown]
# The overlap decreases with every partition, so the rule holds on average. It is no sharp line: neighbouring partitions are nearly
# as alike as the same one. That price comes back below.

# %% [markdown]
# ## The views
# An augmented copy of a slice is a *view* of it: a random crop of about half the side (100/192) at the full size again, then another
# brightness and contrast. A view must change what does not matter and keep what does.

# %%
shown = batch.image[1:3]
views = [augment.contrast_view(shown, step_generator(0, "views", number)) for number in (1, 2)]
plots.volume_grid(
    torch.stack([shown, *views], dim=1).flatten(0, 1)[:, 0],
    title="two slices and two views of each",
    titles=[f"{what} {number}" for number in range(2) for what in ("slice", "view 1 of", "view 2 of")],
)

# %% [markdown]
# Notice how little a view keeps of the image around the heart, how much brightness and contrast change, and that left stays
# left: no flip, no rotation. Does the heart stay inside? The same crop of a mask shows how much of it is left.

# %%
heart = (store.batch(rows).label > 0).float()[:, None]  # [N, 1, H, W]
heart = heart[heart.sum(dim=(1, 2, 3)) > 0]
cropped = torch.stack([augment.crop_resize(heart, step_generator(0, "crops", number)) for number in range(3)])
kept = cropped.sum(dim=(2, 3, 4)) * augment.CROP**2 / heart.sum(dim=(1, 2, 3))  # [3, N]
print(f"a view keeps {augment.CROP**2:.0%} of the image and on average {kept.mean():.0%} of the heart")
print(f"in {(kept < 0.75).float().mean():.0%} of the views a quarter of the heart or more is lost")

# %% [markdown]
# That works because the heart is in the middle of these images. On a data set where the organ is at the border, look at the
# views before you train.

# %% [markdown]
# ## Tiny tensors
# Two volumes, two partitions, one slice of each, two views: eight rows, and embeddings of two dimensions, so that everything
# can be drawn. In the code that Chaitanya et al. released, and here, the slice itself counts as view 0, and an augmented copy is view 1.

# %%
degrees = torch.tensor([15.0, 40.0, 70.0, 130.0, 80.0, 110.0, 160.0, 200.0], dtype=torch.float64)
embedding = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)  # [8, 2], of length 1
tiny = {
    "slice": torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]),
    "partition": torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    "view": torch.tensor([0, 1, 0, 1, 0, 1, 0, 1]),
}
name_of_row = [f"slice {s}" for s in tiny["slice"].tolist()]
alike = partition_pairs(tiny["slice"], tiny["partition"], "gd", tiny["view"])
plots.pairs_matrix(alike, "gd: who is alike", groups=name_of_row)

# %% [markdown]
# Read a row: for anchor 0 (slice 0 itself) its own view is positive, and so is slice 1, the slice of the other volume in the
# same partition; the other view of slice 1 is *neither* (as released, slices are paired with slices and copies with copies); all of
# partition 1 is negative.
#
# ## The loss, slowly
# With $s_{ij}=\cos(z_i,z_j)/\tau$, positives $P$ and the negatives $N_i$ of anchor $i$ (Chaitanya et al., released code; we
# take a plain mean over the pairs):
# $$\mathcal L=\frac1{|P|}\sum_{(i,j)\in P}-\log\frac{e^{s_{ij}}}{e^{s_{ij}}+\sum_{k\in N_i}e^{s_{ik}}}$$
# Only the positive of this pair is in the denominator, never the other positives: they do not compete with each other.


# %%
def slow_loss(embedding, alike, temperature):
    """The formula, word for word, in float64."""
    z = [vector / vector.norm() for vector in embedding.double()]
    s = [[z_i @ z_j / temperature for z_j in z] for z_i in z]
    terms = []
    for i in range(len(z)):
        for j in range(len(z)):
            if alike.positive[i, j]:
                negatives = sum(s[i][k].exp() for k in range(len(z)) if alike.negative[i, k])
                terms.append(-torch.log(s[i][j].exp() / (s[i][j].exp() + negatives)))
    return sum(terms) / len(terms)


# %% [markdown]
# The package does the same with matrices, without a loop over anchors and without overflow. Do they agree, in value and
# in gradient?

# %% tags=["nbval-check-output"]
for tau in (0.1, 1.0):
    slow, fast = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    slow_value = slow_loss(slow, alike, tau)
    fast_value = contrastive_loss(fast, alike, tau, denominator="pair")
    slow_value.backward()
    fast_value.backward()
    apart = max((slow_value - fast_value).abs(), (slow.grad - fast.grad).abs().max())
    print(
        f"temperature {tau}: slow {slow_value:.4f}, fast {fast_value:.4f}, the same within 1e-10: {bool(apart < 1e-10)}"
    )

# %% [markdown]
# With `denominator="all"` (the paper of lesson 12, and our reading of that of lesson 13) all positives of the anchor are in every denominator. Where every anchor has
# one positive, as in SimCLR, the two are one loss:

# %%
views_alike = instance_pairs(tiny["slice"])
for name, positives in {"gr, one positive each": views_alike, "gd, two positives each": alike}.items():
    both = [contrastive_loss(embedding, positives, 0.1, denominator=which).item() for which in ("pair", "all")]
    print(f"{name}: pair {both[0]:.4f}, all {both[1]:.4f}")

# %% [markdown]
# ## What the loss sees and what it does
# It sees similarities only. (Red is similar here, blue is not: these are no pairs.) Two blocks of four rows should be red, one for each
# partition, and the rest blue; slices 1 and 2 stand in the way.

# %%
plots.similarity_matrix(embedding @ embedding.T, "cosine of every two of the eight rows", groups=name_of_row)

# %% [markdown]
# And it moves the embeddings: every arrow is the way of steepest descent of one row. The arrows lie along the circle, because
# the length of an embedding does not matter. Angles (right is 0, up is 90 degrees), view 0 and view 1: slice 0 at 15 and 40, slice 1 at 70 and
# 130, slice 2 at 80 and 110, slice 3 at 160 and 200.


# %%
def gradient(embedding, alike, temperature):
    leaf = embedding.clone().requires_grad_()
    return torch.autograd.grad(contrastive_loss(leaf, alike, temperature, denominator="pair"), leaf)[0]


for tau in (0.1, 1.0):
    arrows = gradient(embedding, alike, tau)
    display(plots.gradient_picture(embedding, arrows, groups=name_of_row, title=f"gd, temperature {tau}"))

# %% [markdown]
# At 0.1 two rows move most: view 1 of slice 1 and view 0 of slice 2, each across a negative on its way to its positives. At 1 the arrows are
# more equal in length: the two rows of slice 3 pull at each other, too.
#
# ## Temperature: who is listened to?
# The gradient of a term with respect to $s_{ik}$, the similarity of negative $k$ over τ, is its share of the denominator, so among the negatives
# it is shared out by a softmax of $s_{ik}$. (With respect to the cosine it is 1/τ times as much, so the cell multiplies by τ.) How much falls on the hardest, the most similar, negative? Ask autograd, for
# anchor 2 and its other view (four negatives, so an equal share is 0.25). "All together" is one minus the
# share of the positive in the denominator.

# %% tags=["nbval-check-output"]
cosine = (embedding @ embedding.T)[2]  # [8] similarities of anchor 2
negatives = alike.negative[2]
for tau in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
    leaf = cosine.clone().requires_grad_()
    s = leaf / tau
    term = -s[3] + torch.cat([s[3:4], s[negatives]]).logsumexp(dim=0)
    push = torch.autograd.grad(term, leaf)[0][negatives]
    print(f"temperature {tau}: hardest negative {push.max() / push.sum():.2f}, all together {push.sum() * tau:.2f}")

# %% [markdown]
# A low temperature listens to one negative only, a high one to all more equally. Hard negatives are the most informative ones, and
# the first to be *wrong*: a neighbouring partition of another volume, nearly the same anatomy. So temperature and
# partitions belong together: a low temperature punishes wrong borders more.
#
# ## Optional: where it leads
# Let the eight points follow their arrows: gradient descent on the embeddings themselves, without a network in between.

# %%
strategies = {
    "gr": views_alike,
    "gd-": partition_pairs(tiny["slice"], tiny["partition"], "gd-"),
    "gd": alike,
}
figure, axes = plt.subplots(2, 3, figsize=(9, 6.6))
for of_tau, tau in zip(axes, (0.1, 0.5), strict=True):
    for axis, (name, positives) in zip(of_tau, strategies.items(), strict=True):
        points = embedding.clone()
        for _ in range(600):
            points = F.normalize(points - 0.1 * gradient(points, positives, tau), dim=1)
        axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.7"))
        for number, colour in enumerate((plots.BLUE, plots.RED, plots.GREEN, plots.PINK)):
            own = points[tiny["slice"] == number]
            axis.scatter(*own.T, color=colour, marker="os"[number // 2], s=60, alpha=0.6, label=f"slice {number}")
        axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
        axis.set_title(f"{name}, temperature {tau}")
        axis.set_axis_off()
axes[0, 0].legend(loc="center", frameon=False)
figure.suptitle("round: partition 0, square: partition 1")
plt.show()

# %% [markdown]
# `gr` spreads the slices over the circle: that slices 0 and 1 show the same part of the heart counts for nothing. `gd` brings each
# partition together. At temperature 0.1 it nearly stops there, with next to nothing left to gain; at 0.5 it goes on to opposite ends.
# `gd-` is the surprise: nothing pulls slices 0 and 1 towards each other, and at 0.1 they stay where `gr` has them, apart. At 0.5
# they end close together all the same: both move away from the same negatives. Pushing alone can gather what is alike.
#
# ## A real batch
# The same three answers for batches as training draws them, with S = 4 as published and 12 slices. The rows are sorted by
# partition (`gr`: by slice).

# %%
settings = {
    "gr": all_volumes.model_copy(update={"pairs": "instance"}),
    "gd-": all_volumes.model_copy(update={"strategy": "gd-"}),
    "gd": all_volumes,
}
work = Work(UNet(1, store.num_classes, NetworkConfig()), store, rows, 12, seed=0)
drawn = {name: draw_batch(work, setting, 0)[1] for name, setting in settings.items()}
for name, of_batch in drawn.items():
    count = len(of_batch.positive)  # rows come view after view, and in each volume after volume
    place = torch.arange(count) % 12
    order = (place if name == "gr" else place % 4 * 12 + place).argsort(stable=True)
    ordered = type(of_batch)(of_batch.positive[order][:, order], of_batch.negative[order][:, order])
    groups = place[order] if name == "gr" else [f"part {p}" for p in place[order] % 4]
    display(plots.pairs_matrix(ordered, f"{name}: {count} rows of 12 slices", groups=groups))

# %% [markdown]
# `gr` sees negatives everywhere. `gd-` has three rows per slice as released, the slice itself and two copies, and greys out what it
# does not know. `gd` fills part of the grey with positives; the pattern inside a block is the work of `view`: slices are paired
# with slices and copies with copies, as in the released code (without `view`, the whole block would be blue).

# %% tags=["nbval-check-output"]
number = torch.arange(12).repeat(2)
counted = drawn | {"gd without view": partition_pairs(number, number % 4, "gd")}
for name, of_batch in counted.items():
    p, n = (int(mask.sum(dim=1).unique().item()) for mask in (of_batch.positive, of_batch.negative))
    print(
        f"{name}: {len(of_batch.positive)} rows, {p} positives and {n} negatives per anchor, loss of equal embeddings {log(1 + n):.2f}"
    )

# %% [markdown]
# The last number of each line is the loss of an encoder that gives all rows the same embedding. Losses of different strategies start from different
# values, so never compare their curves.
#
# How many of these negatives are wrong? Over 50 batches, among negatives of other volumes: the share that lies within 0.1 of
# the anchor's *position* (m/n for slice m of n: small at the base, 1 at the apex), and the share whose mask overlaps the anchor's more than that of a typical (the median) positive of
# `gd` does. `gr` also draws the slices that are left over, at the apex, and these are easy negatives: so it is counted a second time, on the
# slices that `gd` can draw.

# %%
typical = seen.loc[seen["positive"], "overlap"].median()
place = store.slices["slice"].to_numpy()[rows]
length = store.slices["slices_in_volume"].to_numpy()[rows] // stage.partitions
in_a_partition = rows[place // length < stage.partitions]
asked = {"gr": (settings["gr"], rows), "gr, without left-over slices": (settings["gr"], in_a_partition)}
asked |= {name: (settings[name], rows) for name in ("gd-", "gd")}
for name, (setting, of_rows) in asked.items():
    negative = between_volumes(setting, rows=of_rows).query("negative")
    near, similar = (negative["distance"] <= 0.1).mean(), (negative["overlap"] > typical).mean()
    print(f"{name}: {near:.0%} of the negatives are within 0.1, {similar:.0%} more alike than a typical positive")

# %% [markdown]
# By position, partitions remove two thirds of the near negatives of `gr`; the rest are neighbours across a border.
# (`gd-` and `gd` have the same negative slices, in three rows or two; they differ in their positives.)
# By the masks, on the same slices, partitions help a little. Only a little, because hearts of two patients differ in
# size about as much as two parts of one heart: the phantom has normal hearts, wide ones, and ones with thick walls, as clinics have.
# "Alike" has more than one meaning, and partitions know one of them.
#
# ## Optional: how many partitions?
# A batch of 12 slices holds 12 / S volumes. More partitions make the positives more alike, and fewer, and put more borders
# into a volume. `left_out`: the share of slices that belong to no partition; `overlap_...`: mean overlap of the masks; `similar_negatives`: the
# share of negatives that are more alike than the median positive of this S.

# %%
depth = store.volumes["slices"].to_numpy()
table = []
for count in (2, 3, 4, 6):
    setting = all_volumes.model_copy(update={"partitions": count})
    _, of_batch = draw_batch(work, setting, 0)
    pairs_seen = between_volumes(setting)
    positive, negative = pairs_seen[pairs_seen["positive"]], pairs_seen[pairs_seen["negative"]]
    table.append(
        {
            "S": count,
            "volumes": 12 // count,
            "left_out": 1 - (depth // count * count).sum() / depth.sum(),
            "positives": int(of_batch.positive[0].sum()),
            "negatives": int(of_batch.negative[0].sum()),
            "share_positive": of_batch.positive.float().mean().item(),
            "overlap_positive": positive["overlap"].mean(),
            "overlap_negative": negative["overlap"].mean(),
            "similar_negatives": (negative["overlap"] > positive["overlap"].median()).mean(),
        }
    )
pd.DataFrame(table).set_index("S").round(2)

# %% [markdown]
# With 6 partitions positives and negatives are hardly different in their masks. The reason is what is left out: a volume of 11 slices has six
# parts of one slice, and five slices, at the apex, are never drawn. What remains is more alike, so that a third of the negatives is more alike
# than the typical positive. With 2 the contrast is clear but coarse. Which S is
# best for segmentation is another question: [31_glcl_ablation](31_glcl_ablation.ipynb).
#
# ## Does a network learn it?
# A small encoder, 300 steps on 16 subjects at 32 pixels, with the parameters from the top. Then the slices of one draw
# go through it as they are, from training subjects and from 8 subjects it has never seen.

# %%
small = prepare(phantom, Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
width = NetworkConfig(filters=[8, 16, 32, 64, 64, 64], norm_momentum=0.1)
torch.manual_seed(0)
network = UNet(small.channels, small.num_classes, width)
pretraining = contrast(Work(network, small, small.rows(training), stage.slices, seed=0), stage)
head = pretraining.learning["head"]
optimiser = torch.optim.Adam([*network.encoder.parameters(), *head.parameters()], stage.learning_rate)


@torch.no_grad()
def look(subjects):
    """One slice per partition of these subjects, not augmented: similarities [n, n], partition and volume [n]."""
    drawn, partition = partition_slices(
        small, small.rows(subjects), stage.partitions, 10**6, step_generator(0, "look", 0)
    )
    order = partition.argsort(stable=True)
    shown = small.batch(drawn[order.numpy()])
    z = F.normalize(head(network.encoder(shown.image)[-1]), dim=1)
    return z @ z.T, partition[order], shown.volume


def measured(when):
    table = []
    for who, subjects in {"training": training, "new": held_out}.items():
        similarity, partition, volume = look(subjects)
        other, same = volume[:, None] != volume[None, :], partition[:, None] == partition[None, :]
        nearest = partition[similarity.masked_fill(~other, -2).argmax(dim=1)]
        row = {"same partition": similarity[other & same].mean(), "other partition": similarity[other & ~same].mean()}
        row["nearest in same"] = (nearest == partition).float().mean()
        table.append({"when": when, "subjects": who} | {name: round(value.item(), 2) for name, value in row.items()})
    return table


before, losses = measured("before"), []
for step in range(300):
    loss = pretraining.step_loss(step)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(loss.item())
print(
    f"loss: {losses[0]:.2f} in the first step, {sum(losses[:20]) / 20:.2f} in the first 20, {sum(losses[-20:]) / 20:.2f} in the last 20"
)
pd.DataFrame(before + measured("after")).set_index(["when", "subjects"])

# %% [markdown]
# Mean similarity of slices of different volumes, of the same and of another partition; and how often the nearest slice of
# another volume is of the same partition, which by chance happens once in S times. The same as pictures, after training:

# %%
for who, subjects in {"training": training, "new": held_out}.items():
    similarity, partition, _ = look(subjects)
    display(
        plots.similarity_matrix(similarity, f"{who} subjects, sorted by partition", [f"part {p}" for p in partition])
    )

# %% [markdown]
# Compare the two. The first loss of all is above log 19 = 2.94, and near it after a few steps. On the subjects it was trained on, the blocks on
# the diagonal stand out: the same and another partition differ by more than 0.5. On new subjects they differ by less than 0.1 (one seed). That is small. So at most a
# little of the order along the volume was learned, and most of what the loss shows is memory. The column *nearest in same* is too noisy to tell, with 32 slices. A falling loss does not say which of the two happened; a look at subjects that
# were in no batch is cheap, and does.
#
# What does the temperature mean for *these* embeddings?

# %%
views, of_batch = draw_batch(Work(network, small, small.rows(training), stage.slices, seed=0), stage, 999)
with torch.no_grad():
    z = F.normalize(torch.cat([head(network.encoder(view)[-1]) for view in views]), dim=1)
for tau in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
    share = (z @ z.T / tau).masked_fill(~of_batch.negative, -torch.inf).softmax(dim=1)  # [B, B], over the negatives
    print(
        f"temperature {tau}: the hardest of {int(of_batch.negative[0].sum())} negatives gets {share.amax(dim=1).mean():.0%} of the push"
    )

# %% [markdown]
# An equal share would be 1 in 18, 6 %. At 0.1 the hardest negative of this batch gets six to seven times that; in the tiny example it got
# nearly all. The same temperature is mild where similarities lie close together and harsh where they do not.
#
# ## What to notice
# * Each strategy is one choice of two masks, positives and negatives. The loss does not change.
# * No answer is right: `gr` pushes apart what is the same anatomy, `gd` calls unlike hearts alike, and borders cut neighbours.
# * A falling loss on training subjects proves little. Look at new subjects.
#
# ## Summary
# * Partitions are equal parts of a volume. `gd`: the same partition of any volume is alike. `gd-`: only views of a slice are alike, and
#   the rest of its partition is left out. `gr`: only views are alike, and everybody else is a negative (SimCLR).
# * `denominator="pair"` puts one positive into the denominator, `"all"` puts all of them.
# * Equal embeddings have the loss log(1 + negatives): the collapse line of this loss.
# * A low temperature finds the hardest negatives, and the hardest may be wrong ones.
# * More partitions make positives more alike and the batch poorer in them.
#
# ## Exercises
# [92_global_contrast](92_global_contrast.ipynb): the first loss, counting pairs, writing the rule of `gd`, and four statements.
#
# ## Where to read on
# * Next lessons: [11_local_contrast](11_local_contrast.ipynb), regions inside a slice; [12_positional_contrast](12_positional_contrast.ipynb),
#   partitions without borders. Does it help a segmenter? [42_which_method](42_which_method.ipynb).
# * The code: `clseg/pairs.py` (`partition_pairs`) and `clseg/stages/contrast.py`.
# * K. Chaitanya et al., NeurIPS 2020, [arXiv:2006.10511](https://arxiv.org/abs/2006.10511), and
#   [their code](https://github.com/krishnabits001/domain_specific_cl).
