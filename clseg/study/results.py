"""What a study leaves: tables, statistics, provenance and figures."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from clseg import paths, stats
from clseg.errors import RequestError
from clseg.study import archive, runs
from clseg.study.files import read_dataset, read_profile, read_study
from clseg.study.grid import Grid, execute_notebook, expand
from clseg.study.parameters import resolve
from clseg.study.runs import Run


def _subjects(run: Run) -> dict[str, str]:
    """The ids of every set of a finished run, a line each."""
    sets = json.loads((run.folder / "subjects.json").read_bytes())
    unused = ("labelled", "validation", "test") if run.kind == "pretrain" else ("pretrain",)
    return {name: " ".join(ids) for name, ids in sets.items() if name not in unused}


def write_results(grid: Grid, command: str) -> Path:
    """Tables, statistics and provenance of a grid's finished runs; returns their folder."""
    folder = paths.results_dir(grid.profile, grid.place, grid.study.name)
    folder.mkdir(parents=True, exist_ok=True)
    folders = [run.folder for run in grid.finetune]
    table = archive.table(folders, grid.study.name)
    archive.write_table(folder / "table.csv", table)
    archive.write_table(folder / "summary.csv", stats.summary(table))
    tested = stats.compare(table)
    for column in ("p", "p_holm"):  # six decimals would make zeros of them
        tested[column] = tested[column].map(lambda p: "" if p != p else f"{p:.4g}")
    archive.write_table(folder / "comparison.csv", tested)
    records = [json.loads((run.folder / "record.json").read_bytes()) for run in grid.all if run.is_done()]
    logs = [run.read("log").assign(run=run.name) for run in grid.pretrain if run.is_done()]
    archive.write_table(folder / "pretraining.csv", pd.concat([pd.DataFrame(columns=["step", "loss", "run"]), *logs]))
    about = {
        "command": command,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        **archive.provenance(),
        "commits of the runs": sorted({record["provenance"]["commit"] for record in records}),
        "runs": {"expected": len(grid.all), "done": len(records)},
        "training_seconds": round(sum(record["training_seconds"] for record in records), 1),
        "training_seconds_by_run": {record["run"]: record["training_seconds"] for record in records},
        "expected_runs": [run.name for run in grid.finetune],
        "settings": {run.method: run.experiment.model_dump(exclude={"dataset"}) for run in grid.finetune},
        "dataset": grid.finetune[0].experiment.dataset.model_dump(exclude={"protocols", "geometry", "geometry_3d"}),
        "subjects": {run.name: _subjects(run) for run in grid.all if run.is_done()},
    }
    archive.write_json(folder / "provenance.json", about)
    return folder


@dataclass(frozen=True)
class Results:
    """What a study left on one data set, for its figure notebook. `missing`: cells of the grid without a run."""

    folder: Path
    table: pd.DataFrame
    summary: pd.DataFrame
    comparison: pd.DataFrame
    provenance: dict[str, Any]
    pretraining: pd.DataFrame
    missing: list[str]
    command: str

    @property
    def shown(self) -> str:
        """The folder as a reader knows it, without the root."""
        return "/".join(self.folder.parts[-4:])

    @property
    def about(self) -> str:
        """Which results these are, how they were made, and on what."""
        about, made_by = self.provenance, f"{self.shown}\nmade by: {self.provenance['command']}"
        time = f"{about['training_seconds'] / 60:.0f} minutes of training on {about['gpu'] or 'a CPU'}"
        return f"{made_by}\n{about['runs']['done']} runs, {time}\n{about['dataset']['description']}"

    @property
    def gaps(self) -> str:
        """The cells of the grid that have no run, and the command that makes them."""
        lines = [f"{len(self.missing)} cells are missing", *(f"  {cell}" for cell in self.missing[:10])]
        return "\n".join(lines + [f"make them with: {self.command}"] * bool(self.missing))

    @property
    def dice(self) -> str:
        """Means with intervals, a line per method and number of labelled subjects."""
        numbers = ["n_subjects", "n_draws", "dice_mean", "dice_low", "dice_high", "dice_sd_draws"]
        return self.summary[["method", "labelled", *numbers]].round(2).to_string(index=False)

    @property
    def tests(self) -> str:
        """Paired tests against `random`, a line per method and number of labelled subjects."""
        columns = ["method", "labelled", "n_subjects", "n_runs", "median_difference", "rank_biserial"]
        tested = self.comparison[columns].round(3)
        return tested.assign(p_holm=self.comparison["p_holm"].map("{:.1e}".format)).to_string(index=False)

    @property
    def distances(self) -> pd.DataFrame:
        """Surface distances and missed structures."""
        columns = ["hd95_mean", "hd95_unit", "missed", "missed_share", "scored_rows"]
        return self.summary[["method", "labelled", *columns]].round(3)

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure beside the tables, as PNG, under the output root."""
        profile, dataset, study = self.folder.parts[-3:]
        folder = paths.results_dir(profile, dataset, study)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", metadata={"Software": None}, bbox_inches="tight")


def read_results(study: str, dataset: str, profile: str) -> Results:
    """The tables of a study: of this output root, else those that come with the project. Raises `RequestError`."""
    command = f"clseg run {study} --dataset {dataset} --profile {profile}"
    about, of = read_study(study), read_dataset(dataset).name
    own = paths.results_dir(read_profile(profile).name, of, about.name)
    places = own, paths.PROJECT / own.relative_to(paths.out_root())
    if not (folder := next((place for place in places if (place / "table.csv").is_file()), None)):
        raise RequestError(f"study {study} has no results for {dataset}, profile {profile}; make them with: {command}")
    names = ("table", "summary", "comparison", "pretraining")
    table, summary, comparison, pretraining = (archive.read_table(folder / f"{name}.csv") for name in names)
    there = set(zip(table["method"], table["labelled"], table["draw"], table["seed"], strict=True))
    benchmark = {(method, 0, draw, seed) for method, _, draw, seed in there}
    missing = []
    for run in expand(about, dataset, profile).finetune:
        cell = (run.method, run.parameters.labelled, run.key["draw"], run.parameters.seed)
        if cell not in (benchmark if run.experiment.all_labels else there):
            missing.append(f"{run.method}, {run.key['labelled']} labelled, draw {cell[2]}, seed {cell[3]}")
    provenance = json.loads((folder / "provenance.json").read_bytes())
    return Results(folder, table, summary, comparison, provenance, pretraining, missing, command)


def ablation_axes(study: str, dataset: str, profile: str, summary: pd.DataFrame) -> pd.DataFrame:
    """The summary rows of an ablation, one per axis and value: columns axis, value, base (the method's own value), and
    those of the summary."""
    rows = []
    for axis in read_study(study).axes:
        key = axis.key.split(".")
        for method in axis.methods:
            tree = resolve(dataset, profile, method).model_dump()
            for part in key:
                tree = tree[int(part) if part.isdigit() else part]
            values = {method: tree} | {f"{method} [{axis.key}={json.dumps(value)}]": value for value in axis.values}
            named = summary["method"].str.removesuffix(runs.SEEN)
            found = summary[named.isin(values)].assign(axis=axis.name, base=named == method, value=named.map(values))
            rows.append(found.assign(method=method))
    table, first = pd.concat(rows), ["axis", "value", "base"]
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
