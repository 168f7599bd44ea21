# %% [markdown]
# # Exercises: cluster contrast
# **Four tasks on pseudo-classes: what they cost, what they hold, and when they are another method.** About 30 minutes. The lesson
# is [13_cluster_contrast](../13_cluster_contrast.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong.

# %%
from math import log

import numpy as np

from clseg import teach

# %% [markdown]
# ## 1. Predict: the least loss
# A batch has 12 slices, four of each of three pseudo-classes, and two views. The network has learned all there is: rows of
# a pseudo-class have one and the same embedding, and the other classes are so far away that their part of the denominator is
# nothing. What is the loss (`denominator="all"`)? It is not 0. Give a number with two decimals, or a formula.

# %% tags=["solution"]
# hint: the logarithm of the number of rows of its own class in the denominator of an anchor
answer_1 = log(4 * 2 - 1)

# %% tags=["nbval-check-output"]
teach.least_loss(answer_1)

# %% [markdown]
# ## 2. Implement: purity
# `cluster` and `labels` are arrays of n integers from 0; some numbers may have no slice. Purity is the share of slices whose label is the most frequent one of their
# cluster.


# %% tags=["solution"]
def purity(cluster, labels):
    # hint: for each cluster count its most frequent label (np.bincount), add the counts, divide by n
    count = sum(np.bincount(labels[cluster == c]).max() for c in np.unique(cluster))
    return count / len(labels)


# %% tags=["nbval-check-output"]
teach.purity(purity)

# %% [markdown]
# Purity grows with the number of clusters even if they mean nothing. See for yourself, and change the number of labels:

# %%
draw = np.random.default_rng(0)
labels = draw.integers(0, 4, 200)
for k in (2, 10, 50, 200):
    print(f"{k} random clusters of 200 slices with four labels: purity {purity(draw.integers(0, k, 200), labels):.2f}")

# %% [markdown]
# ## 3. Predict: the two ends
# There are 200 slices. With which number of clusters k is cluster contrast SimCLR, and with which are all slices alike? Write
# `(k of SimCLR, k of all alike)`.

# %% tags=["solution"]
# hint: in SimCLR a slice is like its own other view only
answer_3 = (200, 1)

# %% tags=["nbval-check-output"]
teach.extreme_clusters(answer_3)

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) An auto-encoder may describe whose chest it sees better than which part of the heart.
# * (b) A purity of 0.8 proves that the clusters found the labels.
# * (c) The method with k = 10 has a lower loss than that with k = 4, so k = 10 is better.
# * (d) On the phantom, with k = 10, most slices of a patient fall into one cluster, so they are positives.

# %% tags=["solution"]
# hint: compare with shuffled clusters, and with the least loss of exercise 1
answer_4 = "ad"

# %% tags=["nbval-check-output"]
teach.cluster_statements(answer_4)
