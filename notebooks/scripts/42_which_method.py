# %% [markdown]
# # Which use of unlabelled scans helps, with how many labelled patients?
# **Real cardiac MRI (ACDC), the lists of Chaitanya et al., a fine-tuning of up to 2,000 steps, and questions and contrasts written before the numbers.**
# This notebook trains nothing; it reads the rows of the study `acdc`.
#
# You will see: what to use with 1, 2, 8 and all labelled patients, the contrasts of `PROTOCOL.md` with intervals and verdicts, whether each
# pre-training learned anything, what each method costs, and what is not computed yet. Seconds on a CPU.
#
# | name | what it is |
# |---|---|
# | `random` | plain fine-tuning of random weights, no pre-training |
# | `matched-gr` | contrastive pre-training first: two views of a slice are alike (after Chaitanya et al.) |
# | `matched-gd` | ... slices of the same part of the heart are alike (four partitions, as in the code of Zeng et al.; the idea is of Chaitanya et al.) |
# | `matched-pcl` | ... slices at near positions are alike (Zeng et al.) |
# | `matched-ufc` | ... slices of one cluster are alike (pseudo-classes, Zhang et al.); an auto-encoder finds the clusters ([39](39_ufc_clusters.ipynb): on ACDC groups of patients, hardly positions) |
# | `matched-gd+lr` | `matched-gd`, then a stage in which regions of a slice are alike |
# | `weak_to_strong` | (after FixMatch and UniMatch) no pre-training; in fine-tuning the network labels the unlabelled scans itself, and where it is sure, its answer must stay the same when the image is strongly changed |
# | `matched-...+weak_to_strong` | that pre-training, then that fine-tuning |
#
# *Matched arm*: nothing differs but the answer to "who is alike?" (and the auto-encoder that `matched-ufc` needs for it). All four have the denominator of Zeng et al. and the views of Chaitanya et al. Views, network, head, batch, images seen, optimiser and temperature are the same. So
# these rows compare ideas; they do not reproduce the papers. A *draw* is a choice of the labelled patients, a *seed* one of initial weights and batches. The
# score is Dice of the last step, on 20 test patients at end-diastole, from images of 64 x 64 pixels; 52 patients serve as unlabelled scans.

# %%
from itertools import combinations

import pandas as pd
from IPython.display import display

from clseg import plots, stats
from clseg.probe import fault
from clseg.study import archive, rows
from clseg.study.files import read_study
from clseg.study.grid import expand
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "acdc"  # a name under params/studies
dataset: str = "acdc"  # a name under params/datasets
profile: str = "laptop"  # smoke, laptop or paper, which of the results of the study

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)

# %% [markdown]
# ## In short
# Dice of plain fine-tuning (`random`); of `weak_to_strong`; of `weak_to_strong` after pre-training on pseudo-classes. After the colon: the gain over
# the column to the left, its 95 % interval, and the verdict of the protocol.

# %%
words = {
    "random": "plain training",
    "matched-ufc": "pre-training (pseudo-classes)",
    "weak_to_strong": "weak_to_strong",
    "matched-ufc+weak_to_strong": "pre-training, then weak_to_strong",
}
few, rest = (table[table["method"].isin(words)] for table in (results.summary, results.table))
figure = plots.label_curve(few, rest, title="Heart segmentation (ACDC) with few labelled patients", names=words)
results.save(figure, "in_short")
figure

# %% tags=["nbval-check-output"]
print(results.ladder(["random", "weak_to_strong", "matched-ufc+weak_to_strong"]).to_string())

