# %% [markdown]
# # What did a study find?
# **Any study, also your own: its chart, its table, its contrasts, and what they say.** This notebook trains nothing; it reads the rows that
# `clseg run STUDY` left. A study names the notebook that draws its figures (`notebook: 41_study`); the paper's own figures have
# notebooks of their own (30 to 39).
#
# You will see: what is missing and the command that adds it, Dice against the number of labelled subjects, each ablated value where the
# study has axes, contrasts with intervals, surface distances, published numbers of another protocol. Seconds on a CPU. What is shown here is a study of
# settings: the four trials of the matched arm (`PROTOCOL.md`), on patients who are never tested.

# %%
import pandas as pd
from IPython.display import display

from clseg import plots
from clseg.study.parameters import FigureParameters, read_parameters
from clseg.study.results import ablation_axes, read_results

pd.set_option("display.max_colwidth", None)  # notes are shown whole

# %% tags=["parameters"]
study: str = "acdc_matched"  # a name under params/studies, or a YAML file
dataset: str = "acdc"  # a name under params/datasets, or a YAML file
profile: str = "laptop"  # smoke, laptop or paper, which of the results of the study

# %%
parameters = read_parameters(globals(), FigureParameters)
results = read_results(study, dataset, profile)
published = plots.published_for(dataset, results.folder.name)
print(results.about)

# %% [markdown]
# ## What is missing

# %%
print(results.gaps)

# %% [markdown]
# ## Dice against labelled subjects
# Each line is a method, each bar a 95 % interval over test subjects, draws and seeds (none under `smoke`), each small point one draw of
# labelled subjects. A hollow marker lacks runs that others have. A dotted bar is of too few subjects, draws or seeds to say how much others would
# differ. A cross is a published number of the same method, of another protocol; those of other methods stand at the end.

# %%
figure = plots.label_curve(results.summary, results.table, published)
results.save(figure, "dice_against_labelled")
figure

# %% tags=["nbval-check-output"]
print(results.dice)

# %% [markdown]
# ## One choice at a time
# Only for a study with `axes`: Dice for every value of a key; the ringed value is the method's own, the dashed line is `random`.

# %%
if (axes := ablation_axes(results)).empty:
    print("this study has no axes")
else:
    figure = plots.ablation(axes, results.summary[results.summary["method"] == "random"])
    results.save(figure, "ablation")
    display(figure)

# %% [markdown]
# ## Contrasts
# The first method minus the second, on the same subjects, draws and seeds. A study that names its `contrasts` before its runs gets a
# verdict for each; without them every method is compared with `random`, an ablated value with the method's own, and there is no verdict.

# %%
if len(results.contrasts):
    figure = plots.forest(results.contrasts)
    results.save(figure, "contrasts")
    display(figure)
print(results.tests)

# %% [markdown]
# ## What we see

# %%
print(results.findings)

# %% [markdown]
# ### Surface distance and missed structures
# The 95th percentile Hausdorff distance, and how often a structure was missed altogether (then Dice is 0 and the distance is the
# image diagonal).

# %% tags=["nbval-check-output"]
results.distances

# %% [markdown]
# ## Published numbers, other protocol
# They say where the field stands, not how far a study is: patients, images, training and scoring are others. V: read in the source that is
# named; V2: the authors' number, as another paper quotes it.

# %%
if published.empty:
    print("none is quoted beside this study")
else:
    display(published)

# %% [markdown]
# ## What this does not show
# * Another data set, resolution or budget: the lines at the top say what was computed.
# * Differences below the width of the intervals. With fewer than three test subjects or seeds, or one or two draws where others could be drawn, there is no
#   verdict at all.
# * Settings chosen on these test subjects would make every number above too good: choose them on others.
