"""What a pre-training learned: floors and bounds by hand, ranks and probes of what is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from clseg import probe, train
from clseg.errors import RequestError
from clseg.losses import contrastive_loss
from clseg.pairs import cluster_pairs, instance_pairs
from clseg.settings import (
    AutoencoderStage,
    ContextRestorationStage,
    ContrastStage,
    InpaintingStage,
    LocalStage,
    NetworkConfig,
    PirlStage,
    RotationStage,
)
from clseg.stages import STAGES
from clseg.stages.autoencoder import beta_vae_loss
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


SMALL = NetworkConfig(filters=[4, 8, 8, 8], norm_momentum=0.1)


@pytest.mark.parametrize(
    "stage",
    [
        ContrastStage(pairs="instance", slices=4),
        ContrastStage(pairs="position", threshold=0.3, denominator="all", slices=4),
        LocalStage(slices=4, decoder_blocks=3, size=1, regions=9),
        LocalStage(slices=4, decoder_blocks=3, size=1, regions=9, strategy="ld", negatives=2, temperature=0.5),
        RotationStage(slices=4),
        PirlStage(slices=4, temperature=0.5),
    ],
    ids=lambda stage: f"{stage.stage} {getattr(stage, 'strategy', '')}",
)
def test_the_floor_is_the_loss_of_a_network_that_says_the_same_of_all(store, stage):
    training = STAGES[stage.stage](train.stage_work(store, store.subjects, stage, 1, SMALL), stage)
    for value in training.learning["head"].parameters():
        torch.nn.init.zeros_(value)  # embeddings of no length are equally near to all
    batch = training.draw(0)
    floor, bound = probe.limits(stage, batch)
    assert training.loss(*batch).item() == pytest.approx(floor, abs=1e-5)
    assert 0 <= bound < floor


def test_the_floor_of_context_restoration_is_to_leave_the_image_spoilt(store):
    stage = ContextRestorationStage(slices=4, swaps=3)
    training = STAGES[stage.stage](train.stage_work(store, store.subjects, stage, 1, SMALL), stage)
    image, spoilt, counts = training.draw(0)
    by_hand = np.square(spoilt.numpy() - image.numpy()).mean()
    assert by_hand > 0
    assert probe.limits(stage, (image, spoilt, counts)) == (pytest.approx(by_hand, rel=1e-5), 0)


def test_the_floor_of_inpainting_is_the_best_grey(store):
    """A network that gives the same grey for all has this loss, or more."""
    stage = InpaintingStage(slices=4)
    training = STAGES[stage.stage](train.stage_work(store, store.subjects, stage, 1, SMALL), stage)
    image, spoilt, hidden = training.draw(0)
    inside = image[hidden.expand_as(image)].numpy()
    losses = [np.square(inside - grey).mean() for grey in np.linspace(inside.min(), inside.max(), 1001)]
    floor, _ = probe.limits(stage, (image, spoilt, hidden))
    assert floor <= min(losses) < floor + 1e-4


def test_the_floor_of_an_auto_encoder_is_the_mean_image():
    image, nothing = torch.rand((4, 1, 8, 8), generator=torch.Generator().manual_seed(0)), torch.zeros(4, 32)
    by_hand = beta_vae_loss(image, image.mean(0, keepdim=True).expand_as(image), nothing, nothing, 1.0)
    assert probe.limits(AutoencoderStage(), [image, nothing]) == (pytest.approx(by_hand.item()), 0)


def test_the_floor_of_a_stage_that_is_not_known_is_not_known():
    assert np.isnan(probe.limits(type("Stage", (), {"stage": "another"})(), [])).all()


def pre_trained(store, stage, start=None):
    about = {"network": SMALL, "start": start}
    return train.pretrain(store, store.subjects[:3], stage, 3, **about)


STAGE_OF = {
    "contrast": (ContrastStage(pairs="instance", slices=4), None),
    "cluster": (ContrastStage(pairs="cluster", clusters=2, slices=4), AutoencoderStage(slices=4)),
    "autoencoder": (AutoencoderStage(slices=4), None),
    "local": (LocalStage(slices=4, decoder_blocks=3, size=1), ContrastStage(pairs="instance", slices=4)),
    "rotation": (RotationStage(slices=4), None),
    "inpainting": (InpaintingStage(slices=4), None),
    "context_restoration": (ContextRestorationStage(slices=4, swaps=3), None),
    "pirl": (PirlStage(slices=4), None),
}


@pytest.mark.parametrize("name", STAGE_OF)
def test_every_stage_is_probed_and_nothing_changes(store, name):
    stage, before = STAGE_OF[name]
    start = pre_trained(store, before).weights if before else None
    done = pre_trained(store, stage, start)
    kept = {key: value.clone() for key, value in done.weights.items()}
    memory = [value.clone() for module in done.training.state.values() for value in module.buffers()]
    about = done, store, store.subjects[:3], store.subjects[3:7], stage, 3
    found = probe.probe(*about, network=SMALL)
    assert list(found) == probe.COLUMNS
    assert all(torch.equal(kept[key], value) for key, value in done.weights.items())
    now = {f"{k}.{n}": v for k, module in done.training.learning.items() for n, v in module.state_dict().items()}
    assert all(torch.equal(kept[key], value) for key, value in now.items())
    buffers = [value for module in done.training.state.values() for value in module.buffers()]
    assert all(torch.equal(one, other) for one, other in zip(memory, buffers, strict=True))
    assert found["learned"] == pytest.approx((found["floor"] - found["loss"]) / (found["floor"] - found["bound"]))
    assert np.isfinite([found[key] for key in ("loss", "floor", "bound", "position_r2", "size_r2")]).all()
    assert np.isnan(found["loss_held_out"]) == (name in ("cluster", "pirl")), "what is of training slices alone"
    assert np.isfinite(found["rank"]) == (stage.stage == "contrast")
    assert found["held_out_subjects"] == 4
    assert probe.probe(*about, network=SMALL) == pytest.approx(found, nan_ok=True)  # the same again
    alone = probe.probe(done, store, store.subjects[:3], [], stage, 3, network=SMALL)
    assert alone["loss"] == found["loss"]
    assert np.isnan([alone["loss_held_out"], alone["position_r2"]]).all()


def test_the_loss_of_a_probe_is_that_of_the_weights_that_were_learned(store):
    """The next steps of the training give it, and those of a network that starts anew do not."""
    stage = ContrastStage(pairs="instance", slices=8)
    done = train.pretrain(store, store.subjects[:3], stage, 60, network=SMALL)
    found = probe.probe(done, store, store.subjects[:3], [], stage, 60, network=SMALL)
    with torch.no_grad():
        again = np.mean([done.training.step_loss(step).item() for step in range(60, 60 + probe.BATCHES)])
    assert found["loss"] == pytest.approx(again, rel=1e-4)
    assert found["learned"] > 0.05


def test_a_probe_knows_a_collapsed_network(store):
    stage = ContrastStage(pairs="instance", slices=4, head="pool")
    done = pre_trained(store, stage)
    last = [key.removesuffix(".bias") for key in done.weights if key.startswith("head.") and key.endswith(".bias")][-1]
    dead = {f"{last}.weight": torch.zeros_like(done.weights[f"{last}.weight"])}
    dead |= {f"{last}.bias": torch.ones_like(done.weights[f"{last}.bias"])}
    found = probe.probe(
        replace(done, weights=done.weights | dead), store, store.subjects[:3], [], stage, 3, network=SMALL
    )
    assert found["learned"] == pytest.approx(0, abs=1e-6)
    assert found["cosine"] == pytest.approx(1)
    assert probe.fault(found).startswith("learned little")


def test_few_held_out_subjects_have_a_floor_of_their_own(store):
    """Their batches are smaller: a collapsed network is at the floor there, and below that of training batches."""
    stage = ContrastStage(pairs="partition", set_of=None, slices=16)
    done = pre_trained(store, stage)
    dead = {key: torch.zeros_like(value) if key.startswith("head.") else value for key, value in done.weights.items()}
    about = replace(done, weights=dead), store, store.subjects[:5], store.subjects[6:8], stage, 3
    found = probe.probe(*about, network=SMALL)
    assert found["loss_held_out"] == pytest.approx(found["floor_held_out"], abs=1e-5)
    assert found["floor_held_out"] < found["floor"] - 0.1
    unlearned = found | {"learned": 0.5}
    assert "not below its floor" in probe.fault(unlearned | {"loss_held_out": found["floor_held_out"] + 0.01})


def test_held_out_volumes_that_make_no_batch_have_no_loss(store, monkeypatch):
    stage, build = ContrastStage(pairs="instance", slices=4), probe.stage_work
    done = pre_trained(store, stage)

    def refused(store, subjects, *others):
        if store.subjects[3] in subjects:
            raise RequestError("volumes are too short")
        return build(store, subjects, *others)

    monkeypatch.setattr(probe, "stage_work", refused)
    found = probe.probe(done, store, store.subjects[:3], store.subjects[3:7], stage, 3, network=SMALL)
    assert np.isnan([found["loss_held_out"], found["floor_held_out"]]).all()
    assert np.isfinite([found["loss"], found["position_r2"]]).all()


def test_a_probe_that_fails_does_not_cost_the_run(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    monkeypatch.setattr(runs, "probe", fails)
    overrides = ["dataset.options.subjects=24", "pretrain.steps=2"]
    about = {"dataset": "phantom", "profile": "smoke", "method": "gd", "overrides": overrides}
    run = runs.do(runs.pretrain_run(PretrainParameters(**about)))
    assert run.is_done()
    assert "what was learned is not known: out of memory" in capsys.readouterr().out
    assert run.read("probe").isna().all(axis=None)
    assert probe.fault(run.read("probe").iloc[0]).startswith("not known")


def test_blocks_are_probed_too(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    overrides = ["dataset.options.subjects=24", "pretrain.steps=2"]
    about = {"dataset": "phantom", "profile": "smoke", "method": "gr", "dimensions": 3, "overrides": overrides}
    found = runs.do(runs.pretrain_run(PretrainParameters(**about))).read("probe").iloc[0]
    assert np.isfinite(found[["loss", "loss_held_out", "position_r2", "size_r2"]].astype(float)).all()


def test_held_out_are_those_who_are_neither_pre_trained_on_nor_tested(tmp_path, monkeypatch):
    """Their slices alone give the held-out loss and the linear probes."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    given, features, work = {}, probe.features, probe.stage_work

    def watched(encoder, store, rows):
        given["rows"] = rows
        return features(encoder, store, rows)

    def worked(store, subjects, *others):
        given.setdefault("subjects", []).append({*subjects})
        return work(store, subjects, *others)

    monkeypatch.setattr(probe, "features", watched)
    monkeypatch.setattr(probe, "stage_work", worked)
    sets = ["dataset.protocols.seeded.test=2", "dataset.protocols.seeded.validation=2", "unlabelled=4"]
    overrides = ["dataset.options.subjects=9", *sets, "pretrain.steps=2"]
    fields = {"dataset": "phantom", "profile": "smoke", "method": "gd", "overrides": overrides}
    run = runs.pretrain_run(PretrainParameters(**fields))
    found = runs.do(run).read("probe")
    store = runs.open_store(run.experiment, progress=False)
    split = runs.split_of(run, store)
    held_out = {*store.subjects} - {*split.pretrain} - {*split.test}
    assert (len(split.pretrain), len(split.test), len(held_out)) == (4, 2, 3)
    assert given["subjects"] == [{*split.pretrain}, held_out]
    subject = store.volumes["subject"].to_numpy()[store.slices["volume"]]
    assert {*subject[given["rows"]]} == held_out
    assert found["held_out_subjects"].tolist() == [3]


def test_the_nearest_slice_by_hand():
    feature = np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 1.0]])
    off, same = probe.nearest(feature, np.array([0.1, 0.3, 0.9, 0.5]), np.array(["a", "b", "a", "b"]))
    assert off == pytest.approx([0.2, 0.2, 0.4, 0.4])  # the nearest of another: 0-1, 1-0, 2-3, 3-2
    assert not same.any()


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
        (0.5, 4.0, "on subjects that it never saw, the loss is not below its floor"),
        (0.5, float("nan"), "not known on subjects that it never saw"),
    ],
)
@pytest.mark.parametrize("other", [4.0, float("nan")])  # a row from before the floor of held-out batches was kept
def test_what_speaks_against_a_pre_training_is_named(learned, unseen, said, other):
    found = probe.fault({"learned": learned, "loss_held_out": unseen, "floor": 4.0, "floor_held_out": other})
    assert found.startswith(said)
    assert bool(found) == bool(said)
