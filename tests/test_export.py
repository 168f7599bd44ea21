"""Weight files: what is refused, and that MONAI's network with our weights is our network."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from clseg.errors import RequestError
from clseg.settings import NetworkConfig
from clseg.study import runs
from clseg.study.parameters import PretrainParameters
from clseg.tools import cli
from clseg.tools.export import export, read_weights, segments
from clseg.tools.predict import predict

PCL = NetworkConfig(architecture="pcl", filters=[4, 8, 16, 32, 64])
GLCL = NetworkConfig(architecture="glcl", filters=[4, 8, 8, 16, 16, 16])


@pytest.fixture
def weights(tmp_path, save_weights):
    def make(**changes):
        return save_weights(tmp_path / "weights.safetensors", **changes)

    return make


def ours(path):
    tensors, adaptation = read_weights(path)
    network = adaptation.build().eval()
    network.load_state_dict(tensors, strict=segments(tensors))
    return network


def monai(path, strict=True):
    nets = pytest.importorskip("monai.networks.nets")
    with safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["monai"])
    network = getattr(nets, arguments.pop("_target_"))(**arguments)
    answer = network.load_state_dict(load_file(path), strict=strict)
    assert not answer.unexpected_keys
    return network.eval()


@pytest.mark.parametrize(("size", "channels"), [([32, 48], 3), ([16, 32, 16], 1)])
def test_monai_s_basic_unet_gives_the_same_logits(size, channels, weights, tmp_path):
    path = weights(network=PCL, size=size, channels=channels)
    report = export(path, "monai", tmp_path / "new" / "monai.safetensors")
    image = torch.randn(2, channels, *size)
    with torch.inference_mode():
        expected, found = ours(path)(image), monai(tmp_path / "new" / "monai.safetensors")(image)
    assert found.shape == (2, 4, *size)
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    lines = {kind: [line.split()[1:] for line in report if line.startswith(kind)] for kind in ("renamed", "added")}
    tensors = load_file(path)
    assert {line[0] for line in lines["renamed"]} == set(tensors)
    written = set(load_file(tmp_path / "new" / "monai.safetensors"))
    assert {line[2].rstrip(",") for line in lines["renamed"]} | {line[0] for line in lines["added"]} == written
    assert len(written) == len(lines["renamed"]) + len(lines["added"])
    assert not [line for line in report if line.startswith(("refused", "absent"))]


@pytest.mark.parametrize(
    ("network", "fits"),
    [
        (GLCL, 5),
        (PCL, 5),
        (NetworkConfig(architecture="glcl", filters=[4, 8, 16]), 3),
        (NetworkConfig(architecture="pcl", filters=[4, 8, 12, 12, 16]), 5),
    ],
)
def test_the_encoder_of_a_pre_training_goes_into_basic_unet_as_far_as_it_fits(network, fits, weights, tmp_path):
    path = weights(network=network, parts="encoder.")
    report = export(path, "monai", tmp_path / "monai.safetensors")
    theirs, levels = monai(tmp_path / "monai.safetensors", strict=False), []
    for block in [theirs.conv_0, *(getattr(theirs, f"down_{k}") for k in range(1, 5))]:
        block.register_forward_hook(lambda *call: levels.append(call[2]))
    image = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        theirs(image)
        expected = ours(path).encoder(image)
    for level in range(fits):
        torch.testing.assert_close(levels[level], expected[level], atol=1e-5, rtol=1e-5)
    refused = {line.split()[1] for line in report if line.startswith("refused")}
    assert refused == {
        name for name in load_file(path) if name.startswith(tuple(f"encoder.levels.{k}." for k in (5, 6)))
    }
    absent = [line for line in report if line.startswith("absent")]
    assert len(absent) == 5 - fits + 5
    assert absent[-1] == "absent  final_conv.*"


@pytest.mark.parametrize(
    "network",
    [GLCL, NetworkConfig(architecture="pcl", filters=[4, 8, 16, 16, 16]), PCL.model_copy(update={"filters": [4, 8]})],
)
def test_a_segmenter_that_monai_cannot_hold_is_refused_in_a_sentence(network, weights, tmp_path, capsys):
    words = ["--weights", str(weights(network=network)), "--output", str(tmp_path / "out" / "monai.safetensors")]
    assert cli.main(["export", "--format", "monai", *words]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "no network of MONAI" in error
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", "--format", "safetensors", *words]) == 0


def test_what_served_training_is_left_behind_and_the_copy_predicts_the_same(weights, tmp_path):
    path, copy = weights(), tmp_path / "copy.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    extra = {"head.layers.1.weight": torch.ones(2), "autoencoder.decoder.0.weight": torch.full([1], torch.nan)}
    save_file(tensors | extra, path, metadata)
    assert len(export(path, "safetensors", copy)) == len(tensors)
    found = load_file(copy)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert read_weights(copy)[1] == read_weights(path)[1]
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 4)), np.eye(4)), tmp_path / "a.nii.gz")
    for file, out in ((path, "first"), (copy, "second")):
        predict(file, tmp_path / "a.nii.gz", tmp_path / out)
    assert (tmp_path / "first" / "a.nii.gz").read_bytes() == (tmp_path / "second" / "a.nii.gz").read_bytes()
    kept = copy.read_bytes()
    with pytest.raises(RequestError, match=r"copy\.safetensors: is there already; choose another --output"):
        export(path, "monai", copy)
    assert copy.read_bytes() == kept
    for wrong in (path, tmp_path / "copy.pt"):
        with pytest.raises(RequestError, match="another one"):
            export(path, "safetensors", wrong)
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be written"):
        export(path, "safetensors", tmp_path / "file" / "copy.safetensors")


def test_weights_of_every_stage_can_be_exported(tmp_path, monkeypatch):
    """A run's own file: the local stage adds a decoder, the stage before it has none."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    small = ["dataset.options.subjects=6", "dataset.protocols.seeded.test=1", "dataset.protocols.seeded.validation=1"]
    fields = {"dataset": "phantom", "profile": "smoke", "method": "gd+lr", "stage": 1}
    run = runs.do(runs.pretrain_run(PretrainParameters(**fields, overrides=[*small, "pretrain.steps=2"])))
    for stage, parts in ((run.parent, {"encoder"}), (run, {"encoder", "decoder"})):
        copy = tmp_path / f"{stage.name}.safetensors"
        export(stage.folder / "weights.safetensors", "safetensors", copy)
        assert {name.partition(".")[0] for name in load_file(copy)} == parts
        report = export(stage.folder / "weights.safetensors", "monai", tmp_path / f"monai {stage.name}.safetensors")
        refused = {line.split()[1].partition(".")[0] for line in report if line.startswith("refused")}
        assert refused == parts  # level 6 of the encoder, and no decoder of this architecture