# %% [markdown]
# **What to use, if you must choose today.** With 1 or 2 labelled patients: pre-train with contrast, then fine-tune with `weak_to_strong`. Pseudo-classes were
# chosen before these numbers, as the best on development patients; the means of partitions (`matched-gd+weak_to_strong`) differ from theirs by less than .01, and need
# no auto-encoder. With 8, as a best guess: `weak_to_strong`; pre-training before it adds little. With all 77: plain fine-tuning. Pre-training adds next to nothing
# there (all scans that it saw are among the 77), and `weak_to_strong` was not run.
#
# **How sure.** Three seeds are complete, and the verdicts were read once. Of the 26 contrasts, corrected together, six are decided:
#
# * *Helps*: `weak_to_strong` with 2 labelled, by more than .02; pre-training on pseudo-classes before it with 1 and with 2 (whether by more than .02 is open). In seed 0
#   one of five runs with 1 labelled and four of five with 2 are of another machine than those they are compared with; seeds 1 and 2 are of one machine and agree.
# * *No difference that matters*, all with 77: `matched-gd` and `matched-pcl` against plain fine-tuning, `matched-gd+lr` against `matched-gd`.
# * The other 20 are *not known*. That is not "no difference": pre-training alone and `weak_to_strong` gained in every seed with 1, 2 and 8, but seeds differ least.
#   Test patients and draws of labelled patients differ so much, and the draws are so few, that after correction for 26 tests chance is not excluded.
#
# **What cannot be told.** Which slices should count as alike (*Does it matter who is alike?*, below). Whether the local stage (`+lr`) helps with 1
# labelled; with 2 and 8 the means differ by about .001, but after correction it is not decided that the difference is below .02. Pre-training alone gained
# less than `weak_to_strong` alone with 1, 2 and 8; the plan did not compare the two.
#
# **What it costs.** Both together take about 12 minutes with 1 labelled, plain fine-tuning 1. `weak_to_strong` takes about twice the time of plain fine-tuning, on a GPU 2.6 times. Pre-training is 3,000 steps (for pseudo-classes as many more, cheap ones, of an auto-encoder), once, whatever the
# number of labels or scans (*What it costs*, below).

# %% [markdown]
# ## Dice against labelled patients
# Each line is a method (dashed: the matched arm), each bar a 95 % interval over patients, draws and seeds, each small point one draw of labelled
# patients.

# %%
figure = plots.label_curve(results.summary, results.table)
results.save(figure, "dice_against_labelled")
figure

# %% tags=["nbval-check-output"]
print(results.dice)

# %% [markdown]
# ## The contrasts of the protocol
# The first method minus the second, on the same patients, draws and seeds. The grey band is ± .02 Dice: less does not matter. `p_holm` is small if there
# surely is a difference. `p_margin_holm` is small if the difference is surely on that side of .02 where it seems to be. Both are corrected by Holm over
# all 26 contrasts, and verdicts follow from them. Intervals are not corrected: so one that lies above 0 may still be *not known*.
# In the chart a filled marker has a verdict, a hollow one has none.

# %%
figure = plots.forest(results.contrasts)
results.save(figure, "contrasts")
figure

# %% tags=["nbval-check-output"]
print(results.tests)

# %% [markdown]
# The same differences seed by seed: other weights, batches and augmentation, other machines (below), the same patients.

# %%
pairs, seeds = read_study(study).contrasts, results.table.groupby("seed")
by_seed = pd.concat(stats.contrasts(own, pairs).assign(seed=seed) for seed, own in seeds)
by_seed = by_seed.pivot(index=["method", "baseline", "seed"], columns="labelled", values="difference")
print(by_seed.map("{:+.3f}".format, na_action="ignore").fillna("-").to_string())

# %% [markdown]
# How far the intervals of the contrasts reach to each side, least and most, by the number of labels; and how many of the fine-tunings shown ran on
# which device:

# %%
reach = (results.contrasts["high"] - results.contrasts["low"]) / 2
print(reach.groupby(results.contrasts["labelled"]).agg(["min", "max"]).round(3).to_string(), end="\n\n")
have = rows.read(profile, dataset)
shown = have.runs[have.runs["run"].isin(set(results.table["run"]))]
print(shown.groupby(["seed", "method"])["device"].value_counts().unstack(fill_value=0).to_string())

