# %% [markdown]
# # How near is alike?
# **Positional contrast needs no labels and no partitions: two slices are alike if their places in their volumes differ by less
# than a threshold.** One number replaces the borders of the partitions, and everything depends on it.
#
# **Goals.** After this lesson you can (1) say which slices are alike at a threshold, and how many, (2) say why positives can be
# pushed apart, (3) name the methods that are special cases of this one.
#
# **You need** [04_infonce](04_infonce.ipynb) for the loss and [10_global_contrast](10_global_contrast.ipynb) for partitions. **About 40
# minutes** (60 with what is marked *optional*), one of them computing. Nothing is downloaded. The code of long cells can be skipped. The idea is that of the method figure of Zeng et al. (MICCAI 2021).

# %%
from math import ceil, inf, log

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.display import display
from ipywidgets import FloatSlider, interact

from clseg import plots
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import Work, optimiser_for
from clseg.loop import learning_rate as rate_at
from clseg.losses import contrastive_loss
from clseg.models import UNet
from clseg.pairs import Pairs, cluster_pairs, instance_pairs, position_pairs
from clseg.settings import ContrastStage, Geometry, NetworkConfig
from clseg.stages.contrast import contrast, draw_batch
from clseg.stages.sampling import random_slices

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# What this lesson is about, as one object. Change a value, run all cells again, and see what follows.

# %%
stage = ContrastStage(
    pairs="position",  # who is alike: slices whose positions differ by less than the threshold
    threshold=0.35,  # t, in parts of the volume's length
    temperature=0.1,  # tau
    denominator="all",  # the positives are in the denominator, too
    head="pool",  # average over the map, then two layers
    views="pcl",  # mirrored, turned, scaled and bent; brightness and contrast stay
    slices=32,  # slices in a batch, before they are augmented
    optimiser="sgd",
    learning_rate=0.1,
    schedule="cosine",
    weight_decay=1e-5,
)

# %% [markdown]
# ## The idea in one picture
# Slice m of n has the *position* p = m/n: patients have different numbers of slices, but every volume runs from 1/n to 1.
# An anchor (black) is like all slices with $|p_i-p_j|<t$ (blue), of its own volume and of any other, and unlike the rest
# (orange). Here are the patients with the fewest and the most slices (squeezed; the middle of a slice counts).

# %%
phantom = phantom_dataset(subjects=24)
store = prepare(phantom, Geometry(size=[64, 64], spacing_mm=3.2), progress=False)
shortest, longest = store.volumes["slices"].idxmin(), store.volumes["slices"].idxmax()
shown = store.batch([*store.volume_rows(shortest), *store.volume_rows(longest)])
anchor = store.volumes["slices"][shortest] // 2


def near(threshold=stage.threshold):
    """Two patients, a row each: the anchor, its positives and negatives at a threshold."""
    alike = position_pairs(shown.position, threshold)
    low, high = (shown.position[anchor].item() + side * threshold for side in (-1, 1))
    _, axis = plt.subplots(figsize=(10.5, 2.8))
    axis.axvspan(low, high, color=plots.BLUE, alpha=0.12, zorder=-1)
    for row, (picture, position) in enumerate(zip(shown.image[:, 0], shown.position.tolist(), strict=True)):
        colour = plots.BLACK if row == anchor else plots.BLUE if alike.positive[anchor, row] else plots.ORANGE
        bottom = 1.2 * (shown.volume[row] == shortest).item()
        extent = (position - 0.036, position + 0.036, bottom, bottom + 1)
        axis.imshow(picture, cmap="gray", vmin=0, vmax=1.5, extent=extent)
        axis.add_patch(plt.Rectangle(extent[::2], 0.072, 1, fill=False, edgecolor=colour, linewidth=3))
    share = alike.positive.float().sum() / (len(shown.row) * (len(shown.row) - 1))
    axis.set(xlim=(0.03, 1.05), ylim=(-0.1, 2.3), aspect="auto", xlabel="position, base to apex")
    axis.set_yticks([0.5, 1.7], [f"{store.volumes['slices'][v]} slices" for v in (longest, shortest)])
    axis.set_title(f"threshold {threshold:.2f}: {share:.0%} of all pairs are alike")
    axis.grid(False)
    plt.show()


