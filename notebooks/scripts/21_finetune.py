# %% [markdown]
# # Worker: fine-tune on few labelled subjects, then score the test subjects once
# **From pre-trained weights and a handful of masks to a segmenter and its scores.** `clseg run` executes this notebook
# once for every fine-tuning of a study. If the pre-training it starts from is not there, it is done first.
#
# You will see: which subjects are labelled, the loss and the validation Dice, mean scores of every structure, and a test
# subject's masks. Seconds under `smoke`, minutes under `laptop` on a CPU.
#
# Test subjects are scored once, after training: by the network of the last step, which needs no validation subject, or,
# with `finetune.checkpoint=best`, by that of the best step on the validation subjects, on the grid of the network.
#
# By hand, and as a loop over label fractions; `clseg table out/runs` reads what they leave, and `clseg run` does none of it again:
# ```
# papermill notebooks/21_finetune.ipynb out.ipynb -p method gd -p labelled 2 -p draw 1
# ```
# ```python
# import papermill
# for labelled in 1, 2, 4:
#     for draw in 1, 2, 3:
#         parameters = {"method": "gd", "labelled": labelled, "draw": draw}
#         papermill.execute_notebook("notebooks/21_finetune.ipynb", f"gd-{labelled}-{draw}.ipynb", parameters)
# ```
# Runs lie in `out/runs` of the project, or below `$CLSEG_OUT`; data sets in `data`, or below `$CLSEG_DATA`.

# %%
import yaml

from clseg import plots
from clseg.recipes.evaluation import labelled_volumes, probabilities
from clseg.study import runs
from clseg.study.parameters import FinetuneParameters, read_parameters

# %% tags=["parameters"]
dataset: str = "phantom"  # a name under params/datasets, or the path of such a YAML file
profile: str = "smoke"  # smoke, laptop or paper: how much is computed
method: str = "gd"  # a name in params/methods.yaml
labelled: int = 2  # subjects with labels; 0 stands for all (method `benchmark`)
draw: int = 1  # which subjects these are
pretrain_dataset: str = ""  # pre-train on another data set than this one; "" is the same
protocol: str = ""  # how subjects are divided; "" is the data set's first
dimensions: int = 2  # 3: blocks of slices instead of slices
seed: int = 0  # initial weights, batches and augmentations
overrides: list = []  # more of what `clseg run --set` takes, as texts
variant: str = ""  # one more override, named in the results of an ablation
study: str = ""  # the study that had it done first; recorded, and nothing more

# %%
parameters = read_parameters(globals(), FinetuneParameters)
run = runs.finetune_run(parameters)
print(f"run {run.name}\nstarts from {run.parent.name if run.parent else 'random weights'}")
print(
    yaml.safe_dump(
        {key: run.key[key] for key in ("recipe", "budget", "network")}, sort_keys=False, default_flow_style=None
    )
)

# %%
store = runs.open_store(run.experiment)
split = runs.split_of(run, store)
print("labelled:", *split.labelled)
print("validation:", *split.validation)
print(f"test: {len(split.test)} subjects")

# %% [markdown]
# ## The labelled slices

# %%
rows = store.rows(split.labelled, labelled=True)[:16]
batch = store.batch(rows, "cpu")
plots.volume_grid(batch.image, batch.label, title="labelled slices (at most 16)", class_names=store.class_names)

# %% [markdown]
# ## Training
# Resumes from the last checkpoint if it was interrupted; does nothing if this run is done already.

# %%
runs.do(run)
log = run.read("log")
plots.training_curves(log)

# %% [markdown]
# ## Test subjects
# Dice and 95th percentile Hausdorff distance on the native grid, per subject and structure. `missed` counts structures that
# the reference has and the prediction has not: they score Dice 0 and the image diagonal.

# %%
metrics = run.read("metrics")
print(f"mean Dice {metrics['dice'].mean():.2f}" if len(metrics) else "nobody is tested; below is a subject of training")
metrics.groupby("class_name")[["dice", "hd95", "missed"]].mean().round(3)

# %%
volume = labelled_volumes(store, split.test or split.labelled)[0]
probability = probabilities(runs.trained_network(run, store), store, volume)
rows = store.volume_rows(volume)
name = store.volumes["subject"][volume]
plots.volume_grid(store.images[rows], store.labels[rows], title=f"{name}: reference", class_names=store.class_names)

# %%
plots.volume_grid(
    store.images[rows], probability.argmax(dim=1), title=f"{name}: prediction", class_names=store.class_names
)

# %% tags=["nbval-check-output"]
print(f"{metrics['subject'].nunique()} test subjects, {len(metrics)} scores")

# %% tags=["nbval-check-output"]
tenth = max(len(log) // 10, 1)  # of the steps; single ones jump
fell = log["loss"].iloc[-tenth:].mean() < log["loss"].iloc[:tenth].mean()
print(f"{len(log)} steps; the loss of the last tenth is below that of the first: {fell}")
