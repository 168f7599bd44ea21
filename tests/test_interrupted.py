"""A notebook that its user interrupts in the middle of training: `clseg run` goes on from there."""

import time

import jupyter_client
import nbformat
import pytest
import torch

from clseg import paths
from clseg.study import archive, grid, runs
from clseg.study.parameters import FinetuneParameters, PretrainParameters

STEPS = 150
OVERRIDES = ["dataset.options.subjects=8", "dataset.protocols.seeded.test=2", "dataset.protocols.seeded.validation=2"]
OVERRIDES += [f"pretrain.steps={STEPS}", f"finetune.steps={STEPS}"]
FIELDS = {"dataset": "phantom", "profile": "smoke", "overrides": OVERRIDES}
RUNS = {
    "pretrain": lambda: runs.pretrain_run(PretrainParameters(**FIELDS, method="gd")),
    "finetune": lambda: runs.finetune_run(FinetuneParameters(**FIELDS, method="random")),
}


@pytest.fixture
def kernel():
    """A kernel as JupyterLab starts it; its manager and a client."""
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3", cwd=str(paths.NOTEBOOKS))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def answer(client, request):
    while (reply := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != request:
        pass
    return reply["content"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_an_interrupted_notebook_leaves_what_a_study_goes_on_from(kind, kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "whole"))
    whole = runs.do(RUNS[kind]()).folder
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    run, (manager, client) = RUNS[kind](), kernel
    checkpoint = run.folder / "checkpoint.pt"

    # the cells, with the user's parameters, up to the one that trains
    cells = [c for c in nbformat.read(paths.NOTEBOOKS / grid.NOTEBOOK[kind], 4).cells if c.cell_type == "code"]
    tagged = next(k for k, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    mine = "\n".join(f"{name} = {value!r}" for name, value in run.parameters.model_dump().items())
    first = next(k for k, cell in enumerate(cells) if "runs.do(run)\n" in cell.source)
    environment = {"CLSEG_OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    before = [f"import os; os.environ.update({environment!r})", *(c.source for c in cells[: tagged + 1]), mine]
    for source in [*before, *(c.source for c in cells[tagged + 1 : first])]:
        assert answer(client, client.execute(source))["status"] == "ok", source
    training = client.execute(cells[first].source)
    patience = time.monotonic() + 120
    while not checkpoint.exists():
        assert time.monotonic() < patience
        time.sleep(0.002)
    manager.interrupt_kernel()
    assert answer(client, training)["ename"] == "KeyboardInterrupt"

    # the notebook stays open; whoever goes on must not wait for it, nor begin anew
    assert manager.is_alive()
    assert not run.is_done()
    with archive.locked(run.folder / ".lock", wait=False) as free:
        assert free
    saved = torch.load(checkpoint, weights_only=True)
    assert 0 < saved["step"] < STEPS
    saved["losses"][0] = 1234.0  # a mark that shows in the log of who goes on
    torch.save(saved, checkpoint)
    assert grid.execute_run(run) == ("done", "")
    assert run.is_done()
    assert run.read("log")["loss"][0] == 1234.0
    assert manager.is_alive()
    names = ["weights.safetensors", *(["metrics.csv"] if kind == "finetune" else [])]
    assert all((run.folder / name).read_bytes() == (whole / name).read_bytes() for name in names)
    log = [(folder / "log.csv").read_bytes().split(b"\n")[2:] for folder in (run.folder, whole)]
    assert log[0] == log[1]

    # and the notebook itself, run again
    assert answer(client, client.execute(cells[first].source))["status"] == "ok"
