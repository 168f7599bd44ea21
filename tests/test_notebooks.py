"""The committed notebooks may be committed, and `notebooks/build.py` tells those that may not.

That the notebooks run and find the same numbers is nbval's part of the same pytest call.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbconvert import HTMLExporter

import build

PROJECT = Path(__file__).resolve().parent.parent

SCRIPT = """\
# %% [markdown]
# # A small notebook

# %% tags=["parameters"]
points: int = 3  # how many
colour = "teal"  # of the line

# %% tags=["nbval-check-output"]
import os

import matplotlib.pyplot as plt

print("threads", os.environ["OMP_NUM_THREADS"])
print("empty", not os.path.exists(os.environ["CLSEG_OUT"]) or not os.listdir(os.environ["CLSEG_OUT"]))
print("real data", os.path.exists(os.environ["CLSEG_DATA"]))

# %% tags=["nbval-check-output"]
print(f"{sum(range(points)) / 7:.3f}")

# %% tags=["nbval-check-output"]
points**2


# %%
def line(ax):
    ax.plot(range(points), color=colour)


fig, ax = plt.subplots(figsize=(1, 1))
line(ax)
plt.show()
"""


@pytest.mark.parametrize("stem", build.stems())
def test_notebook_may_be_committed(stem):
    assert build.problems(stem) == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with one small notebook built from SCRIPT."""
    folder = tmp_path_factory.mktemp("notebooks")
    (folder / "scripts").mkdir()
    (folder / "scripts" / "00_small.py").write_text(SCRIPT, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_DATA", str(folder))
        assert build.main([], folder) == 0
        assert os.environ["CLSEG_DATA"] == str(folder), "the build must leave the environment as it was"
    return folder


@pytest.fixture
def spoil(built, tmp_path):
    """Writes a changed copy of the small notebook and returns what is found wrong with it."""
    source = (built / "scripts" / "00_small.py").read_text(encoding="utf-8")
    notebook = nbformat.read(built / "00_small.ipynb", as_version=4)

    def spoiled(change=lambda notebook: None, script=source):
        change(notebook)
        (tmp_path / "scripts").mkdir()
        (tmp_path / "scripts" / "00_small.py").write_text(script, encoding="utf-8")
        nbformat.write(notebook, tmp_path / "00_small.ipynb")
        return build.problems("00_small", tmp_path)

    return spoiled


def test_a_built_notebook_is_in_order(built, spoil):
    notebook = nbformat.read(built / "00_small.ipynb", as_version=4)
    assert spoil() == []
    assert [cell.id for cell in notebook.cells] == [f"00_small-{index:03d}" for index in range(6)]
    assert [path.name for path in built.glob("*.ipynb*")] == ["00_small.ipynb"]


def test_the_kernel_runs_in_a_clean_room_and_only_stable_outputs_stay(built):
    cells = nbformat.read(built / "00_small.ipynb", as_version=4).cells
    assert [output.name for output in cells[2].outputs] == ["stdout"]
    assert cells[2].outputs[0].text == "threads 1\nempty True\nreal data False\n"
    assert cells[3].outputs[0].text == "0.429\n"
    assert "image/png" in cells[5].outputs[0].data


def test_a_second_build_writes_the_same_bytes(built, tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "00_small.py").write_text(SCRIPT, encoding="utf-8")
    build.build("00_small", tmp_path)
    assert (tmp_path / "00_small.ipynb").read_bytes() == (built / "00_small.ipynb").read_bytes()


def strip(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []


def show(text, cell=5):
    def change(notebook):
        notebook.cells[cell].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]

    return change


def add(kind, cell=5, **content):
    def change(notebook):
        notebook.cells[cell].outputs.append(nbformat.v4.new_output(kind, **content))

    return change


SPOILT = {
    "other source": (lambda nb: nb.cells[3].update(source="print(1)"), "cell 3 is not what the script says"),
    "other tags": (lambda nb: nb.cells[3].metadata.update(tags=[]), "cell 3 is not what the script says"),
    "other id": (lambda nb: nb.cells[1].update(id="1a2b3c4d"), "cell 1 is not what the script says"),
    "cell missing": (lambda nb: nb.cells.pop(), "cell 5 is not what the script says"),
    "cell too many": (lambda nb: nb.cells.append(nbformat.v4.new_markdown_cell("", id="x")), "cell 6 is not what"),
    "other kernel": (lambda nb: nb.metadata.kernelspec.update(name="mine"), "metadata"),
    "widget state": (lambda nb: nb.metadata.update(widgets={}), "metadata"),
    "cell timings": (lambda nb: nb.cells[2].metadata.update(execution={}), "cell 2 has metadata"),
    "stripped": (strip, "no cell has an output"),
    "not executed": (lambda nb: nb.cells[2].update(execution_count=None), "cell 2 was not executed"),
    "nothing to compare": (show("done\n", cell=3), "cell 3 has the tag `nbval-check-output` but shows no number"),
    "stderr": (add("stream", name="stderr", text="warning"), "cell 5 holds stderr, mend what it warns of: warning"),
    "error": (add("error", ename="E", evalue="", traceback=[]), "cell 5 ended in an error"),
    "widget": (add("display_data", data={"application/vnd.jupyter.widget-view+json": {}}), "cell 5 holds a widget"),
    "posix path": (show("saved /somewhere/else/x.png"), "cell 5 shows an absolute path"),
    "quoted path": (show("file='/somewhere/else/x.png'"), "cell 5 shows an absolute path"),
    "windows path": (show("saved C:\\somewhere"), "cell 5 shows an absolute path"),
    "path in a table": (
        add("display_data", data={"text/html": "<td>/somewhere/else</td>"}),
        "cell 5 shows an absolute path",
    ),
    "address": (show("<function f at 0x7f3a1c0e5f80>"), "cell 5 shows a memory address"),
    "too large": (show("x" * 1_000_001), "bytes, 1,000,000 may be"),
}


@pytest.mark.parametrize(("change", "words"), SPOILT.values(), ids=SPOILT.keys())
def test_a_spoilt_notebook_is_told(spoil, change, words):
    found = spoil(change)
    assert any(words in sentence for sentence in found), found
    assert all(sentence.startswith("00_small: ") for sentence in found)


@pytest.mark.parametrize(
    "text", ["1/2 and/or 3", "https://example.org/a/b", "runs/phantom/smoke", "</td></tr>", "~/data"]
)
def test_what_only_looks_like_a_path_passes(spoil, text):
    assert spoil(show(text)) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("points**2", "points**3", "cell 4 is not what the script says"),
        ("points: int = 3  # how many\n", "points = int(3)\n", "cell 1 (`parameters`) must assign literals"),
        ("points: int = 3  # how many\n", "import os\n", "cell 1 (`parameters`) must assign literals"),
        (
            '# %% tags=["nbval-check-output"]\nimport os',
            '# %% tags=["parameters"]\nimport os',
            "cells [1, 2] all have the tag `parameters`",
        ),
        (' tags=["nbval-check-output"]', "", "0 cells have the tag"),
    ],
)
def test_a_bad_script_is_told(spoil, old, new, words):
    assert old in SCRIPT
    found = spoil(script=SCRIPT.replace(old, new))
    assert any(words in sentence for sentence in found), found


