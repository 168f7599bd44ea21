# %% [markdown]
# # Exercises: InfoNCE
# **Four tasks on the loss behind all contrastive methods.** About 40 minutes. The lesson is [04_infonce](../04_infonce.ipynb).
#
# Replace each `teach.todo(...)` by your answer and run the cell below it, cell by cell. The check says what is wrong.

# %%
from math import exp, log

import torch
import torch.nn.functional as F

from clseg import teach

# %% [markdown]
# ## 1. Predict: a network that gives every image the same embedding
# A batch has 20 slices, two views of each. The network gives every view (every *row* of the batch) the same embedding. What is the loss?
# The temperature does not matter; why? Two decimals are enough.

# %% tags=["solution"]
# hint: all e^s are equal; how many of them are in the denominator of an anchor?
answer_1 = log(2 * 20 - 1)

# %% tags=["nbval-check-output"]
teach.collapsed_loss(answer_1)

# %% [markdown]
# ## 2. Implement: InfoNCE
# `embedding` is [B, D], of any length; `partner` is a list: row `partner[i]` is the other view of row i. All rows but i itself
# are in the denominator of anchor i. A loop is fine. Return the mean over the rows.


# %% tags=["solution"]
def info_nce(embedding, partner, temperature):
    z = F.normalize(embedding, dim=1)  # of length 1
    # hint: for each row i take the similarities z[i] @ z[k] / temperature of all other rows k
    terms = []
    for i, j in enumerate(partner):
        s = [z[i] @ z[k] / temperature for k in range(len(z)) if k != i]
        terms.append(-torch.log((z[i] @ z[j] / temperature).exp() / torch.stack(s).exp().sum()))
    return torch.stack(terms).mean()


# %% tags=["nbval-check-output"]
teach.info_nce(info_nce)

# %% [markdown]
# A test of your own: equal embeddings must give log(B - 1). Where the two of a pair are equal and the pairs at right angles to each other,
# the loss must be nearly 0.

# %%
equal, apart = torch.ones(6, 3), torch.eye(3).repeat_interleave(2, dim=0)
for name, embedding in {"equal": equal, "apart": apart}.items():
    print(f"{name}: {info_nce(embedding, [1, 0, 3, 2, 5, 4], 0.1):.3f}; log 5 = {log(5):.3f}")

# %% [markdown]
# ## 3. Change: who is pushed?
# An anchor has three negatives, with cosines 0.8, 0.6 and 0.2. Among these three, what share of the push falls on the
# first one at temperature 0.5? Two decimals. Then try 0.1 and 2: the check knows these, too.

# %% tags=["solution"]
# hint: the share is a softmax of cosine / temperature
weights = [exp(cosine / 0.5) for cosine in (0.8, 0.6, 0.2)]
answer_3 = weights[0] / sum(weights)

# %% tags=["nbval-check-output"]
teach.hardest_share(answer_3)

# %% [markdown]
# ## 4. Explain: true or false?
# Write the letters of the true statements, in one text, such as `"abc"`.
#
# * (a) If the loss stays at log(2N - 1) during a pre-training, the network has gained nothing over one that gives every image the same embedding.
# * (b) Embeddings of twice the length have half the loss.
# * (c) If the loss is lower because the batch is smaller, the network is better.
# * (d) A lower temperature gives more of the push to the most similar negative.

# %% tags=["solution"]
# hint: put equal embeddings, longer embeddings and fewer rows into the formula
answer_4 = "ad"

# %% tags=["nbval-check-output"]
teach.infonce_statements(answer_4)
