# %% [markdown]
# # Exercises: local contrast
# **Four tasks on regions of a slice, among them a way to cheat.** About 30 minutes. The lesson is
# [11_local_contrast](../11_local_contrast.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong.

# %%
from math import log

import torch
import torch.nn.functional as F

from clseg import teach

# %% [markdown]
# ## 1. Predict: the loss of equal regions
# Every region has 5 neighbours that are its negatives, in each of the two maps. All regions have one and the same embedding.
# What is the local loss?

# %% tags=["solution"]
# hint: count the terms of the denominator
answer_1 = log(1 + 2 * 5)

# %% tags=["nbval-check-output"]
teach.first_local_loss(answer_1)

# %% [markdown]
# ## 2. Implement: one term
# `a` and `b` are the regions of two maps, [R, D]; `r` is a region and `near` the list of its neighbours (numbers). Write, as one number,
# $t(a,b,r)=-\log\frac{e^{s(a_r,b_r)}}{e^{s(a_r,b_r)}+\sum_{m}\left[e^{s(a_r,a_m)}+e^{s(a_r,b_m)}\right]}$ with
# $s(x,y)=\cos(x,y)/\tau$.


# %% tags=["solution"]
def local_term(a, b, r, near, temperature):
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)  # of length 1
    # hint: e^s of the positive, e^s of the neighbours in a and in b, then -log of the fraction
    positive = (a[r] @ b[r] / temperature).exp()
    negatives = sum((a[r] @ a[m] / temperature).exp() + (a[r] @ b[m] / temperature).exp() for m in near)
    return -torch.log(positive / (positive + negatives))


# %% tags=["nbval-check-output"]
teach.local_term(local_term)

# %% [markdown]
# ## 3. Change: a cheat
# Write down embeddings of the 17 places (13 anchors and 4 that are negatives only), a tensor [17, D], D as you like. They are used
# for every image and every view, so they know nothing of the image. Make the loss fall below 0.001 at temperature 0.1.

# %% tags=["solution"]
# hint: which directions are at right angles, and how many dimensions give 17 of them?
answer_3 = torch.eye(17)

# %% tags=["nbval-check-output"]
teach.cheat(answer_3)

# %% [markdown] tags=["solution"]
# At right angles every term is $\log(1+10\,e^{-1/\tau})\approx 10\,e^{-10}\approx 0.0005$. Directions that point away from each
# other a little (the corners of a simplex) do even better.

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) A decoder could make the local loss small on pictures of noise.
# * (b) The two views of a slice may be cropped differently.
# * (c) `ld` assumes that one place shows the same thing in different patients.
# * (d) The local stage changes the weights of the encoder, too.

# %% tags=["solution"]
# hint: what does the loss compare, and at which place?
answer_4 = "ac"

# %% tags=["nbval-check-output"]
teach.local_statements(answer_4)