near()

# %% tags=["slider"]
_ = interact(near, threshold=FloatSlider(value=0.35, min=0.02, max=1, step=0.01, continuous_update=False))

# %% [markdown]
# Follow the shaded band down: the same stretch of heart in another patient, without registration (moving one image onto the other). Move the
# slider: at which thresholds does anything change? The band moves with the anchor; no border separates two neighbours, as between partitions.
#
# ## Tiny tensors
# Patients A and B, two slices each, two views of every slice: eight rows, and embeddings of two dimensions, so that
# everything can be drawn. The threshold is 0.35.

# %%
position = torch.tensor([0.2, 0.4, 0.6, 0.9]).repeat_interleave(2)  # [8]
slice_id = torch.arange(4).repeat_interleave(2)
name_of_row = [name for name in ("A 0.2", "B 0.4", "A 0.6", "B 0.9") for _ in range(2)]
degrees = torch.tensor([10.0, 35.0, 60.0, 85.0, 20.0, 110.0, 150.0, 190.0], dtype=torch.float64)
embedding = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)  # [8, 2], of length 1
alike = position_pairs(position, 0.35)
plots.pairs_matrix(alike, "t = 0.35: who is alike", groups=name_of_row)

# %% [markdown]
# A chain: 0.2 is like 0.4, and 0.4 like 0.6, but 0.2 is **not** like 0.6. Partitions and clusters are classes, this is
# not, and no embedding can make all positives coincide and keep the negatives apart. No pair is "neither": what is not alike
# is a negative.
#
# ## The loss, slowly
# With $s_{ij}=\cos(z_i,z_j)/\tau$, 2N rows and the positives $\Lambda_i^+$ of anchor $i$ (Zeng et al., released code):
# $$\mathcal L=\frac1{2N}\sum_i\frac{-1}{|\Lambda_i^+|}\sum_{j\in\Lambda_i^+}\log\frac{e^{s_{ij}}}{\sum_{k\ne i}e^{s_{ik}}}$$
# The denominator holds **every** other row, positives included: they compete with each other.


# %%
def slow_loss(embedding, position, threshold, temperature):
    """The formula, word for word, in float64."""
    z = [vector / vector.norm() for vector in embedding.double()]
    s = [[z_i @ z_j / temperature for z_j in z] for z_i in z]
    rows, total = range(len(z)), 0.0
    for i in rows:
        positives = [j for j in rows if j != i and abs(position[i] - position[j]) < threshold]
        everybody = sum(s[i][k].exp() for k in rows if k != i)
        total += -1 / len(positives) * sum(torch.log(s[i][j].exp() / everybody) for j in positives)
    return total / len(z)


# %% [markdown]
# The package: `position_pairs` says who is alike, and the loss is that of all methods. Same value, same gradient?

# %% tags=["nbval-check-output"]
for tau in (0.1, 1.0):
    slow, fast = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    slow_value = slow_loss(slow, position.tolist(), 0.35, tau)
    fast_value = contrastive_loss(fast, position_pairs(position, 0.35), tau, denominator="all")
    slow_value.backward()
    fast_value.backward()
    apart = max((slow_value - fast_value).abs(), (slow.grad - fast.grad).abs().max())
    same = bool(apart < 1e-10)
    print(f"temperature {tau}: slow {slow_value:.4f}, fast {fast_value:.4f}, the same within 1e-10: {same}")

