"""What holds on any device: no step asks a tensor of the device for a number, which would wait for a GPU.

The device `meta` computes shapes only, so such a question is an error there.
"""

import json
from copy import deepcopy
from importlib import import_module

import pytest
import torch
import yaml
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clseg import paths
from clseg.loop import Work, optimiser_for
from clseg.models import UNet
from clseg.recipes import RECIPES
from clseg.stages import STAGES
from clseg.study import bf16, runs
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


@pytest.fixture
def trainings(store, monkeypatch):
    """Every stage and the recipe of a method, each with its settings and two steps to take."""

    def made(method, device):
        experiment = resolve("phantom", "smoke", method, overrides=["dataset.options.subjects=8"])
        network = UNet(store.channels, store.num_classes, experiment.network).placed(device).train()
        rows, unlabelled = store.rows(store.subjects[:2]), store.rows(store.subjects[2:4])
        classes = None, torch.arange(len(store.slices)) % 5  # of features that have values
        monkeypatch.setattr(import_module("clseg.stages.contrast"), "pseudo_classes", lambda *_: classes)
        for stage in experiment.stages:
            yield STAGES[stage.stage](Work(network, store, rows, 8, 0, steps=20), stage), stage, [0, 1]
        recipe = experiment.recipe
        yield RECIPES[recipe.recipe](Work(network, store, rows, 6, 0, 20, unlabelled), recipe), recipe, [0, 8, 19]

    return made


@pytest.mark.parametrize("method", METHODS)
def test_no_step_waits_for_the_device(trainings, method):
    for training, settings, steps in trainings(method, META):
        take_steps(training, settings, steps)


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


LAYERS = {
    "conv2d": (nn.Conv2d(16, 32, 3, padding=1), (4, 16, 32, 32)),
    "conv3d": (nn.Conv3d(8, 8, 3, padding=1), (2, 8, 8, 16, 16)),
    "transposed": (nn.ConvTranspose2d(16, 32, 2, stride=2), (4, 16, 16, 16)),
    "linear": (nn.Linear(128, 64), (64, 128)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_emulated_bf16_is_the_exact_product_of_rounded_numbers_rounded(layer):
    module, shape = LAYERS[layer]
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(shape, generator=draw)
    with bf16.Emulated(), torch.autocast("cpu", torch.bfloat16):
        result = module(given := image.clone().requires_grad_())
    assert result.dtype == torch.bfloat16
    slope = torch.randn(result.shape, generator=draw).bfloat16()
    found = [result, *torch.autograd.grad(result, [given, *module.parameters()], slope)]

    exact = deepcopy(module).double()
    for weight in exact.parameters():
        weight.data = weight.data.bfloat16().double()
    result = exact(given := image.bfloat16().double().requires_grad_())
    wanted = [result, *torch.autograd.grad(result, [given, *exact.parameters()], slope.double())]
    for ours, true in zip(found, wanted, strict=True):
        assert (ours.bfloat16() != true.bfloat16()).float().mean() < 0.002  # a sum may fall on the other side of a step
        assert (ours - true).norm() < 2.0**-8 * true.norm()


class NoProductInBf16(TorchDispatchMode):
    """Raises where a convolution or a matrix product gets numbers in bf16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in ("convolution", "mm.", "bmm")):
            dtypes = {value.dtype for value in args if isinstance(value, torch.Tensor)}
            assert torch.bfloat16 not in dtypes, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_no_method_multiplies_in_bf16_where_the_processor_cannot(trainings, method, monkeypatch):
    monkeypatch.setattr(bf16, "in_hardware", lambda: False)
    with NoProductInBf16(), bf16.arithmetic("bf16"):
        for training, _, _ in trainings(method, torch.device("cpu")):
            with torch.autocast("cpu", torch.bfloat16):
                loss = training.step_loss(0)
            loss.backward()


def test_bf16_is_that_of_the_hardware_where_there_is_one(monkeypatch):
    layer, image = nn.Conv2d(1, 2, 3), torch.ones(1, 1, 8, 8)
    for here, precision in [(True, "bf16"), (False, "float32"), (True, "float32")]:
        monkeypatch.setattr(bf16, "in_hardware", lambda here=here: here)
        assert not isinstance(bf16.arithmetic(precision), bf16.Emulated)
    with pytest.raises(AssertionError), NoProductInBf16(), torch.autocast("cpu", torch.bfloat16):
        layer(image)


def test_a_run_in_bf16_where_the_processor_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setattr(bf16, "in_hardware", lambda: False)
    multiplied = []
    monkeypatch.setattr(bf16, "_rounded", lambda value, rounded=bf16._rounded: multiplied.append(1) or rounded(value))
    about = {"dataset": "phantom", "profile": "smoke", "method": "random"}
    for precision, emulated in [("float32", False), ("bf16", True)]:
        about["overrides"] = ["finetune.steps=2", f"precision={precision}"]
        run = runs.finetune_run(FinetuneParameters(**about))
        runs.do(run)
        assert run.read("log")["loss"].notna().all()
        assert bool(multiplied) == emulated
