# %% [markdown]
# # Which use of unlabelled scans helps, with how many labelled patients?
# **Real cardiac MRI (ACDC), the papers' own lists, a fine-tuning that has converged, and a protocol written before the numbers.**
# This notebook trains nothing; it reads the rows of the study `acdc`.
#
# You will see: Dice against the number of labelled patients, the contrasts of `PROTOCOL.md` with intervals and verdicts, whether each
# pre-training learned anything, what each method costs, and what is not computed yet. Seconds on a CPU.
#
# In the matched arm (`matched-...`) nothing differs but the answer to "who is alike?": views, network, head, batch, images seen, optimiser
# and temperature are the same. It compares the four answers; it does not reproduce the papers. The score is Dice of the last
# step, on 20 test patients at end-diastole, from images of 64 x 64 pixels.

# %%
from IPython.display import display

from clseg import plots, stats
from clseg.study import rows
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

# %% tags=["parameters"]
study: str = "acdc"  # a name under params/studies
dataset: str = "acdc"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper, which of the results of the study

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
print(results.about)

# %% [markdown]
# ## What is missing
# The grid is computed seed by seed (seeds 0, 1, 2). Until it is complete, intervals are over patients and draws alone: they do not
# know how much another seed would change.

# %%
print(results.gaps)

# %% [markdown]
# Other parts of the plan, in order: rivals and initialisations as published, the split of the semi-supervised literature, other data sets, one
# ablation for each paper. Each command adds what is missing, and goes on where it was stopped.

# %%
PLAN = {
    "acdc": ["acdc", "glcl_comparison", "glcl_strategies", "acdc_semi", "glcl_ablation", "pcl_semi", "pcl_threshold"],
    "hippocampus": ["hippocampus", "ufc_heart"],
    "ph2": ["ufc_skin"],
    "mscmr": ["pcl_transfer"],
    "phantom": ["ufc_clusters"],
}
for place, studies in PLAN.items():
    for name in studies:
        done, planned = rows.progress(name, place, profile)
        print(f"{done:3} of {planned:3}   clseg run {name} --dataset {place} --profile {profile} --extend")

# %% [markdown]
# ## Dice against labelled patients
# Each line is a method (dashed: the matched arm), each bar a 95 % interval over patients, draws and seeds, each small point one draw of
# labelled patients. A hollow marker lacks runs that others have; a dotted bar is of too few draws or seeds to say how much others would
# differ.

# %%
figure = plots.label_curve(results.summary, results.table)
results.save(figure, "dice_against_labelled")
figure

# %% tags=["nbval-check-output"]
print(results.dice)

# %% [markdown]
# ## The contrasts of the protocol
# The first method minus the second, on the same patients, draws and seeds. The grey band is ± .02 Dice: less does not matter. *p* is
# corrected by Holm over all contrasts of the protocol, also those that have no runs yet: `p_holm` asks if there is a difference,
# `p_margin_holm` if it is on the side of .02 where it seems to be. *Not known* means: the data allow a gain as well as nothing, or one
# seed, one or two draws are too few to say (dotted).

# %%
figure = plots.forest(results.contrasts)
results.save(figure, "contrasts")
figure

# %% tags=["nbval-check-output"]
print(results.tests)

# %% [markdown]
# ## What we see

# %% tags=["nbval-check-output"]
print(results.findings)

# %% [markdown]
# ## Did the pre-trainings learn?
# `learned`: how far the loss came from that of a collapsed network (0) to the least that any embedding could have (1), on training slices.
# `loss_held_out` beside `floor`: on patients that were not pre-trained on; a held-out loss at the floor or above says that the network
# learned these slices by heart. `position_r2`, `size_r2`: what a linear probe reads from the frozen encoder (0: nothing).

# %%
have = rows.read(profile, dataset)
probes = have.probes.merge(have.runs[["run", "parent"]], on="run")
probes = probes[probes["run"].isin(set(results.pretraining["run"]))].drop(columns="parent")
print(
    probes.assign(run=probes["run"].str.removeprefix("pretrain-contrast-").str.rpartition("-")[0])
    .round(2)
    .to_string(index=False)
)

# %% [markdown]
# ## How long fine-tuning is
# Steps were chosen on 20 development patients, who are never tested (`PROTOCOL.md`): three draws, one seed, float32, on a GPU. With 1 labelled
# patient more than 500 steps gain nothing; with 8 `random` still gained about .015 by doubling from 1,000 to 2,000, and 2,000 is the cap. What
# the other methods would gain by more steps was not measured.

# %%
made = have.runs[(have.runs["precision"] == "float32") & (have.runs["kind"] == "finetune")]
budget = have.of(made["run"]).table(study, dataset, profile).merge(made[["run", "steps"]], on="run")
budget["name"] = budget["method"].str.partition(" ")[0]
curve = stats.summary(budget.assign(method=budget["name"] + " " + budget["steps"].astype(str)))
curve[["method", "value"]] = curve["method"].str.split(" ", expand=True)
curve["value"] = curve["value"].astype(int)
figure = plots.ablation(curve.assign(axis="fine-tuning steps, development patients", base=False))
results.save(figure, "fine_tuning_steps")
figure

# %% [markdown]
# ## What it costs
# Mean seconds of training of one run, by device. On the GPU fifteen runs shared the card, so a run alone is several times faster.

# %%
for device, seconds in results.provenance["seconds_of_a_run"].items():
    print(device)
    for what, mean in seconds.items():
        print(f"  {what}: {mean:.0f} s")

# %% [markdown]
# ### Surface distance and missed structures
# The 95th percentile Hausdorff distance in pixels of the files, and how often a structure was missed altogether (then Dice is 0 and the
# distance is the image diagonal).

# %%
display(results.distances)

# %% [markdown]
# ## Published numbers, other protocol
# 192 x 192 pixels, other fine-tuning, best checkpoint on validation patients: they say where the field stands, not how far this study is.

# %%
plots.published_for(dataset, "glcl_comparison")

# %% [markdown]
# ## What this does not show
# * 64 x 64 pixels and end-diastole: at full resolution, and with both phases, the order may differ.
# * 20 test patients of one hospital: differences below about .02 cannot be told from nothing.
# * The matched arm shares settings that were tuned for `matched-gr` and `matched-gd` together, in four trials. A method may do better with its own:
#   that is the arm *as published*, which is not computed yet.
# * What averaging alone does: `weak_to_strong` is scored with the running average of its weights (decay .99), the other methods with the weights of
#   the last step. At the end of a falling rate the two should be near each other; that was not measured.
# * 52 patients to pre-train on. With thousands, pre-training may do more.