# %% [markdown]
# One thing is left out: the released code multiplies the loss by $\tau/0.07$, at $\tau=0.1$ a factor of 1.43 on every
# gradient. Adam would not notice; with the published SGD the learning rate is 0.143 where 0.1 is written (weight decay
# aside).
#
# ## What the loss sees and what it does

# %%
display(plots.similarity_matrix(embedding @ embedding.T, "cosine of every two of the eight rows", groups=name_of_row))
for t in (0.1, 0.35, inf):
    leaf = embedding.clone().requires_grad_()
    arrows = torch.autograd.grad(contrastive_loss(leaf, position_pairs(position, t), 0.5), leaf)[0]
    display(plots.gradient_picture(embedding, arrows, groups=name_of_row, title=f"t = {t}, temperature 0.5"))

# %% [markdown]
# Three thresholds, the same eight points (the longest arrow is equally long in each picture). At 0.1 a slice knows only its
# own other view: the two of A 0.6 are drawn together, and B 0.9 moves away from one of them, to its own other view. At 0.35 the
# chain acts. B 0.9 stays: A 0.6, now a positive, pulls it, and B 0.4 pushes it, about equally. B 0.4 is drawn to where three of its other
# positives are, and pushed there by B 0.9. At infinity there are no negatives; after many steps all points would be at one place (not drawn).
#
# ## Temperature: positives that are pushed
# Because positives compete, the derivative of the anchor's term with respect to $s_{ij}$ is the row's share of the denominator, minus
# $1/|\Lambda_i^+|$ if the row is a positive. Below 0: pulled together. Above 0: pushed apart. For the first view of B 0.4:

# %%
others = [row for row in range(8) if row != 2]
table = {}
for tau in (0.05, 0.1, 0.5, 1.0):
    s = ((embedding @ embedding.T)[2, others] / tau).requires_grad_()
    positive = alike.positive[2, others]
    slope = torch.autograd.grad(s.logsumexp(dim=0) - s[positive].mean(), s)[0]
    table[f"tau {tau}"] = [round(value, 2) + 0.0 for value in slope.tolist()]
table = pd.DataFrame(table, index=[name_of_row[row] for row in others])
table.insert(0, "alike", positive.tolist())
table.insert(1, "cosine", (embedding @ embedding.T)[2, others].round(decimals=2).tolist())
table

# %% [markdown]
# At 0.05 the negatives, far away already, get nothing, and what competes are the positives: the two most like the anchor, its
# own other view among them, are *pushed* (0.28), so that all become equally similar. At 1.0 the negatives are pushed, and
# these two are hardly pushed. With `denominator="pair"` no positive is ever pushed.
#
# ## The threshold: how many pairs are alike?
# Of the pairs of a slice of one volume and a slice of another, with very many slices, $1-(1-t)^2$ are positive. Two volumes with the same small
# number of slices give a staircase. Zeng et al. use t = 0.35 for ACDC, with about 9 or 10 slices to a volume, and t = 0.1 for CT, with 17,525
# slices in 68 volumes, 258 on average.


# %% tags=["nbval-check-output"]
def share(slices, threshold):
    """Of the pairs of slices of two volumes with so many slices, the share that is alike."""
    place = torch.arange(1, slices + 1) / slices
    return position_pairs(place.repeat(2), threshold).positive[:slices, slices:].float().mean().item()


for t, counts in ((0.35, (9, 10)), (0.1, (258,))):
    for count in counts:
        print(f"t = {t}, {count} slices: {share(count, t):.0%} of the pairs; 1 - (1 - t)^2 = {1 - (1 - t) ** 2:.0%}")

# %%
training, held_out = store.subjects[:16], store.subjects[16:]
rows = store.rows(training)
known = store.batch(rows)
between = known.volume[:, None] != known.volume[None, :]
thresholds = torch.arange(0.0125, 1.1, 0.0125).tolist()
figure, axis = plt.subplots(figsize=(8, 4))
for count, colour in ((10, plots.ORANGE), (258, plots.BLUE)):
    axis.plot(thresholds, [share(count, t) for t in thresholds], color=colour, label=f"two volumes of {count} slices")
