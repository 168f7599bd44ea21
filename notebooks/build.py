"""Makes the notebooks from their scripts: `python notebooks/build.py [--check] [STEM ...]`.

`scripts/<stem>.py` (jupytext percent format) is the source, `<stem>.ipynb` beside this file the executed result. Of an
exercise the source is `solutions/<stem>.py`, the executed result `solutions/<stem>.ipynb`, and `<stem>.ipynb` beside
this file is what a student gets, with the solutions cut out (`exercise_of`). Builds repeat: cell ids come from the stem
and the cell's number, the kernel runs on one thread with an empty output folder and without real data, and what changes
from run to run (timings, progress bars) is left out. A warning fails the build.
"""

import argparse
import ast
import base64
import io
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from textwrap import dedent

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

FOLDER = Path(__file__).resolve().parent
CHECKED = "nbval-check-output"
SOLUTION = "solution"  # tag of a cell that exercises lack
SLIDER = "slider"  # tag of a cell whose output a page cannot hold
HINT = re.compile(r"^( *)# hint: (.+)$")  # opens a solution
LARGEST_BYTES = 1_000_000
CELL_LIMIT_S = 900
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # two threads sum in another order: other last digits

# What JupyterLab would write on opening a notebook, so that none is changed by being looked at.
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
WIDGET = re.compile(r"application/vnd\.jupyter\.widget")
# What a reader's machine cannot have or the next run will not repeat. A "/" between words, the tail of a URL and the
# end of an HTML tag are not the start of a path.
FOREIGN = {
    "an absolute path": re.compile(r"(?<![\w.~/<)\]}*+-])/[A-Za-z_][\w.-]*/[\w.-]|\b[A-Za-z]:\\\w|\bfile://"),
    "a memory address": re.compile(r"\b0x[0-9a-f]{7,}\b"),
}


def stems(folder: Path = FOLDER) -> list[str]:
    """Every notebook's name, whether its script or the notebook or both are there."""
    patterns = "scripts/*.py", "solutions/*.py", "solutions/*.ipynb", "*.ipynb"
    return sorted({path.stem for pattern in patterns for path in folder.glob(pattern)})


def script_of(stem: str, folder: Path = FOLDER) -> Path:
    """The source of a notebook: a solution, if there is one, or a script."""
    solution = folder / "solutions" / f"{stem}.py"
    return solution if solution.exists() else folder / "scripts" / f"{stem}.py"


def _executed(script: Path) -> Path:
    """Where the executed notebook of a script lies."""
    return (
        script.with_suffix(".ipynb")
        if script.parent.name == "solutions"
        else script.parents[1] / f"{script.stem}.ipynb"
    )


