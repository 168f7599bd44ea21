# %% [markdown]
# # Your own answer to "who is alike?"
# **A method is an answer to one question. If it recombines answers that exist, it is a few lines of YAML; if it is new, it is ten lines of Python. Both run
# beside the others.**
#
# **Goals.** After this lesson you can (1) write a method as data, (2) write a new rule as `Pairs` and test it before you train, (3) compare it with the rule
# that it wants to improve.
#
# **You need** [10_global_contrast](10_global_contrast.ipynb) or [12_positional_contrast](12_positional_contrast.ipynb), and
# [15_end_to_end](15_end_to_end.ipynb). **About 50 minutes**, one of them computing. Nothing is downloaded.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import torch
from ipywidgets import FloatRangeSlider, interact

from clseg import plots
from clseg.augment import contrast_view
from clseg.data.phantom import phantom_dataset
from clseg.data.prepare import prepare
from clseg.loop import Training, fit
from clseg.losses import contrastive_loss
from clseg.models import GlobalHead
from clseg.pairs import Pairs, position_pairs
from clseg.settings import ContrastStage, Geometry, NetworkConfig, SupervisedRecipe
from clseg.stages.sampling import random_slices
from clseg.train import finetune, scores, stage_work

plt.rcParams.update(plots.STYLE)
store = prepare(phantom_dataset(subjects=24), Geometry(size=[32, 32], spacing_mm=6.5), progress=False)
training_subjects, tested = store.subjects[:12], store.subjects[12:]

# %% [markdown]
# ## As data: a few lines of YAML
# A method of the project looks like this. Put it into `params/methods.yaml`, and it can be named in a study. It changes one setting of `gd+lr`,
# the number of partitions (three in place of four). The batch follows: 15 slices of five volumes, no longer 16 of four:
#
# ```yaml
# gd3+lr:
#   title: gd with three partitions, then regions
#   stages:
#     - {<<: *gd, partitions: 3}    # the stage that is marked &gd there, but for one key
#     - *lr
#   recipe: *published
# ```
#
# ```
# .venv/bin/clseg methods                                                                     # is it there?
# .venv/bin/clseg run quickstart --profile smoke --set 'study.methods=[random,gd+lr,gd3+lr]'  # does it run? minutes
# .venv/bin/clseg run quickstart --profile laptop --set 'study.methods=[random,gd+lr,gd3+lr]' --dry-run  # how long it would take
# ```
#
# The table is in `out/paper_figures`; the command says where.
# A misspelt key is refused with the nearest valid one. In Python the first stage is
# `ContrastStage(pairs="partition", partitions=3, slices=16)`: the YAML is the same object, written down.
#
# ## As Python: a rule of your own
# What is wrong with positions? At the threshold a pair at 0.34 is a positive and one at 0.36 a negative, though they show nearly the same. Idea: **near is
# alike, far is not, and in between nobody says anything.** One picture:


# %%
def buffered_pairs(position, near=0.15, far=0.35):
    """Positive below `near`, negative above `far`, neither in between."""
    exact = position.double()
    apart = (exact[:, None] - exact[None, :]).abs() + 1e-7  # float32 rounds; a distance of exactly `near` is not near
    return Pairs((apart < near).fill_diagonal_(False), apart >= far)


def rule(limits=(0.15, 0.35)):
    """Who is alike for every pair of positions of two volumes of 20 slices."""
    place = (torch.arange(20) + 1) / 20
    pairs = buffered_pairs(place.repeat(2), *limits)
    kind = 2 * pairs.positive.int() + pairs.negative.int()
    _, axis = plt.subplots(figsize=(5.5, 4.6))
    colours = plt.matplotlib.colors.ListedColormap(["#E4E4E4", plots.ORANGE, plots.BLUE])
    image = axis.imshow(kind[:20, 20:], cmap=colours, vmin=-0.5, vmax=2.5, extent=(0, 1, 1, 0))
    bar = plt.colorbar(image, ticks=[0, 1, 2])
    bar.set_ticklabels(["neither", "negative", "positive"])
    axis.set(
        xlabel="position in volume B",
        ylabel="position in volume A",
        title="blue is alike, orange is not, grey says nothing",
    )
    axis.grid(False)
    plt.show()


