# %% [markdown]
# # What does "alike" mean to a network?
# **A contrastive method learns from images alone, by comparing them. Nearly all use one loss, InfoNCE: pull together what is alike, push away
# all else. The methods of this course differ in their answer to "who is alike?".**
#
# **Goals.** After this lesson you can (1) compute InfoNCE by hand and in code, (2) say what the temperature does, (3) tell from one
# number whether a *pre-training* (the training on images alone, before a segmenter is trained on few labels) has failed to learn.
#
# **You need** [02_few_labels](02_few_labels.ipynb) for what an encoder is, cosine and logarithm, and that training follows the
# negative gradient. Of PyTorch only that a tensor is used like a NumPy array (`@`, `.exp()`, `.sum()`). **About 40 minutes**, one of them computing. Nothing is downloaded: the images
# are computed, too. `log` is the natural logarithm.

# %%
from math import log

import matplotlib.pyplot as plt
import pandas as pd
import torch
import torch.nn.functional as F
from ipywidgets import SelectionSlider, interact

from clseg import plots
from clseg.augment import contrast_view
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import step_generator
from clseg.losses import contrastive_loss
from clseg.pairs import instance_pairs
from clseg.settings import ContrastStage, Geometry, NetworkConfig
from clseg.stages.contrast import contrast, draw_batch
from clseg.train import stage_work

plt.rcParams.update(plots.STYLE)
store = prepare(phantom_dataset(subjects=24), Geometry(size=[64, 64], spacing_mm=3.2), progress=False)

# %% [markdown]
# ## The idea in one picture
# Take three slices and change each of them twice: another crop, another brightness. These changed copies are *views*. A network
# turns each view into a point on a circle, its *embedding* (in real networks the circle has 128 or more dimensions).

# %%
degrees = torch.tensor([15.0, 55.0, 85.0, 165.0, 250.0, 290.0], dtype=torch.float64)  # two views of slice A, B, C
embedding = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)  # [6, 2], of length 1
names = ["A1", "A2", "B1", "B2", "C1", "C2"]
slice_id = torch.tensor([0, 0, 1, 1, 2, 2])
colours = [plots.BLUE, plots.BLUE, plots.RED, plots.RED, plots.GREEN, plots.GREEN]

rows = [store.volume_rows(volume)[place] for volume, place in ((0, 1), (3, 5), (6, 7))]
shown = store.batch(rows).image
views = torch.stack([contrast_view(shown, step_generator(0, "views", number)) for number in (1, 2)], dim=1)
views = views.flatten(0, 1)[:, 0]  # [6, H, W], A1 A2 B1 B2 C1 C2


def circle(axis, points=embedding, title=""):
    """The six embeddings on the unit circle, two of each colour."""
    axis.add_patch(plt.Circle((0, 0), 1, fill=False, color="0.7"))
    for point, colour, name in zip(points.tolist(), colours, names, strict=True):
        axis.plot(*point, "o", color=colour, markersize=10)
        inside = 0.8 if name.endswith("1") else 0.58
        axis.text(inside * point[0], inside * point[1], name, color=colour, ha="center", va="center")
    axis.set(xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), aspect="equal", title=title)
    axis.set_axis_off()


figure, axis = plt.subplots(figsize=(6, 6))
circle(axis)
for view, (x, y), colour in zip(views, embedding.tolist(), colours, strict=True):
    box = (1.4 * x - 0.27, 1.4 * x + 0.27, 1.4 * y - 0.27, 1.4 * y + 0.27)
    axis.imshow(view, cmap="gray", extent=box, vmin=0, vmax=1.5)
    axis.add_patch(plt.Rectangle((box[0], box[2]), 0.54, 0.54, fill=False, edgecolor=colour, linewidth=3))
axis.set(xlim=(-1.75, 1.75), ylim=(-1.75, 1.75))
plt.show()