def exercise_of(solution: NotebookNode) -> NotebookNode:
    """The exercise of a solution notebook, not executed: text cells with the tag `solution` are left out, code cells
    with it have a `stub` for each `# hint: ...`, and links lead from the folder above."""
    exercise = deepcopy(solution)
    exercise.metadata.jupytext = nbformat.from_dict({"formats": "ipynb"})  # JupyterLab writes no script of it
    exercise.cells = [
        cell for cell in exercise.cells if cell.cell_type == "code" or SOLUTION not in cell.metadata.get("tags", [])
    ]
    for cell in exercise.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](")
        else:
            cell.outputs, cell.execution_count = [], None
            if SOLUTION in cell.metadata.pop("tags", []):
                cell.source = stub(cell.source)
    return exercise


def stub(source: str) -> str:
    """Code in which the lines from `# hint: ...` to the end of its block are one line that stops with this hint.

    The line is `return ...` or `name = ...` as the last of the block. Raises `ValueError` where that is neither, or
    where nothing is cut out.
    """
    lines, kept = source.splitlines(), []
    while lines:
        line = lines.pop(0)
        if match := HINT.match(line):
            (indent, hint), block = match.groups(), []
            while lines and (not lines[0].strip() or lines[0].startswith(indent)):
                block.append(lines.pop(0))
            last = ast.parse(dedent("\n".join(block))).body[-1]
            if not isinstance(last, ast.Return | ast.Assign):
                raise ValueError(f"the solution after {hint!r} must end with `return` or an assignment")
            start = "return" if isinstance(last, ast.Return) else f"{ast.unparse(last.targets[0])} ="
            line = f"{indent}{start} teach.todo({json.dumps(hint, ensure_ascii=False)})"
        kept.append(line)
    if kept == source.splitlines():
        raise ValueError("a code cell with the tag `solution` has no line `# hint: ...`")
    return "\n".join(kept)


def convert(script: Path) -> NotebookNode:
    """The script as an unexecuted notebook with stable cell ids."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": LANGUAGE | {"version": platform.python_version()},
        }
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"{script.stem}-{index:03d}"
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    return notebook


@contextmanager
def clean_room(out: Path) -> Iterator[None]:
    """Environment for a kernel started inside: one thread, results under `out`, no real data, pictures inline."""
    wanted = {"CLSEG_OUT": str(out), "CLSEG_DATA": str(out / "no-data"), "MPLBACKEND": None, **ONE_THREAD}
    before = {name: os.environ.get(name) for name in wanted}
    _set_environment(wanted)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Runs all cells in place, in a fresh kernel whose working directory is `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    client = NotebookClient(
        notebook,
        timeout=CELL_LIMIT_S,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        config=Config(KernelManager={"transport_encryption": "auto"}),  # without, each kernel warns on the terminal
    )
    # nbclient would answer the kernel for a slider's output, and then sometimes misses the end of the cell
    client.comm_open_handlers = {"jupyter.widget": lambda message: None}
    with tempfile.TemporaryDirectory(prefix="clseg-notebook-") as out, clean_room(Path(out)):
        client.execute()


def clean(notebook: NotebookNode) -> None:
    """Drops progress bars and what cells with the tag `slider` show (a page moves none; the picture stands before it),
    and gives pictures a palette of 256 colours, a third of the bytes."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output
                for output in cell.outputs
                if SLIDER not in cell.metadata.get("tags", [])
                and not any(WIDGET.match(kind) for kind in output.get("data", {}))
            ]
            for output in cell.outputs:
                if picture := output.get("data", {}).get("image/png"):
                    output.data["image/png"] = _with_palette(picture)