rule()

# %% tags=["slider"]
_ = interact(rule, limits=FloatRangeSlider(value=(0.15, 0.35), min=0.01, max=1, step=0.01, continuous_update=False))

# %% [markdown]
# ## Test the rule before you train it
# By hand first: positions 0.1, 0.2, 0.4, 0.9. For the first, 0.2 is near (0.1 apart), 0.4 is in between (0.3), 0.9 is far (0.8). Then a *reduction*: with
# `near = far` nothing is in between, so it must be the rule of Zeng et al. A new method that contains an old one can be tested against it.

# %% tags=["nbval-check-output"]
four = torch.tensor([0.1, 0.2, 0.4, 0.9])
pairs = buffered_pairs(four)
print("positives of 0.1:", int(pairs.positive[0].sum()), "negatives:", int(pairs.negative[0].sum()))
known = store.batch(store.rows(training_subjects[:4]))  # real places: many pairs are exactly 0.3 apart
ours, theirs = buffered_pairs(known.position, 0.3, 0.3), position_pairs(known.position, 0.3)
print(
    "near = far = 0.3 is position_pairs:", ours.positive.equal(theirs.positive) and ours.negative.equal(theirs.negative)
)
z = torch.randn(len(known.row), 8, generator=torch.Generator().manual_seed(1))
print(f"losses {contrastive_loss(z, ours):.4f} and {contrastive_loss(z, theirs):.4f}")

# %% [markdown]
# Is the rule *true*? The masks can tell: how alike are the hearts of positives and of negatives of different volumes? (Areas of structures in common, as
# in lesson 10. This looks at masks: of four labelled subjects, never of test subjects.)

# %%
area = torch.stack([(known.label == index).sum(dim=(1, 2)) for index in store.class_names], dim=1)  # [N, K]
overlap = 2 * torch.minimum(area[:, None], area[None]).sum(dim=2) / (area[:, None] + area[None]).sum(dim=2).clamp(min=1)
other = known.volume[:, None] != known.volume[None, :]
table = {}
for name, of_rule in {
    "position, 0.35": position_pairs(known.position, 0.35),
    "position, 0.15": position_pairs(known.position, 0.15),
    "buffered": buffered_pairs(known.position),
}.items():
    table[name] = {
        "overlap of positives": overlap[of_rule.positive & other].mean().item(),
        "overlap of negatives": overlap[of_rule.negative & other].mean().item(),
        "share of positives": of_rule.positive.float().mean().item(),
    }
pd.DataFrame(table).T.round(2)

# %% [markdown]
# Against t = 0.15 the positives are the same, and the negatives are less alike: that is what the buffer buys. The price: the pairs in between teach
# nothing. Against t = 0.35 the negatives are the same, and the positives are fewer and more alike. So in each comparison one thing changes: what the pairs in
# between are.
#
# ## Train it
# A stage needs three things: which modules learn, how the batch of a step is drawn, and its loss. That is a `Training`, and `fit` is the loop that all
# methods share.

# %%
config = NetworkConfig(filters=[8, 16, 32, 32], norm_momentum=0.1)
# only slices, temperature, optimiser and learning rate are used: who is alike comes from the rule
settings = ContrastStage(pairs="position", threshold=0.35, slices=16)


def pretrained_with(pairs_of, steps=120):
    """The encoder's weights after pre-training with a rule: it gets the batch, each slice twice (its two views)."""
    work = stage_work(store, training_subjects, settings, steps, config)
    encoder, head = work.network.encoder, GlobalHead(config, store.size)

    def draw(step):
        generator = work.generator("mine", step)
        rows = random_slices(work.rows, work.slices, generator)
        views = [contrast_view(work.store.batch(rows).image, generator) for _ in range(2)]
        pairs = pairs_of(work.store.batch(rows.repeat(2)))  # of its row, volume, position, image
        return [pairs.positive, pairs.negative, *views]

    def loss(positive, negative, *views):
        z = torch.cat([head(encoder(view)[-1]) for view in views])
        return contrastive_loss(z, Pairs(positive, negative), settings.temperature, "all")

    result = fit(work.network, Training({"encoder": encoder, "head": head}, draw, loss), settings, steps)
    equal = torch.ones(2 * work.slices, 2)  # embeddings that are all the same
    collapsed = [contrastive_loss(equal, Pairs(*draw(k)[:2]), settings.temperature, "all").item() for k in range(10)]
    ends = [result.log["loss"][:10].mean(), result.log["loss"][-10:].mean(), sum(collapsed) / 10]
    weights = {name: value for name, value in work.network.state_dict().items() if name.startswith("encoder.")}
    return weights, ends