# %% [markdown]
# Points of one colour are views of one slice: they are *alike*, a **positive** pair. All others are **negative** pairs. We want the two of
# a colour to come together and the colours to move apart. No label is needed: we made the views ourselves, so we know.
#
# ## By hand
# How alike two points are is the cosine of the angle between them: 1 at the same place, 0 at a right angle, -1 opposite. Divide by a
# *temperature* $\tau$ and call it $s_{ij}=\cos(z_i,z_j)/\tau$. Take one view, the *anchor* $i$; its positive is $j$. InfoNCE asks: of the sum of
# $e^{s}$ over all other views, what share does the positive have? (Such a share is also called a *softmax*.)
# $$\ell_i=-\log\frac{e^{s_{ij}}}{\sum_{k\neq i}e^{s_{ik}}}$$
# A share of 1 costs nothing; a small share costs much. For the anchor A1 at $\tau=0.5$:

# %%
anchor, temperature = 0, 0.5
table = pd.DataFrame({"view": names, "cosine": (embedding @ embedding[anchor]).tolist()}).drop(anchor)
table["s"] = table["cosine"] / temperature
table["e^s"] = torch.tensor(table["s"].to_numpy()).exp().numpy()
table["share"] = table["e^s"] / table["e^s"].sum()
print(
    f"the positive A2 has the share {table['share'][1]:.2f}, so the loss of A1 is -log {table['share'][1]:.2f} = {-log(table['share'][1]):.2f}"
)
table.set_index("view").round(2)

# %% [markdown]
# Check one line with a pocket calculator. A1 and A2 are 40 degrees apart: the cosine is 0.766, and $e^{0.766/0.5}=4.63$.
#
# ## The loss, slowly
# The mean over all six anchors, with loops:


# %%
def slow_loss(embedding, slice_id, temperature):
    """InfoNCE, word for word."""
    z = [vector / vector.norm() for vector in embedding]
    terms = []
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i]
        (positive,) = [k for k in others if slice_id[k] == slice_id[i]]
        s = {k: z[i] @ z[k] / temperature for k in others}
        terms.append(-torch.log(s[positive].exp() / sum(s[k].exp() for k in others)))
    return sum(terms) / len(terms)


# %% [markdown]
# The package separates the two questions. `instance_pairs` says who is alike: two tables of True and False, `pairs.positive` and
# `pairs.negative`, with a row and a column for each view. `contrastive_loss` knows nothing of slices. Do value and gradient agree?

# %% tags=["nbval-check-output"]
pairs = instance_pairs(slice_id)
for temperature in (0.1, 0.5):
    slow, fast = embedding.clone().requires_grad_(), embedding.clone().requires_grad_()
    slow_value, fast_value = slow_loss(slow, slice_id, temperature), contrastive_loss(fast, pairs, temperature)
    slow_value.backward()
    fast_value.backward()
    apart = max((slow_value - fast_value).abs(), (slow.grad - fast.grad).abs().max())
    print(
        f"temperature {temperature}: slow {slow_value:.4f}, package {fast_value:.4f}, the same: {bool(apart < 1e-10)}"
    )

# %% [markdown]
# ## What changes when the temperature changes?
# Left: the arrows are the way each point wants to go, the negative gradient (the longest arrow always has the same length, and the
# number says how steep it is); a point without an arrow has almost no gradient. Right: how the push of anchor A1 is shared out among its four
# negatives. It is $e^s$ of one negative, divided by the sum over the *negatives only* (in the table above the positive was in the sum, too).


# %%
def push(temperature=0.5):
    """Arrows of all six points, and the shares of the negatives of A1."""
    leaf = embedding.clone().requires_grad_()
    loss = contrastive_loss(leaf, pairs, temperature)
    arrows = -torch.autograd.grad(loss, leaf)[0]
    steepest = arrows.norm(dim=1).max().item()
    share = (embedding[2:] @ embedding[0] / temperature).softmax(dim=0)
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), width_ratios=(1, 1.1))
    circle(left, title=f"temperature {temperature}: loss {loss.item():.2f}, steepest {steepest:.2f}")
    left.quiver(
        *embedding.T, *(0.6 * arrows / steepest).T, color=colours, angles="xy", scale_units="xy", scale=1, width=0.012
    )
    right.bar(names[2:], share, color=colours[2:])
    right.axhline(0.25, color=plots.GREY, linestyle="--")
    right.set(ylim=(0, 1), title="share of the push of A1", xlabel="negative")
    plt.show()


for temperature in (0.1, 1.0):
    push(temperature)

