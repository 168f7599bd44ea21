# %% [markdown]
# # What can be learned from few labels?
# **A segmenter is a network that says for every pixel what it is. It learns from masks that people drew, and these are few.**
#
# **Goals.** After this lesson you can (1) say what a U-Net takes and gives, (2) compute Dice and HD95 and say what each of them does
# not see, (3) say what "8 labelled of 77" means, and why one draw of labelled patients is not enough.
#
# **You need** Python with NumPy, and what a mean and an interval are. Nothing of medicine: the images are computed (a *phantom*,
# [01_data](01_data.ipynb) shows how). They look like a heart cut into *slices*: two chambers that pump, the left and the right
# *ventricle*, and the *myocardium*, the muscle around the left one. **About 45 minutes**, one of them computing.
# Nothing is downloaded. A *subject* is a patient, or here a phantom.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from ipywidgets import interact

from clseg import metrics, plots
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.models import UNet
from clseg.settings import Geometry, NetworkConfig, SupervisedRecipe
from clseg.stats import bootstrap_interval
from clseg.train import finetune, scores

plt.rcParams.update(plots.STYLE)
store = prepare(phantom_dataset(subjects=24), Geometry(size=[64, 64], spacing_mm=3.2), progress=False)
names = store.class_names  # {1: right ventricle, 2: myocardium, 3: left ventricle}

# %% [markdown]
# ## The idea in one picture
# A *slice* goes in, a class for every pixel comes out. The network in between is a *U-Net*: on the way down (left) it makes
# the image smaller and the description of each place richer, on the way up (right) it makes the image large again. The
# dashed *skip connections* hand the sharp details across.

# %%
config = NetworkConfig(filters=[8, 16, 32, 64], norm_momentum=0.1)
network = UNet(store.channels, store.num_classes, config)
shown = store.batch([4])
with torch.no_grad():
    down = network.encoder(shown.image)  # feature maps of all levels, the finest first
    up = [network.decoder(down, blocks) for blocks in (1, 2, 3)]
plots.unet(down, up, shown.image[0, 0], shown.label[0])

# %% [markdown]
# Each box is a stack of *feature maps*: channels × height × width (a box is as wide as it has channels, as high as a map). Read it
# from left to right. A last layer, not drawn, turns the 8 channels of each pixel into 4 scores: background and three structures; the
# largest wins. Contrastive pre-training, which learns from images alone and is the subject of the lessons [10](10_global_contrast.ipynb) to [13](13_cluster_contrast.ipynb), trains the blue part (and sometimes a part of the
# red one) before anybody has drawn a mask. *Fine-tuning* then trains all of it on the few masks there are.
#
# ## Dice by hand
# How good is a mask? *Dice* asks how much two masks have in common, in parts of their sizes:
# $$\mathrm{Dice}(P,R)=\frac{2\,|P\cap R|}{|P|+|R|}$$
# with $P$ the prediction and $R$ the *reference*, what an expert drew. 1 is perfect, 0 is nothing in common. Two small masks:

# %%
reference = np.array([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 0]], dtype=bool)
prediction = np.roll(reference, 1, axis=1)
print(f"reference {reference.sum()} pixels, prediction {prediction.sum()}, both {(reference & prediction).sum()}")
print("so Dice = 2 · 6 / (9 + 9) = 0.67")


# %% [markdown]
# The same as a slow loop over pixels, and as the function of the package. Do they agree?


# %% tags=["nbval-check-output"]
def slow_dice(prediction, reference):
    """The formula, pixel by pixel."""
    both = size = 0
    for row in range(reference.shape[0]):
        for column in range(reference.shape[1]):
            p, r = prediction[row, column], reference[row, column]
            both += p and r
            size += int(p) + int(r)
    return 2 * both / size


slow, fast = slow_dice(prediction, reference), metrics.dice(prediction, reference)
print(f"slow {slow:.4f}, package {fast:.4f}, the same: {slow == fast}")

