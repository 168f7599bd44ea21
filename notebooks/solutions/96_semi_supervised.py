# %% [markdown]
# # Exercises: a network that teaches itself
# **Four tasks on teachers, pseudo-labels and what they may believe.** About 30 minutes. The lesson is
# [14_semi_supervised](../14_semi_supervised.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong.

# %%
import torch
import torch.nn.functional as F

from clseg import teach

# %% [markdown]
# ## 1. Predict: how long does a teacher remember?
# A mean teacher has decay 0.99. By the formula of the lesson, which part of its first weights is left in it after 100 steps? Give a number
# from 0 to 1, with two decimals.

# %% tags=["solution"]
# hint: each step multiplies what is left by the decay
answer_1 = 0.99**100

# %% tags=["nbval-check-output"]
teach.memory_of_teacher(answer_1)

# %% [markdown]
# ## 2. Implement: what may be believed?
# `logits` is [B, K, H, W]. Return two tensors [B, H, W]: the most probable class of each pixel, and whether its probability is at least
# `confidence`.


# %% tags=["solution"]
def believe(logits, confidence):
    # hint: logits are no probabilities: what makes probabilities of them, and along which dimension?
    probability, label = logits.softmax(dim=1).max(dim=1)
    return label, probability >= confidence


# %% tags=["nbval-check-output"]
teach.believe(believe)

# %% [markdown]
# Try it: random logits of four classes. Before you run the cell: at which confidence is no pixel left?

# %%
logits = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
for confidence in (0.25, 0.5, 0.75, 0.95, 0.97):
    print(f"confidence {confidence}: {believe(logits, confidence)[1].sum():4} of {64 * 64} pixels are sure")

# %% [markdown]
# ## 3. Implement: the consistency loss
# Cross-entropy between the student's `logits` [B, K, H, W] and the pseudo-labels `label` [B, H, W], summed over the pixels that are `sure`, divided
# by the number of all pixels.


# %% tags=["solution"]
def consistency(logits, label, sure):
    # hint: F.cross_entropy gives the mean of all pixels; first you need a value for each (see `reduction`)
    each = F.cross_entropy(logits, label, reduction="none")  # [B, H, W]
    return (each * sure).mean()


# %% tags=["nbval-check-output"]
teach.consistency(consistency)

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) The strong view of a slice must not be cropped in another way than the weak one while the pseudo-label stays as it is.
# * (b) The gradient of the consistency loss trains the teacher.
# * (c) Pseudo-labels of high confidence are right, so they can correct the network.
# * (d) At confidence 1 the recipe is nearly supervised fine-tuning (with averaged weights).

# %% tags=["solution"]
# hint: for each, ask where a label comes from and what it is compared with
answer_4 = "ad"

# %% tags=["nbval-check-output"]
teach.semi_supervised_statements(answer_4)
