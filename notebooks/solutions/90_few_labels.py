# %% [markdown]
# # Exercises: few labels
# **Four tasks on masks, scores and subjects, from a number on paper to a judgement.** About 20 minutes. The lesson is
# [02_few_labels](../02_few_labels.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong, so try before you
# look anything up.

# %%
import numpy as np
import pandas as pd

from clseg import teach

# %% [markdown]
# ## 1. Predict: Dice on paper
# A structure has 10 pixels. A network finds 6 of them and nothing else. What is the Dice of its mask?

# %% tags=["solution"]
# hint: count the pixels that both masks have, and the pixels of each
answer_1 = 2 * 6 / (6 + 10)

# %% tags=["nbval-check-output"]
teach.dice_by_hand(answer_1)

# %% [markdown]
# ## 2. Implement: Dice
# Write a function of two bool arrays of one shape. You may assume that they are not both empty.


# %% tags=["solution"]
def dice(prediction, reference):
    # hint: prediction & reference is True where both are; .sum() counts
    both = (prediction & reference).sum()
    return 2 * both / (prediction.sum() + reference.sum())


# %% tags=["nbval-check-output"]
teach.dice(dice)

# %% [markdown]
# Try it on two discs of the same size, moved apart pixel by pixel. Before you run the cell: does Dice fall in a
# straight line?

# %%
row, column = np.indices((64, 64))
disc = (row - 32) ** 2 + (column - 20) ** 2 < 10**2
pd.Series({shift: round(dice(disc, np.roll(disc, shift, axis=1)), 2) for shift in range(0, 24, 4)}, name="dice")

# %% [markdown] tags=["solution"]
# Nearly, then slower: what leaves the disc on one side grows with the shift. It reaches 0 where the discs no longer touch, and
# stays there: Dice cannot tell "just missed" from "far away". HD95 can.

# %% [markdown]
# ## 3. Change: who counts once?
# The table has the Dice of every slice. Patient b has many slices and a low Dice. Write a function that gives the mean in
# which every *patient* counts once: a function of any such table.

# %%
table = pd.DataFrame({"subject": list("aabbbbbbcc"), "dice": [0.9, 0.8, 0.3, 0.4, 0.2, 0.3, 0.3, 0.3, 0.7, 0.8]})
print(f"mean of all slices: {table['dice'].mean():.2f}")


# %% tags=["solution"]
def mean_over_subjects(table):
    # hint: first a mean for each subject (groupby), then the mean of those
    return table.groupby("subject")["dice"].mean().mean()


# %% tags=["nbval-check-output"]
teach.mean_over_subjects(mean_over_subjects)

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) With 16 test patients of 10 slices each, one computes the interval of a mean Dice as of 160 independent observations.
# * (b) A structure that the network did not find at all counts with Dice 0.
# * (c) A narrow 95 % interval over test patients says that other labelled patients would have given the same Dice.
# * (d) Two masks with equal Dice can have very different HD95.

# %% tags=["solution"]
# hint: for each, ask what was drawn by chance, and what the number does not see
answer_4 = "bd"

# %% tags=["nbval-check-output"]
teach.few_labels_statements(answer_4)
