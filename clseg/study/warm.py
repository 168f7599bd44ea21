"""Done once, in the process that kernels are forked from: imports, and what the first of a kind brings along."""

import pandas as pd
import torch

from clseg import plots
from clseg.study import runs  # noqa: F401 - so that a forked kernel has them

pd.set_option("display.max_columns", 20)  # as in a kernel; pandas looks for one when it is imported
torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports a thousand modules
plots.volume_grid(torch.eye(4)[None], torch.eye(4)[None].long(), "title")._repr_png_()  # reads the fonts
