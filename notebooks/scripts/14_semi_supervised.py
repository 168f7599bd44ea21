# %% [markdown]
# # Can unlabelled images teach while we fine-tune?
# **Pre-training uses unlabelled images before the first mask is seen. Semi-supervised fine-tuning uses them at the same time: the network
# teaches itself, and the question is which of its own labels it may use.**
#
# **Goals.** After this lesson you can (1) say what a mean teacher is, (2) make pseudo-labels and choose which pixels count, (3) say when
# a network's own labels help and when they repeat its mistakes.
#
# **You need** [02_few_labels](02_few_labels.ipynb) and these words: the network gives every pixel a score for each class, its *logits* $s_k$.
# *Softmax* makes probabilities of them: $e^{s_k}/\sum_j e^{s_j}$. *Cross-entropy* is minus the logarithm of the probability of the right class: 0
# if that is 1, large if it is near 0. **About 40 minutes**, two of them computing. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from ipywidgets import FloatSlider, interact

from clseg import plots
from clseg.augment import cutmix_boxes, strong_view
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import step_generator
from clseg.recipes.weak_to_strong import consistency_loss, pseudo_labels
from clseg.settings import Geometry, NetworkConfig, SupervisedRecipe, WeakToStrongRecipe
from clseg.train import finetune, scores

