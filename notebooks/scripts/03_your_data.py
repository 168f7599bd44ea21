# %% [markdown]
# # Your own scans
# **Point this at a folder of scans of which a few carry masks: it says what is there and what is wrong, pre-trains on all of
# it, fine-tunes on the few, and leaves weights that segment new scans.**
#
# You will see: what the folder holds, slices with their masks, the data set file that is proposed for it, a pre-training and two
# fine-tunings (with it, and from random weights), and a scan without a mask segmented. Under a minute with `smoke` on a CPU,
# which proves that everything fits together; take `laptop` (about ten minutes of pre-training) or `paper` (a GPU) for numbers that mean
# something.
#
# Layouts that are understood: Decathlon and nnU-Net v2 (`dataset.json`, `imagesTr`, `labelsTr`; scans without a label are used
# for pre-training), and images and masks that belong together by their names, NIfTI or photographs.

# %%
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import yaml
from PIL import Image

from clseg import paths, plots
from clseg.data.phantom import phantom_volume
from clseg.errors import RequestError
from clseg.study import runs
from clseg.study.files import read_dataset
from clseg.study.parameters import FinetuneParameters, OwnDataParameters, read_parameters
from clseg.tools import check
from clseg.tools.predict import predict

# %% tags=["parameters"]
folder: str = ""  # your folder; "" makes a small one in nnU-Net v2 layout from the phantom
profile: str = "smoke"  # smoke, laptop or paper: how much is computed
labelled: int = 2  # subjects whose masks are used for training
method: str = ""  # a name in params/methods.yaml; "" is gd, or gr where slices have no known positions

# %%
parameters = read_parameters(globals(), OwnDataParameters)
print(parameters)


# %% [markdown]
# ## A folder for those who have none
# Twelve phantoms as an annotator might leave them: masks for seven.


# %%
def example_folder(root: Path, subjects: int = 12, with_mask: int = 7) -> Path:
    for number in range(subjects):
        name = f"heart_{number:02d}"
        volume = phantom_volume(name)
        arrays = {f"imagesTr/{name}_0000.nii.gz": volume.image[0].astype(np.int16)}
        arrays |= {f"labelsTr/{name}.nii.gz": volume.label} if number < with_mask else {}
        for file, array in arrays.items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            if not (root / file).exists():
                nib.save(nib.Nifti1Image(array.T, volume.affine), root / file)
    labels = {"background": 0, "right ventricle": 1, "myocardium": 2, "left ventricle": 3}
    about = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": with_mask, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


own = Path(folder) if folder else example_folder(paths.runs_root() / "example" / "Dataset001_Hearts")

# %% [markdown]
# ## What is there, and what is wrong
# Every file is opened. A problem names its file and what to do; `clseg check FOLDER` prints the same, with the memory and the
# minutes to expect on your machine. Go on when nothing is left, or move the files that are named elsewhere.

# %%
report = check.check(own)

# %% tags=["nbval-check-output"]
print(report.text())
print("problems:", *(report.problems or ["none"]), sep="\n  ")

# %% [markdown]
# ## What a study needs to know
# The proposal follows the folder's own fingerprint: the median spacing, and a field of view that holds the median volume and
# the masks. Change what you know better: names of classes, whether slices have positions, the threshold of `pcl`.

# %%
if report.dataset is None:
    raise RequestError(report.problems[0])
dataset = report.dataset
file = paths.runs_root() / "datasets" / f"{dataset.name}.yaml"
file.parent.mkdir(parents=True, exist_ok=True)
if not (file.exists() and read_dataset(str(file)).folder == dataset.folder):  # what you changed is kept
    check.write(dataset, file)
shown = read_dataset(str(file)).model_dump(exclude_defaults=True, exclude={"folder", "description"})
print(f"runs/datasets/{file.name}\n\n{yaml.safe_dump(shown, sort_keys=False, default_flow_style=None)}")

# %% [markdown]
# ## Slices as the network sees them
# If outlines do not lie on what they should, stop here: masks and images do not belong together.

# %%
chosen = method or ("gd" if dataset.positions == "known" else "gr")
cell = {"dataset": str(file), "profile": profile, "labelled": labelled}
own_run = runs.finetune_run(FinetuneParameters(**cell, method=chosen))
store = runs.open_store(own_run.experiment, progress=False)
volume = int(np.flatnonzero(store.volumes["labelled"])[0])
rows = store.volume_rows(volume) if len(store.volume_rows(volume)) > 1 else store.rows(store.labelled_subjects)
rows = rows[np.unique(np.linspace(0, len(rows) - 1, 12).astype(int))]
batch = store.batch(rows)
plots.volume_grid(
    store.images[rows], store.labels[rows], title=store.volumes["subject"][volume], class_names=store.class_names
)

