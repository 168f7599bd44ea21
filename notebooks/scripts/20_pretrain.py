# %% [markdown]
# # Worker: pre-train one stage
# **From unlabelled slices to an encoder (or decoder) that knows what is alike.** `clseg run` executes this notebook once
# for every pre-training of a study; open it to watch one, or to change a parameter and run it yourself.
#
# You will see: the parameters as they were understood, one batch with its positives and negatives, the loss over all
# steps. Seconds under `smoke`, minutes under `laptop`, on a CPU.
#
# Pre-training sees only the subjects of the pre-training set: never a test subject. Runs lie in `out/runs` of the project, or below
# `$CLSEG_OUT`; data sets in `data`, or below `$CLSEG_DATA`. By hand:
# ```
# papermill notebooks/20_pretrain.ipynb out.ipynb -p method pcl -p profile laptop
# ```

# %%
from dataclasses import replace

import torch
import yaml
from IPython.display import display

from clseg import plots, probe
from clseg.cluster import pseudo_classes
from clseg.stages.contrast import draw_batch
from clseg.study import archive, runs
from clseg.study.parameters import PretrainParameters, read_parameters

# %% tags=["parameters"]
dataset: str = "phantom"  # a name under params/datasets, or the path of such a YAML file
profile: str = "smoke"  # smoke, laptop or paper: how much is computed
method: str = "gd"  # a name in params/methods.yaml; one with a pre-training stage
draw: int = 1  # whose test subjects it must not see, where draws differ in them
stage: int = 0  # which of the method's stages, from 0; the ones before it are done first
protocol: str = ""  # how subjects are divided; "" is the data set's first
dimensions: int = 2  # 3: blocks of slices instead of slices
seed: int = 0  # initial weights, batches and augmentations
overrides: list = []  # more of what `clseg run --set` takes, as texts
variant: str = ""  # one more override, named in the results of an ablation
study: str = ""  # the study that had it done first; recorded, and nothing more

# %%
parameters = read_parameters(globals(), PretrainParameters)
run = runs.pretrain_run(parameters)
print(f"run {run.name}\nstarts from {run.parent.name if run.parent else 'random weights'}")
print(
    yaml.safe_dump(
        {key: run.key[key] for key in ("steps", "stage", "network")}, sort_keys=False, default_flow_style=None
    )
)

# %% [markdown]
# ## One batch
# The slices of one step and, for global contrast, who is alike among their views: the pre-training differs from method
# to method only in this matrix.

# %%
store = runs.open_store(run.experiment)
split = runs.split_of(run, store)
rows = store.rows(split.pretrain)
print(f"{len(split.pretrain)} subjects, {len(rows)} slices for pre-training; image {list(store.images.shape[1:])}")

# %%
stage_config = run.experiment.stages[run.parameters.stage]
if stage_config.stage == "contrast":
    if run.parent:
        runs.do(run.parent)
    work = replace(runs.stage_work(run, store, split), slices=min(stage_config.slices, 8))
    cluster = pseudo_classes(work, stage_config)[1] if stage_config.pairs == "cluster" else None
    views, pairs = draw_batch(work, stage_config, 0, cluster)
    display(plots.pairs_matrix(pairs))

# %%
if stage_config.stage == "contrast":
    display(plots.volume_grid(torch.cat(views)[:16], title="the views of one batch (at most 16)"))

# %% [markdown]
# ## Training
# Resumes from the last checkpoint if it was interrupted; does nothing if this run is done already.

# %%
runs.do(run)
log = run.read("log")
plots.training_curves(log)

# %% tags=["nbval-check-output"]
print(f"loss: first step {log['loss'].iloc[0]:.2f}, {len(log)} steps")

# %% [markdown]
# ## Did it learn?
# The loss beside its *floor* (that of a network that gives every image the same answer; of context restoration, that of leaving the image as it was
# spoilt) and its *bound* (nothing goes below). `learned` is how far the loss came from floor to bound. On subjects that it never saw: the loss again, and how much
# of the slices' position and of the structures' sizes a straight line reads from the features (R², 1 is all, 0 or less is nothing).
# These numbers find faults. They never choose a method: labels of test subjects play no part.

# %%
if (run.folder / "probe.csv").is_file():
    found = run.read("probe").iloc[0]
    print(found.dropna().round(2).to_string())
    print(f"fault: {probe.fault(found) or 'none found'}")
else:
    print("this run is older than these numbers; remove its folder to have it made again")

# %% tags=["nbval-check-output"]
weights = run.folder / "weights.safetensors"
for key, value in archive.adaptation(weights).items():
    if key in ("network", "channels", "dataset", "method"):
        print(f"{key}: {value}")

# %% [markdown]
# The weights and the record of this run lie in its folder. Fine-tuning (`21_finetune`) takes the encoder (and the decoder
# blocks of a local stage) from there; the head stays behind.
