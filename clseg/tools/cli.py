"""The command line. Exit status: 0 done, 1 a run failed, 2 the request or the data are wrong."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clseg import __version__
from clseg.errors import RequestError, writing
from clseg.settings import DatasetConfig
from clseg.study.files import known_names, read_dataset, read_methods, read_profile, read_study
from clseg.study.parameters import PretrainParameters, override_study, parse_override, read_parameters, resolve


def _require_repository() -> None:
    from clseg import paths

    if not (paths.PARAMS / "methods.yaml").is_file():
        absent = "has no params/ and notebooks/, which clseg reads in its repository"
        raise RequestError(f"{paths.PROJECT}: {absent}; clone it and install in place: pip install -e .")


def _set_roots(arguments: argparse.Namespace) -> None:
    for folder, variable in ((arguments.data, "CLSEG_DATA"), (arguments.out, "CLSEG_OUT")):
        if folder:
            os.environ[variable] = str(Path(folder).absolute())


def _absolute(name: str) -> str:
    """A name stays, a file is found from everywhere: kernels have another working directory."""
    return str(Path(name).absolute()) if name.endswith((".yaml", ".yml")) else name


def _here(dataset: DatasetConfig) -> bool:
    """Whether a data set needs no files, or its folder is here."""
    from clseg import paths

    return not dataset.folder or (paths.data_root() / dataset.folder).is_dir()


def _run(arguments: argparse.Namespace) -> int:
    from clseg.data.splits import write_splits  # torch is imported only where it is needed
    from clseg.study import archive, estimate, grid, rows, runs

    _set_roots(arguments)
    study = read_study(arguments.study).within(read_profile(arguments.profile))
    study, overrides = override_study(study, arguments.set)
    study = study.model_copy(update={"pretrain_dataset": _absolute(study.pretrain_dataset)})
    named = {"study": arguments.study, "dataset": arguments.dataset or study.datasets[0], "profile": arguments.profile}
    named = {key: _absolute(name) for key, name in named.items()}
    dataset, profile = named["dataset"], read_profile(named["profile"]).name
    plan = grid.expand(study, dataset, named["profile"], overrides)
    title = f"{study.name} on {dataset}, profile {profile}"
    spared: set[str] = set()
    if arguments.extend:
        spared = {run.name for run in plan.all} - rows.needed(plan, rows.read(plan.profile, plan.place)).keys()
        if len(spared) == len(plan.all):
            print(f"{title}: all rows are there")
            return _extend(plan, {}, arguments)  # which needs no data
    experiments = {run.data: run.experiment for run in plan.all}
    gone = {about.dataset.name for about in experiments.values() if not _here(about.dataset)}
    if gone and arguments.dry_run and not arguments.splits:
        unchecked = f"not checked: data set {', '.join(gone)} is not here"
    else:  # subjects are counted before anything is prepared
        subjects = {data: runs.subjects_of(experiment) for data, experiment in experiments.items()}
        splits = {run.name: runs.split_of(run, subjects[run.data]) for run in plan.all}
        plan, unchecked = grid.distinct(plan, splits, subjects), ""
        untested = [run for run in plan.finetune if not splits[run.name].test]
        if 0 < len(untested) < len(plan.finetune):
            empty = f"fold {untested[0].parameters.draw} of protocol {untested[0].experiment.protocol} tests nobody"
            raise RequestError(f"{title}: {empty}; leave out that draw, or make fewer folds")
        if arguments.extend and untested:
            raise RequestError(f"--extend: {title} tests nobody, and rows are of scores; leave --extend away")
    flaws = {run.name: archive.flaw(run.folder) for run in plan.all}
    finished = {name for name, flaw in flaws.items() if flaw is None}
    done = finished | {run.name for run in plan.all} & spared
    how = " or spared by rows that are there" if arguments.extend else ""
    counts = f"{len(plan.pretrain)} pre-trainings, {len(plan.finetune)} fine-tunings, {len(done)} of them done{how}"
    print(f"{title}: {counts}")
    for note in [*(f"left out: {note}" for note in plan.notes), *filter(None, [unchecked])]:
        print(note)
    for name in study.methods:
        own, common = read_profile(named["profile"]).set.get(name, []), study.set.get(profile, [])
        if said := ", ".join(text for text in own if text not in common):
            print(f"set by profile {profile} for {name}: {said}")
    here = max((os.cpu_count() or 1) // plan.finetune[0].experiment.threads, 1)
    if len(plan.all) > len(done) and not arguments.scheduler:
        jobs = arguments.jobs or (1 if arguments.extend else here)
        print(f"cost: {estimate.estimate(plan, done).text(jobs)}")
    if arguments.splits:
        few = [run for run in plan.finetune if not run.experiment.all_labels]
        write_splits(Path(arguments.splits), (splits[run.name] for run in few))
    if arguments.dry_run:
        for run in plan.all:
            print(f"{'done ' if run.name in done else 'to do'}  {run.name}")
        return 0
    # prepared here, once, so that workers only open them and wrong data end the command
    stores = {data: runs.open_store(experiment) for data, experiment in experiments.items()}
    for run in plan.all:
        runs.require_positions(run, stores[run.data])
        runs.split_of(run, stores[run.data])  # again: labels inside of files are known only now
        if run.name in finished:
            runs.require_same_data(run, stores[run.data])
    for run in plan.all:
        if flaws[run.name]:
            print(f"clseg: {run.folder}: {flaws[run.name]}; it is made again", file=sys.stderr)
    if arguments.extend:
        return _extend(plan, stores, arguments)
    failure = None
    try:
        grid.execute(plan, arguments.jobs or (0 if arguments.scheduler else here), arguments.scheduler)
    except grid.RunFailed as error:
        failure = error
    _report(plan, named, arguments.set, tested=not untested)
    if failure:
        print(f"clseg: {failure}", file=sys.stderr)
    return 1 if failure else 0


def _report(plan: Any, named: Mapping[str, str], overrides: Sequence[str], tested: bool) -> None:
    """Tables and figures of the fine-tunings that have ended, and the next command."""
    from clseg import paths
    from clseg.study import archive, rows
    from clseg.study.results import draw_figures, write_results

    if not (ended := [run for run in plan.finetune if run.is_done()]):
        return
    if tested:
        command = ["clseg", "run", named["study"], "--dataset", named["dataset"], "--profile", named["profile"]]
        command += [word for text in overrides for word in ("--set", text)]
        with archive.locked(paths.runs_root() / plan.place / plan.profile / f".{plan.study.name}.lock"):
            folder = paths.results_dir(plan.profile, plan.place, plan.study.name)
            write_results(plan, rows.collect(run for run in plan.all if run.is_done()), folder, shlex.join(command))
            notebook = draw_figures(plan, named)
        print(f"tables and figures: {folder}\nfigure notebook: {notebook}")
    else:
        print("no tables and figures: nobody was tested")
    weights = ended[-1].folder.with_name(ended[-1].name.rpartition("-")[0])
    print(f"masks of new scans: clseg predict --weights {shlex.quote(str(weights))} --input SCANS --output MASKS")


def _extend(plan: Any, stores: Mapping[str, Any], arguments: argparse.Namespace) -> int:
    """Add what is missing to the committed rows."""
    from clseg.study import grid, rows

    status, have = 0, rows.read(plan.profile, plan.place)
    known = dict(zip(have.runs["run"], have.runs["content"], strict=True))
    needed = rows.needed(plan, have)
    if again := [name for name, run in needed.items() if name in known and not run.is_done()]:
        print(f"{len(again)} pre-trainings have rows and no weights here: they are done again, on this machine")
    hashless = {name.rpartition("-")[0] for name in known}
    if other := [name for name in needed if name not in known and name.rpartition("-")[0] in hashless]:
        print(f"{len(other)} runs have rows with another hash: of another setting, protocol or version of the code")
    for run in plan.all if stores else ():
        if known.get(run.name, content := stores[run.data].content) != content:
            wrong = f"was made from other images or masks than data set {run.experiment.dataset.name} has now"
            raise RequestError(f"{rows.place(plan.profile, plan.place)}: {run.name} {wrong}; use the same data")
    try:
        if needed:
            rows.extend(plan, arguments.jobs or 1, arguments.minutes)
    except grid.RunFailed as error:
        print(f"clseg: {error}", file=sys.stderr)
        status = 1
    left = len(rows.missing(plan, rows.read(plan.profile, plan.place)))
    where = rows.place(plan.profile, plan.place)
    print(f"{where}: {len(plan.finetune) - left} of {len(plan.finetune)} fine-tunings have rows, {left} are missing")
    print(f"tables and charts of them: clseg results {plan.study.name} (a study in params/studies)")
    return status


def _results(arguments: argparse.Namespace) -> int:
    """Tables and charts of every study that has some, or committed rows of each of its methods."""
    from clseg import paths
    from clseg.study import grid, rows, runs
    from clseg.study.results import committed_figures, write_results

    if files := [name for name in arguments.studies if name.endswith((".yaml", ".yml"))]:
        raise RequestError(f"{files[0]}: tables of committed rows are of studies in params/studies; put it there")
    silent = set(arguments.studies)
    for folder in sorted(path.parent for path in paths.COMMITTED.glob("*/*/runs.csv")):
        profile, dataset = folder.parts[-2:]
        have = rows.read(profile, dataset)
        for name in arguments.studies or known_names("studies"):
            study = read_study(name).within(read_profile(profile))
            if dataset not in study.datasets:
                continue
            silent.discard(name)
            plan = grid.expand(study, dataset, profile)
            found = have.of(run.name for run in plan.all)
            lacks = set(study.methods) - {*found.runs["method"].str.removesuffix(runs.SEEN)}
            command = f"clseg run {name} --dataset {dataset} --profile {profile} --extend"
            if lacks and not (folder / name / "table.csv").is_file():
                if arguments.studies:
                    print(f"{profile}/{dataset}/{name}: no rows of {', '.join(sorted(lacks))}; {command}")
                continue  # what rows there are it shares with another study
            write_results(plan, found, folder / name, command)
            committed_figures(plan, folder / name)
            lacking = len(rows.missing(plan, have))
            print(f"{profile}/{dataset}/{name}: {len(plan.finetune) - lacking} fine-tunings, {lacking} missing")
    for name in sorted(silent):
        print(f"{name}: no rows of its data sets ({', '.join(read_study(name).datasets)}) are there")
    return 0


def _pretrain(arguments: argparse.Namespace) -> int:
    from clseg import ranks
    from clseg.study import runs

    _set_roots(arguments)
    given = {name: getattr(arguments, name) for name in ("profile", "method", "protocol", "dimensions", "draw", "seed")}
    given |= {"dataset": _absolute(arguments.dataset), "overrides": arguments.set}
    stages = len(resolve(given["dataset"], arguments.profile, arguments.method).stages)
    if not stages:
        raise RequestError(f"--method {arguments.method}: has no pre-training; choose another of `clseg methods`")
    stage = stages - 1 if arguments.stage is None else arguments.stage
    run = runs.pretrain_run(read_parameters(given | {"stage": stage}, PretrainParameters))
    with ranks.joined():
        runs.do(run)
        if not ranks.number():
            print(run.folder / "weights.safetensors")
    ranks.leave()
    return 0


def _table(arguments: argparse.Namespace) -> int:
    from clseg import stats
    from clseg.study import archive

    root = Path(arguments.runs)
    if not root.is_dir():
        raise RequestError(f"{root}: is not a folder; name the runs folder of a study, for example out/runs")
    table = archive.table(path.parent for path in root.rglob("status.json"))
    if table.empty:
        example = "run a study first, for example clseg run quickstart"
        raise RequestError(f"{root}: holds no finished fine-tuning that was tested; {example}")
    runs = table.groupby([*stats.CELL[1:], *stats.RUN])["run"].nunique()
    if (several := runs[runs > 1]).any():
        name = ", ".join(map(str, several.index[0]))
        apart = "`run`" + " and `overrides`" * ("overrides" in table)
        same = f"of different settings, protocol or code (see {apart}); a mean must not mix them"
        print(f"clseg: several runs in {len(several)} of {len(runs)} cells ({name}), {same}", file=sys.stderr)
    if arguments.out:
        with writing(arguments.out, "choose another --out"):
            archive.write_table(Path(arguments.out), table)
    else:
        sys.stdout.write(table.to_csv(index=False, float_format="%.6f"))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from clseg.tools.check import check, expect, write

    target = Path(arguments.write) if arguments.write else None
    options = {}
    for text in arguments.set:
        key, value = parse_override(text)
        if len(key) != 2 or key[0] != "options":
            raise RequestError(f"--set {text}: of a check only options can be set, such as options.nan=0")
        options[key[1]] = value
    report = check(arguments.folder, target.stem if target else "", options)
    costs = [] if report.problems else expect(report)
    if arguments.json:
        print(json.dumps(report.tree() | {"expect": costs}))
    else:
        print(report.text())
        for cost in costs:
            print("  - expected, {}:".format(cost.pop("profile")), *(f"{what} {n:g}" for what, n in cost.items()))
    for problem in report.problems:
        print(f"clseg: {problem}", file=sys.stderr)
    if target and not report.problems:
        write(report.dataset, target)
        if not arguments.json:
            print(f"next: {report.study(str(target))}")
            print(f"last, all masks and no test: {report.last(str(target))}")
    return 2 if report.problems else 0


def _predict(arguments: argparse.Namespace) -> int:
    from clseg.study.archive import adaptation
    from clseg.tools.predict import predict, weights_of

    where = [Path(folder) for folder in (arguments.input, arguments.output)]
    weights = weights_of(Path(arguments.weights))
    images, before = predict(weights, *where, arguments.probabilities)
    print(f"{images} segmented, {before} of them before, by {adaptation(weights)['run']}: {arguments.output}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from clseg.tools.export import export
    from clseg.tools.predict import weights_of

    print(*export(weights_of(Path(arguments.weights)), arguments.format, Path(arguments.output)), sep="\n")
    return 0


def _methods(_: argparse.Namespace) -> int:
    for name, method in read_methods().items():
        print(f"{name:26} {method.title}")
    print(f"one of your own: {OWN['methods']}")
    return 0


def _studies(arguments: argparse.Namespace) -> int:
    from clseg.study import estimate, grid

    profile = read_profile(arguments.profile)
    for name in known_names("studies"):
        study = read_study(name).within(profile)
        dataset = study.datasets[0]
        plan = grid.expand(study, dataset, arguments.profile)
        sizes = {"methods": study.methods, "numbers of labels": study.labelled, "draws": study.draws}
        sizes |= {"seeds": study.seeds}
        words = " x ".join(f"{len(values)} {what}" for what, values in sizes.items())
        words += "".join(f" + {len(axis.values)} more of {axis.key}" for axis in study.axes)
        print(f"{name}: {study.title}")
        print(f"    notebook {study.notebook}; data sets {', '.join(study.datasets)}; {words}")
        count = f"{len(plan.pretrain)} pre-trainings shared by {len(plan.finetune)} fine-tunings"
        print(f"    {profile.name} on {dataset}: {count}; {estimate.estimate(plan).text()}")
    print(f"one of your own: {OWN['studies']}")
    return 0


def _datasets(_: argparse.Namespace) -> int:
    from clseg.data.formats import how_to_get

    for dataset in map(read_dataset, known_names("datasets")):
        where = "here   " if _here(dataset) else "missing"
        print(f"{dataset.name:12} {where}  {dataset.title}\n    {how_to_get(dataset)}")
    print(f"one of your own: {OWN['datasets']}")
    return 0


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


OWN = {
    "studies": "copy params/studies/_template.yaml, which names every key, and clseg run MINE.yaml",
    "methods": "a few lines in params/methods.yaml; notebook 16_your_method shows it",
    "datasets": "clseg check DIR --write MINE.yaml, then clseg run STUDY --dataset MINE.yaml",
}
COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "run": (_run, "do a study: its pre-trainings, fine-tunings, tables and figures"),
    "pretrain": (_pretrain, "one pre-training, and the stages before it; torchrun starts it on several GPUs"),
    "results": (_results, "tables and charts of the project's studies made anew from the committed rows"),
    "table": (_table, "all finished runs below a folder as one tidy table"),
    "check": (_check, "what is in a folder of scans, and what is wrong with it"),
    "predict": (_predict, "segment new images with the weights of a fine-tuning"),
    "export": (_export, "weights for other programs"),
    "studies": (_studies, "studies that can be run, and what they cost; where to write one's own"),
    "methods": (_methods, "methods that can be named in a study; where to write one's own"),
    "datasets": (_datasets, "data sets that can be named in a study; how to use one's own"),
}


def parser() -> argparse.ArgumentParser:
    about = "Contrastive pre-training for segmentation with few labels."
    top = argparse.ArgumentParser(prog="clseg", description=about)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=about) for name, (_, about) in COMMANDS.items()}
    names = ("run", "pretrain", "results", "table", "check", "predict", "export", "studies")
    run, pretrain, results, table, check, predict, export, studies = (parsers[name] for name in names)

    for command in (run, pretrain):
        command.add_argument("--profile", default="smoke", help="how much is computed (default: smoke)")
        roots = "folder that holds the data sets (default: $CLSEG_DATA or data/)"
        command.add_argument("--data", metavar="ROOT", help=roots)
        where = "folder for runs/ and paper_figures/ (default: $CLSEG_OUT or out/)"
        command.add_argument("--out", metavar="DIR", help=where)
        example = "override, e.g. pretrain.steps=100; of a study also study.labelled=[1,2]"
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=example)

    run.add_argument("study", metavar="STUDY", help="a YAML file, or a name under params/studies")
    run.add_argument("--dataset", help="a name under params/datasets, or a YAML file (default: the study's first)")
    run.add_argument("--jobs", type=_positive, help="most runs at a time (default: cores / threads of a run)")
    cluster = "address of a Dask scheduler whose workers do the runs, e.g. tcp://10.0.0.1:8786"
    run.add_argument("--scheduler", default="", metavar="tcp://HOST:PORT", help=cluster)
    run.add_argument("--splits", metavar="FILE.json", help="write its draws there, as nnU-Net's splits_final.json")
    run.add_argument("--dry-run", action="store_true", help="print the grid and what it costs, and stop")

    about = "add missing runs to the committed rows, in plain processes without notebooks; default --jobs 1"
    run.add_argument("--extend", action="store_true", help=about)
    run.add_argument("--minutes", type=float, help="with --extend: stop after so many, at a checkpoint")

    studies.add_argument("--profile", default="laptop", help="whose cost is told (default: laptop)")

    results.add_argument("studies", nargs="*", metavar="STUDY", help="default: all")

    pretrain.add_argument("--method", required=True, help="a name of `clseg methods`")
    pretrain.add_argument("--dataset", required=True, help="a name under params/datasets, or a YAML file")
    pretrain.add_argument("--stage", type=int, help="which of the method's stages, from 0 (default: its last)")
    pretrain.add_argument("--protocol", default="", help="how subjects are divided (default: the data set's first)")
    draw = "whose test subjects it must not see, where draws differ in them (default: 1)"
    pretrain.add_argument("--draw", type=int, default=1, help=draw)
    pretrain.add_argument("--dimensions", type=int, default=2, help="2 or 3 (default: 2)")
    pretrain.add_argument("--seed", type=int, default=0, help="of weights, batches and augmentations (default: 0)")

    table.add_argument("runs", metavar="RUNS", help="a folder of runs, for example out/runs")
    table.add_argument("--out", metavar="FILE.csv", help="write there instead of to standard output")

    check.add_argument("folder", metavar="DIR", help="a Decathlon or nnU-Net v2 folder, or images and masks")
    example = "an option of the data set that a message names, e.g. options.nan=0"
    check.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=example)
    check.add_argument("--json", action="store_true", help="everything, for programs")
    check.add_argument("--write", metavar="FILE.yaml", help="a data set file for clseg run --dataset, if all is well")

    weights = "weights.safetensors of a run, or its folder, whose name may end before the hash"
    predict.add_argument("--weights", required=True, metavar="FILE_OR_RUN", help=weights)
    where = "NIfTI or photograph, as the weights need, or a folder of such"
    predict.add_argument("--input", required=True, metavar="FILE_OR_DIR", help=where)
    predict.add_argument(
        "--output", required=True, metavar="DIR", help="for label maps; those there are not made again"
    )
    predict.add_argument("--probabilities", action="store_true", help="also those of each class, in an .npz")

    export.add_argument("--weights", required=True, metavar="FILE_OR_RUN", help=weights)
    export.add_argument("--format", required=True, choices=["monai", "safetensors"], help="monai: for its BasicUNet")
    export.add_argument("--output", required=True, metavar="FILE", help="a .safetensors file")
    return top


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # names of files may hold letters that the terminal's encoding has not
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    arguments = parser().parse_args(words)
    try:
        _require_repository()
        return COMMANDS[arguments.command][0](arguments)
    except RequestError as error:
        print(f"clseg: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # what the machine refuses, such as a full disk
        remedy = "mend that and give the same command: it goes on from here"
        problem = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"clseg: {problem}; {remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("clseg: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