starts, curves = {"random": None}, {}
starts["position"], curves["position"] = pretrained_with(lambda batch: position_pairs(batch.position, 0.35))

# %%
starts["buffered"], curves["buffered"] = pretrained_with(lambda batch: buffered_pairs(batch.position))
pd.DataFrame(curves, index=["loss of the first 10 steps", "of the last 10", "of equal embeddings"]).T.round(2)

# %% [markdown]
# Look at the collapse line first (lesson 04): both losses are still near that of equal embeddings, so these encoders have learned next to nothing. The
# Dice below shows *how* one compares; it says nothing about the rule. A study takes more subjects, slices and steps. And the two losses must not be compared:
# their pairs differ.
#
# ## Compare it
# Two draws of two labelled subjects, the same for all three methods, 12 test subjects.

# %%
found = []


def compare(name):
    """Fine-tunes from one start on both draws."""
    for draw in (0, 1):
        chosen = training_subjects[6 * draw : 6 * draw + 2]
        result = finetune(store, chosen, SupervisedRecipe(), 100, network=config, seed=draw, start=starts[name])
        found.extend({"method": name, "draw": draw, **row} for row in scores(result.network, store, tested))


compare("random")
compare("position")

# %%
compare("buffered")
dice = pd.DataFrame(found).groupby(["method", "draw"])["dice"].mean().unstack()
dice.round(2)

# %% tags=["nbval-check-output"]
print(f"{len(dice)} methods, {dice.shape[1]} draws, {len(tested)} test subjects: too few to say which is best")

# %% [markdown]
# ## What to notice
# * The loss did not change by a line. In this comparison only the pairs differ.
# * The tests of the rule took seconds. An idea that fails there needs no training.
# * Whether the idea *helps* is a question for a study: more draws, seeds, and a margin set before (lesson [15](15_end_to_end.ipynb)).
#
# ## Summary
# * A recombination of what exists is a few lines of YAML and runs as `clseg run ... --set study.methods=[...]`.
# * A new rule is a function that returns `Pairs(positive, negative)`; neither is allowed.
# * Test it by hand, by a reduction to a known rule, and by masks of a few labelled subjects.
# * A stage is a `Training`: modules that learn, a draw and a loss.
#
# ## Exercises
# 1. *Predict:* what does `buffered_pairs(four, 0.01, 0.99)` leave? Give it to `contrastive_loss` with `z[:4]` and read the error. Then
#    `four.repeat(2)` with `z[:8]`: why is there no error, and what is the loss?
# 2. *Change:* combine rules: positives of `position_pairs`, but only between *different* patients (`batch.volume`). Are the two views of a slice now
#    neither, or negatives? Both can be meant: say which you take.
# 3. *Implement:* slices of like mean brightness are alike: `known.image.mean(dim=(1, 2, 3))`, nearer than 0.02. A row is never its own pair
#    (`fill_diagonal_(False)`). Test it with the masks before you train. How many positives are of the same patient? Is it a good idea?
# 4. *Explain:* find a rule that has a falling loss and teaches nothing. (Lesson [11](11_local_contrast.ipynb) has a loss of that kind, over regions.)
#
# ## Where to read on
# * The code: `clseg/pairs.py`, `clseg/stages/contrast.py`, `clseg/loop.py`, `params/methods.yaml`.
# * Back to the map: [00_start_here](00_start_here.ipynb). How to contribute a method: [CONTRIBUTING.md](../CONTRIBUTING.md).