def _with_palette(picture: str) -> str:
    """A PNG in base64 with at most 256 colours, opaque."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        buffer = io.BytesIO()
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _texts(output: NotebookNode) -> Iterator[str]:
    """What of an output is text: streams, and every representation but pictures."""
    yield str(output.get("text", ""))
    for kind, value in output.get("data", {}).items():
        if not kind.startswith("image/") or kind == "image/svg+xml":
            yield str(value)


def _is_literal_assignment(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
        return False
    try:
        ast.literal_eval(statement.value)
    except ValueError:
        return False
    return True


def problems(stem: str, folder: Path = FOLDER) -> list[str]:
    """What is wrong with one notebook on disk, a sentence each, naming the cell; empty if it may be committed."""
    script = script_of(stem, folder)
    if not script.exists():
        return [f"{stem}: scripts/{stem}.py is missing; write it, or delete the notebook"]
    source, path = convert(script), _executed(script)
    wanted = {path: source} if path.parent == folder else {path: source, folder / path.name: exercise_of(source)}
    for place in wanted:
        if not place.exists():
            return [f"{stem}: {place.relative_to(folder)} is missing; build it"]
    found = _source_problems(stem, source)
    for place, book in wanted.items():
        found += _drift(stem, book, text := place.read_text(encoding="utf-8"))
        shown = (cell.get("outputs") or cell.get("execution_count") for cell in json.loads(text)["cells"])
        if place != path and any(shown):
            found.append(f"{stem}: the exercise shows outputs, which may hold answers; build it")
    return found + _output_problems(stem, path.read_text(encoding="utf-8"))


def _source_problems(stem: str, source: NotebookNode) -> list[str]:
    found = []
    tags = [cell.metadata.get("tags", []) for cell in source.cells]
    parameters = [index for index, of_cell in enumerate(tags) if "parameters" in of_cell]
    if len(parameters) > 1:
        found.append(f"{stem}: cells {parameters} all have the tag `parameters`; one may")
    for index in parameters:
        if not all(map(_is_literal_assignment, ast.parse(source.cells[index].source).body)):
            found.append(f"{stem}: cell {index} (`parameters`) must assign literals and do nothing else")
    checked, solutions = (sum(tag in of_cell for of_cell in tags) for tag in (CHECKED, SOLUTION))
    if not solutions and not 2 <= checked <= 4:
        found.append(f"{stem}: {checked} cells have the tag `{CHECKED}`; two to four must")
    return found


def _drift(stem: str, source: NotebookNode, text: str) -> list[str]:
    notebook = nbformat.reads(text, as_version=4)
    here, there = (
        [(cell.id, cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in book.cells]
        for book in (notebook, source)
    )
    if here != there:
        first = next(index for index in range(len(here) + 1) if here[index : index + 1] != there[index : index + 1])
        return [f"{stem}: cell {first} is not what the script says (source, tags or cell id); build it again"]
    for book in (notebook, source):
        book.metadata.get("language_info", {}).pop("version", None)  # of whoever built it
    if notebook.metadata != source.metadata:
        return [f"{stem}: the notebook's metadata is not that of a build; build it again"]
    return []


def _output_problems(stem: str, text: str) -> list[str]:
    notebook = nbformat.reads(text, as_version=4)
    found = []
    if (size := len(text.encode())) > LARGEST_BYTES:
        found.append(f"{stem}: the notebook has {size:,} bytes, {LARGEST_BYTES:,} may be; make its pictures smaller")
    code = [(index, cell) for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    if not any(cell.outputs for _, cell in code):
        found.append(f"{stem}: no cell has an output; build it, or nothing is compared")
    for index, cell in code:
        where = f"{stem}: cell {index}"
        if cell.execution_count is None and cell.source.strip():
            found.append(f"{where} was not executed; build it again")
        shown = "\n".join(text for output in cell.outputs for text in _texts(output))
        if CHECKED in cell.metadata.get("tags", []) and not re.search(r"\d|Right", shown):
            found.append(f"{where} has the tag `{CHECKED}` but shows no number that could be compared")
        if "Not yet" in shown:
            found.append(f"{where} shows an answer that its own check refuses")
        if set(cell.metadata) - {"tags"}:
            found.append(f"{where} has metadata besides its tags; build it again")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"{where} ended in an error")
            if output.get("name") == "stderr":
                found.append(f"{where} holds stderr, mend what it warns of: {output.text[:200]}")
            if any(WIDGET.match(kind) for kind in output.get("data", {})):
                found.append(f"{where} holds a widget; build it again")
        for what, pattern in FOREIGN.items():
            if match := pattern.search(shown):
                around = shown[max(0, match.start() - 30) : match.end() + 30].replace("\n", " ")
                found.append(f"{where} shows {what}: ...{around}...")
    return found


def build(stem: str, folder: Path = FOLDER) -> None:
    """Converts, executes, cleans and writes one notebook; a notebook that may not be committed is not written.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
        ValueError: the outputs may not be committed; says which cell and why.
    """
    script = script_of(stem, folder)
    if not script.exists():
        raise ValueError(f"{stem}: there is no scripts/{stem}.py to build it from")
    notebook, path = convert(script), _executed(script)
    if found := _source_problems(stem, notebook):
        raise ValueError("\n".join(found))
    exercise = exercise_of(notebook)
    execute(notebook, path.parent)
    clean(notebook)
    if found := _output_problems(stem, nbformat.writes(notebook)):
        raise ValueError("\n".join(found))
    _write(path, notebook)
    if path.parent != folder:
        _write(folder / path.name, exercise)


def _write(path: Path, notebook: NotebookNode) -> None:
    half_written = path.with_name(f".{path.name}.tmp")
    half_written.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    half_written.replace(path)


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Command line; returns the exit status: 0 all well, 1 not."""
    parser = argparse.ArgumentParser(
        description="Make notebooks/*.ipynb from notebooks/scripts/*.py and solutions/*.py."
    )
    parser.add_argument("stems", nargs="*", metavar="STEM", help="notebook without ending; default: all")
    parser.add_argument("--check", action="store_true", help="execute nothing; say what is wrong with the notebooks")
    options = parser.parse_args(arguments)
    status = 0
    for stem in options.stems or stems(folder):
        try:
            if not options.check:
                print(f"{stem} ...", flush=True)
                build(stem, folder)
            elif found := problems(stem, folder):
                raise ValueError("\n".join(found))
        except (CellExecutionError, ValueError) as error:
            print(f"{stem} failed:\n{error}" if isinstance(error, CellExecutionError) else error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
