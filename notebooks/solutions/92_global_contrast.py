# %% [markdown]
# # Exercises: global contrast
# **Four tasks on pairs of slices: count them, make them, judge them.** About 30 minutes. The lesson is
# [10_global_contrast](../10_global_contrast.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong.

# %%
from math import log

import torch

from clseg import teach
from clseg.losses import contrastive_loss
from clseg.pairs import Pairs

# %% [markdown]
# ## 1. Predict: the loss before training
# A batch of `gd` has 5 volumes and 4 partitions, one slice of each, and two views. All rows have one and the same embedding.
# What is the loss (`denominator="pair"`)? (A first loss far from it needs a reason: embeddings that differ at random lie above it, too.)

# %% tags=["solution"]
# hint: every term is log(1 + number of negatives of an anchor)
answer_1 = log(1 + 5 * 3 * 2)

# %% tags=["nbval-check-output"]
teach.first_loss_gd(answer_1)

# %% [markdown]
# ## 2. Predict: count pairs
# A batch of `gd-` has 5 volumes and 3 partitions, and three rows of each slice: the slice itself and two augmented copies. How
# many positives and how many negatives has an anchor? Write a pair of numbers, `(positives, negatives)`.

# %% tags=["solution"]
# hint: positives are the other rows of its own slice; negatives are all rows of other partitions
answer_2 = (2, 5 * 2 * 3)

# %% tags=["nbval-check-output"]
teach.pairs_of_gd_minus(answer_2)

# %% [markdown]
# ## 3. Implement: who is alike?
# Write a function that takes the partition of every row, integers [B], and returns bool [B, B]: True where row j is a
# positive of row i. The rule is that of `gd` without `view`: the same partition is alike. No row is its
# own positive: for a tensor of bool, `same.fill_diagonal_(False)` clears the diagonal.


# %% tags=["solution"]
def gd_positives(partition):
    # hint: compare a column of partitions with a row of them; broadcasting makes the square
    same = partition[:, None] == partition[None, :]  # [B, B]
    return same.fill_diagonal_(False)


# %% tags=["nbval-check-output"]
teach.gd_positives(gd_positives)

# %% [markdown]
# Your rule is a method now. Everything that is not alike is a negative. (Here positives stand in the denominator, five of them for each
# anchor, so even perfect directions do not give 0.)

# %%
partition = torch.arange(4).repeat(6)  # 6 rows of each of 4 partitions
positive = gd_positives(partition)
pairs = Pairs(positive, (~positive).fill_diagonal_(False))
random = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
print(f"loss of random embeddings: {contrastive_loss(random, pairs, 0.5):.2f}")
print(
    f"loss where each partition has a direction of its own: {contrastive_loss(torch.eye(4)[partition], pairs, 0.5):.2f}"
)

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) After the same number of steps `gd` has a lower loss than `gr`, so it has learned more.
# * (b) Two slices on the two sides of a border between partitions are negatives, though they may show nearly the same.
# * (c) A loss that falls on training subjects does not prove that the network knows the anatomy of new ones.
# * (d) For `gd-`, slices of the same partition of two patients are negatives.

# %% tags=["solution"]
# hint: write down positives and negatives of one anchor for each strategy
answer_4 = "bc"

# %% tags=["nbval-check-output"]
teach.global_statements(answer_4)