# %% [markdown]
# ### What a machine changes
# The same runs of seed 1, from the same weights and batches, computed a second time on an AMD CPU; first on an Intel CPU, an H100 or an AMD CPU without
# bf16 (of `matched-gr` the pre-training, too). Machines add numbers in different orders, so that after some steps the weights differ; the version of torch and
# how bf16 is computed differ with them, and were not told apart. Dice of the first run minus the second, which the tables use:

# %%
other = archive.read_table(rows.place(profile, dataset) / "other_machines.csv").groupby("run")["dice"].mean()
twice = have.runs[have.runs["run"].isin(other.index)].set_index("run")[["method", "labelled"]]
twice["difference"] = other - have.scores.groupby("run")["dice"].mean()
print(
    twice.groupby(["method", "labelled"])["difference"].agg(["count", "mean", "std", "min", "max"]).round(3).to_string()
)
print(f"all {len(twice)}: mean {twice['difference'].mean():+.3f}, standard deviation {twice['difference'].std():.3f}")

# %% [markdown]
# One run changes by about as much as matters; on average there was no change to see.

# %% [markdown]
# ## What we see

# %% tags=["nbval-check-output"]
print(results.findings)

# %% [markdown]
# ## Does it matter who is alike?
# The four answers against each other: difference of Dice and its interval, by the number of labels. Then three more differences that the protocol does not name.
# Exploratory: they are read without a verdict. Where the interval reaches beyond ± .02, a difference that matters is possible, and is not shown.

# %%
more = [("matched-ufc+weak_to_strong", "random"), ("matched-ufc+weak_to_strong", "matched-gd+weak_to_strong")]
more.append(("weak_to_strong", "matched-ufc"))
for pairs in (combinations(["matched-gr", "matched-gd", "matched-pcl", "matched-ufc"], 2), more):
    between = stats.contrasts(results.table, [*pairs]).drop(columns=["p_holm", "p_margin_holm", "verdict"])
    between["interval"] = [f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})" for row in between.itertuples()]
    wide = between.pivot(index=["method", "baseline"], columns="labelled", values="interval")
    print(wide.fillna("-").to_string(), end="\n\n")

# %% [markdown]
# ## Did the pre-trainings learn?
# `learned`: how far the loss came from that of a collapsed network (0) to the least that any embedding could have (1), on training slices.
# `bound` is that least loss. `loss_held_out` beside `floor`: on patients that were not pre-trained on; a held-out loss at the floor or above says
# that what lowered the loss does not carry over to new patients (that is so for `gcl`; no loss of Dice is seen above): learned by heart, or sure and wrong
# at the borders of partitions; which was not looked into. `position_r2`, `size_r2`: what a linear probe
# reads from the frozen encoder (0 or less: nothing). `rank`, `cosine`: how many directions the embeddings fill, and how alike two of them are on
# average, in a batch of patients that were not pre-trained on (of `cluster` in one of training slices: do not compare it with the others). Auto-encoders and the local stage were
# not probed when these rows were made. The pre-trainings: `instance` is that of `matched-gr`, `gcl` of `matched-gd`, `position` of `matched-pcl`, `cluster` of `matched-ufc`.

# %%
probes = have.probes.merge(have.runs[["run", "parent"]], on="run")
probes = probes[probes["run"].isin(set(results.pretraining["run"]))].drop(columns="parent")
probes["run"] = probes["run"].str.replace(r"pretrain-(contrast-)?", "", regex=True).str.rpartition("-")[0]
print(probes.round(2).to_string(index=False), end="\n\n")
for row in probes.to_dict("records"):
    print(f"{row['run']}: {fault(row) or 'no fault found'}")

# %% [markdown]
# ## How long fine-tuning is
# Steps were chosen on 20 development patients, who are never tested (`PROTOCOL.md`): three draws (small points), one seed, float32, on a GPU, with the code
# before these rows. The rule: the least of 500, 1,000, 2,000 after which doubling gains less than .005, at most 2,000. With 1 labelled patient that is
# 500 (one of the three draws fails with every method). With 8, both methods gained more by their last doubling (below), so 2,000, the cap. `weak_to_strong` was measured up to
# 1,000 steps, with old settings: do not compare its height with the table above. The matched methods, 2 and all labels were not measured.