# %% [markdown]
# ## HD95: how far off is the border?
# Dice counts pixels, wherever they are. The *Hausdorff distance* looks at borders: for every border pixel of one mask, how far is
# the nearest border pixel of the other? *HD95* is the 95th percentile of these distances: 95 of 100 are smaller, so that one stray
# pixel does not decide. It is taken from one mask to the other and back, and the larger one counts. It is a length, in mm, and
# small is good. Four predictions of one left ventricle:

# %% tags=["nbval-check-output"]
slices = store.labels[store.volume_rows(0)]
heart = slices[2] == 3  # the left ventricle in one slice
row, column = np.indices(heart.shape)
centre = [int(axis.mean()) for axis in np.nonzero(heart)]
speck = (row - centre[0] + 22) ** 2 + (column - centre[1] - 16) ** 2 < 3
predictions = {
    "shifted by 2 pixels": np.roll(heart, 2, axis=1),
    "only the middle": heart & ((row - centre[0]) ** 2 + (column - centre[1]) ** 2 < 0.55 * heart.sum() / np.pi),
    "a speck far away": heart | speck,
    "not found": np.zeros_like(heart),
}


def judged(prediction, reference=heart):
    """Dice and HD95 in mm of two masks of one slice; the last is the image diagonal where one is empty."""
    return metrics.score(prediction[None].astype(int), reference[None].astype(int), {1: "x"}, (1, 3.2, 3.2))[0]


def compared(axis, prediction, title):
    """The reference filled, the border of the prediction as a line."""
    axis.imshow(heart, cmap="Blues", vmax=2)
    if prediction.any():
        axis.contour(prediction, levels=[0.5], colors=plots.RED, linewidths=2)
    axis.set(title=title, xlim=(8, 56), ylim=(54, 6))
    axis.set_axis_off()


figure, axes = plt.subplots(1, 4, figsize=(10, 3.2))
for axis, (name, mask) in zip(axes, predictions.items(), strict=True):
    row_of = judged(mask)
    compared(axis, mask, f"{name}\nDice {row_of['dice']:.2f}, HD95 {row_of['hd95']:.0f} mm")
    print(f"{name}: Dice {row_of['dice']:.2f}, HD95 {row_of['hd95']:.1f} mm, missed {row_of['missed']}")
plt.show()

# %% [markdown]
# Blue: the reference; red: the border of the prediction. Compare by eye first, then read the numbers. The speck hardly changes Dice, and
# HD95 jumps: the two say different things, so we report both. (The border of the speck is more than 5 of 100 border pixels, so HD95 sees it.
# It would not see a single pixel.) A structure that was *not found* counts with Dice 0 and
# the diagonal of the image as its distance, here 64 · 3.2 mm · √2 = 290 mm. To leave it out of the mean would reward missing it.
#
# ## What changes when the mask moves?


# %%
def moved(pixels=4):
    """The prediction is the reference, moved to the right by some pixels; all shifts beside it as curves."""
    shifts = range(0, 25)
    table = pd.DataFrame([judged(np.roll(heart, shift, axis=1)) for shift in shifts], index=shifts)
    _, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    compared(axes[0], np.roll(heart, pixels, axis=1), f"moved by {pixels} pixels")
    for axis, measure, unit in zip(axes[1:], ("dice", "hd95"), ("Dice", "HD95 in mm"), strict=True):
        axis.plot(table[measure], color=plots.GREY)
        axis.plot(pixels, table[measure][pixels], "o", color=plots.RED)
        axis.set(xlabel="moved by (pixels)", title=f"{unit}: {table[measure][pixels]:.2f}")
    plt.show()


moved(4)

# %% [markdown]
# Run the next cell to get a slider. At which shift is Dice 0.5? What do the two curves do once the masks no longer touch?

# %% tags=["slider"]
_ = interact(moved, pixels=(0, 24))

# %% [markdown]
# Dice is 0.5 between 6 and 7 pixels. At 15 it reaches 0 and stays there: it cannot tell "just missed" from "far away". HD95 goes on.
#
# ## Slices are not patients
# A small segmenter, trained on one labelled subject, is tested on 12 new ones. Here is the Dice of the left ventricle in every
# slice, sorted by subject. Slices without a left ventricle in either mask have no Dice and are left out.

