"""The three roots - data, runs, results - and the project's own files; nothing else builds a path."""

import os
from pathlib import Path

for _root in ("CLSEG_DATA", "CLSEG_OUT"):  # once, at the door: kernels have another working directory
    if os.environ.get(_root):
        os.environ[_root] = str(Path(os.environ[_root]).expanduser().absolute())

PROJECT = Path(__file__).resolve().parent.parent
PARAMS = PROJECT / "params"
NOTEBOOKS = PROJECT / "notebooks"
COMMITTED = PROJECT / "paper_figures"  # rows, tables and charts that come with the project


def data_root() -> Path:
    """Folder that holds one folder per data set: `$CLSEG_DATA`, or `data/` of the project."""
    return Path(os.environ.get("CLSEG_DATA") or PROJECT / "data").expanduser().absolute()


def out_root() -> Path:
    """Folder under which everything is written: `$CLSEG_OUT`, or `out/` of the project, which git ignores."""
    return Path(os.environ.get("CLSEG_OUT") or PROJECT / "out").expanduser().absolute()


def runs_root() -> Path:
    """Run folders (`runs/<dataset>/<profile>/<run>`) and the prepared stores (`runs/prepared`)."""
    return out_root() / "runs"


def prepared_root() -> Path:
    """Prepared data sets, one folder per hash of inputs and geometry."""
    return runs_root() / "prepared"


def results_dir(profile: str, dataset: str, study: str, out: Path | None = None) -> Path:
    """Tables, charts and provenance of one study, under the output root or another one."""
    return (out or out_root()) / "paper_figures" / profile / dataset / study
