"""What holds on any device: no step asks a tensor of the device for a number, which would wait for a GPU.

The device `meta` computes shapes only, so such a question is an error there.
"""

import json
from importlib import import_module

import pytest
import torch
import yaml

from clseg import paths
from clseg.loop import Work, optimiser_for
from clseg.models import UNet
from clseg.recipes import RECIPES
from clseg.stages import STAGES
from clseg.study import runs
from clseg.study.files import read_methods
from clseg.study.parameters import FinetuneParameters, resolve

META = torch.device("meta")
METHODS = read_methods()


def take_steps(training, settings, at):
    """Loss, backward pass and optimiser of these steps, as the loop takes them."""
    optimiser = optimiser_for(training.learning.values(), settings)
    for step in at:
        loss = training.step_loss(step)
        assert loss.device == META
        assert loss.shape == ()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    weights = [weight for group in optimiser.param_groups for weight in group["params"]]
    assert any(weight.grad is not None for weight in weights)


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(store, method, monkeypatch):
    experiment = resolve("phantom", "smoke", method, overrides=["dataset.options.subjects=8"])
    network = UNet(store.channels, store.num_classes, experiment.network).placed(META).train()
    rows, unlabelled = store.rows(store.subjects[:2]), store.rows(store.subjects[2:4])
    classes = None, torch.arange(len(store.slices)) % 5  # of features that have values
    monkeypatch.setattr(import_module("clseg.stages.contrast"), "pseudo_classes", lambda *_: classes)
    for stage in experiment.stages:
        take_steps(STAGES[stage.stage](Work(network, store, rows, 8, 0, steps=20), stage), stage, [0, 1])
    recipe = experiment.recipe
    training = RECIPES[recipe.recipe](Work(network, store, rows, 6, 0, 20, unlabelled), recipe)
    take_steps(training, recipe, [0, 8, 19])


def test_a_question_to_the_device_would_be_an_error():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        bool(torch.zeros(2, device=META).any())
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.zeros(2, device=META)[torch.ones(2, dtype=torch.bool, device=META)]


def test_rows_of_a_store_stay_on_the_device(store):
    first = store.batch(store.rows(store.subjects[:1]), META)
    assert first.image.device == first.label.device == META
    images = store._resident["images", META]
    assert tuple(images.shape) == store.images.shape
    assert store.only(store.subjects[1:2]).batch(store.rows(store.subjects[1:2]), META).image.device == META
    assert store._resident["images", META] is images
    assert first.row.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_run_on_a_gpu(tmp_path, monkeypatch, precision):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    profile = yaml.safe_load((paths.PARAMS / "profiles" / "smoke.yaml").read_text()) | {"precision": precision}
    (tmp_path / "gpu.yaml").write_text(yaml.safe_dump(profile))
    run = runs.finetune_run(FinetuneParameters(dataset="phantom", profile=str(tmp_path / "gpu.yaml"), method="gd+lr"))
    runs.do(run)
    record = json.loads((run.folder / "record.json").read_bytes())
    assert record["gpu_bytes"] > runs.GPU_CONTEXT
    assert run.read("log")["loss"].notna().all()
    assert run.read("metrics")["dice"].between(0, 1).any()