def test_script_and_notebook_need_each_other(built, tmp_path, capsys):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "01_script.py").write_text(SCRIPT, encoding="utf-8")
    (tmp_path / "02_notebook.ipynb").write_bytes((built / "00_small.ipynb").read_bytes())
    assert build.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == [
        "01_script: 01_script.ipynb is missing; build it",
        "02_notebook: scripts/02_notebook.py is missing; write it, or delete the notebook",
    ]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "# %%\nprint(__import__('os').getcwd())\n\n" + 2 * '# %% tags=["nbval-check-output"]\n1\n\n',
            "an absolute path",
        ),
        (
            "# %%\nimport warnings\nwarnings.warn('old')\n\n" + 2 * '# %% tags=["nbval-check-output"]\n1\n\n',
            "cell 0 holds stderr, mend what it warns of: ",
        ),
        ("# %%\n1 / 0\n\n" + 2 * '# %% tags=["nbval-check-output"]\n1\n\n', "ZeroDivisionError"),
        ("# %%\n1\n", "0 cells have the tag"),
    ],
)
def test_a_failed_build_says_why_and_leaves_the_notebook_alone(tmp_path, capsys, script, words):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "03_bad.py").write_text(script, encoding="utf-8")
    (tmp_path / "03_bad.ipynb").write_text("as it was")
    assert build.main(["03_bad"], tmp_path) == 1
    error = capsys.readouterr().err
    assert "03_bad" in error
    assert words in error
    assert (tmp_path / "03_bad.ipynb").read_text() == "as it was"