# %% tags=["nbval-check-output"]
split = runs.split_of(own_run, store)
for name, ids in vars(split).items():
    print(f"{name:10} {len(ids):3}: {' '.join(ids[:8])}")
print("test subjects in pre-training:", len(set(split.pretrain) & set(split.test)))

# %% [markdown]
# ## Pre-train on everything but the test subjects, fine-tune on the few
# The same is done without pre-training, for comparison. What is done already is not done again; what was interrupted goes on.

# %%
found = {}
for name in ("random", chosen):
    run = runs.do(runs.finetune_run(FinetuneParameters(**cell, method=name)))
    found[name] = run.read("metrics")
    print(f"{name}: {run.name}")
plots.training_curves(run.parent.read("log") if run.parent else run.read("log"))

# %%
for name, metrics in found.items():
    by_class = ", ".join(f"{c} {dice:.2f}" for c, dice in metrics.groupby("class_name")["dice"].mean().items())
    print(
        f"{name}: mean Dice {metrics['dice'].mean():.2f} on {metrics['subject'].nunique()} test subjects ({by_class})"
    )

# %% tags=["nbval-check-output"]
for name, metrics in found.items():
    print(f"{name}: {metrics['subject'].nunique()} test subjects, {len(metrics)} scores")

# %% [markdown]
# With two test subjects and `smoke` this decides nothing. Where a folder has three masks only, one subject trains, one validates and one tests: enough to
# look at masks, too few for a number. A study with several draws of labelled subjects and intervals is one command: see the end.
#
# ## Segment scans that have no mask
# Here those of the folder itself, one after the other, into label maps on their own grid with their own affine.

# %%
bare = [v["file"] for v in report.volumes if not v["labelled"]] or [report.volumes[0]["file"]]
output = run.folder / "segmented"
images, before = predict(run.folder / "weights.safetensors", Path(bare[0]), output)
results = sorted(path.name for path in output.iterdir() if path.suffix != ".json")
print(f"{images} segmented: runs/{dataset.name}/{profile}/{run.name}/segmented/{results[0]}")

# %% [markdown]
# Look at the masks before you trust a number. Above the scan at its own resolution, below the same slices with what was predicted.


# %%
def slices_of(file: Path) -> np.ndarray:
    """[Z, Y, X] of a NIfTI file, [1, Y, X] of a photograph."""
    if file.name.endswith((".nii", ".nii.gz")):
        return np.asarray(nib.as_closest_canonical(nib.load(file)).dataobj).T
    return np.asarray(Image.open(file).convert("L"))[None]


label = slices_of(output / results[0])
shown = np.unique(np.linspace(0, len(label) - 1, 5).astype(int)[1:-1])
grey, label = slices_of(Path(bare[0]))[shown].astype(np.float32), label[shown]
values = np.unique([0, *np.unique(label)])  # of the file; the picture counts classes from 1 on
label = np.searchsorted(values, label)
plots.volume_grid(
    np.concatenate([grey, grey]),
    np.concatenate([0 * label, label]),
    title=f"{name}, profile {profile}: predicted masks",
    class_names={k: dataset.classes.get(int(value), f"value {value}") for k, value in enumerate(values) if k},
)

# %% [markdown]
# ## Where things lie, and the same from the command line
# `out/runs/<data set>/<profile>/finetune-*/weights.safetensors` are the weights, with a record of what they need to be used:
# network, channels, spacing, normalisation, label values.
#
# ```
# clseg check FOLDER --write mine.yaml      it prints the next two commands, whole:
# clseg run own_data --dataset mine.yaml --profile laptop --set ...                              which method?
# clseg run own_data --dataset mine.yaml --profile laptop --set study.protocol=all_masks ...     that one on all masks, without a test
# clseg predict --weights out/runs/mine/laptop/finetune-matched-gd+weak_to_strong-labelled3-draw1-seed0 --input NEW_SCANS --output SEGMENTED
# ```
#
# **Try it.** Remove a mask from the example folder, truncate an image, or give a mask a value that is not declared, and run from
# the check on. What is said, and what is still done?
