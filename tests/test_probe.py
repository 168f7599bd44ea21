"""What a pre-training learned: floors and bounds by hand, ranks and probes of what is known."""

import math

import numpy as np
import pytest
import torch

from clseg import probe, train
from clseg.losses import contrastive_loss
from clseg.models import Encoder, GlobalHead
from clseg.pairs import cluster_pairs, instance_pairs
from clseg.settings import ContrastStage, NetworkConfig
from clseg.study import runs
from clseg.study.parameters import PretrainParameters

VIEWS = instance_pairs(torch.arange(4).repeat(2))  # one positive and six negatives of each row


def test_the_floor_is_the_loss_of_collapsed_embeddings():
    assert probe.floor(VIEWS, 0.1, "all") == pytest.approx(math.log(7))
    assert probe.floor(VIEWS, 0.1, "pair") == pytest.approx(math.log(7))
    classes = cluster_pairs(torch.arange(6), torch.arange(6) // 3)  # two positives, three negatives
    assert probe.floor(classes, 0.5, "all") == pytest.approx(math.log(5))


def test_no_embedding_goes_below_the_bound_and_the_best_reaches_it():
    classes = cluster_pairs(torch.arange(4), torch.arange(4) // 2)
    best = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    for denominator in ("all", "pair"):
        bound = probe.bound(classes, 0.5, denominator)
        assert contrastive_loss(best, classes, 0.5, denominator).item() == pytest.approx(bound, abs=1e-6)
        random = torch.randn(200, 4, 3, generator=torch.Generator().manual_seed(0))
        assert min(contrastive_loss(z, classes, 0.5, denominator).item() for z in random) > bound
    assert probe.bound(VIEWS, 0.1, "pair") == pytest.approx(6 * math.exp(-20), rel=1e-4)


def test_effective_rank_counts_directions():
    random = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    assert probe.effective_rank(random) == pytest.approx(8, abs=0.1)
    assert probe.effective_rank(random[:, :1] @ torch.ones(1, 8)) == pytest.approx(1)


def test_a_linear_probe_reads_what_is_there():
    random = np.random.default_rng(0)
    feature, group = random.normal(size=(120, 5)), np.arange(120) // 10
    assert probe.linear_probe(feature, feature @ np.arange(5.0), group) > 0.99
    assert probe.linear_probe(feature, random.normal(size=120), group) < 0.2
    assert np.isnan(probe.linear_probe(feature, np.ones(120), group))
    assert np.isnan(probe.linear_probe(feature[:10], feature[:10, 0], group[:10]))


def test_a_probe_changes_nothing_and_knows_a_collapsed_network(store):
    config = NetworkConfig(filters=[4, 8, 8])
    torch.manual_seed(0)
    encoder, head = Encoder(store.channels, config), GlobalHead(config, store.size, "pool")
    views = [store.batch(store.rows(store.subjects[:1])[:4]).image] * 2
    batch = [VIEWS.positive, VIEWS.negative, *views]
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = probe.probe(encoder, head, [batch], [batch], store, store.subjects[:4], 0.1, "pair")
    assert list(found) == probe.COLUMNS
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert found["floor"] == pytest.approx(math.log(7))
    assert found["held_out_subjects"] == 4
    assert found["loss"] == found["loss_held_out"]
    torch.nn.init.zeros_(head.layers[-1].weight)
    torch.nn.init.ones_(head.layers[-1].bias)
    dead = probe.probe(encoder, head, [batch], [], store, [], 0.1, "pair")
    assert dead["learned"] == pytest.approx(0, abs=1e-6)
    assert dead["cosine"] == pytest.approx(1)
    assert np.isnan([dead["loss_held_out"], dead["position_r2"]]).all()


def test_held_out_are_those_who_are_neither_pre_trained_on_nor_tested(tmp_path, monkeypatch):
    """Their slices alone give the held-out loss and the linear probes."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    given, features = {}, probe.features

    def probed(encoder, head, seen, unseen, *others):
        given.update(seen=list(seen), unseen=unseen)
        return probe.probe(encoder, head, given["seen"], unseen, *others)

    def watched(encoder, store, rows):
        given["rows"] = rows
        return features(encoder, store, rows)

    monkeypatch.setattr(runs, "probe", probed)
    monkeypatch.setattr(probe, "features", watched)
    sets = ["dataset.protocols.seeded.test=2", "dataset.protocols.seeded.validation=2", "unlabelled=4"]
    overrides = ["dataset.options.subjects=9", *sets, "pretrain.steps=2"]
    fields = {"dataset": "phantom", "profile": "smoke", "method": "gd", "overrides": overrides}
    run = runs.pretrain_run(PretrainParameters(**fields))
    found = runs.do(run).read("probe")
    store = runs.open_store(run.experiment, progress=False)
    split = runs.split_of(run, store)
    held_out = {*store.subjects} - {*split.pretrain} - {*split.test}
    assert (len(split.pretrain), len(split.test), len(held_out)) == (4, 2, 3)
    subject = store.volumes["subject"].to_numpy()[store.slices["volume"]]
    of_slice = {image.tobytes(): name for image, name in zip(store.images, subject, strict=True)}

    def subjects(batches):  # the first view of gd is the slice itself
        return {of_slice[image.half().numpy().tobytes()] for _, _, first, _ in batches for image in first}

    assert given["seen"]
    assert subjects(given["seen"]) <= {*split.pretrain}
    assert subjects(given["unseen"]) == held_out
    assert {*subject[given["rows"]]} == held_out
    assert found["held_out_subjects"].tolist() == [3]


def test_the_nearest_slice_by_hand():
    feature = np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 1.0]])
    off, same = probe.nearest(feature, np.array([0.1, 0.3, 0.9, 0.5]), np.array(["a", "b", "a", "b"]))
    assert off == pytest.approx((0.2 + 0.2 + 0.4 + 0.4) / 4)  # the nearest of another: 0-1, 1-0, 2-3, 3-2
    assert same == 0


def test_the_encoders_of_a_pre_training_work_as_they_were_trained(store):
    """As `36_pcl_embedding` shows them: with running averages features are nearly those that a batch has in training.

    With the averages that a new network starts with they are others.
    """
    config = NetworkConfig(filters=[8, 16, 32, 32], norm_momentum=0.1)
    about = {"pairs": "position", "threshold": 0.2, "denominator": "all", "head": "pool", "views": "pcl", "slices": 16}
    stage = ContrastStage(**about, schedule="cosine")
    weights = train.pretrain(store, store.subjects, stage, steps=100, network=config).weights
    new, rows = train.new_network(store, config, 0).state_dict(), store.rows(store.subjects)

    def error(start):
        encoder = train.new_network(store, config, 0, start).encoder
        found = probe.features(encoder, store, rows)
        with torch.no_grad():
            trained = encoder.train()(store.batch(rows).image)[-1].flatten(2).mean(2).numpy()
        return np.abs(found - trained).mean() / np.abs(trained).mean()

    assert error(weights) < 0.3
    assert error(weights | {name: new[name] for name in weights if "running" in name}) > 0.5


@pytest.mark.parametrize(
    ("learned", "unseen", "said"),
    [
        (0.5, 3.0, ""),
        (0.05, 3.0, "learned little"),
        (float("nan"), 3.0, "learned little"),
        (0.5, 4.0, "on subjects that it never saw, the contrastive loss is not below its floor"),
        (0.5, float("nan"), "not known on subjects that it never saw"),
    ],
)
def test_what_speaks_against_a_pre_training_is_named(learned, unseen, said):
    found = probe.fault({"learned": learned, "loss_held_out": unseen, "floor": 4.0})
    assert found.startswith(said)
    assert bool(found) == bool(said)
