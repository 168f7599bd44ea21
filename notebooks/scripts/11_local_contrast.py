# %% [markdown]
# # Which regions are alike?
# **Local contrast trains the decoder without labels: a region of a slice is like the same region of another view of it, and unlike
# its neighbours.** It follows global contrast; the weights of the encoder stay as they are (they are *frozen*).
#
# **Goals.** After this lesson you can (1) say what a region, its positive and its negatives are, (2) compute the local loss, and its
# value for equal regions, (3) design an experiment that asks *why* a loss falls.
#
# **You need** [04_infonce](04_infonce.ipynb) for the loss and [10_global_contrast](10_global_contrast.ipynb) for pairs of slices.
# **About 40 minutes** (55 with what is marked *optional*), one of them computing. Nothing is downloaded. The code of cells from *Can the task be solved by place alone?* on can be skipped: read what
# they print. The idea is that of Fig. 1 (ii) of Chaitanya et al. (2020).

# %%
from math import log

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from ipywidgets import interact
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from clseg import plots
from clseg.augment import intensity
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import Work, step_generator
from clseg.losses import local_contrastive_loss
from clseg.models import LocalHead, UNet
from clseg.pairs import Pairs
from clseg.regions import nearest_neighbours, region_grid
from clseg.settings import Geometry, LocalStage, NetworkConfig
from clseg.stages.local import local
from clseg.stages.local import regions as regions_of
from clseg.stages.sampling import partition_slices, random_slices

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# What this lesson is about, as one object. Change a value (`strategy` is only shown), run all cells again, and see what follows.

# %%
stage = LocalStage(
    strategy="lr",  # lr (views of one slice) or ld (and slices of the same partition)
    decoder_blocks=3,  # l, how many decoder blocks learn, from 2 to 5 here; the map has side / 2^(5 - l) pixels
    regions=13,  # A, regions of a map that serve as anchors: 9 or 13
    size=3,  # K, side of a region in pixels of the map: 1 or 3
    negatives=5,  # neighbours that are negatives, in each of the two maps
    neighbours="published",  # which neighbours: published (hand-written) or nearest
    slices=10,  # slices in a batch, before they are augmented
    temperature=0.1,  # tau
)

# %% [markdown]
# ## The idea in one picture
# Segmentation needs features that differ from place to place inside a slice, and global contrast asks for one embedding per slice.
# So take two views that differ in brightness and contrast **only**: what lies at one place in one view lies at the same
# place in the other. The blue region of view 1 should be like the blue region of view 2, and unlike the orange ones of both.

# %%
large = prepare(phantom_dataset(subjects=1), Geometry(size=[192, 192], spacing_mm=1.1), progress=False)
image = large.batch(large.volume_rows(0)[3:4]).image
scale = 2 ** (5 - stage.decoder_blocks)  # image pixels per map pixel, along a side
map_size = tuple(side // scale for side in large.size)
corners, near = regions_of(stage, map_size)


def boxes(axis, picture, corners, size, colours, title, scale=scale):
    """Regions of the map, drawn where they lie in the image; no colour, no box."""
    axis.imshow(picture, cmap="gray", vmin=0, vmax=1.5)
    for (row, column), colour in zip((corners * scale).tolist(), colours, strict=True):
        if colour:
            square = plt.Rectangle((column - 0.5, row - 0.5), size * scale, size * scale, fill=False, edgecolor=colour)
            line = "--" if colour == plots.RED else "-"
            axis.add_patch(square).set(linewidth=1.8, linestyle=line, clip_on=False)
    axis.set_title(title)
    axis.set_axis_off()


centre = [None] * len(corners)  # colours: the region in the middle of the map, number 4, and its negatives
for region in near[4].tolist():
    centre[region] = plots.ORANGE
centre[4] = plots.SKY
generator = step_generator(0, "idea", 1)
pictures = {"slice": image, "view 1": intensity(image, generator), "view 2": intensity(image, generator)}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.8))
for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
    boxes(axis, picture[0, 0], corners, stage.size, centre if title != "slice" else [None] * len(centre), title)
plt.show()