# %%
trials = archive.read_table(rows.place(profile, dataset) / "earlier_code.csv").query("precision == 'float32'")
trials = trials[~trials["steps"].isin([750, 1500])].copy()  # no doublings of the others
trials["method"] = trials["method"].str.partition(" ")[0]
figure = plots.budget_curve(trials)
results.save(figure, "fine_tuning_steps")
figure

# %%
budget = trials.groupby(["labelled", "method", "steps"])["dice"].mean().unstack()
gain = pd.DataFrame({f"{n} to {2 * n}": budget[2 * n] - budget[n] for n in (250, 500, 1000)})
print("what doubling the steps gains\n" + gain.map("{:+.3f}".format, na_action="ignore").fillna("-").to_string())

# %% [markdown]
# The cap may have ended fine-tuning too early. So, of the study `acdc_budget`, with 8 labelled of the same development patients, one seed, today's code and settings, bf16: plain fine-tuning
# with twice the steps, 4,000, minus 2,000. Where it gains, a method that gains with 2,000 may only be faster. Of `weak_to_strong`, whose step costs about
# twice as much, 2,000 and 4,000 steps are missing there. Exploratory.

# %%
trials = have.of(run.name for run in expand(read_study("acdc_budget"), dataset, profile).finetune)
longer = trials.table("acdc_budget", dataset, profile)
of_steps = longer[~longer["method"].str.contains("average")]
print(
    "Dice by draw\n" + of_steps.groupby(["method", "draw"])["dice"].mean().unstack().round(3).to_string(na_rep="-"),
    end="\n\n",
)
shown = ["method", "baseline", "labelled", "n_subjects", "n_draws", "n_seeds", "difference", "low", "high"]
tried = stats.contrasts(longer)[shown].round(3).set_index("method")
print(tried.filter(like="steps", axis="index").reset_index().to_string(index=False))

# %% [markdown]
# ## What averaging of weights does alone
# `weak_to_strong` is scored with the running average of its weights (decay .99), the other methods with the weights of the last step. So: plain
# fine-tuning with that average minus without it, on the development patients, one seed; these runs, too, are of `acdc_budget`. Exploratory.

# %%
print(tried.filter(like="average", axis="index").reset_index().to_string(index=False))

# %% [markdown]
# ## What it costs
# Median seconds of a step, by device (on the GPU fifteen runs shared the card, and each CPU did other work beside it); then the minutes that a run takes
# at that speed on the device with most runs, by the number of labels. The pre-training is needed once, whatever the number of labels.

# %%
timed = have.of(run.name for run in expand(read_study(study), dataset, profile).all).runs
kind = timed["method"].map(lambda method: "weak_to_strong" if "weak_to_strong" in method else "plain")
kind = kind.where(timed["kind"] == "finetune", timed["run"].str.extract(r"pretrain-(\w+)")[0])
steps = timed.assign(step=timed["seconds"] / timed["steps"]).groupby(["device", kind.rename("kind")])["step"].median()
print(steps.unstack().round(3).to_string(), end="\n\n")
seconds = steps[timed["device"].mode()[0]]
fine = timed[timed["kind"] == "finetune"].groupby("labelled")["steps"].first()
before = timed[timed["kind"] == "pretrain"].groupby(kind)["steps"].first() * seconds / 60
minutes = pd.DataFrame({name: fine * seconds[name] / 60 for name in ("plain", "weak_to_strong")})
minutes.loc[fine.index.max(), "weak_to_strong"] = None  # not in the plan
print(minutes.round(1).to_string(na_rep="-"))
print(
    f"contrastive pre-training: {before['contrast']:.0f} minutes; auto-encoder for pseudo-classes: {before['autoencoder']:.0f}"
)