# %%
labelled, tested = store.subjects[:12], store.subjects[12:]
segmenter = finetune(store, labelled[3:4], SupervisedRecipe(), steps=60, network=config, seed=0)
measured = []
for volume in np.unique(store.slices["volume"][store.rows(tested)]):
    rows = store.volume_rows(volume)
    with torch.no_grad():
        found = segmenter.network.eval()(store.batch(rows).image).argmax(dim=1).numpy()
    for number, one in enumerate(found):
        value = metrics.dice(one == 3, store.labels[rows[number]] == 3)
        measured.append({"subject": store.volumes["subject"][volume], "dice": value})
measured = pd.DataFrame(measured).dropna()
by_subject = measured.groupby("subject")["dice"]

figure, axis = plt.subplots(figsize=(9, 3.2))
for place, (_, values) in enumerate(sorted(by_subject, key=lambda item: item[1].mean())):
    axis.plot([place] * len(values), values, "o", color=plots.SKY, alpha=0.6, markersize=5)
    axis.plot(place, values.mean(), "D", color=plots.RED)
axis.plot([], [], "o", color=plots.SKY, label="a slice")
axis.plot([], [], "D", color=plots.RED, label="mean of a subject")
axis.set(xlabel="test subject, sorted", ylabel="Dice of the left ventricle", xticks=range(len(by_subject)))
axis.set_title("subjects differ; slices of one subject are more alike")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
wrong, right = bootstrap_interval(measured["dice"].to_numpy()), bootstrap_interval(by_subject.mean().to_numpy())
print(
    f"as if {len(measured)} slices were independent: {wrong[0]:.2f} to {wrong[1]:.2f}, width {wrong[1] - wrong[0]:.2f}"
)
print(f"with {len(by_subject)} subjects as the unit: {right[0]:.2f} to {right[1]:.2f}, width {right[1] - right[0]:.2f}")

# %% tags=["nbval-check-output"]
print(
    f"{len(measured)} slices, {len(by_subject)} subjects; as slices too narrow: {bool(np.ptp(wrong) < 0.8 * np.ptp(right))}"
)

# %% [markdown]
# Both are 95 % *bootstrap* intervals of a mean: draw as many again, with replacement, thousands of times, and take the middle 95 % of the
# means. The first one is too narrow: it believes in over a hundred independent slices where there are twelve patients. **The unit is
# the subject.** Above we scored slices, to see them. The project puts the slices of a subject together to one *volume* and scores that once.
#
# ## "8 labelled of 77"
# ACDC has 150 cardiac MRI patients; 100 of them, its training folder, are used here. A square is a patient:

# %%
kinds = [("tested, never seen in training", 20, plots.RED), ("not used here", 3, plots.PINK)]
kinds += [("labelled: image and mask are used", 8, plots.BLUE), ("image only: the mask is not used", 69, plots.SKY)]
figure, axis = plt.subplots(figsize=(9, 2.4))
number = 0
for name, count, colour in kinds:
    places = range(number, number + count)
    axis.scatter(
        [p // 5 for p in places], [-(p % 5) for p in places], marker="s", s=150, color=colour, label=f"{count} {name}"
    )
    number += count
axis.set(xlim=(-0.8, 19.8), ylim=(-4.8, 0.8))
axis.set_axis_off()
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% [markdown]
# All masks exist, but the study acts as if only 8 did. Why? Because then we can compare with what all of them would give (the
# *benchmark*, all 8 + 69 = 77 blue ones with their masks). In a hospital the light blue ones are the rule: images are there, and nobody has
# the hours to outline them. Pre-training may use the images of both blue groups (the study
# itself takes 52 of them), and never those of the red one.
#
# ## One draw is not enough
# *Which* patients are labelled is chance, too: a *draw*. Here are five draws of one labelled subject and five of four, each tested
# on the same 12 subjects. The images are small (32 pixels), so that each draw takes seconds, and the Dice is the mean of all three
# structures: do not compare it with the Dice above.

# %%
small = prepare(phantom_dataset(subjects=24), Geometry(size=[32, 32], spacing_mm=6.5), progress=False)


def dice_of_draw(draw, count):
    """Mean Dice over test subjects and structures of a segmenter from `count` labelled subjects."""
    chosen = np.random.default_rng(draw).permutation(labelled)[:count]
    segmenter = finetune(small, chosen, SupervisedRecipe(), steps=80, network=config, seed=0)
    table = pd.DataFrame(scores(segmenter.network, small, tested))
    return table.groupby("subject")["dice"].mean().mean()


draws = {1: [dice_of_draw(draw, 1) for draw in range(5)]}

# %%
draws[4] = [dice_of_draw(draw, 4) for draw in range(5)]
figure, axis = plt.subplots(figsize=(6, 3.2))
for place, values in enumerate(draws.values()):
    axis.plot(values, [place] * 5, "o", color=plots.BLUE, markersize=9, alpha=0.6)
    axis.plot(np.mean(values), place, "|", color=plots.BLACK, markersize=30)
axis.set(xlabel="mean Dice of 12 test subjects", yticks=[0, 1], ylim=(-0.6, 1.6))
axis.set_yticklabels(["1 labelled", "4 labelled"])
axis.set_title("each point is a draw, the line their mean")
plt.show()

# %%
for count, values in draws.items():
    print(f"{count} labelled: mean {np.mean(values):.2f}, from {min(values):.2f} to {max(values):.2f} over five draws")

# %% tags=["nbval-check-output"]
few, more = draws.values()
print(f"{len(few)} draws; the worst of one label is a tenth or more below the best: {max(few) - min(few) > 0.1}")

# %% [markdown]
# The worst and the best draw of one subject lie far apart, and the network, the training and the test subjects are the same.
# A paper that reports one draw, on patients of its own, cannot tell its gain from luck: it would have to be larger than this spread. On the
# same draws the part of the spread that both methods share cancels, so we compare methods there, and still on several draws. More labels help. Whether they also make draws more alike, five
# draws cannot show.
#
# ## What to notice
# * Dice and HD95 answer different questions; a missed structure must count.
# * Two kinds of chance: who is *tested* (the interval over subjects) and who is *labelled* (the spread over draws). A third comes with the
#   *seed*, the random numbers of the training.
#
# ## Summary
# * A segmenter gives a class to every pixel. A U-Net has an encoder, a decoder and skip connections.
# * Dice = 2 · common / (sum of sizes). HD95 is a distance of borders. The project computes both on the whole volume of a subject.
# * The unit is the subject, not the slice.
# * "8 labelled of 77" means 8 subjects with masks, the images of others, and test subjects that nobody sees before the end.
# * With few labels the draw decides a lot: compare methods on the same draws, and on several.
#
# ## Exercises
# [90_few_labels](90_few_labels.ipynb): Dice on paper and in code, who counts once, and four statements to judge.
#
# ## Where to read on
# * Next lesson: [04_infonce](04_infonce.ipynb), what "alike" means to a network. Your own scans: [03_your_data](03_your_data.ipynb).
# * The code: `clseg/metrics.py` (one page), `clseg/models.py`, `clseg/data/splits.py`.
# * O. Ronneberger, P. Fischer, T. Brox, *U-Net*, MICCAI 2015, [doi.org/10.1007/978-3-319-24574-4_28](https://doi.org/10.1007/978-3-319-24574-4_28).
# * O. Bernard et al., the ACDC data set, IEEE TMI 2018, [doi.org/10.1109/TMI.2018.2837502](https://doi.org/10.1109/TMI.2018.2837502).
# * L. Maier-Hein et al., *Metrics reloaded*, Nature Methods 2024, [doi.org/10.1038/s41592-023-02151-z](https://doi.org/10.1038/s41592-023-02151-z).