# %% [markdown]
# Notice what a region is: a few pixels of a feature *map* of the decoder (here 48 x 48 for 192 x 192 pixels), drawn where
# they lie in the image. Through the deeper levels of the U-Net such a pixel sees far beyond its box, to the border of the
# image. There a convolution needs pixels that do not exist, and takes zeros for them (*zero padding*). So a network can find out how far a place
# is from the border, even if the image is noise. Keep that in mind.
#
# ## The grid
# A is 9 or 13 regions, K is 1 or 3 map pixels.


# %%
def grid(regions=13, size=3, blocks=3):
    """The places of the regions over the slice, for a map after so many decoder blocks."""
    map_scale = 2 ** (5 - blocks)
    places, _ = region_grid(tuple(side // map_scale for side in large.size), size, regions)
    colours = [plots.SKY if r < regions else plots.RED for r in range(len(places))]
    _, axis = plt.subplots(figsize=(4.2, 4.2))
    title = f"A = {regions}, K = {size}, {blocks} decoder blocks: {len(places)} places"
    boxes(axis, image[0, 0], places, size, colours, title, map_scale)
    plt.show()


grid()

# %% tags=["slider"]
_ = interact(grid, regions=[9, 13], size=[1, 3], blocks=[2, 3, 4, 5])

# %% [markdown]
# Blue boxes are anchors. Use the menus to change their number A, their side K and the decoder map. The red ones, for A = 13 and K = 3, are four places that the released code's hand-written tables name
# as negatives although they are not among the 13: (1/4, 1/2), (1/2, 1/4), (1/2, 3/4) and (3/4, 1/2), in parts of the side. They
# are never anchors. The package copies the tables by default (`published`) and has the regular rule beside
# it (`nearest`: the nearest of the anchors themselves).

# %%
grids = {(A, K): region_grid(map_size, K, A) for A, K in ((9, 3), (13, 3), (13, 1))}
places, by_hand = grids[13, 3]
by_rule = nearest_neighbours(places[:13], 5)
figure, axes = plt.subplots(1, 4, figsize=(11, 3.4))
shown = [
    (0, by_hand, "corner, published"),
    (0, by_rule, "corner, nearest"),
    (4, by_hand, "middle, published"),
    (4, by_rule, "middle, nearest"),
]
for axis, (region, rule, name) in zip(axes, shown, strict=True):
    colours = ["0.9" if r < 13 else None for r in range(len(places))]
    for other in rule[region].tolist():
        colours[other] = plots.ORANGE if other < 13 else plots.RED
    colours[region] = plots.SKY
    boxes(axis, image[0, 0], places, 3, colours, name)
plt.show()

# %% [markdown]
# Blue: the anchor. Orange and red (dashed): its negatives. Grey: other anchors. How much do the two rules differ? Distances in parts of the
# range of places, from the first to the last:

# %% tags=["nbval-check-output"]
for (A, K), (places, by_hand) in grids.items():
    by_rule = nearest_neighbours(places[:A], 5)
    side = (places.max() - places.min()).item()
    distance = {
        name: (places[:A, None] - places[rule]).double().norm(dim=-1).mean().item() / side  # [A, 5, 2] -> mean
        for name, rule in (("published", by_hand), ("nearest", by_rule))
    }
    common = np.mean([len({*one} & {*other}) for one, other in zip(by_hand.tolist(), by_rule.tolist(), strict=True)])
    print(
        f"A = {A}, K = {K}: {len(places)} places, mean distance published {distance['published']:.2f}, "
        f"nearest {distance['nearest']:.2f}, {common:.1f} of 5 negatives in common"
    )

# %% [markdown]
# Hardly: for A = 9 they are the same, for 13 they share four of five. Nobody should expect much of this choice; that
# the negatives lie *far* from their anchor (about half of that range) is common to both.
#
# ## Tiny tensors
# Two images, two views of each, four regions with embeddings of two dimensions. Three regions are anchors, the fourth serves as a
# negative only, as the red places do.

# %%
degrees = torch.tensor(
    [
        [[10.0, 95.0, 170.0, 60.0], [30.0, 100.0, 250.0, 45.0]],  # image 0: view 1, view 2
        [[350.0, 80.0, 200.0, 300.0], [20.0, 150.0, 190.0, 320.0]],  # image 1
    ],
    dtype=torch.float64,
)
tiny = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=-1)  # [image, view, region, 2]
first, second = tiny[:, 0], tiny[:, 1]  # [2, 4, 2] each
tiny_near = torch.tensor([[1, 3], [0, 2], [1, 3]])  # the negatives of regions 0, 1 and 2

# %% [markdown]
# ## The loss, slowly
# With $s(x,y)=\cos(x,y)/\tau$ and $a_r$ the embedding of region $r$ in map $a$, the term of that region, compared with map $b$, is
# $$t(a,b,r)=-\log\frac{e^{s(a_r,b_r)}}{e^{s(a_r,b_r)}+\sum_{m\in N(r)}\left[e^{s(a_r,a_m)}+e^{s(a_r,b_m)}\right]}$$
#
# Image $i$ has two views, with the maps $\text{first}_i$ and $\text{second}_i$. $L^R$ is the mean of $t(\text{first}_i,\text{second}_i,r)$ and
# $t(\text{second}_i,\text{first}_i,r)$ over all images and regions. $L^D$ adds the same region of *other* images, those of the same
# partition, as further positives: the terms $t(\text{first}_i,\text{first}_j,r)$ join the mean.


# %%
def slow_loss(first, second, neighbours, temperature, image_pairs=None):
    """The formula, word for word, in float64."""

    def e(x, y):
        return torch.exp(x @ y / (x.norm() * y.norm()) / temperature)

    def term(a, b, r):
        negatives = sum(e(a[r], a[m]) + e(a[r], b[m]) for m in neighbours[r].tolist())
        return -torch.log(e(a[r], b[r]) / (e(a[r], b[r]) + negatives))

    terms = []
    for i in range(len(first)):
        for r in range(len(neighbours)):
            terms += [term(first[i], second[i], r), term(second[i], first[i], r)]
            if image_pairs is not None:
                terms += [term(first[i], first[j], r) for j in range(len(first)) if image_pairs[i, j]]
    return sum(terms) / len(terms)


# %% [markdown]
# The package does the same with matrices. Do they agree, in value and in gradient?

# %% tags=["nbval-check-output"]
both_images = torch.tensor([[False, True], [True, False]])
for name, image_pairs in {"L^R": None, "L^D": both_images}.items():
    slow, fast = (tiny.clone().requires_grad_() for _ in range(2))
    slow_value = slow_loss(slow[:, 0], slow[:, 1], tiny_near, 0.1, image_pairs)
    fast_value = local_contrastive_loss(fast[:, 0], fast[:, 1], tiny_near, 0.1, image_pairs)
    slow_value.backward()
    fast_value.backward()
    apart = max((slow_value - fast_value).abs(), (slow.grad - fast.grad).abs().max())
    print(f"{name}: slow {slow_value:.4f}, fast {fast_value:.4f}, the same within 1e-10: {bool(apart < 1e-10)}")

# %% [markdown]
# ## What the loss sees and what it does
# Image 0 alone, rows sorted by region, view 1 before view 2. The blocks on the diagonal should be red.

# %%
alone = tiny[0].transpose(0, 1).flatten(0, 1)  # [4 regions x 2 views, 2]
name_of_row = [f"region {r}" for r in range(4) for _ in range(2)]
plots.similarity_matrix(alone @ alone.T, "cosine of every two regions of image 0", groups=name_of_row)

# %%
leaf = tiny[:1].clone().requires_grad_()
local_contrastive_loss(leaf[:, 0], leaf[:, 1], tiny_near, 0.1).backward()
arrows = leaf.grad[0].transpose(0, 1).flatten(0, 1)
plots.gradient_picture(alone, arrows, groups=name_of_row, title="L^R, temperature 0.1")

# %% [markdown]
# Region 2 has the long arrows: its two views lie 80 degrees apart, and a negative, region 1, is nearer to one of them than the other
# view is. One view of region 0 is driven away from region 3, its negative next to it, and drawn to its other view. Region 3 is the anchor of
# nothing, yet it is driven the other way (its arrows are nearly hidden behind the points): negatives learn, too.
#
# ## What the numbers of the loss mean
# If all regions have one embedding, every term is the logarithm of one plus the number of negatives, which are counted in both
# maps. At the other end regions in unlike directions bring it near zero, and the temperature says how near.

# %% tags=["nbval-check-output"]
places, by_hand = region_grid(map_size, 3, 13)
equal, different = torch.ones(1, len(places), 2), torch.eye(len(places))[None]
for count in (3, 4, 5):
    start = local_contrastive_loss(equal, equal, by_hand[:, :count]).item()
    print(f"{count} negatives: equal regions {start:.3f}, which is log({1 + 2 * count}) = {log(1 + 2 * count):.3f}")
for tau in (0.05, 0.1, 0.5, 1.0):
    low = local_contrastive_loss(different, different, by_hand, tau).item()
    print(f"temperature {tau}: regions at right angles {low:.4f}")

# %% [markdown]
# Notice that at 0.1 right angles are enough: 128 dimensions of a head have room for 17 directions at right angles. Nothing in the loss asks
# for more, and *in $L^R$ nothing compares a region with the same place of another image*. We come back to this.
#
# ## Optional: L^D: the same region of other patients
# $L^D$ draws one slice per partition of three volumes and calls the same region of two slices of a partition alike. So
# 24 ordered pairs of images join the 2 x 12 pairs of views: half of the loss. (The released code leaves out the way back from view 2, so that
# they are 24 of 36, and takes 4 negatives.)

# %%
medium = prepare(phantom_dataset(subjects=24), Geometry(size=[64, 64], spacing_mm=3.2), progress=False)
training, held_out = medium.rows(medium.subjects[:16]), medium.rows(medium.subjects[16:])
chosen, partition = partition_slices(medium, training, 4, 12, step_generator(0, "local", 0))
same_partition = (partition[:, None] == partition[None, :]).fill_diagonal_(False)
plots.pairs_matrix(
    Pairs(same_partition, torch.zeros_like(same_partition)),
    "L^D: images of one batch",
    groups=[f"volume {v}" for v in medium.batch(chosen).volume],
)

# %% [markdown]
# (No image is a negative: negatives are regions.) The pairs assume that one place shows one thing in two patients, without
# registration. Does it? Of the pixels that are heart in one slice, how many carry the same label in the other?

# %%
agreement = []
for step in range(50):
    chosen, partition = partition_slices(medium, training, 4, 12, step_generator(0, "local", step))
    known = medium.batch(chosen)
    i, j = torch.where(~torch.eye(len(chosen), dtype=torch.bool))
    heart = known.label[i] > 0
    share = ((known.label[i] == known.label[j]) & heart).sum(dim=(1, 2)) / heart.sum(dim=(1, 2))
    volume = np.where(known.volume[i] == known.volume[j], "same", "other")
    same = np.where(partition[i] == partition[j], "same", "other")
    agreement.append(pd.DataFrame({"volume": volume, "partition": same, "same label": share}))
pd.concat(agreement).groupby(["volume", "partition"]).mean().round(2)

# %% [markdown]
# Between patients a third, whether the partition is the same or not; inside one volume, between partitions, far more. On the
# phantom, whose hearts differ in place, turn and size, being in the same partition says next to nothing about what lies at a
# place. $L^D$ assumes images that are aligned.
#
# ## Can the task be solved by place alone?
# The positive of a region is the region at the same place, its negatives lie at other places. A decoder that writes down *where* it
# is, and ignores the image, would solve it. Three trainings tell, with the same first weights, steps and slices:
#
# * `same`: two views of one slice, as it should be ($L^R$);
# * `shuffled`: view 2 is that of **another slice**, so what agrees is the place, and what most slices show there;
# * `noise`: both views are independent noise: **no image at all**.
#
# In `noise` there is nothing but the place. The network has half the published width, its encoder is random (not pre-trained by global contrast)
# and its weights are frozen. (Only the running averages of its *batch norm* move: a layer that rescales features by mean and spread of the batch, and keeps averages of them for later use.) The images
# have 64 pixels, and 50 steps are few: a small experiment, but the question is whether the task *can* be solved this way.

# %%
corners, near = regions_of(stage, tuple(side // scale for side in medium.size))
width = NetworkConfig(filters=[8, 16, 32, 64, 64, 64], norm_momentum=0.1)


def two_views(kind, rows, step):
    """Both views [n, 1, H, W] of the slices of a step; drawn as `stages.local` draws them."""
    generator = step_generator(0, "local", step)
    image = medium.batch(random_slices(rows, stage.slices, generator)).image
    if kind == "noise":
        return tuple(torch.rand(image.shape, generator=generator) for _ in range(2))
    view_1, view_2 = intensity(image, generator), intensity(image, generator)
    return view_1, view_2.roll(1, dims=0) if kind == "shuffled" else view_2


def embed(network, head, views):
    """Region embeddings [n, R', D] of both views; batch norm in training mode, as in the published stage."""
    maps = []
    for view in views:
        with torch.no_grad():
            features = network.encoder(view)
        maps.append(head(network.decoder(features, stage.decoder_blocks), corners))
    return maps


def new_network():
    torch.manual_seed(0)
    return UNet(medium.channels, medium.num_classes, width), LocalHead(width, stage.decoder_blocks, stage.size)


def loss_of(network, head, views):
    return local_contrastive_loss(*embed(network, head, views), near, stage.temperature)


network, _ = new_network()
by_stage = local(Work(network, medium, training, stage.slices, seed=0), stage.model_copy(update={"strategy": "lr"}))
here = loss_of(network, by_stage.learning["head"], two_views("same", training, 0))
print(f"step 0: the stage says {by_stage.step_loss(0).item():.3f}, this notebook {here.item():.3f}")

# %%
trained, losses = {"untrained": new_network()}, {}
for kind in ("same", "shuffled", "noise"):
    network, head = new_network()
    learning = [*network.decoder.blocks[: stage.decoder_blocks].parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(learning, stage.learning_rate)
    losses[kind] = []
    for step in range(50):
        loss = loss_of(network, head, two_views(kind, training, step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses[kind].append(loss.item())
    trained[kind] = network, head

figure, axis = plt.subplots(figsize=(7, 3.6))
for (kind, values), colour in zip(losses.items(), (plots.BLUE, plots.RED, plots.GREY), strict=True):
    axis.semilogy(range(1, 51), values, color=colour, label=kind)
axis.set(xlabel="step", ylabel="local loss", title="noise is learned as well as images")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# **Yes.** All three fall by a factor of several hundred. `shuffled` and `noise` begin near the value for equal regions, log 11 = 2.40; `same`
# begins lower, because two views of a slice look alike before anything is learned. After 15 steps the curves meet. Noise, in which there is
# nothing to find, is as good a training set for this loss as images are. A curve of the local loss that falls is therefore no evidence that
# the decoder learned anything about the heart.
#
# ## Optional: what do the regions know?
# On subjects that no training saw. A region of view 1 looks for its nearest neighbour:
#
# * `loss, same` and `loss, shuffled`: the loss on real pairs of views, and on pairs that share nothing but the place;
# * `place`: among the regions of view 2 of its own slice, how often is it the one at the same place;
# * `place, other slice`: the same among the regions of *another* slice;
# * `slice`: among the regions at its own place in all slices, how often is it that of its own slice.


# %%
@torch.no_grad()
def measured(network, head, batches=4):
    rows = []
    count = len(near)  # anchors only: negative-only places belong to the grid, not to the question
    for step in range(1000, 1000 + batches):
        views = two_views("same", held_out, step)
        first, second = (F.normalize(regions[:, :count], dim=-1) for regions in embed(network, head, views))
        own, other = first @ second.mT, first @ second.roll(1, dims=0).mT  # [n, R, R] each
        place, slice_ = torch.arange(count), torch.arange(len(first))
        at_place = torch.einsum("ird,jrd->irj", first, second)  # [n, R, n]
        rows.append(
            {
                "loss, same": loss_of(network, head, views).item(),
                "loss, shuffled": loss_of(network, head, two_views("shuffled", held_out, step)).item(),
                "place": (own.argmax(dim=-1) == place).float().mean().item(),
                "place, other slice": (other.argmax(dim=-1) == place).float().mean().item(),
                "slice": (at_place.argmax(dim=-1) == slice_[:, None]).float().mean().item(),
            }
        )
    return pd.DataFrame(rows).mean()


pd.DataFrame({kind: measured(*pair) for kind, pair in trained.items()}).T.round(2)

# %% [markdown]
# By chance `place` would be 1 in 13 and `slice` 1 in 10. Every training makes the embedding a map of places: a region finds its
# place in another slice, nearly always another patient's, and the decoder that has seen nothing but noise solves the task on the phantom's
# slices, too. What is in the slice is not lost: `slice` is far above chance before training (random layers keep much of an image), and
# rises with training on slices. It does so with `shuffled`, too, whose loss rewards nothing of the kind. `same` has a little more, but over
# other seeds the gain was from 0.01 to 0.07: too small to build on.
#
# ## What did the decoder gain?
# The decoder's map, without the head, is what fine-tuning gets. How well does a linear classifier on it tell heart from
# the rest in new subjects? *AUC*: take a heart pixel and another one at random; how often does the heart pixel get the higher score? 0.5 is
# chance, 1 is perfect. As a yardstick, a score that looks at no image: how often a pixel was heart in the training subjects. The last
# column gives the classifier the map *and* that yardstick.


# %%
@torch.no_grad()
def features(network, rows):
    """Decoder map [pixels, channels] and whether the middle of each map pixel is heart [pixels]."""
    batch = medium.batch(rows)
    feature_map = network.decoder(network.encoder(batch.image), stage.decoder_blocks)
    heart = batch.label[:, scale // 2 :: scale, scale // 2 :: scale] > 0
    return feature_map.permute(0, 2, 3, 1).flatten(0, 2).numpy(), heart


def heart_auc(network, *more):
    """AUC in new subjects of the decoder map, and of what is known of each place beside it."""
    (x, heart), (x_new, heart_new) = features(network, training), features(network, held_out)
    x, x_new = (
        np.hstack([part, *(np.tile(m.flatten(), len(part) // m.numel())[:, None] for m in more)]) for part in (x, x_new)
    )
    centre, spread = x.mean(axis=0), x.std(axis=0) + 1e-6
    linear = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1e-3).fit((x - centre) / spread, heart.flatten())
    return roc_auc_score(heart_new.flatten(), linear.decision_function((x_new - centre) / spread))


heart, heart_new = (features(trained["untrained"][0], rows)[1] for rows in (training, held_out))
by_place = heart.float().mean(dim=0)
print(
    f"place alone, no network: AUC {roc_auc_score(heart_new.flatten(), by_place.expand(heart_new.shape).flatten()):.2f}"
)
for kind, (network, _) in trained.items():
    print(f"decoder map, {kind}: AUC {heart_auc(network):.2f}, map and place {heart_auc(network, by_place):.2f}")

# %% [markdown]
# Each training makes the map better at finding the heart, and the one on noise no less than `same`. None beats the yardstick, and beside it
# no trained map adds clearly more than the untrained one. Here, then, what the decoder gained is knowledge of place: useful, because hearts
# lie in the middle, but not knowledge of hearts. **What this does not show:** that the published result is due to place. There the encoder is
# pre-trained, images are larger, and what counts is Dice after fine-tuning. [42_which_method](42_which_method.ipynb) compares
# `matched-gd` with `matched-gd+lr` on real patients, with everything else equal: there the difference is *not known* with 1, 2 and 8
# labelled patients, and with all 77 it is none that matters.
#
# ## What to notice
# * The positive of a region is at the *same place*, and its negatives are at *other places*. So the place alone solves the task.
# * A control that has nothing to find (noise) says more about a loss than a long training.
#
# ## Summary
# * A region is K × K pixels of a decoder map. It is like the same region of another view (`lr`), and with `ld` also like that region of other
#   patients. Its neighbours in both maps are negatives.
# * The views differ in brightness and contrast only, so that places correspond.
# * Equal regions have the loss log(1 + 2 · negatives). Training brings it near 0 within tens of steps.
# * Here the decoder learned places: noise trained it as well as images did.
# * `ld` assumes aligned patients. On the phantom that is not given.
#
# ## Exercises
# [93_local_contrast](93_local_contrast.ipynb): the first loss, one term in code, a cheat, and four statements.
#
# ## Where to read on
# * Next lesson: [12_positional_contrast](12_positional_contrast.ipynb). Does it help a segmenter? [42_which_method](42_which_method.ipynb)
#   compares `matched-gd` with `matched-gd+lr`; [31_glcl_ablation](31_glcl_ablation.ipynb) asks which choices matter.
# * The code: `clseg/regions.py` (the published tables), `clseg/losses.py` (`local_contrastive_loss`), `clseg/stages/local.py`.
# * K. Chaitanya et al., NeurIPS 2020, [arXiv:2006.10511](https://arxiv.org/abs/2006.10511), and
#   [their code](https://github.com/krishnabits001/domain_specific_cl).
