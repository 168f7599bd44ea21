# %% [markdown]
# # From a question to one paragraph
# **A whole study in one hour: a question, a pre-training, fine-tunings on several draws, an honest comparison, and what may be concluded. Every step is a few
# lines that you can change.**
#
# **Goals.** After this lesson you can (1) state a question so that numbers can answer it, (2) run it on draws and seeds, paired by test subject, (3) write a
# conclusion that says what was measured, and no more.
#
# **You need** [02_few_labels](02_few_labels.ipynb), [04_infonce](04_infonce.ipynb) and one of [10](10_global_contrast.ipynb) to
# [13](13_cluster_contrast.ipynb). **About 60 minutes**, two of them computing as it stands. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from ipywidgets import interact

from clseg import plots
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.data.splits import make_split
from clseg.settings import ContrastStage, Geometry, NetworkConfig, SeededProtocol, SupervisedRecipe
from clseg.stats import bootstrap_interval, signed_rank_test, verdict
from clseg.train import finetune, pretrain, scores

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# ## 1. The question
# *Does pre-training by `gr` (two views of a slice are alike) raise Dice on new subjects when two are labelled?* Write down, **before** you look
# at a number: what is compared with what, on which subjects, by which measure, and which difference would matter to you. Ours: `gr` against random first
# weights, mean Dice over structures, 12 test subjects, and a gain of 0.02 would matter.
#
# **Change me.** Another stage, for example `ContrastStage(pairs="partition", set_of=None)` or `ContrastStage(pairs="position", threshold=0.35)`.

# %%
stage = ContrastStage(pairs="instance")
matters = 0.02  # a difference of Dice
labelled, draws = 2, (1, 2, 3)

# %% [markdown]
# ## 2. The data, and who is who
# Test subjects are set aside first. Every draw takes its labelled subjects from the rest; pre-training may use the images of all but the test and
# validation subjects.