# %% [markdown]
# At 0.1 nearly all the push goes to B1, the *hardest* negative: the one that is most like the anchor. C1 and C2 have no arrow there: each has
# nearly the whole share already. At 1.0 the push is spread more evenly, from 0.40 to 0.12 (dashed: an equal share). Run the next
# cell to move the temperature yourself. At which one has the hardest negative about half of the push?
#
# The losses in the titles are of different temperatures: such losses cannot be compared.

# %% tags=["slider"]
options = [0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0]
_ = interact(push, temperature=SelectionSlider(options=options, value=0.5, continuous_update=False))

# %% [markdown]
# A low temperature listens to the hardest negative. That is good if it is truly different, and bad if it is not: B1 may be the
# neighbouring slice of the same patient, nearly the same image. **Such a *false negative* is why the later lessons ask who is alike.**
#
# ## Where it leads
# Let the points follow their arrows: gradient descent on the six points themselves, without a network.

# %% tags=["nbval-check-output"]
ends = {}
for temperature in (0.1, 0.5, 1.0):
    points = embedding.clone()
    for _ in range(500):
        leaf = points.requires_grad_()
        step = torch.autograd.grad(contrastive_loss(leaf, pairs, temperature), leaf)[0]
        points = F.normalize(points.detach() - 0.1 * step, dim=1)
    ends[temperature] = points
    before, after = (contrastive_loss(where, pairs, temperature).item() for where in (embedding, points))
    print(f"temperature {temperature}: loss {before:.2f} before, {after:.2f} after")

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6))
for axis, (temperature, points) in zip(axes, ends.items(), strict=True):
    circle(axis, points, f"temperature {temperature}")
plt.show()

# %% [markdown]
# At 0.5 and 1.0 the views of a slice meet (*alignment*), and the slices spread evenly (*uniformity*): three of them, 120 degrees apart. At 0.1
# they nearly stop before they meet: once a positive has nearly the whole share, the loss is 0.00 and nothing is left to gain.
#
# ## The loss of a network that has learned nothing
# If a network gives *all* images the same embedding, it has **collapsed**. Then all $e^{s}$ are equal, and the positive has the share of one in
# $2N-1$ for N slices with two views each:
# $$\ell=\log(2N-1)\quad\text{at every temperature.}$$

# %% tags=["nbval-check-output"]
for count in (3, 12, 32):
    number = torch.arange(count).repeat(2)
    equal = torch.ones(2 * count, 8)
    at = [contrastive_loss(equal, instance_pairs(number), temperature).item() for temperature in (0.1, 1.0)]
    print(f"{count} slices: {at[0]:.4f} at 0.1, {at[1]:.4f} at 1.0, log(2 * {count} - 1) = {log(2 * count - 1):.4f}")

# %% [markdown]
# Remember this number, the **collapse line**. A pre-training whose loss stays at it has gained nothing over a network that gives every image the
# same embedding, however long it ran; whether it has collapsed, the cosines say. An untrained
# network often starts a little below it, because two views of a slice look alike before anything was learned. So compare with the line
# *and* with the first step. Above the line means: some negatives are more alike to their anchor than its positive, even where positives are more
# alike on average. At a low temperature a few such negatives are enough.
#
# Does collapse happen? We train one small encoder twice on 16 subjects. `InfoNCE` pulls and pushes. `only pulling` brings the two views of a slice
# together and has no negatives. Is that not what we want?

