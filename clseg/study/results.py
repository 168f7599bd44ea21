"""What a study leaves: tables, statistics, provenance and figures."""

import errno
import json
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from clseg import paths, stats
from clseg.errors import RequestError
from clseg.settings import ListProtocol
from clseg.study import archive, runs
from clseg.study.files import read_dataset, read_profile, read_study
from clseg.study.grid import Grid, execute_notebook
from clseg.study.rows import Rows, missing
from clseg.study.runs import Run
from clseg.study.schema import Axis

SCORED = {
    "last": "the last step, on the grid of the files",
    "best": "the best step on validation subjects (whose masks count as labels, too), chosen on the network's grid;"
    " on the grid of the files",
}


def write_results(grid: Grid, found: Rows, folder: Path, command: str) -> None:
    """Tables, statistics and provenance of the rows of a grid, into a folder of results.

    They follow from the rows and the study alone: the same rows give the same bytes. Where a grid is computed seed by
    seed, statistics are of the seeds that are complete, so that all methods have the same ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = found.table(grid.study.name, grid.place, grid.profile)
    archive.write_table(folder / "table.csv", table)
    of_all = table["run"].isin({run.name for run in grid.finetune if run.labelled == "all"})
    if of_all.any():  # one number of labels, though folds may differ by a subject
        table.loc[of_all, "labelled"] = int(table[of_all].groupby("run")["labelled"].first().median())
    all_labels = grid.all_labels | set(table.loc[of_all, "labelled"])
    seeds = _seeds(grid, found)
    counted = table[table["seed"].isin(seeds["counted"])]
    archive.write_table(folder / "summary.csv", stats.summary(counted, all_labels))
    tested = stats.contrasts(counted, _pairs(grid), _declared(grid), all_labels=all_labels)
    for column in ("p", "p_holm", "p_margin_holm"):  # six decimals would make zeros of them
        tested[column] = tested[column].map(lambda p: "" if p != p else f"{p:.4g}")
    archive.write_table(folder / "contrasts.csv", tested)
    stages = _stages(found.runs[found.runs["seed"].isin(seeds["counted"])])
    losses = found.losses[found.losses["run"].isin(stages)]
    archive.write_table(folder / "pretraining.csv", losses.assign(stage=losses["run"].map(stages)))
    about = {
        "command": command,
        "runs": {"expected": len(grid.all), "done": len(found.runs)},
        "seeds": seeds,
        "made": {name: sorted(set(found.runs[name])) for name in ("commit", "device", "precision", "torch")},
        "training_seconds": round(float(found.runs["seconds"].sum()), 1),
        "seconds_of_a_run": _seconds(found),
        "settings": {run.method: run.experiment.model_dump(exclude={"dataset"}) for run in grid.finetune},
        "dataset": grid.finetune[0].experiment.dataset.model_dump(exclude={"protocols", "geometry", "geometry_3d"}),
        "subjects": _subjects(grid, table),
        "axes": [axis.model_dump() | {"base": _bases(grid, axis)} for axis in grid.study.axes],
        "missing": [_cell(run) for run in missing(grid, found)],
    }
    archive.write_json(folder / "provenance.json", about)


def _seeds(grid: Grid, found: Rows) -> dict[str, list[int]]:
    """Of the seeds that have rows, those that are counted, as every fine-tuning has rows, and those that wait for it;
    all are counted where no seed is complete."""
    there = set(found.runs["run"])
    lacking = {run.parameters.seed for run in grid.finetune if run.name not in there}
    begun = {run.parameters.seed for run in grid.finetune if run.name in there}
    counted = begun - lacking or begun
    return {"counted": sorted(counted), "waiting": sorted(begun - counted)}


def _stages(runs: pd.DataFrame) -> dict[str, str]:
    """Pre-trainings by name in words, no two the same, with the stages before them: contrast gd > local lr, seed 0."""
    parents = dict(zip(runs["run"], runs["parent"], strict=True))

    def words(run: str) -> tuple[list[str], str]:
        what, seed = re.fullmatch(r"pretrain-(.+)-seed(\d+)-\w+", run).groups()
        before = words(parents[run])[0] if parents.get(run) in parents else []
        return [*before, what.replace("-", " ", 1)], seed

    chains = {run: words(run) for run in parents if run.startswith("pretrain-")}
    several, again, named = len({seed for _, seed in chains.values()}) > 1, Counter(), {}
    for run, (chain, seed) in chains.items():
        again[name := " > ".join(chain) + f", seed {seed}" * several] += 1
        named[run] = f"{name} ({again[name]})" if again[name] > 1 else name  # those of an ablation have the same words
    return named


def _bases(grid: Grid, axis: Axis) -> dict[str, Any]:
    """The value that each method of an axis has elsewhere."""
    found = {}
    for run in grid.finetune:
        if (method := run.parameters.method) in axis.methods and method not in found:
            value: Any = run.parameters.model_copy(update={"variant": ""}).experiment().model_dump(mode="json")
            for part in axis.key.split("."):
                value = value[int(part)] if isinstance(value, list) else value[part]
            found[method] = value
    return found


def _cell(run: Run) -> str:
    """A fine-tuning in words."""
    return f"{run.method}, {run.labelled} labelled, draw {run.key['draw']}, seed {run.parameters.seed}"


def _pairs(grid: Grid) -> list[list[str]]:
    """The contrasts that the study declares, of methods as results name them."""
    shown = {run.method.removesuffix(runs.SEEN): run.method for run in grid.finetune}
    return [[shown.get(name.removesuffix(runs.SEEN), name) for name in pair] for pair in grid.study.contrasts]


def _declared(grid: Grid) -> int:
    """How many contrasts the study declares: its pairs, at each number of labels with which it runs both methods."""
    cells = {(run.method, run.key["labelled"]) for run in grid.finetune}
    labelled = {count for _, count in cells}
    return sum(cells >= {(one, count), (other, count)} for one, other in _pairs(grid) for count in labelled)


def _seconds(found: Rows) -> dict[str, dict[str, float]]:
    """Mean seconds of training of a run: of each stage and, by number of labels, of each method; by device."""
    runs = found.runs.assign(what=found.runs["run"].str.replace(r"-(labelled|seed).*", "", regex=True))
    labelled = runs["labelled"].map(lambda n: "" if pd.isna(n) else f", {n} labelled")
    means = runs.assign(what=runs["what"] + labelled).groupby(["device", "what"])["seconds"].mean().round(1)
    return {device: means[device].to_dict() for device in means.index.unique("device")}


def _subjects(grid: Grid, table: pd.DataFrame) -> dict[str, str]:
    """The ids of who was tested, a line for each draw, and of published lists those of every set."""
    lists = grid.finetune[0].experiment.division
    sets = {f"tested, draw {draw}": " ".join(sorted(set(own["subject"]))) for draw, own in table.groupby("draw")}
    if isinstance(lists, ListProtocol):
        sets |= {"pretrain": " ".join(lists.pretrain), "validation": " ".join(lists.validation)}
        for count, draws in lists.labelled.items():
            sets |= {f"{count} labelled, draw {draw}": " ".join(ids) for draw, ids in draws.items()}
    return sets


@dataclass(frozen=True)
class Results:
    """What a study left on one data set, for its figure notebook. `table`: rows of the seeds that are counted."""

    folder: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    contrasts: pd.DataFrame
    provenance: dict[str, Any]
    pretraining: pd.DataFrame

    @property
    def missing(self) -> list[str]:
        """Cells of the grid without a run, seed by seed."""
        return self.provenance["missing"]

    @property
    def shown(self) -> str:
        """The folder as a reader knows it, without the root."""
        return "/".join(self.folder.parts[-4:])

    @property
    def about(self) -> str:
        """Which results these are, how they were made, and on what."""
        about, made_by = self.provenance, f"{self.shown}\nmade by: {self.provenance['command']}"
        time = f"{about['training_seconds'] / 60:.0f} minutes of training on {', '.join(about['made']['device'])}"
        kinds = sorted({setting["finetune"]["checkpoint"] for setting in about["settings"].values()})
        scored = " or ".join(SCORED[kind] for kind in kinds)
        counted, waiting = (", ".join(map(str, about["seeds"][kind])) for kind in ("counted", "waiting"))
        own = [] if self.folder.is_relative_to(paths.COMMITTED) else ["results of your own, from the output folder"]
        lines = [
            *own,
            made_by,
            f"{about['runs']['done']} runs (pre-trainings and fine-tunings), {time}",
            f"scores of {scored}",
            f"seeds: {counted}" + (f"; not complete, so not counted yet: {waiting}" if waiting else ""),
            textwrap.fill(about["dataset"]["description"], 100),
        ]
        return "\n".join(lines)

    @property
    def gaps(self) -> str:
        """The cells of the grid that have no run, and the command that makes them."""
        lines = [f"{len(self.missing)} cells are missing", *(f"  {cell}" for cell in self.missing[:10])]
        lines += ["  ..."] * (len(self.missing) > 10)
        return "\n".join(lines + [f"make them with: {self.provenance['command']}"] * bool(self.missing))

    @property
    def dice(self) -> str:
        """Means with intervals, a line per method and number of labelled subjects."""
        numbers = ["n_subjects", "n_draws", "n_seeds", "dice_mean", "dice_low", "dice_high", "dice_sd_draws"]
        shown = self.summary[["method", "labelled", *numbers]].round(2)
        return shown.dropna(axis="columns", how="all").to_string(index=False)

    @property
    def tests(self) -> str:
        """Contrasts with intervals and verdicts, a line each; or why there are none."""
        if why := stats.why_no_tests(self.table):
            return why
        columns = ["method", "baseline", "labelled", "n_subjects", "n_draws", "n_seeds", "difference", "low", "high"]
        shown = self.contrasts[columns].round(3)
        if (self.contrasts["family"] == "declared").any():
            holm = {p: self.contrasts[p].map("{:.2g}".format, "ignore") for p in ("p_holm", "p_margin_holm")}
            shown = shown.assign(**holm, verdict=self.contrasts["verdict"])
        return shown.assign(note=self.contrasts["note"]).to_string(index=False, na_rep="-")

    @property
    def findings(self) -> str:
        """The contrasts as sentences, by verdict, with their numbers; or why there are none."""
        if why := stats.why_no_tests(self.table):
            return why
        if (self.contrasts["family"] == "declared").any():
            lines = [line for verdict in stats.VERDICTS for line in self._sentences(verdict, verdict)]
        else:
            lines = self._sentences("", "exploratory, so without a verdict")
        return "\n".join(lines)

    def _sentences(self, verdict: str, title: str) -> list[str]:
        """A line for each pair of methods whose contrast has this verdict."""
        found = self.contrasts[self.contrasts["verdict"].fillna("") == verdict]
        alike = found["note"].nunique() == 1  # then it is said once
        lines = [f"{stats.in_words(title, found['note'].iloc[0] * alike)}:"] if len(found) else [f"{title}: none"]
        for (method, baseline), own in found.groupby(["method", "baseline"], sort=False):
            numbers = own[["difference", "low", "high", "labelled", "note"]].itertuples(index=False)
            cells = [
                f"{mean:+.3f} ({low:+.3f} to {high:+.3f}) with {n} labelled" + f" ({note})" * bool(note and not alike)
                for mean, low, high, n, note in numbers
            ]
            lines.append(f"  {method} minus {baseline}: {'; '.join(cells)}")
        return lines

    def ladder(self, methods: Sequence[str]) -> pd.DataFrame:
        """Methods that each add something to the one before: Dice, what was added, and the verdict on that; a line per
        number of labelled subjects; "-" where there are no runs of both, or no contrast of them is declared.
        """
        dice = self.summary.pivot(index="labelled", columns="method", values="dice_mean")
        dice = dice.map("{:.2f}".format, na_action="ignore")
        table = dice.reindex(columns=methods[:1])
        for baseline, method in pairwise(methods):
            pair = (self.contrasts["method"] == method) & (self.contrasts["baseline"] == baseline)
            own = self.contrasts[pair].set_index("labelled")
            rows = own[["difference", "low", "high", "verdict", "note"]].itertuples(name=None)
            told = {n: f": {d:+.3f} ({low:+.3f} to {high:+.3f}), {stats.in_words(*v)}" for n, d, low, high, *v in rows}
            table = table.assign(**{method: dice.get(method) + pd.Series(told) if told else None})
        return table.fillna("-").rename_axis(columns=None)

    @property
    def distances(self) -> pd.DataFrame:
        """Surface distances and missed structures."""
        columns = ["hd95_mean", "hd95_unit", "missed", "missed_share", "scored_rows"]
        return self.summary[["method", "labelled", *columns]].round(3)

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure beside the tables, as PNG, under the output root, if that may be written."""
        about = {"metadata": {"Software": None}, "bbox_inches": "tight"}
        self._write(f"{name}.png", lambda path: figure.savefig(path, **about))

    def kept(self, name: str, of: Iterable[Run], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table that takes images and weights, which need not be here: what `make` returns, written as by `save`.

        Its column `run` says of which run a row is, "" of none. As long as these are the runs `of` which it is asked,
        the file is read again; whoever changes how it is made deletes it.
        """
        names, places = {run.name for run in of}, [paths.results_dir(*self.folder.parts[-3:]), self.folder]
        for path in (place / f"{name}.csv" for place in places):
            if path.is_file():
                table = archive.read_table(path)
                if {*table["run"]} - {""} == names:
                    return table
                print(f"{name}.csv is of other runs and is made anew")
        with TemporaryDirectory() as folder:
            archive.write_table(path := Path(folder) / f"{name}.csv", make())
            table = archive.read_table(path)  # as whoever finds it will have it
        self._write(path.name, lambda path: archive.write_table(path, table))
        return table

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        folder = paths.results_dir(*self.folder.parts[-3:])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / name)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):  # as in a class that shares a checkout
                raise
            print(f"{name} is not kept: the output folder is read-only, and CLSEG_OUT can name another one")


def read_results(study: str, dataset: str, profile: str) -> Results:
    """The tables of a study: of this output root, else those that come with the project. Raises `RequestError`."""
    command = f"clseg run {study} --dataset {dataset} --profile {profile}"
    own = paths.results_dir(read_profile(profile).name, read_dataset(dataset).name, read_study(study).name)
    places = own, paths.COMMITTED / own.relative_to(paths.out_root() / "paper_figures")
    if not (folder := next((place for place in places if (place / "table.csv").is_file()), None)):
        raise RequestError(f"study {study} has no results for {dataset}, profile {profile}; make them with: {command}")
    names = ("table", "summary", "contrasts", "pretraining")
    table, summary, contrasts, pretraining = (archive.read_table(folder / f"{name}.csv") for name in names)
    provenance = json.loads((folder / "provenance.json").read_bytes())
    table = table[table["seed"].isin(provenance["seeds"]["counted"])]
    return Results(folder, table, summary, contrasts, provenance, pretraining)


def ablation_axes(results: Results) -> pd.DataFrame:
    """The summary rows of an ablation, one per axis and value: columns axis, value, base (the value that the method has
    elsewhere), and those of the summary. No row of a study without axes."""
    summary, rows = results.summary, []
    named = summary["method"].str.removesuffix(runs.SEEN)
    for axis in results.provenance["axes"]:
        name, key = axis["name"], axis["key"]
        for method in axis["methods"]:
            values = {f"{method} [{key}={json.dumps(value)}]": value for value in axis["values"]}
            values[method] = axis["base"].get(method)
            found = summary.assign(axis=name, base=named == method, value=named.map(values), method=method)
            rows.append(found[named.isin(values)])
    first = ["axis", "value", "base"]
    table = pd.concat(rows) if rows else summary.head(0).assign(**dict.fromkeys(first))
    return table[[*first, *table.columns.drop(first)]]


def draw_figures(grid: Grid, parameters: dict[str, str]) -> Path:
    """Execute the study's figure notebook on its table; returns the executed notebook.

    parameters: study, dataset and profile, by name or by file.
    """
    study = grid.study
    target = paths.runs_root() / grid.place / grid.profile / f"{study.notebook}-{study.name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    execute_notebook(paths.NOTEBOOKS / f"{study.notebook}.ipynb", target, parameters)
    return target


def committed_figures(grid: Grid, folder: Path) -> None:
    """Execute the study's figure notebook on the committed tables; what it saves and keeps goes beside them."""
    about = {"study": grid.study.name, "dataset": grid.place, "profile": grid.profile}
    with TemporaryDirectory() as out:
        if paths.runs_root().is_dir():  # with weights of what is not kept yet
            (Path(out) / "runs").symlink_to(paths.runs_root())
        target = Path(out) / "figures.ipynb"
        execute_notebook(paths.NOTEBOOKS / f"{grid.study.notebook}.ipynb", target, about, CLSEG_OUT=out)
        for chart in folder.glob("*.png"):
            chart.unlink()
        for saved in paths.results_dir(*folder.parts[-3:], out=Path(out)).glob("*.*"):
            shutil.copy(saved, folder)
