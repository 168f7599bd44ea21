"""Whole volumes through the network: the sliding window of 3-D covers every voxel and trusts the middle of a window."""

import pytest
import torch
from torch import nn

from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.recipes import evaluation
from clseg.recipes.evaluation import probabilities, scores, validation_dice
from clseg.settings import Geometry, NetworkConfig, SupervisedRecipe
from clseg.study.files import read_dataset
from clseg.train import finetune


class Pointwise(nn.Module):
    """Logits are multiples of the intensity; at the faces of a window, wherever it lies, the last class with `edge`."""

    def __init__(self, edge=0.0):
        super().__init__()
        self.scale, self.edge, self.windows = nn.Parameter(torch.ones(())), edge, []

    def forward(self, image):
        self.windows.append(image.shape)
        inside = torch.zeros_like(image)
        inside[..., 1:-1, 1:-1, 1:-1] = 1
        return torch.cat([image, image * 2, image * 3, image * 4 + self.edge * (1 - inside)], dim=1) * self.scale


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))

    def make(**geometry):
        dataset = read_dataset("phantom").model_copy(update={"options": {"subjects": 2}})
        return prepare(dataset, Geometry(spacing_mm=6.5, **geometry), progress=False)

    return make


@pytest.mark.parametrize(
    ("geometry", "windows"),
    [
        ({"size": [8, 16, 32], "plane": [32, 40], "slice_mm": 4.5}, None),
        ({"size": [16, 32, 32]}, 1),  # 9 or 10 slices, padded
        ({"size": [4, 32, 32], "slice_mm": 10.0}, None),
    ],
)
def test_every_voxel_is_seen_and_a_pointwise_network_is_not_changed(store, geometry, windows):
    store, network = store(**geometry), Pointwise()
    image = torch.from_numpy(store.images[store.volume_rows(1)].copy()).float()  # [Z, 1, H, W]
    expected = torch.cat([image * k for k in (1, 2, 3, 4)], dim=1).softmax(dim=1)
    torch.testing.assert_close(probabilities(network, store, 1), expected)
    assert {shape[2:] for shape in network.windows} == {torch.Size(store.size)}
    assert windows is None or len(network.windows) == windows


def test_windows_overlap_by_half_and_their_middle_counts(store):
    store, network = store(size=[8, 16, 16], plane=[32, 32], slice_mm=4.5), Pointwise(edge=50.0)
    found = probabilities(network, store, 0)
    depth = len(store.volume_rows(0))
    assert len(network.windows) == (-(-2 * (depth - 8) // 8) + 1) * 3 * 3
    image = torch.from_numpy(store.images[store.volume_rows(0)].copy()).float()
    expected = torch.cat([image * k for k in (1, 2, 3, 4)], dim=1).softmax(dim=1)
    error = (found - expected).abs().amax(dim=1)
    assert error[1:-1, 1:-1, 1:-1].max() < 0.05  # faces inside the volume are outvoted,
    assert error[0].mean() > 0.3  # those of the volume have no other window


def test_scores_are_on_the_native_grid_in_mm(store):
    store = store(size=[8, 32, 32], slice_mm=4.5)
    rows = scores(Pointwise(), store, ["phantom001"])
    assert [row["class_name"] for row in rows] == list(store.class_names.values())
    assert {row["hd95_unit"] for row in rows} == {"mm"}


def test_a_healthy_subject_does_not_hide_the_others(store, monkeypatch):
    """A volume without a structure, in which none is found, has no Dice; the mean is of the others."""
    store = store(size=[32, 32])
    for dice, expected in (([0.5, float("nan")], 0.5), ([0.25, 0.75], 0.5), ([float("nan")] * 2, float("nan"))):
        values = iter(dice)
        monkeypatch.setattr(evaluation, "volume_dice", lambda *_, values=values: next(values))
        assert validation_dice(Pointwise(), store, store.subjects) == pytest.approx(expected, nan_ok=True)


def test_the_best_step_needs_a_structure_to_be_measured_on(store):
    store = store(size=[32, 32])
    about = {"network": NetworkConfig(filters=[4, 4, 8, 8, 8, 8]), "batch": 4, "validate_every": 1}
    first, second = store.subjects
    with pytest.raises(RequestError, match="validation subjects have no labelled structure"):
        finetune(store, [first], SupervisedRecipe(), 2, best=True, **about)
    assert finetune(store, [first], SupervisedRecipe(), 2, best=True, validation=[second], **about).fit.best_step in (
        1,
        2,
    )