# %%
small = prepare(phantom_dataset(subjects=24), Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
config = NetworkConfig(filters=[8, 16, 32, 32], norm_momentum=0.1)
stage = ContrastStage(pairs="instance", slices=12, temperature=0.1)


def embed(training, views):
    """Both views pass the encoder, and then the head, two small layers that serve the loss alone: embeddings [2 n, D]."""
    encoder, head = training.learning["encoder"], training.learning["head"]
    return torch.cat([head(encoder(view)[-1]) for view in views])


def trained(loss_of, steps=120):
    """Trains with a loss of (embedding, pairs); returns InfoNCE of every step, whatever was trained, and the similarities at the end."""
    work = stage_work(small, small.subjects[:16], stage, steps, config)  # a new network, and the slices it may see
    training, curve = contrast(work, stage), []  # what learns: encoder and head
    optimiser = torch.optim.Adam([p for part in training.learning.values() for p in part.parameters()], 1e-3)
    for step in range(steps):
        views, pairs = draw_batch(work, stage, step)  # two views of each of 12 slices, and who is alike
        z = embed(training, views)
        optimiser.zero_grad()
        loss_of(z, pairs).backward()
        optimiser.step()
        curve.append(contrastive_loss(z.detach(), pairs, stage.temperature).item())
    z = F.normalize(z.detach(), dim=1)
    return curve, (z @ z.T)[pairs.positive].mean().item(), (z @ z.T)[pairs.negative].mean().item()


def only_pulling(z, pairs):
    """Minus the mean cosine of the positives."""
    z = F.normalize(z, dim=1)
    return -(z @ z.T)[pairs.positive].mean()


torch.manual_seed(0)
results = {"InfoNCE": trained(lambda z, pairs: contrastive_loss(z, pairs, stage.temperature))}

# %%
torch.manual_seed(0)
results["only pulling"] = trained(only_pulling)
collapse = log(2 * stage.slices - 1)
figure, axis = plt.subplots(figsize=(8, 3.6))
axis.axhline(collapse, color=plots.BLACK, linestyle="--", label=f"collapse line, log 23 = {collapse:.2f}")
for (name, (curve, _, _)), colour in zip(results.items(), (plots.BLUE, plots.RED), strict=True):
    axis.plot(pd.Series(curve).rolling(5, min_periods=1).mean(), color=colour, label=name)
axis.set(xlabel="step", ylabel="InfoNCE")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
for name, (curve, alike, unlike) in results.items():
    end = sum(curve[-10:]) / 10
    print(
        f"trained with {name}: InfoNCE {curve[0]:.1f} at the first step, {end:.1f} at the end, cosine of positives {alike:.1f}, of negatives {unlike:.1f}"
    )

# %% tags=["nbval-check-output"]
for name, (curve, alike, unlike) in results.items():
    print(f"{len(curve)} steps with {name}: negatives as alike as positives: {bool(alike - unlike < 0.05)}")

# %% [markdown]
# `only pulling` does what it was told: positives have cosine 1. So have the negatives. It has collapsed onto the dashed line, and its own loss,
# -1, looks perfect. The push keeps a network from that. InfoNCE had 120 steps: its curve is noisy, and its negatives are still
# rather alike (0.7), but less than its positives (0.9). A part of that was there before the first step: the first loss was below the line, too.
#
# ## What to notice
# * The loss knows similarities only. It forgets lengths, and it does not know what is *in* an image.
# * What is alike is decided before the loss, in `clseg.pairs`. That one choice tells the methods apart.
# * The collapse line depends on the batch: losses of batches of different size must not be compared.
#
# ## Summary
# * Views of one slice are positives; all other views of the batch (its *rows*) are negatives.
# * InfoNCE is -log of the share that the positive has among all others, after a softmax of cosine / temperature.
# * A low temperature pushes the hardest negative, a high one all negatives more equally.
# * Where it leads: views of a slice come together, slices spread evenly.
# * A collapsed network has the loss log(2N - 1). Compare every pre-training with this line before you believe in it.
#
# ## Exercises
# [91_infonce](91_infonce.ipynb): predict the collapse line, write InfoNCE, find who is pushed, and judge four statements.
#
# ## Where to read on
# * Next lesson: [10_global_contrast](10_global_contrast.ipynb), when the neighbouring slice is a false negative.
# * The code: `clseg/losses.py` (`contrastive_loss`) and `clseg/pairs.py` (`instance_pairs`).
# * A. van den Oord, Y. Li, O. Vinyals, *Contrastive predictive coding* (the name InfoNCE), 2018, [arXiv:1807.03748](https://arxiv.org/abs/1807.03748).
# * T. Chen et al., *SimCLR*, ICML 2020, [arXiv:2002.05709](https://arxiv.org/abs/2002.05709).
# * T. Wang, P. Isola, *Alignment and uniformity on the hypersphere*, ICML 2020, [arXiv:2005.10242](https://arxiv.org/abs/2005.10242).
# * F. Wang, H. Liu, *Understanding the behaviour of contrastive loss* (temperature), CVPR 2021, [arXiv:2012.09740](https://arxiv.org/abs/2012.09740).
