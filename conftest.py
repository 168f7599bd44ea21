"""What holds for the tests and for the notebooks that nbval executes beside them."""

import os
import tempfile
from pathlib import Path

import nbval.kernel
import pytest
from jupyter_client import KernelManager
from nbval.plugin import IPyNbCell, IPyNbFile

from build import ONE_THREAD, clean_room
from clseg.study.kernels import Warm

os.environ |= ONE_THREAD  # before tests/conftest.py imports torch
collect_ignore_glob = ["notebooks/9*.ipynb"]  # exercises stop at their first stub; their solutions run as notebooks
_OUT = pytest.StashKey[Path]()


def pytest_configure(config):
    """An empty output folder of this session's own: results on disk must not stand in for training."""
    out = tempfile.TemporaryDirectory(prefix="clseg-test-", ignore_cleanup_errors=True)
    config.add_cleanup(out.cleanup)
    config.stash[_OUT] = Path(out.name)
    os.environ["CLSEG_OUT"] = out.name
    nbval.kernel.KernelManager = type("Manager", (Warm, KernelManager), {})  # torch is imported once, not per notebook


def pytest_collectstart(collector):
    """Warnings and progress bars come and go, and tables as HTML repeat their text: nbval compares none of them."""
    if isinstance(collector, IPyNbFile):
        collector.skip_compare += ("stderr", "text/html", "image/svg+xml")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Kernels start where `build.py` starts them: in an output folder of their own.

    The folder goes by the notebook's name. So the executed notebooks of a grid, which are all called `notebook.ipynb`,
    share one: a fine-tuning finds the pre-training made a moment ago.
    """
    if not isinstance(item, IPyNbCell):
        return (yield)
    with clean_room(item.config.stash[_OUT] / item.path.stem):
        return (yield)
