# %% [markdown]
# # What do the networks see?
# **From volumes on a scanner's grid to slices a network can use, and who is in which set.** Every later notebook starts
# from the prepared store that is made here.
#
# You will see: the volumes of a data set, slices with their reference masks, how anatomy changes along a volume (the reason
# why "same part of the volume" can mean "alike"), what the preparation costs in accuracy, and the subjects of every set.
# Seconds on a CPU. Change `dataset` to `acdc` or `hippocampus` where these files are at hand (`clseg datasets`).

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from clseg import metrics, plots
from clseg.data.prepare import prepare
from clseg.data.splits import make_split
from clseg.study.files import read_dataset, read_profile
from clseg.study.parameters import DataParameters, read_parameters

# %% tags=["parameters"]
dataset: str = "phantom"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper: the geometry
labelled: int = 2  # subjects with labels, for the sets shown
draws: int = 3  # how many draws of them to show

# %%
parameters = read_parameters(globals(), DataParameters)
about = read_dataset(dataset)
geometry = about.geometry[read_profile(profile).name]
print(about.title)
print(about.description)
print(
    f"\ngrid of the network: {geometry.size} pixels of {geometry.spacing_mm} mm ({geometry.step_px} native pixels without spacing)"
)

# %% [markdown]
# ## Volumes
# Prepared once: intensities scaled so that the 1st and 99th percentile of a volume become 0 and 1, resampled in the plane,
# cropped or padded around the centre. Opened afterwards without reading the original files again.

# %%
store = prepare(about, geometry, progress=False)
print(
    f"{len(store.subjects)} subjects, {len(store.volumes)} volumes, {len(store.slices)} slices of {list(store.images.shape[1:])}"
)
store.volumes[
    ["subject", "phase", "labelled", "slices", "native_y", "native_x", "spacing_z", "spacing_y"]
].head().round(2)

# %%
first = store.volume_rows(0)
batch = store.batch(first)
plots.volume_grid(
    batch.image[:, 0].numpy(),
    batch.label.numpy(),
    title=f"{store.volumes['subject'][0]}, first to last slice",
    class_names=store.class_names,
)

# %% [markdown]
# Another subject, to see how much shape, pose and contrast differ. One labelled subject shows a network none of this.

# %%
other = store.batch(store.volume_rows(len(store.volumes) // 2))
plots.volume_grid(
    other.image[:, 0].numpy(), other.label.numpy(), title=str(store.volumes["subject"][len(store.volumes) // 2])
)

# %% [markdown]
# ## Anatomy changes along the volume
# The area of every structure against the position of a slice, a thin line per subject. Slices at one position resemble each
# other between subjects: that is what `partition` and `position` pairs use. It needs no label, only the slice's place.

# %%
figure, axes = plt.subplots(
    1, len(store.class_names), figsize=(3 * len(store.class_names), 2.6), sharey=True, squeeze=False
)
areas = np.stack([(store.labels == c).sum(axis=(1, 2)) for c in store.class_names], axis=1)  # [N, K]
for axis, (index, name) in zip(axes[0], store.class_names.items(), strict=True):
    for volume in range(min(len(store.volumes), 30)):
        rows = store.volume_rows(volume)
        axis.plot(store.slices["position"][rows], areas[rows, index - 1], color="0.6", linewidth=0.7)
    axis.set(title=name, xlabel="position m / n (first slice 1 / n, last 1)")
axes[0, 0].set_ylabel("area in network pixels")
plt.show()

# %% tags=["nbval-check-output"]
position = store.slices["position"].to_numpy()
for index, name in store.class_names.items():
    area = areas[:, index - 1]
    thirds = [area[(position > low) & (position <= low + 1 / 3)].mean() for low in (0, 1 / 3, 2 / 3)]
    print(
        f"{name}: mean area {thirds[0]:.0f}, {thirds[1]:.0f}, {thirds[2]:.0f} pixels in the first, second and last third"
    )

# %% [markdown]
# ## Intensity alone does not segment
# If it did, nobody would need a network: the histograms of the structures and of everything else overlap.

# %%
figure, axis = plt.subplots(figsize=(6, 2.6))
edges = np.linspace(-0.2, 1.6, 60)
for index, name in {0: "everything else", **store.class_names}.items():
    axis.hist(
        store.images[:, 0][store.labels == index].astype(np.float32), edges, density=True, histtype="step", label=name
    )
axis.set(xlabel="scaled intensity", ylabel="density")
axis.legend()
plt.show()

# %% [markdown]
# ## What the grid costs
# Scores are computed on the native grid. Even a perfect network loses something on the way back from its coarser grid: the
# reference, taken there and back, is the ceiling of every score.

# %% tags=["nbval-check-output"]
ceiling = []
for volume in range(0, len(store.volumes), 4):
    known = torch.from_numpy(store.labels[store.volume_rows(volume)].astype(np.int64))
    perfect = torch.nn.functional.one_hot(known, store.num_classes).movedim(-1, 1).float()
    back, reference = store.to_native(volume, perfect), store.native_label(volume)
    ceiling.append([metrics.dice(back == index, reference == index) for index in store.class_names])
for name, value in zip(store.class_names.values(), np.nanmean(ceiling, axis=0), strict=True):
    print(f"{name}: Dice at most about {value:.2f}")

# %% [markdown]
# ## Who is in which set
# Sets are made of subjects, never of slices. Draws are nested: the set with one subject is inside the set with two. Test
# subjects never enter pre-training.

# %% tags=["nbval-check-output"]
name, protocol = next(iter(about.protocols.items()))
for draw in range(1, draws + 1):
    split = make_split(protocol, store.subjects, store.labelled_subjects, labelled, draw)
    print(f"protocol {name}, draw {draw}: labelled {', '.join(split.labelled)}")
print(f"pre-training {len(split.pretrain)}, validation {len(split.validation)}, test {len(split.test)} subjects")
print("test subjects in another set:", len(set(split.test) & {*split.pretrain, *split.labelled, *split.validation}))

# %% [markdown]
# **Try it.** Set `profile = "smoke"` and run again: what happens to the ceiling of the thinnest structure, and what does that
# say about numbers from the smoke profile?