def test_nbval_compares_numbers_and_passes_over_warnings(built, tmp_path):
    for name in ("pyproject.toml", "conftest.py", "notebooks/build.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    text = (built / "00_small.ipynb").read_text(encoding="utf-8")
    assert text.count("0.429") == 1
    text = text.replace(
        '"print(\\"threads',
        '"import sys\\n",\n    "print(\\"a warning\\", file=sys.stderr)\\n",\n    "print(\\"threads',
    )
    assert "a warning" in text
    (tmp_path / "notebooks" / "true.ipynb").write_text(text, encoding="utf-8")
    (tmp_path / "notebooks" / "wrong.ipynb").write_text(text.replace("0.429", "0.430"), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "notebooks"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "1 failed, 9 passed" in done.stdout, done.stdout + done.stderr
    assert "FAILED notebooks/wrong.ipynb::Cell 2" in done.stdout


@pytest.mark.parametrize("path", sorted(build.FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_papermill_shows_every_parameter_with_type_default_and_help(path):
    """What `papermill --help-notebook` prints; it passes over lines that it does not understand."""
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assigned = [line.split(":")[0] for source in tagged for line in source.splitlines()]
    shown = papermill.inspect_notebook(path)
    assert list(shown) == assigned
    for name, about in shown.items():
        assert about["inferred_type_name"] in ("str", "int", "list"), name
        assert about["default"] != "", name
        assert len(about["help"]) > 10, name


def test_papermill_by_hand_leaves_the_rows_of_clseg_run(tmp_path, monkeypatch, command, small_grid):
    """The loop of notebook 21, of a copy with another name in another folder, and without a home that can be written
    to; then the command finds all of it done."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "by hand"))
    monkeypatch.setenv("HOME", "/proc/nothing")
    monkeypatch.chdir(tmp_path)
    shutil.copy(build.FOLDER / "21_finetune.ipynb", "mine.ipynb")
    for labelled in 1, 2:
        parameters = {"method": "random", "labelled": labelled, "draw": 1, "overrides": [*small_grid.few]}
        papermill.execute_notebook("mine.ipynb", f"random {labelled}.ipynb", parameters, progress_bar=False)
    words = ["run", "quickstart", "--profile=smoke", "--set=study.methods=[random]", "--set=study.labelled=[1,2]"]
    words += ["--set=study.draws=[1]", *(f"--set={text}" for text in small_grid.few)]
    status, output, _ = command(tmp_path / "by hand", *words)
    assert (status, "0 pre-trainings, 2 fine-tunings, 2 of them done" in output) == (0, True)
    assert command(tmp_path / "run", *words)[0] == 0
    by_hand, run = (
        command(tmp_path / place, "table", str(tmp_path / place / "runs"))[1] for place in ("by hand", "run")
    )
    without_study = [re.sub("^[^,]*,", "", text, flags=re.MULTILINE) for text in (by_hand, run)]
    assert without_study[0] == without_study[1]
    assert len(without_study[0].splitlines()) == 1 + 2 * 3 * 3


READ_ONLY = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
MOUNT = "mount --bind '{0}' '{0}' && mount -o remount,ro,bind '{0}'"


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*READ_ONLY, MOUNT.format("/tmp")], capture_output=True).returncode,
    reason="a read-only mount needs unshare, and leave to use it",
)
def test_notebooks_of_a_read_only_checkout(tmp_path):
    """As in a classroom: the teacher's checkout is mounted read-only, students run copies in a folder of their own."""
    checkout, own = tmp_path / "checkout", tmp_path / "own"
    for name in ("clseg", "params", "notebooks", "paper_figures"):
        shutil.copytree(PROJECT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    own.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "CLSEG_OUT"}
    environment |= {"HOME": str(own), "PYTHONPATH": str(checkout), "NO_COLOR": "1"}

    def run(stem):
        shutil.copy(checkout / "notebooks" / f"{stem}.ipynb", own)
        jupyter = f"'{sys.executable}' -m jupyter execute --inplace {stem}.ipynb"
        done = subprocess.run(
            [*READ_ONLY, f"{MOUNT.format(checkout)} && ! touch '{checkout}/new' && {jupyter}"],
            **{"cwd": own, "env": environment, "capture_output": True, "text": True},
        )
        return done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stderr)

    assert run("00_start_here")[0] == 0
    status, said = run("01_data")
    assert (status, "Read-only file system" in said) == (1, True)
    assert "set CLSEG_OUT or --out to a folder that can be written" in said.strip().splitlines()[-1]


@pytest.mark.parametrize("stem", ["04_infonce", "42_which_method"])
def test_a_notebook_as_html_is_readable(stem):
    """What `jupyter nbconvert --to html` makes: its text, its pictures, nothing of a terminal's colours."""
    page, _ = HTMLExporter().from_filename(build.FOLDER / f"{stem}.ipynb")
    notebook = nbformat.read(build.FOLDER / f"{stem}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert page.count('src="data:image/png;base64,') == sum("image/png" in o.get("data", {}) for o in outputs)
    assert notebook.cells[0].source.splitlines()[0].removeprefix("# ") in page
    assert "\x1b" not in page


LESSONS = [stem for stem in build.stems() if re.match(r"0[24]_|1\d_", stem)]
RESULTS = [stem for stem in build.stems() if re.match(r"3\d_|4[0-2]_", stem)]
PAGES = [*PROJECT.glob("*.md"), *build.FOLDER.glob("*.ipynb"), *build.FOLDER.glob("solutions/*.ipynb")]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """The text of a page: all of a Markdown file, the text cells of a notebook; code in it left out."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = nbformat.reads(text, as_version=4).cells
        text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`|\$[^$]*\$", "", text, flags=re.DOTALL)


def test_what_students_get_has_no_solutions_and_its_links_stay_inside(tmp_path):
    text = (PROJECT / "Makefile").read_text(encoding="utf-8")
    places = re.search(r"^STUDENTS := (.*)$", text, re.MULTILINE).group(1).split()
    given = {path.resolve() for place in places for path in PROJECT.glob(place)}
    assert {path.stem for path in given if path.suffix == ".ipynb"} == set(build.stems())
    assert not [path for path in given if "solutions" in path.parts or path.name == "TEACHING.md"]
    for page in sorted(path for path in given if path.suffix in (".ipynb", ".md")):
        for link in LINK.findall(prose(page)):
            target = (page.parent / link.partition("#")[0]).resolve()
            inside = re.match("[a-z]+:|#", link) or target in given or target.name == "TEACHING.md"
            assert inside or any(path.is_relative_to(target) for path in given), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_links_lead_somewhere(page):
    for target in LINK.findall(prose(page)):
        if target.startswith(("http:", "https:")):
            assert target.startswith("https://"), target
        else:
            assert (page.parent / target.partition("#")[0]).exists(), (
                f"{page.name} links to {target}, which is not there"
            )


@pytest.mark.parametrize("stem", LESSONS)
def test_a_lesson_is_made_to_the_pattern(stem):
    text = prose(build.FOLDER / f"{stem}.ipynb")
    wanted = [
        "**Goals.**",
        "**You need**",
        "minutes**",
        "## What to notice",
        "## Summary",
        "## Exercises",
        "## Where to read on",
    ]
    places = [text.find(part) for part in wanted]
    assert -1 not in places, wanted[places.index(-1)]
    assert places == sorted(places)
    summary = text[text.index("## Summary") : text.index("## Exercises")]
    assert 4 <= summary.count("\n* ") <= 6
    code = build.script_of(stem).read_text(encoding="utf-8")
    assert '# %% tags=["slider"]' in code
    stated = re.search(r"\*\*About (\d+) minutes\*\*(?: (\(\d+) with)?", " ".join(text.split()))
    minutes = f"{stated[1]} {stated[2]})" if stated[2] else stated[1]
    for page in ("TEACHING.md", "notebooks/00_start_here.ipynb"):
        (row,) = (
            line for line in prose(PROJECT / page).splitlines() if line.startswith("|") and f"{stem}.ipynb" in line
        )
        assert minutes in map(str.strip, row.split("|")), f"{page} has other minutes"


@pytest.mark.parametrize("stem", RESULTS)
def test_results_say_what_they_show_and_what_they_do_not(stem):
    script = build.script_of(stem).read_text(encoding="utf-8")
    headings = ["What we see", "Deviations", "What this does not show"]
    if stem in ("40_benchmarks", "41_study"):  # of no paper
        headings.remove("Deviations")
    places = [script.find(f"\n# ## {heading}\n") for heading in headings]
    assert -1 not in places
    assert places == sorted(places)


def test_results_are_numbers_30_to_42():
    assert [stem[:2] for stem in RESULTS] == [str(number) for number in range(30, 43)]
