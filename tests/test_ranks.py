"""Several processes that pre-train together take the steps of one; this file is also the program of each of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from clseg import probe, ranks
from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.loop import Work
from clseg.models import UNet
from clseg.stages import STAGES
from clseg.study.parameters import resolve
from clseg.tools import cli
from clseg.train import Pretrained

STEPS = {"gr": 0, "gd-": 0, "gd": 0, "pcl": 0, "gr+lr": 1, "gd+ld": 1}  # a stage of each, by its place in the method
PROBED = "gr", "gd", "gd+ld"  # whose held-out batches are two equal parts
SMALL = [
    *("dataset.options.subjects=8", "dataset.protocols.seeded.test=1", "dataset.protocols.seeded.validation=1"),
    "pretrain.steps=3",
]


def gradients(method):
    """The loss of a step in float64, the gradient and the running averages that it leaves."""
    experiment = resolve("phantom", "smoke", method, overrides=SMALL[:1])
    store = prepare(experiment.dataset, experiment.geometry, progress=False)
    torch.manual_seed(0)
    network = UNet(store.channels, store.num_classes, experiment.network).double().train()
    network.encoder.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(),))
    stage = experiment.stages[STEPS[method]]
    training = STAGES[stage.stage](Work(network, store, store.rows(store.subjects), 8, seed=0), stage)
    modules = torch.nn.ModuleList([network, *training.learning.values()]).double()
    ranks.connect(modules)
    loss = training.step_loss(0)
    loss.backward()
    ranks.average_gradients(torch.optim.SGD(modules.parameters()))
    found = {name: value.grad for name, value in modules.named_parameters() if value.grad is not None}
    averages = {name: value for name, value in modules.named_buffers() if "running" in name}
    return {"loss": loss.detach()} | found | averages


def probed(method):
    """What a probe finds in weights that nobody trained."""
    experiment = resolve("phantom", "smoke", method, overrides=SMALL[:1])
    store = prepare(experiment.dataset, experiment.geometry, progress=False)
    torch.manual_seed(0)
    network, stage = UNet(store.channels, store.num_classes, experiment.network), experiment.stages[STEPS[method]]
    training = STAGES[stage.stage](Work(network, store, store.rows(store.subjects), 8, seed=0), stage)
    parts = {"": network} | {f"{name}.": module for name, module in training.learning.items()}
    weights = {prefix + name: value for prefix, part in parts.items() for name, value in part.state_dict().items()}
    done = Pretrained(weights, None, {}, training)
    return probe.probe(done, store, store.subjects[:5], store.subjects[5:], stage, 0, network=experiment.network)


def torchrun(*command, processes=2, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, check=False)


def test_two_processes_have_the_loss_gradient_and_averages_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    expected, learned = {name: gradients(name) for name in STEPS}, {name: probed(name) for name in PROBED}
    root = str(Path(__file__).resolve().parents[1])
    done = torchrun(__file__, str(tmp_path), PYTHONPATH=os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for method, values in expected.items():
            assert found[method].keys() == values.keys()
            assert any("running_var" in name for name in values)
            for name, value in values.items():
                torch.testing.assert_close(found[method][name], value, rtol=1e-8, atol=1e-10, msg=f"{method}: {name}")
        for method, values in json.loads((tmp_path / f"rank{rank}.json").read_text()).items():
            assert values == pytest.approx(learned[method], rel=1e-3, abs=1e-3, nan_ok=True), method


@pytest.mark.parametrize(("method", "folders"), [("gd+lr", 2), ("ufc", 2)])
def test_pretrain_alone_and_in_two_processes(tmp_path, capsys, method, folders, monkeypatch):
    words = ["pretrain", "--method", method, "--dataset", "phantom", *(f"--set={text}" for text in SMALL)]
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "one"))
    assert cli.main(words) == 0
    one = Path(capsys.readouterr().out.strip())
    done = torchrun("-m", "clseg", *words, CLSEG_OUT=str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    (two,) = (Path(line) for line in done.stdout.splitlines() if line.endswith(".safetensors"))  # said once
    assert two.relative_to(tmp_path / "two") == one.relative_to(tmp_path / "one")
    assert len(list(two.parents[1].glob("*/status.json"))) == folders
    assert load_file(two).keys() == load_file(one).keys()
    first = [pd.read_csv(path.with_name("log.csv"))["loss"].iloc[0] for path in (one, two)]
    if method == "ufc":  # else its start, an earlier stage, differs in the last bits and the optimiser enlarges that
        assert first[1] == pytest.approx(first[0], rel=1e-3)


def test_a_batch_that_cannot_be_shared_is_a_wrong_request(tmp_path):
    words = ["--method=gd", "--dataset=phantom", "--set=stages.0.slices=4", *(f"--set={text}" for text in SMALL)]
    done = torchrun("-m", "clseg", "pretrain", *words, processes=3, CLSEG_OUT=str(tmp_path))
    assert done.returncode != 0
    assert "4 images of a batch are not 3 equal parts; change --nproc-per-node" in done.stderr
    assert not list(tmp_path.rglob("status.json"))


def test_a_method_without_pre_training_and_a_stage_too_many_are_wrong_requests(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    words = ["pretrain", "--dataset", "phantom", "--method"]
    assert cli.main([*words, "random"]) == 2
    assert "--method random: has no pre-training" in capsys.readouterr().err
    assert cli.main([*words, "gd", "--stage", "1"]) == 2
    assert "method 'gd' has 1 pre-training stages" in capsys.readouterr().err


def test_alone_everything_is_as_it_was():
    layer, rows = torch.nn.BatchNorm2d(3), torch.rand(4, 3, 2, 2)
    ranks.connect([layer])
    assert type(layer) is torch.nn.BatchNorm2d
    assert ranks.part(rows) is rows or torch.equal(ranks.part(rows), rows)
    assert ranks.agreed(True)
    assert not ranks.agreed(False)
    with pytest.raises(RequestError, match="no such error"), ranks.joined():
        raise RequestError("no such error")


if __name__ == "__main__":
    with ranks.joined():
        torch.set_num_threads(1)
        torch.save({method: gradients(method) for method in STEPS}, f"{sys.argv[1]}/rank{ranks.number()}.pt")
        content = json.dumps({method: probed(method) for method in PROBED})
        Path(f"{sys.argv[1]}/rank{ranks.number()}.json").write_text(content)