# %%
store = prepare(phantom_dataset(subjects=28), Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
protocol = SeededProtocol(test=12, validation=2)
splits = {draw: make_split(protocol, store.subjects, store.labelled_subjects, labelled, draw) for draw in draws}
for draw, split in splits.items():
    print(
        f"draw {draw}: labelled {', '.join(split.labelled)}; {len(split.pretrain)} for pre-training, {len(split.test)} for testing"
    )

# %% [markdown]
# ## 3. Pre-train, and look whether anything was learned
# 150 steps, and the collapse line of [04_infonce](04_infonce.ipynb) beside the loss.

# %%
config = NetworkConfig(filters=[8, 16, 32, 32], norm_momentum=0.1)
pretrained = pretrain(store, splits[1].pretrain, stage, steps=150, network=config, seed=0)
curve = pretrained.fit.log.set_index("step")["loss"]
figure, axis = plt.subplots(figsize=(7, 3.4))
axis.plot(curve.rolling(10, min_periods=1).mean(), color=plots.BLUE, label="loss, mean of 10 steps")
if stage.pairs == "instance":
    axis.axhline(np.log(2 * stage.slices - 1), color=plots.BLACK, linestyle="--", label="collapse line")
axis.set(xlabel="step", ylabel="loss")
axis.legend()
plt.show()

# %% [markdown]
# ## 4. Fine-tune: the same draws and seeds with both starts
# Everything but the first weights is equal, so that a difference has one cause only.

# %%
starts = {"random": None, "pre-trained": pretrained.weights}
rows, segmenters = [], {}


def run(draw, name):
    """Fine-tunes on one draw and keeps a row for each test subject and structure."""
    split = splits[draw]
    result = finetune(store, split.labelled, SupervisedRecipe(), 100, network=config, seed=draw, start=starts[name])
    segmenters[name] = result.network
    for row in scores(result.network, store, split.test):
        rows.append({"method": name, "draw": draw, **row})


for draw in draws:
    run(draw, "random")

# %%
for draw in draws:
    run(draw, "pre-trained")
table = pd.DataFrame(rows)
table.groupby(["method", "class_name"])[["dice", "hd95", "missed"]].mean().round(2)

# %% [markdown]
# ## 5. Look at the masks before the numbers
# A number can be good for a bad reason. Filled: the reference; line: the prediction of the last draw.


# %%
def browse(subject=0, place=3):
    """One slice of a test subject with both predictions."""
    volume = int(np.flatnonzero(store.volumes["subject"] == splits[1].test[subject])[0])
    slices = store.volume_rows(volume)
    shown = store.batch([slices[min(place, len(slices) - 1)]])
    _, axes = plt.subplots(1, 2, figsize=(8, 4))
    for axis, (name, network) in zip(axes, segmenters.items(), strict=True):
        with torch.no_grad():
            found = network.eval()(shown.image).argmax(dim=1)[0]
        axis.imshow(shown.image[0, 0], cmap="gray", vmin=0, vmax=1.5)
        axis.imshow(np.ma.masked_equal(shown.label[0], 0), cmap="viridis", vmin=0, vmax=3, alpha=0.45)
        for index in (1, 2, 3):
            if (found == index).any():
                axis.contour(found == index, levels=[0.5], colors=plots.RED, linewidths=2)
        axis.set_title(name)
        axis.set_axis_off()
    plt.show()


browse()

# %% tags=["slider"]
_ = interact(browse, subject=(0, 11), place=(0, 11))

# %% [markdown]
# ## 6. The comparison
# First one number for each test subject and method (the mean over structures and draws), then the *difference* for each subject. The interval and the test
# are over subjects, because the unit is the subject.

# %%
by_subject = table.groupby(["subject", "method"])["dice"].mean().unstack()
difference = (by_subject["pre-trained"] - by_subject["random"]).to_numpy()
low, high = bootstrap_interval(difference)
p, effect, note = signed_rank_test(difference)
figure, axis = plt.subplots(figsize=(8, 2.6))
axis.axvline(0, color=plots.BLACK)
axis.axvspan(-matters, matters, color=plots.GREY, alpha=0.2, label="does not matter")
axis.plot(np.sort(difference), np.zeros(len(difference)), "o", color=plots.SKY, label="a test subject")
axis.errorbar(
    difference.mean(),
    0.4,
    xerr=[[difference.mean() - low], [high - difference.mean()]],
    fmt="D",
    color=plots.RED,
    label="mean, 95 % interval",
)
axis.set(yticks=[], ylim=(-0.4, 0.8), xlabel="Dice, pre-trained minus random")
axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %% tags=["nbval-check-output"]
print(f"subjects {len(difference)}, draws {len(draws)}, seeds of pre-training 1")

# %%
by_draw = table.groupby(["draw", "method"])["dice"].mean().unstack()
print(
    f"mean difference {difference.mean():.3f}, 95 % interval {low:.3f} to {high:.3f}, p = {p:.2g} (Wilcoxon, n = {len(difference)})"
)
print(f"verdict at a margin of {matters}: {verdict(low, high, p, matters)}")
by_draw.round(2)

# %% [markdown]
# Read the verdict with the table of draws. If single draws disagree about the sign, more draws are needed, not more test subjects. And there is one
# pre-training with one seed: another one might differ. `clseg run` repeats all of this over draws and seeds, and `clseg/stats.py` accounts for all three.
#
# ## 7. One paragraph
# A pattern to fill in. Every number in it must be in an output above:
#
# > *We asked whether [method] raises Dice on new subjects when [n] are labelled. On [data], with [d] draws and [s] seeds, the mean Dice of [k] test
# > subjects was [a] with and [b] without it; the difference was [x] (95 % interval [y] to [z], Wilcoxon p = [p]). By our margin of 0.02 this means [helps / harms /
# > no difference that matters / not known]. It does not show [what was not varied: size of the images, steps, other data, the seed of the pre-training].*

# %% tags=["nbval-check-output"]
print("what this run varied: draws 3; what it did not vary: 1 image size, 1 length of training, 1 data set")

# %% [markdown]
# ## What to notice
# * The question came first, and the margin with it.
# * Both methods had the same draws, seeds and steps. Only the first weights differed.
# * "Not known" is a result. It says how many subjects, draws or seeds are lacking.
#
# ## Summary
# * Set test subjects aside first; draw labelled subjects from the rest; pre-train without both.
# * Look at the loss and its collapse line, then at masks, then at numbers.
# * Pair by test subject; give the difference with its interval, and the spread of the draws beside it.
# * A conclusion names what was compared, on whom, how often, and what was not varied.
#
# ## Exercises
# 1. *Predict, then change:* halve the steps of the pre-training. Which number do you expect to change first?
# 2. *Change:* ask the question with 1 and with 6 labelled subjects. Where is the gain largest?
# 3. *Break it:* let the pre-training see the test subjects (`store.subjects`). Does the result change, and why must one say so?
# 4. *Explain:* swap your paragraph with a neighbour's. Underline every claim that no output supports.
#
# ## Where to read on
# * Next: [16_your_method](16_your_method.ipynb). The same on real patients: [42_which_method](42_which_method.ipynb).
# * The code: `clseg/train.py` (one page), `clseg/stats.py`, `clseg/data/splits.py`.
# * A. Reinke et al., *Understanding metric-related pitfalls*, Nature Methods 2024, [doi.org/10.1038/s41592-023-02150-0](https://doi.org/10.1038/s41592-023-02150-0).
