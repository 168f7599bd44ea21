"""Stages and recipe: which slices make a batch, who is alike in it, what learns, and that it learns."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.loop import Work, step_generator
from clseg.models import UNet
from clseg.recipes import supervised
from clseg.recipes.evaluation import labelled_volumes, probabilities, scores, validation_dice
from clseg.settings import (
    ContrastStage,
    LocalStage,
    NetworkConfig,
    Normalisation,
    PirlStage,
    RotationStage,
    SupervisedRecipe,
)
from clseg.stages import STAGES, contrast, local
from clseg.stages.contrast import draw_batch
from clseg.stages.local import regions
from clseg.stages.sampling import equal_partitions, partition_slices, random_slices
from clseg.study.files import read_dataset

SMALL = NetworkConfig(filters=[8, 16, 16, 32, 32, 32], norm_momentum=0.3)
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_random_slices_are_distinct_and_at_most_all():
    rows = np.arange(100, 120)
    assert len(set(random_slices(rows, 12, generator()))) == 12
    assert sorted(random_slices(rows, 50, generator())) == rows.tolist()


@pytest.mark.parametrize("partitions", [3, 4, 6])
def test_partitions_are_the_published_ones(store, partitions):
    """Partition k holds the slices [k floor(D/S), (k+1) floor(D/S)); every one of them is drawn, no other ever."""
    seen = set()
    allowed = store.rows(store.subjects[:4])
    for seed in range(300):
        rows, partition = partition_slices(store, allowed, partitions, 3 * partitions, generator(seed))
        assert partition.tolist() == list(range(partitions)) * 3
        assert set(rows) <= set(allowed)
        volumes = store.slices["volume"].to_numpy()[rows].reshape(3, partitions)
        assert (volumes == volumes[:, :1]).all()
        assert len(set(volumes[:, 0])) == 3
        seen |= set(zip(rows.tolist(), partition.tolist(), strict=True))
    expected = set()
    for volume in np.unique(store.slices["volume"].to_numpy()[allowed]):
        first, length = store.volumes["first_row"][volume], store.volumes["slices"][volume] // partitions
        expected |= {(int(first + k * length + i), k) for k in range(partitions) for i in range(length)}
    assert seen == expected


def test_a_batch_that_cannot_be_filled_takes_what_is_there(store):
    rows, _ = partition_slices(store, store.rows(store.subjects[:2]), 4, 12, generator())
    assert len(rows) == 8
    with pytest.raises(RequestError, match="no volume has 40 slices"):
        partition_slices(store, store.rows(store.subjects), 40, 80, generator())


@pytest.mark.parametrize(
    ("fields", "slices", "views", "positives", "negatives"),
    [
        # per anchor, with 3 or 4 volumes x 4 partitions: counts from the sets of Chaitanya et al.
        ({"pairs": "instance"}, 12, 2, 1, 22),
        ({"pairs": "partition", "strategy": "gd-"}, 12, 3, 2, 27),
        ({"pairs": "partition", "strategy": "gd"}, 16, 2, 1 + 1, 24),
        ({"pairs": "partition", "strategy": "gd", "set_of": None}, 12, 2, 1 + 2, 18),
    ],
)
def test_views_and_pairs_of_a_batch(store, fields, slices, views, positives, negatives):
    stage = ContrastStage(stage="contrast", **fields)
    everything = Work(UNet(1, 4, SMALL), store, store.rows(store.subjects), slices, 0)
    image, pairs = draw_batch(everything, stage, 0)
    assert [view.shape for view in image] == [(slices, 1, 32, 32)] * views
    assert (pairs.positive.sum(dim=1) == positives).all()
    assert (pairs.negative.sum(dim=1) == negatives).all()
    original = any(
        np.array_equal(image[0][0].numpy(), store.images[row].astype(np.float32)) for row in range(len(store.slices))
    )
    assert original == (fields["pairs"] == "partition")  # the slice itself is a view, but not in `gr`
    again, _ = draw_batch(everything, stage, 0)
    other, _ = draw_batch(everything, stage, 1)
    assert all(map(torch.equal, image, again))
    assert not any(map(torch.equal, image, other))


@pytest.mark.parametrize(
    ("slices", "partitions", "expected"),
    [
        (10, 4, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]),  # 2.5 is 3; the last takes the rest
        (9, 4, [0, 0, 1, 1, 2, 2, 3, 3, 3]),  # 2.25 is 2
        (11, 4, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]),  # 2.75 is 3, the last has fewer
        (14, 4, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2),  # 3.5 is 4
        (9, 2, [0, 0, 0, 0, 0, 1, 1, 1, 1]),
        (3, 6, [0, 1, 2]),  # never shorter than a slice
    ],
)
def test_equal_partitions_are_those_of_zeng_et_al(store, monkeypatch, slices, partitions, expected):
    table = pd.DataFrame({"slice": [*range(slices)], "slices_in_volume": slices})
    monkeypatch.setattr(store, "slices", table)
    found = equal_partitions(store, np.arange(slices), partitions)
    assert found.dtype == torch.int64
    assert found.tolist() == expected
    assert equal_partitions(store, np.array([slices - 1, 0]), partitions).tolist() == [expected[-1], expected[0]]


def drawn(store, cluster=None, **fields):
    """The pairs of a batch of 12 random slices, two copies of each, and the slices [24]."""
    stage = ContrastStage(stage="contrast", **fields)
    rows = store.rows(store.subjects)
    image, pairs = draw_batch(Work(UNet(1, 4, SMALL), store, rows, 12, 0), stage, 3, cluster)
    chosen = random_slices(rows, 12, step_generator(0, "contrast", 3))
    assert [view.shape for view in image] == [(12, 1, 32, 32)] * 2
    assert not torch.equal(*image)
    return pairs, np.tile(chosen, 2)


def check_classes(pairs, alike):
    """Rows that are alike, but the row itself, are its positives, all others negatives."""
    itself = np.eye(24, dtype=bool)
    assert np.array_equal(pairs.positive.numpy(), alike & ~itself)
    assert np.array_equal(pairs.negative.numpy(), ~alike)


@pytest.mark.parametrize("threshold", [0.1, 0.35])
def test_a_position_batch_holds_near_slices_of_any_volume(store, threshold):
    pairs, chosen = drawn(store, pairs="position", threshold=threshold)
    position = store.slices[["slice", "slices_in_volume"]].to_numpy()[chosen]
    place = [Fraction(int(m) + 1, int(n)) for m, n in position]
    check_classes(pairs, np.array([[abs(p - q) < Fraction(str(threshold)) for q in place] for p in place]))


def test_a_partition_batch_of_zeng_et_al_holds_the_same_part_of_any_volume(store):
    pairs, chosen = drawn(store, pairs="partition", strategy="gcl", partitions=3)
    part = equal_partitions(store, chosen, 3).numpy()
    check_classes(pairs, part[:, None] == part)


def test_a_cluster_batch_holds_the_same_pseudo_class(store):
    cluster = torch.arange(len(store.slices)) % 5
    pairs, chosen = drawn(store, cluster, pairs="cluster")
    check_classes(pairs, chosen[:, None] % 5 == chosen % 5)
    alone, chosen = drawn(store, torch.arange(len(store.slices)), pairs="cluster")
    check_classes(alone, chosen[:, None] == chosen)  # one slice each: instance pairs


def descend(training, steps):
    parameters = [p for module in training.learning.values() for p in module.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    for step in range(steps):
        optimiser.zero_grad()
        loss = training.step_loss(step)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("strategy", ["gr", "gd-", "gd", "gcl", "pcl"])
def test_global_contrast_learns(store, strategy):
    fields = {
        "gr": {"pairs": "instance"},
        "gcl": {"pairs": "partition", "strategy": "gcl", "denominator": "all", "head": "pool", "views": "pcl"},
        "pcl": {"pairs": "position", "threshold": 0.2, "denominator": "all", "head": "pool", "views": "pcl"},
    }.get(strategy, {"pairs": "partition", "strategy": strategy})
    stage = ContrastStage(stage="contrast", **fields)
    torch.manual_seed(0)
    network = UNet(1, 4, SMALL)
    training = contrast(Work(network, store, store.rows(store.subjects), 12, 0), stage)
    assert set(training.learning) == {"encoder", "head"}
    losses = descend(training, 160 if strategy == "gr" else 80)  # two positives of a row teach it least
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:5])
    assert all(p.grad is None for p in [*network.decoder.parameters(), *network.output.parameters()])


@pytest.mark.parametrize("strategy", ["lr", "ld"])
def test_local_contrast_learns_and_leaves_the_encoder_alone(store, strategy):
    stage = LocalStage(stage="local", strategy=strategy)
    torch.manual_seed(0)
    network = UNet(1, 4, SMALL)
    training = local(Work(network, store, store.rows(store.subjects), 8, 0), stage)
    assert set(training.learning) == {"head", *(f"decoder.blocks.{k}" for k in range(3))}
    losses = descend(training, 30)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert all(p.grad is None for p in [*network.encoder.parameters(), *network.decoder.blocks[3:].parameters()])
    assert all(p.grad is not None for module in training.learning.values() for p in module.parameters())


@pytest.mark.parametrize(
    ("stage", "views"),
    [
        (ContrastStage(pairs="instance"), 2),
        (ContrastStage(pairs="partition", strategy="gd-"), 3),
        (ContrastStage(pairs="position", threshold=0.2, head="pool", views="pcl"), 2),
        (LocalStage(), 2),
        (LocalStage(strategy="ld"), 2),
    ],
)
def test_every_view_is_a_batch_of_its_own(store, stage, views):
    """Each passes encoder and head alone, or their batch norm could tell views by being together."""
    network = UNet(1, 4, SMALL)
    training = STAGES[stage.stage](Work(network, store, store.rows(store.subjects), 12, 0), stage)
    seen, sizes = [], {}
    network.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for part in (network, training.learning["head"]):
        for module in part.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda norm, given: sizes.setdefault(norm, []).append(len(given[0])))
    batch = training.draw(0)
    training.loss(*batch)
    drawn = [part for part in batch if part.ndim == 4]
    assert len(seen) == len(drawn) == views
    assert all(map(torch.equal, seen, drawn))
    assert all(found == [12] * views for found in sizes.values())
    assert len(sizes) > len(SMALL.filters)


@pytest.mark.parametrize("stage", [ContrastStage(pairs="instance"), LocalStage(), RotationStage(), PirlStage()])
def test_views_of_z_scores_keep_what_is_dark(stage, tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    about = read_dataset("phantom").model_copy(
        update={"options": {"subjects": 4}, "normalisation": Normalisation(kind="z_score")}
    )
    store = prepare(about, about.geometry["smoke"], progress=False)
    work = Work(UNet(1, 4, SMALL), store, store.rows(store.subjects), 12, 0, 10)
    batch = STAGES[stage.stage](work, stage).draw(0)
    views = [part for part in batch if part.ndim == 4]
    assert views
    for view in views:
        assert view.min() < -0.5
        assert (view == 0).float().mean() < 0.05


def test_regions_of_a_stage():
    corners, neighbours = regions(LocalStage(stage="local", negatives=4), (48, 48))
    assert (corners.shape[0], neighbours.shape) == (17, (13, 4))
    corners, neighbours = regions(LocalStage(stage="local", neighbours="nearest"), (48, 48))
    assert (corners.shape[0], neighbours.shape) == (13, (13, 5))
    with pytest.raises(RequestError, match="decoder_blocks"):
        regions(LocalStage(stage="local"), (4, 4))


@pytest.mark.parametrize("loss", ["dice", "cross_entropy", "dice+cross_entropy"])
def test_the_supervised_recipe_learns_to_segment(store, loss):
    torch.manual_seed(0)
    network = UNet(1, 4, SMALL)
    recipe = SupervisedRecipe(recipe="supervised", loss=loss)
    before = validation_dice(network, store, store.subjects[:2])
    network.train()
    rows = store.rows(store.subjects[:2], labelled=True)
    losses = descend(supervised(Work(network, store, rows, 12, 0, 60), recipe), 60)
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert validation_dice(network, store, store.subjects[:2]) > before + 0.1


def test_without_augmentation_the_slices_are_used_as_they_are(store):
    rows = store.rows(store.subjects[:1])
    seen = []
    network = UNet(1, 4, SMALL)
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    recipe = SupervisedRecipe(recipe="supervised", augmentation="none")
    supervised(Work(network, store, rows, 6, 0, 1), recipe).step_loss(0)
    known = {store.images[row].tobytes() for row in rows}
    assert all(image.half().numpy().tobytes() in known for image in seen[0].contiguous())


def test_scores_are_per_subject_and_structure_on_the_native_grid(store):
    network = UNet(1, 4, SMALL)
    volumes = labelled_volumes(store, store.subjects[2:4])
    probability = probabilities(network, store, volumes[0])
    torch.testing.assert_close(probability.sum(dim=1), torch.ones(len(probability), 32, 32))
    rows = scores(network, store, store.subjects[2:4])
    assert [(row["subject"], row["class_name"]) for row in rows] == [
        (subject, name) for subject in store.subjects[2:4] for name in store.class_names.values()
    ]
    assert {row["hd95_unit"] for row in rows} == {"mm"}
