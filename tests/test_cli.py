"""The command line as a user meets it: exit status and one clear sentence."""

import errno
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from clseg import __version__, paths
from clseg.errors import RequestError
from clseg.study.files import known_names, read_dataset, read_methods, read_study
from clseg.study.results import Results
from clseg.study.schema import StudyConfig
from clseg.tools import cli


def test_methods_and_data_sets_are_listed_a_line_each(capsys):
    assert cli.main(["methods"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(read_methods())
    assert last.startswith("one of your own: a few lines in params/methods.yaml")
    assert cli.main(["datasets"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.startswith("one of your own: clseg check DIR --write MINE.yaml")
    assert [line.split()[0] for line in lines[::2]] == known_names("datasets")
    for name, about in zip(known_names("datasets"), lines[1::2], strict=True):  # indented, where to get it
        dataset = read_dataset(name)
        assert about.startswith("    ")
        assert all(text in about for text in (dataset.source, dataset.licence, dataset.tree, dataset.download_size))


def test_studies_are_listed_with_their_grid_and_what_it_costs(capsys):
    assert cli.main(["studies", "--profile", "smoke"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::3]] == known_names("studies")
    assert "_template" not in known_names("studies")
    start = next(number for number, line in enumerate(lines) if line.startswith("quickstart: "))
    about, cost = lines[start + 1 : start + 3]
    assert about == "    notebook 00_start_here; data sets phantom; 4 methods x 3 numbers of labels x 1 draws x 1 seeds"
    assert cost.startswith("    smoke on phantom: 2 pre-trainings shared by 10 fine-tunings; about ")
    assert all(re.search(r"; about \d+ (s|min|h), \d[^(]+ a run \(.+\), and [\d,]+ MB$", line) for line in lines[2::3])
    assert "params/studies/_template.yaml" in last


def test_the_template_of_a_study_names_every_key_and_can_be_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    text = (paths.PARAMS / "studies/_template.yaml").read_text()
    for key in StudyConfig.model_fields:
        assert re.search(rf"^(# )?{key}:", text, re.MULTILINE), key
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    assert cli.main(["run", str(mine), "--dry-run"]) == 0
    assert "mine on phantom, profile smoke: 2 pre-trainings, 6 fine-tunings, 0 of them done" in capsys.readouterr().out
    header, commented, _ = re.split(r"^(?=# seeds|# What)", text, flags=re.MULTILINE)
    mine.write_text(header + re.sub(r"^# ", "", commented, flags=re.MULTILINE))
    assert read_study(str(mine)).axes[0].key == "stages.0.temperature"


@pytest.mark.parametrize("study", ["quickstart", "glcl_strategies"])
def test_a_dry_run_refuses_what_the_run_would_refuse(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    words = ["run", study, "--dataset", "phantom", "--set=dataset.options.subjects=30", "--dry-run"]
    assert cli.main([*words, "--set=study.labelled=[1000]"]) == 2
    assert "clseg: 1000 labelled, 4 validation and 16 test subjects are wanted" in capsys.readouterr().err


def test_a_dry_run_without_the_data_says_that_it_was_not_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path))
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    assert cli.main(["run", "acdc", "--dry-run"]) == 0
    assert "not checked: data set acdc is not here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quickstrat"], "did you mean 'quickstart'"),
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "quickstart", "--profile", "smoky"], "did you mean 'smoke'"),
        (["run", "quickstart", "--dataset", "phantoms"], "did you mean 'phantom'"),
        (["run", "quickstart", "--set", "pretrain.step=1"], "did you mean 'steps'"),
        (["run", "quickstart", "--set", "temperature=0.2"], "its full name is stages.0.temperature"),
        (["run", "quickstart", "--set", "study.method=[gd]"], "did you mean 'methods'"),
        (["run", "quickstart", "--set", "study.methods=[gdd]"], "did you mean"),
        (["run", "quickstart", "--set", "study.labelled=[1000]"], "1000"),
        (["run", "glcl_strategies", "--set", "study.labelled=[3]"], "no lists with 3 labelled"),
        (["run", "glcl_strategies"], "acdc"),
        (["run", "quickstart", "--profile", "smoke", "--set", "stages.0.partitions=40"], "40"),
        (["table", "nowhere"], "nowhere"),
    ],
)
def test_a_wrong_request_ends_in_one_sentence_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    errors = capsys.readouterr().err
    line = next(line for line in errors.splitlines() if line.startswith("clseg: "))
    assert message in line
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("pretrain*/status.json"))


def test_the_console_command_is_the_module():
    done = subprocess.run([sys.executable, "-m", "clseg", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    assert entry_points(group="console_scripts")["clseg"].value == "clseg.tools.cli:main"


def test_results_of_a_study_without_rows_say_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(paths, "COMMITTED", tmp_path)
    with pytest.raises(RequestError, match=r"mine.yaml: .* put it there"):
        cli._results(SimpleNamespace(studies=["mine.yaml"]))
    assert cli.main(["results", "hippocampus"]) == 0
    assert capsys.readouterr().out == "hippocampus: no rows of its data sets (hippocampus) are there\n"


def test_the_draws_of_a_study_are_written_for_nnunet(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    words = ["run", "quickstart", "--dry-run", "--splits", str(tmp_path / "splits_final.json")]
    assert cli.main([*words, "--set", "study.labelled=[2]", "--set", "study.draws=[1, 2, 3]"]) == 0
    folds = json.loads((tmp_path / "splits_final.json").read_text())
    assert len(folds) == 3
    assert all(len(fold["train"]) == 2 and not set(fold["train"]) & set(fold["val"]) for fold in folds)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_escaped(encoding, tmp_path):
    (tmp_path / "dät 心").mkdir()
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "clseg", "check", str(tmp_path / "dät 心")]
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert done.returncode == 2
    errors = done.stderr.decode(encoding)
    assert "\\u5fc3: no image and mask belong together" in errors
    assert "Traceback" not in errors


def test_relative_roots_are_those_of_the_folder_where_the_process_started(tmp_path):
    """Kernels have another working directory."""
    code = "import os; from clseg import paths; os.chdir('/'); print(paths.data_root(), paths.out_root(), *map("
    code += "os.environ.get, ['CLSEG_DATA', 'CLSEG_OUT']), sep='\\n')"
    environment = os.environ | {"CLSEG_DATA": "data", "CLSEG_OUT": "out/here", "PYTHONPATH": str(paths.PROJECT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "data"), str(tmp_path / "out/here")] * 2


def test_an_installation_without_the_repository_says_how_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "PARAMS", tmp_path / "params")
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    assert cli.main(["methods"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"clseg: {tmp_path}: has no params/ and notebooks/")
    assert line.endswith("clone it and install in place: pip install -e .")


@pytest.mark.parametrize(("number", "told"), [(errno.EROFS, True), (errno.EACCES, True), (errno.ENOSPC, False)])
def test_a_figure_in_a_read_only_checkout_is_shown_and_a_full_disk_is_an_error(number, told, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with nullcontext() if told else pytest.raises(OSError, match="no"):
        Results(Path("smoke/phantom/quickstart"), *[None] * 5).save(None, "dice")
    assert ("dice.png is not kept: the output folder is read-only" in capsys.readouterr().out) == told