# %% [markdown]
# ### Surface distance and missed structures
# The 95th percentile Hausdorff distance in pixels of the files, and how often a structure was missed altogether (then Dice is 0 and the
# distance is the image diagonal). These copies of ACDC have no spacing in mm.

# %%
display(results.distances)

# %% [markdown]
# ## What is missing
# Of the study `acdc`:

# %%
print(results.gaps)

# %% [markdown]
# Of the wider plan, runs that are there of those planned, by data set: steps with today's settings (`acdc_budget`), the released batch of `gd` (`acdc_sets`), the tuning of the arm as
# published (`acdc_published`) and of six rivals (`acdc_rivals`), then that arm, the split of the semi-supervised literature, one ablation for each paper, embeddings, other data sets. Each command
# adds what is missing, and goes on where it was stopped. The race against a plain MONAI script is a benchmark: [40_benchmarks](40_benchmarks.ipynb) names its command.

# %%
PLAN = {
    "acdc": "acdc acdc_budget acdc_sets acdc_published acdc_rivals glcl_comparison glcl_strategies acdc_semi"
    " glcl_ablation pcl_threshold ufc_clusters pcl_embedding pcl_semi",
    "hippocampus": "hippocampus ufc_heart",
    "ph2": "ufc_skin",
    "mscmr": "pcl_transfer",
}
for place, studies in PLAN.items():
    for name in studies.split():
        done, planned = rows.progress(name, place, profile)
        print(f"{done:3} of {planned:3}   clseg run {name} --dataset {place} --profile {profile} --extend")

# %% [markdown]
# ## Published numbers, other protocol
# They say where the field stands, not how far this study is: patients and split, images to pre-train on, image size, fine-tuning and the choice of the
# checkpoint are others. V: read in the source that is named, here a re-run by others (MACL, a user); V2: the authors' number, as another paper quotes it.

# %%
plots.published_for(dataset, "acdc")

# %% [markdown]
# ## Deviations
# From the protocol: the last section of `PROTOCOL.md`. *Deviation* of the matched arm from the papers: one head, batch, optimiser and denominator for all
# four, and views that pass batch norm apart (the rest of `30_glcl_strategies` and `33_pcl_semi`). *Deviation* of `weak_to_strong` from UniMatch: one strong
# view, not two; no dropped features; pixel-wise cross-entropy on the pseudo-labels, not Dice; the teacher is a running average of the weights;
# brightness is added, not multiplied; a weaker blur.

# %% [markdown]
# ## What this does not show
# * 64 x 64 pixels and end-diastole: at full resolution, and with both phases, the order may differ.
# * Whether one of the four answers is better than another: no contrast of the protocol compares two of them, and the exploratory table cannot
#   exclude differences as large as its intervals reach.
# * Differences smaller than the intervals reach to each side (the table above). The test
#   patients are of one hospital. All draws of 1 and 2 labelled come from five patients, who are in each of the three draws of 8, too: other patients
#   may differ by more than the draws say.
# * What is the method and what the machine. In seed 0 some methods ran on a GPU and some on a CPU (the table of devices above): where the two methods of a contrast
#   differ in that, it contains the difference of the machines.
# * Tuning was not equal: of `weak_to_strong` and of the matched arm four settings were tried each, of plain fine-tuning none but its steps.
# * The matched arm shares settings that were tuned for `matched-gr` and `matched-gd` together, in four trials. A method may do better with its own:
#   that is the arm *as published*, which is not computed yet.
# * What averaging of weights alone does with 1 or 2 labelled patients. With 8 it changed next to nothing in plain fine-tuning, in two draws of one seed (above).
#   The network of `weak_to_strong` without its average was not scored.
# * 52 patients to pre-train on, some of them labelled, too; with all 77, every one of them. With thousands, pre-training may do more.

# %% [markdown]
# ## Where the numbers come from

# %%
print(results.about)
