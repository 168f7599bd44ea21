import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clseg.data.prepare import prepare
from clseg.models import UNet
from clseg.settings import Geometry, NetworkConfig, Normalisation
from clseg.study.files import read_dataset
from clseg.tools import cli


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets, one folder each; the test is skipped where there is none."""
    root = os.environ.get("CLSEG_DATA")
    if not root:
        pytest.skip("no real data: CLSEG_DATA is not set")
    if not Path(root).is_dir():
        pytest.skip(f"no real data: CLSEG_DATA={root} is not a folder")
    return Path(root).absolute()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight phantoms, prepared at the smallest size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_OUT", str(tmp_path_factory.mktemp("store")))
        about = read_dataset("phantom").model_copy(update={"options": {"subjects": 8}})
        return prepare(about, about.geometry["smoke"], progress=False)


def command(root: Path, *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of `clseg`, in this process: it has imported everything already."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setenv("CLSEG_OUT", str(root))
        status = cli.main([*words])
    assert "Traceback" not in errors.getvalue()
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="session", name="command")
def command_fixture():
    return command


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; without one on the path the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on the path")
    with playwright.sync_playwright() as run:
        started = run.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class SmallGrid:
    """A smoke grid of one pre-training and two fine-tunings, as a command of its own."""

    few = (
        "dataset.options.subjects=10",
        *("dataset.protocols.seeded.test=3", "dataset.protocols.seeded.validation=1"),
    )
    words = (
        *("run", "quickstart", "--profile", "smoke", *map("--set={}".format, few)),
        *("--set=study.methods=[random, gd]", "--set=study.labelled=[1]", "--set=study.draws=[1]"),
    )

    def start(self, root: Path, *more: str, **options) -> subprocess.Popen:
        environment = os.environ | {"CLSEG_OUT": str(root), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "clseg", *self.words, *more]
        return subprocess.Popen(command, env=environment, **pipes, **options)

    def finish(self, root: Path, *more: str) -> tuple[int, str, str]:
        """Exit status, output and errors of the command."""
        return command(root, *self.words, *more)

    @staticmethod
    def folders(root: Path, pattern: str = "*") -> list[Path]:
        """Those of finished runs."""
        return sorted(path.parent for path in root.glob(f"runs/phantom/smoke/{pattern}/status.json"))

    @staticmethod
    def tables(root: Path) -> list[bytes]:
        folder = root / "paper_figures/smoke/phantom/quickstart"
        return [(folder / f"{name}.csv").read_bytes() for name in ("table", "summary", "pretraining")]


@pytest.fixture(scope="session")
def small_grid() -> SmallGrid:
    return SmallGrid()


@pytest.fixture(scope="session")
def whole(small_grid, tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of a small grid that was left alone."""
    root = tmp_path_factory.mktemp("whole")
    status, output, errors = small_grid.finish(root)
    assert status == 0, errors
    return root, output


@pytest.fixture
def save_weights():
    """Writes the weight file of an untrained network, by default of three classes with the values 200, 500 and 600."""

    def make(path: Path, seed=0, size=(32, 32), resize=False, values=(0, 200, 500, 600), channels=1, **changes) -> Path:
        network = changes.pop("network", NetworkConfig(filters=[8, 16, 16, 32], norm_momentum=0.3))
        parts, prefixes = changes.pop("parts", ("encoder.", "decoder.", "output.")), {"of a segmenter": ["output."]}
        torch.manual_seed(seed)
        module = UNet(channels, len(values), network, len(size))
        for name, value in module.named_buffers():  # as after some training
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.3)
        weights = {name: value for name, value in module.state_dict().items() if name.startswith(parts)}
        geometry = Geometry(size=list(size), spacing_mm=None if resize else 1.4, resize=resize)
        record = {"network": network.model_dump(), "geometry": geometry.model_dump(), "channels": channels}
        record |= {"normalisation": Normalisation().model_dump(), "channel": None, "photograph": False, "orient": True}
        record |= {"classes": {str(k): f"class {k}" for k in range(1, len(values))}, "label_values": list(values)}
        record |= {"prefixes": prefixes, "dataset": "example", "method": "random", "run": "example"} | changes
        save_file(weights, path, {"clseg": json.dumps(record)})
        return path

    return make
