"""Done once, in the process that kernels are forked from: imports, and what the first of a kind brings along."""

import importlib

import pandas as pd
import torch

from clseg import plots
from clseg.study import runs  # noqa: F401 - so that a forked kernel has them

importlib.import_module("ipykernel.kernelapp")  # after our modules: so their progress bars are plain text
pd.set_option("display.max_columns", 20)  # as in a kernel; pandas looks for one when it is imported
torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # imports a thousand modules
plots.volume_grid(torch.eye(4)[None], torch.eye(4)[None].long(), "title")._repr_png_()  # reads the fonts
