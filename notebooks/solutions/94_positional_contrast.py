# %% [markdown]
# # Exercises: positional contrast
# **Four tasks on a single number, the threshold.** About 25 minutes. The lesson is
# [12_positional_contrast](../12_positional_contrast.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong.

# %%
import torch

from clseg import teach

# %% [markdown]
# ## 1. Predict: count the positives
# A batch holds all 10 slices of one volume, two views of each: 20 rows at the positions 0.1, 0.2, ... 1.0. The threshold is 0.3. How
# many positives has an anchor at position 0.5?

# %% tags=["solution"]
# hint: which slices are nearer than 0.3, how many rows are they, and which row is the anchor?
answer_1 = 5 * 2 - 1

# %% tags=["nbval-check-output"]
teach.count_positives(answer_1)

# %% [markdown]
# ## 2. Implement: who is near?
# Write a function that takes positions [B] and a threshold and returns bool [B, B]: True where row j is a positive of row i. Two views of a
# slice have the same position.


# %% tags=["solution"]
def position_positives(position, threshold):
    # hint: position[:, None] - position[None, :] has all differences
    near = (position[:, None] - position[None, :]).abs() < threshold  # [B, B]
    return near.fill_diagonal_(False)


# %% tags=["nbval-check-output"]
teach.position_positives(position_positives)

# %% [markdown]
# Your function in action. Change the thresholds: between which values does the number change at all? (Try values between the multiples of 0.1.
# Where |p - q| = t exactly, float32 may round the wrong way; `position_pairs` corrects that.)

# %%
place = (torch.arange(10) + 1) / 10
for threshold in (0.05, 0.15, 0.25, 0.35, 0.45):
    share = position_positives(place, threshold).float().sum() / 90
    print(f"threshold {threshold}: {share:.0%} of the pairs are alike")

# %% [markdown]
# ## 3. Predict: the share of positives
# Two volumes have very many slices. Of all pairs of a slice of one and a slice of the other, which share is alike at t = 0.1? Write a fraction
# of 1, with two decimals.

# %% tags=["solution"]
# hint: draw the square of all pairs (p, q) and the band where they are near; what is outside are two triangles
answer_3 = 1 - (1 - 0.1) ** 2

# %% tags=["nbval-check-output"]
teach.share_of_positives(answer_3)

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) "Near" sorts the slices of a volume into classes.
# * (b) If all stacks have ten slices, the thresholds 0.32 and 0.38 are the same method.
# * (c) With a very large threshold the network learns most.
# * (d) With `denominator="all"` a positive can be pushed away from its anchor.

# %% tags=["solution"]
# hint: try each on the slices at 0.2, 0.4 and 0.6
answer_4 = "bd"

# %% tags=["nbval-check-output"]
teach.positional_statements(answer_4)