plt.rcParams.update(plots.STYLE)
store = prepare(phantom_dataset(subjects=24), Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
labelled, unlabelled, tested = store.subjects[:2], store.subjects[2:12], store.subjects[12:]
config = NetworkConfig(filters=[8, 16, 32, 32], norm_momentum=0.1)

# %% [markdown]
# ## The idea in one picture
# Take a slice without a mask. Change it in two ways. The *weak* view is turned or mirrored like the labelled slices (not drawn here), its
# brightness stays; the *strong* view is the weak one with other brightness, contrast and blur, and boxes from another slice. Whatever a *teacher* is sure of on the weak view, a *student* must say on the strong one.

# %%
shown = store.batch(store.rows(unlabelled)[[4, 34, 63]]).image
generator = step_generator(0, "views", 5)
strong, box = strong_view(shown, generator), cutmix_boxes(shown, generator, share=1.0)
mixed = torch.where(box[:, None], strong.roll(1, dims=0), strong)
plots.volume_grid(
    torch.stack([shown, strong, mixed], dim=1).flatten(0, 1)[:, 0],
    title="strong views change brightness and blur; a box brings in another slice",
    titles=["weak", "strong", "with a box"] * 3,
)

# %% [markdown]
# Brightness, contrast and blur leave shapes where they are (and change one image in ten hardly at all). In a box both the pixels and their
# pseudo-labels come from the other slice. So the labels of the weak view fit everywhere.
#
# ## Who is the teacher?
# The *mean teacher* is the running average of the student's weights: after every step
# $$w'\leftarrow a\,w'+(1-a)\,w.$$
# By hand: with $a=0.9$, a student weight that jumps from 0 to 1 gives the teacher 0.1 after one step, 0.19 after two, 0.27 after three. As a
# loop, and with the formula $1-a^n$ for n steps:


# %% tags=["nbval-check-output"]
def slow_average(weights, a):
    """The teacher's weight after each of the student's weights."""
    teacher, path = 0.0, []
    for weight in weights:
        teacher = a * teacher + (1 - a) * weight
        path.append(teacher)
    return path


slow = slow_average([1.0] * 50, 0.9)
print(f"slow, after 1, 2, 3, 50 steps: {slow[0]:.2f}, {slow[1]:.2f}, {slow[2]:.2f}, {slow[49]:.2f}")
print(f"formula after 50 steps: {1 - 0.9**50:.2f}, the same: {abs(slow[49] - (1 - 0.9**50)) < 1e-12}")

# %% [markdown]
# Why average? A single step may be bad; an average of many steps changes slowly. (The package begins with the plain mean of all steps so
# far, until that remembers longer than $a$ does: so the bad first weights are soon forgotten.)
#
# ## Pseudo-labels by hand
# For a pixel the teacher gives a probability to every class. Its *pseudo-label* is the most probable class, and it counts only if that
# probability is at least the *confidence* c. Four pixels, two classes:

# %%
probability = torch.tensor([[0.97, 0.60, 0.30, 0.02], [0.03, 0.40, 0.70, 0.98]])  # [classes, pixels]
logits = probability.log()[None, :, None]  # [1, classes, 1, 4]: an image of one row
label, sure = pseudo_labels(logits, 0.95)
pd.DataFrame(
    {"p(class 0)": probability[0], "p(class 1)": probability[1], "label": label[0, 0], "sure at 0.95": sure[0, 0]}
)


# %% [markdown]
# The student's loss is the cross-entropy of the sure pixels only, and the sum is divided by the number of *all* pixels: if few are sure, this
# loss counts little. By hand, with a student that gives 0.80 and 0.60 to the two sure labels: $(-\ln 0.80-\ln 0.60)/4=0.18$. The slow loop and
# the package:


# %% tags=["nbval-check-output"]
def slow_consistency(student_probability, label, sure):
    """Minus the log of what the student gives to the pseudo-label, over sure pixels, by all pixels."""
    total = 0.0
    for pixel in range(4):
        if sure[pixel]:
            total += -np.log(student_probability[label[pixel], pixel])
    return total / 4


student = torch.tensor([[0.80, 0.50, 0.50, 0.40], [0.20, 0.50, 0.50, 0.60]])
slow = slow_consistency(student.numpy(), label[0, 0].tolist(), sure[0, 0].tolist())
fast = consistency_loss(student.log()[None, :, None], label, sure).item()
print(f"slow {slow:.4f}, package {fast:.4f}, the same: {abs(slow - fast) < 1e-6}")

# %% [markdown]
# ## What changes when the confidence changes?
# A segmenter from two labelled subjects looks at slices that it has never seen. Which of its pixels become pseudo-labels, and how many of these are
# right? (The masks are there to look it up; the network does not get them.) Colours: black background, orange right ventricle,
# light blue myocardium, pink left ventricle; grey is *not sure*, no pseudo-label.

# %%
supervised = finetune(store, labelled, SupervisedRecipe(), steps=120, network=config, seed=0).network.eval()
rows = store.rows(unlabelled)
every = store.batch(rows)
with torch.no_grad():
    every_logits = supervised(every.image)
called = every_logits.argmax(dim=1) > 0  # what the network calls heart, in all slices


def believed(confidence=0.9):
    """Pseudo-labels of one slice at a confidence, and over all slices how many there are and how many are right."""
    label, sure = pseudo_labels(every_logits, confidence)
    right = label == every.label
    number = 4
    classes = plt.matplotlib.colors.ListedColormap(
        [plots.GREY, "black", *plots.STRUCTURES[1:4]]
    )  # not sure, 0, 1, 2, 3
    _, axes = plt.subplots(1, 4, figsize=(11, 3.4))
    pictures = {
        "slice": every.image[number, 0],
        "reference": every.label[number],
        "pseudo-label": torch.where(sure[number], label[number], -1),
        "sure and wrong": (sure & ~right)[number],
    }
    for axis, (title, picture) in zip(axes, pictures.items(), strict=True):
        look = {"cmap": "gray"} if title in ("slice", "sure and wrong") else {"cmap": classes, "vmin": -1, "vmax": 3}
        axis.imshow(picture, **look)
        axis.set_title(title)
        axis.set_axis_off()
    share, correct = sure[called].float().mean(), right[called & sure].float().mean()
    plt.suptitle(
        f"confidence {confidence:.2f}, all slices: {share:.0%} of what it calls heart counts, {correct:.0%} of that is right"
    )
    plt.show()


believed()

# %% tags=["nbval-check-output"]
counted = []
for confidence in (0.5, 0.7, 0.9):
    label, sure = pseudo_labels(every_logits, confidence)
    counts, right = sure & called, label == every.label
    counted.append((counts.sum() / called.sum(), right[counts].float().mean()))
(low, low_right), _, (high, high_right) = counted
print(
    f"from confidence 0.5 to 0.9 fewer pixels count: {bool(high < low)}; a larger share is right: {bool(high_right > low_right)}"
)

# %% tags=["slider"]
_ = interact(believed, confidence=FloatSlider(value=0.9, min=0.3, max=0.99, step=0.01, continuous_update=False))

# %% [markdown]
# A higher confidence leaves fewer pixels, and a larger share of them is right. But not all: a network can be sure and wrong, and training on
# these labels makes it surer. At 0.9 this segmenter is unsure in about three quarters of what it calls heart, inside as well as at borders. The titles do
# not count heart that it calls background. That is the most frequent of its sure mistakes, mostly at borders. The thin myocardium (light blue) gets hardly a pseudo-label.
#
# ## Does it help?
# Three recipes from the same first weights, the same two labelled subjects and as many steps: `supervised`; `supervised, averaged`, whose segmenter is the
# running average of its weights; and `weak to strong`, whose segmenter is such an average, too. So the last two differ in the
# unlabelled scans (and by chance: other labelled slices come in a batch). They are tested on 12 new subjects. (A *mean teacher* in the first sense has neither pseudo-labels nor a confidence: its
# loss is the mean squared difference of the two networks' probabilities, over all pixels. It is the recipe `mean_teacher`.)

# %%
# as the study trains on ACDC: a falling rate, and a teacher that normalises by its batch
training = {"loss": "dice+cross_entropy", "learning_rate": 2e-3, "schedule": "cosine"}
recipes = {
    "supervised": SupervisedRecipe(**training),
    "supervised, averaged": SupervisedRecipe(**training, average=0.99),
    "weak to strong": WeakToStrongRecipe(**training, confidence=0.9, statistics="batch"),
}
tables = {}


def measured(name, seed=0):
    """Mean Dice of every test subject."""
    result = finetune(store, labelled, recipes[name], 300, network=config, seed=seed, unlabelled=unlabelled)
    return pd.DataFrame(scores(result.network, store, tested)).groupby("subject")["dice"].mean()


tables["supervised"] = measured("supervised")

# %%
tables["supervised, averaged"] = measured("supervised, averaged")

# %%
tables["weak to strong"] = measured("weak to strong")

# %%
dice = pd.DataFrame(tables)
figure, axis = plt.subplots(figsize=(8, 4))
for _, values in dice.iterrows():
    axis.plot(range(3), values, "-", color=plots.GREY, alpha=0.7)
axis.plot(range(3), dice.mean(), "D", color=plots.RED, markersize=9, label="mean")
axis.set(
    xticks=range(3), ylabel="Dice of a test subject", title="unlabelled scans lift most test subjects (a line each)"
)
axis.set_xticklabels(list(dice))
axis.legend()
plt.show()
print(dice.mean().round(2).to_string())

# %% tags=["nbval-check-output"]
gain = dice["weak to strong"].mean() - dice["supervised, averaged"].mean()
print(f"{len(dice)} test subjects; weak to strong is ahead: {gain > 0}")

# %% [markdown]
# One draw and one seed: enough to see *how* it is done, not to say how much it gives (lesson [02](02_few_labels.ipynb) says why). With another seed the
# gain over `supervised` was 0.02 in place of 0.09. On real patients the mean gain over plain training was 0.19 with 1 labelled (verdict: not known) and 0.23 with 2 (helps):
# [42_which_method](42_which_method.ipynb) has the intervals, and the numbers of pre-training before it.
#
# ## What to notice
# * Pre-training comes before the first mask, pseudo-labels act while masks are learned. They can be combined.
# * The teacher is never trained by a gradient.
# * Confidence trades many pseudo-labels against right ones. Sure and wrong is the danger.
#
# ## Summary
# * A mean teacher is a running average of the student's weights.
# * A pseudo-label is the teacher's most probable class; it counts where the probability is at least the confidence.
# * Weak-to-strong: what is sure on the weak view is required on the strong view; its labels still fit there, in boxes too.
# * The loss is divided by all pixels, so unsure images count little.
# * Compare on the same draws, with as many steps, on subjects that nobody trained on.
#
# ## Exercises
# [96_semi_supervised](96_semi_supervised.ipynb): the memory of a teacher, pseudo-labels and their loss in code, and four statements.
#
# ## Where to read on
# * Next: [15_end_to_end](15_end_to_end.ipynb), a small study of your own. How the papers compare: [32_glcl_comparison](32_glcl_comparison.ipynb).
# * The code: `clseg/recipes/weak_to_strong.py`, `mean_teacher.py`, `average.py`.
# * A. Tarvainen, H. Valpola, *Mean teachers*, NeurIPS 2017, [arXiv:1703.01780](https://arxiv.org/abs/1703.01780).
# * K. Sohn et al., *FixMatch*, NeurIPS 2020, [arXiv:2001.07685](https://arxiv.org/abs/2001.07685).
# * L. Yang et al., *UniMatch*, CVPR 2023, [arXiv:2208.09910](https://arxiv.org/abs/2208.09910).