of_phantom = [position_pairs(known.position, t).positive[between].float().mean() for t in thresholds]
axis.plot(thresholds, of_phantom, color=plots.BLACK, linestyle=":", label="phantom, all pairs of volumes")
for t, name in ((0.1, "CT"), (0.35, "ACDC")):
    axis.axvline(t, color="0.8", zorder=0)
    axis.text(t, 1.02, f"{name}, {t}", ha="center")
axis.set(xlabel="threshold t", ylabel="share of positive pairs", xlim=(0, 1.1), ylim=(0, 1.1))
axis.set_title("ten slices: a staircase; 258, or mixed numbers: smooth", pad=22)
axis.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# The published thresholds ask for different things: on ACDC *most* pairs are alike, on CT a fifth. If all stacks have ten slices,
# every t above 0.3 and up to 0.4 is the same threshold. With mixed numbers of slices (dotted) it is not.
#
# What is there to gain? The shares of the positives in the denominator add up to 1 at most, so their mean is at most $1/|\Lambda_i^+|$. The mean of
# $-\log$ of them is therefore at least $\log|\Lambda_i^+|$, which is reached when the positives share everything equally. For two views of 32
# slices of the phantom:

# %%
some = known.position[:: len(rows) // 32][:32].repeat(2)
equal = contrastive_loss(torch.ones(64, 2), position_pairs(some, 0.35))
for t in (0.05, 0.1, 0.2, 0.35, 0.5, 0.8):
    least = position_pairs(some, t).positive.sum(dim=1).log().mean()
    print(f"t = {t}: all embeddings equal {equal:.2f}, no loss below {least:.2f}, to gain at most {equal - least:.2f}")

# %% [markdown]
# The larger t, the less the loss *can* fall. This says nothing about how useful the embedding is; and loss curves of different t must not be
# compared. Which t segments best is for runs to say: [35_pcl_threshold](35_pcl_threshold.ipynb).
#
# ## What is hidden in it
# Three methods are this one: two are special thresholds, the third replaces p by partition / S. Not nearly: pair by pair.

# %% tags=["nbval-check-output"]
everybody = ~torch.eye(8, dtype=torch.bool)
half = (position > 0.5).long()  # two equal partitions
cases = {
    "t = inf: all are alike": (position_pairs(position, inf), Pairs(everybody, torch.zeros_like(everybody))),
    "t below the smallest distance: instance (SimCLR)": (position_pairs(position, 0.1), instance_pairs(slice_id)),
    "partition / S for p, t < 1 / S: pcl-partition": (position_pairs(half / 2, 0.25), cluster_pairs(slice_id, half)),
}
for name, (by_position, other) in cases.items():
    same = by_position.positive.equal(other.positive) and by_position.negative.equal(other.negative)
    values = [round(contrastive_loss(embedding, of_case).item(), 4) for of_case in (by_position, other)]
    print(f"{name}: the same pairs {same}, losses {values}")
nothing = contrastive_loss(torch.ones(8, 2), position_pairs(position, inf))
print(f"t = inf, all embeddings equal: {nothing:.4f}, the least there is: log(7) = {log(7):.4f}")

# %% [markdown]
# With t = infinity an encoder that says the same of every slice is perfect. `pcl-partition` is the baseline "GCL" in the
# code of Zeng et al., with this loss and not that of Chaitanya et al.
#
# ## Optional: a real batch
# One batch as training draws it, by position:

# %%
ask = {"position": stage, "pcl-partition": stage.model_copy(update={"pairs": "partition", "strategy": "gcl"})}
width = NetworkConfig(architecture="pcl", filters=[8, 16, 32, 64, 128], norm_momentum=0.1)
network = UNet(store.channels, store.num_classes, width)
work = Work(network, store, rows, stage.slices, seed=0)
chosen = random_slices(rows, work.slices, work.generator("contrast", 0))  # of step 0, whoever is alike
place = store.batch(chosen).position.repeat(2)
order = place.argsort(stable=True)
drawn = {}
for name, of_stage in ask.items():
    drawn[name] = draw_batch(work, of_stage, 0)[1]
    ordered = Pairs(drawn[name].positive[order][:, order], drawn[name].negative[order][:, order])
    quarters = [f"≤ {ceil(4 * p) / 4:g}" for p in place[order].tolist()]
    display(plots.pairs_matrix(ordered, f"{name}, by position", groups=quarters))

apart = (place[:, None] - place[None, :]).abs()
for name, of_batch in drawn.items():
    close = (apart[of_batch.negative] < 0.15).float().mean()
    far = apart[of_batch.positive].max()
    print(f"{name}: {close:.0%} of the negatives are nearer than 0.15, the farthest positive is {far:.3f} away")
extra = position_pairs(place, 1e-3).positive.sum() - len(place)
print(f"t = 0.001: {extra / len(place):.1f} positives per anchor besides its other view")

# %% [markdown]
# A band against blocks. Zeng et al. cut in another way than Chaitanya et al. (lesson 10, where slices that are left over belong to no
# partition), and these are no exact quarters: a partition has n/4 slices, rounded (halves up), and the last one takes the rest. With 10 slices that is
# 3, 3, 3 and 1: the slice at 0.9 is still in the third partition, and makes the cross. 14 % of the partitions'
# negatives are nearer than 0.15, neighbours across a border; positions have none, by their rule. And
# mind the last line: in a *real* batch a tiny t is not quite SimCLR. Patients with equally many slices share
# positions, and all share p = 1; such slices stay alike.
#
# ## Optional: the border: |p - q| = t
# The rule is "less than": a pair at distance t is a negative. Is it, for a computer?

# %% tags=["nbval-check-output"]
for p, q, t in ((0.2, 0.3, 0.1), (0.3, 0.4, 0.1), (0.5, 0.8, 0.3), (0.6, 0.9, 0.3)):
    naive = (torch.tensor(p) - torch.tensor(q)).abs() < t
    ours = position_pairs(torch.tensor([p, q]), t).positive[0, 1]
    print(f"|{p} - {q}| < {t}: by float32 {bool(naive)}, by position_pairs {bool(ours)}")

# %% [markdown]
# Left to float32, 0.3 and 0.4 would be alike and 0.2 and 0.3 not. In the released code the rounding decides; the package counts
# a difference within the rounding of t as t.
#
# ## Does a network learn position?
# A small network like that of Zeng et al., 200 steps on 16 subjects at 32 pixels, with the parameters from the top and with
# two other answers. The network never gets the number p; it sees only the image. The test: the slices of 8 new subjects, as they are. For each,
# how far away is the nearest slice of another new subject, nearest by the embedding? Beside it an embedding by an untrained network, and
# the pixels themselves.

# %%
small = prepare(phantom, Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
ask["instance"] = stage.model_copy(update={"pairs": "instance"})
new = small.batch(small.rows(held_out))
other = new.volume[:, None] != new.volume[None, :]
apart = (new.position[:, None] - new.position[None, :]).abs()


def pretrained(of_stage, steps=200):
    """Embeddings [n, D] of the new slices after so many steps, of length 1, and the losses."""
    torch.manual_seed(0)
    network, losses = UNet(small.channels, small.num_classes, width), []
    pretraining = contrast(Work(network, small, small.rows(training), of_stage.slices, seed=0), of_stage)
    descent = optimiser_for(pretraining.learning.values(), of_stage)
    for step in range(steps):
        descent.param_groups[0]["lr"] = rate_at(of_stage, step, 200)
        loss = pretraining.step_loss(step)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    for module in pretraining.learning.values():
        module.eval()
    with torch.no_grad():
        return F.normalize(pretraining.learning["head"](network.encoder(new.image)[-1]), dim=1), losses


def off(z):
    """How far away in position the nearest slice of another new subject is, mean over slices."""
    nearest = (z @ z.T).masked_fill(~other, -torch.inf).argmax(dim=1)
    return apart[torch.arange(len(z)), nearest].mean().item()


pixels = F.normalize(new.image.flatten(1) - new.image.mean(dim=0).flatten(), dim=1)
table = {"chance": apart[other].mean().item(), "untrained": off(pretrained(stage, steps=0)[0]), "pixels": off(pixels)}

# %%
figure, axis = plt.subplots(figsize=(7, 4))
for (name, of_stage), colour in zip(ask.items(), (plots.BLUE, plots.ORANGE, plots.GREY), strict=True):
    z, losses = pretrained(of_stage)
    print(f"{name}: loss {sum(losses[:10]) / 10:.2f} in the first 10 steps, {sum(losses[-10:]) / 10:.2f} in the last")
    similarity, table[name] = z @ z.T, off(z)
    curve = pd.Series(similarity[other]).groupby((apart[other] * 10).round().numpy() / 10).mean()
    axis.plot(curve, color=colour, marker="o", markersize=4, label=name)
axis.axvline(stage.threshold, color="0.8", zorder=0)
axis.set(xlabel="distance of positions", ylabel="mean cosine similarity", title="slices of different new subjects")
axis.legend(frameon=False)
plt.show()
pd.Series(table, name="the nearest slice of another new subject is so far away").round(2).to_frame()

# %% [markdown]
# Chance is 0.33, but an untrained network already has 0.23, and the nearest image by its pixels 0.17. Training by position or by
# partition gives 0.13 to 0.17, depending on the run; 8 subjects do not tell the two apart, nor from the pixels. `instance` is farther away than no
# training (one seed): it pushes all away, near or far, and its loss falls most of all. The similarity falls smoothly, without a step at t. Knowing the place is not yet
# knowing the heart: [33_pcl_semi](33_pcl_semi.ipynb) asks whether Dice gains.
#
# ## What to notice
# * "Near" is no class: a chain of positives has no ends that are alike.
# * The same threshold means different things in a stack of ten slices and in a CT of 258.
# * A loss that falls most (`instance`) need not be the one that knows most.
# * "Better than chance" is a weak claim: compare with no training, and with the pixels.
#
# ## Summary
# * Position p = m/n. Slices with |p - q| < t are positives, of any patient; all others are negatives.
# * The share of positives is 1 - (1 - t)² in long volumes, and a staircase in short ones of equal length.
# * With `denominator="all"` positives compete: the nearest can be pushed away.
# * t = ∞ makes all alike, a tiny t is nearly SimCLR, and positions of partitions give `pcl-partition`.
# * On the phantom learned positions carry over to new subjects, better than chance; better than pixels is not shown. If that helps Dice is another question.
#
# ## Exercises
# [94_positional_contrast](94_positional_contrast.ipynb): count positives, write the rule, predict the share, and four statements.
#
# ## Where to read on
# * Next lesson: [13_cluster_contrast](13_cluster_contrast.ipynb). Does it help a segmenter? [33_pcl_semi](33_pcl_semi.ipynb); which t?
#   [35_pcl_threshold](35_pcl_threshold.ipynb); where slices lie: [36_pcl_embedding](36_pcl_embedding.ipynb).
# * The code: `clseg/pairs.py` (`position_pairs`).
# * D. Zeng et al., MICCAI 2021, [arXiv:2106.09157](https://arxiv.org/abs/2106.09157), and [their code](https://github.com/dewenzeng/positional_cl).
# * P. Khosla et al., *Supervised contrastive learning* (the loss with several positives), NeurIPS 2020, [arXiv:2004.11362](https://arxiv.org/abs/2004.11362).
