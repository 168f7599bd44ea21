"""Auto-encoder, pseudo-classes and their contrast: what is learned, who is clustered, and that nobody else is read."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.cluster.hierarchy import fcluster
from sklearn.metrics import adjusted_rand_score
from torch.distributions import Normal, kl_divergence

from clseg import cluster as clustering
from clseg.cluster import clusters_of, features, linkage_matrix, pseudo_classes, purity
from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.loop import Work
from clseg.models import BetaVAE, UNet, transfer
from clseg.settings import AutoencoderStage, ContrastStage, NetworkConfig
from clseg.stages import autoencoder, contrast
from clseg.stages.autoencoder import beta_vae_loss
from clseg.stages.contrast import draw_batch
from clseg.study import runs
from clseg.study.files import read_dataset
from clseg.study.parameters import PretrainParameters

SMALL = NetworkConfig(filters=[8, 8, 16, 16], norm_momentum=0.3)
CPU = torch.device("cpu")
VOLUME = [8, 32, 32]


def prepared(out, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_OUT", str(out))
        about = read_dataset("phantom").model_copy(update={"options": {"subjects": 8}})
        return prepare(about, about.geometry["smoke"].model_copy(update={"size": size}), progress=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("store"), [32, 32])


@pytest.fixture(scope="module")
def rows(store):
    """The slices of five subjects in the middle."""
    return store.rows(store.subjects[2:7])


def work(store, rows, earlier=None):
    """Twelve slices a batch, for a network of the store's dimensions."""
    network = UNet(store.channels, 4, SMALL, store.dimensions)
    return Work(network, store, rows, 12, 0, earlier=earlier or {})


def saved(vae):
    """The weights of an auto-encoder as a run hands them on."""
    return {f"autoencoder.{name}": value.detach() for name, value in vae.state_dict().items()}


def train(store, rows, steps, **fields):
    """An auto-encoder after so many steps, its losses, and its weights as a run hands them on."""
    torch.manual_seed(0)
    network = UNet(store.channels, 4, SMALL, store.dimensions)
    stage = AutoencoderStage(stage="autoencoder", **{"latent": 8, **fields})
    training = autoencoder(Work(network, store, rows, 12, 0), stage)
    (prefix, vae), losses = *training.learning.items(), []
    optimiser = torch.optim.Adam(vae.parameters(), 1e-3)
    for step in range(steps):
        loss = training.step_loss(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert prefix == "autoencoder"
    return vae, losses, saved(vae)


@pytest.fixture(scope="module")
def trained(store, rows):
    return train(store, rows, 300, beta=0.1)


def stage(**fields):
    number = {} if "cluster_distance" in fields else {"clusters": 4}
    return ContrastStage(**{"stage": "contrast", "pairs": "cluster", "denominator": "all", **number, **fields})


# -------------------------------------------------------------------------------------------------------- auto-encoder


@pytest.mark.parametrize(
    ("channels", "size", "coarsest"),
    [(1, (32, 32), (4, 4)), (3, (160, 192), (5, 6)), (2, (16, 32, 32), (4, 4, 4)), (1, (8, 64, 56), (4, 4, 7))],
)
def test_images_of_every_size_have_features_and_come_back(channels, size, coarsest):
    vae = BetaVAE(channels, size, 5)
    mean, log_variance = vae.encode(torch.rand(2, channels, *size))
    assert mean.shape == log_variance.shape == (2, 5)
    assert vae.decode(mean).shape == (2, channels, *size)
    assert vae.encoder[:-2](torch.rand(1, channels, *size)).shape[2:] == coarsest


def test_the_loss_is_the_reconstruction_and_beta_times_the_divergence():
    generator = torch.Generator().manual_seed(0)
    image, restored = (torch.rand(3, 2, 4, 4, generator=generator) for _ in range(2))
    mean, log_variance = (torch.randn(3, 5, generator=generator) for _ in range(2))
    likelihood = Normal(restored, 1.0).log_prob(image) - Normal(image, 1.0).log_prob(image)  # without its constant
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(5), 1.0))
    for beta in (0.0, 1.0, 4.0):
        bound = -likelihood.sum(dim=(1, 2, 3)) + beta * divergence.sum(dim=1)  # of every image
        loss = beta_vae_loss(image, restored, mean, log_variance, beta)
        torch.testing.assert_close(loss, bound.mean() / 32)
    assert beta_vae_loss(image, image, 0 * mean, 0 * mean, 4.0) == 0


def test_the_autoencoder_learns_to_reconstruct(store, rows, trained):
    vae, losses, _ = trained
    assert np.mean(losses[-20:]) < 0.2 * np.mean(losses[:5])
    image = store.batch(rows).image
    with torch.no_grad():
        error = (vae.decode(vae.encode(image)[0]) - image).square().mean()
    assert error < 0.7 * image.var(dim=0).mean()  # of what the mean image leaves


def test_more_beta_means_less_divergence_and_a_worse_image(store, rows):
    image, divergence, error = store.batch(rows).image, [], []
    for beta in (0.01, 1.0, 100.0):
        vae, _, _ = train(store, rows, 60, beta=beta)
        with torch.no_grad():
            mean, log_variance = vae.encode(image)
            divergence.append((mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1).mean().item() / 2)
            error.append((vae.decode(mean) - image).square().mean().item())
    assert divergence[0] > 1.5 * divergence[1] > 1.5 * divergence[2]
    assert error[0] < error[1] < error[2]


def test_a_step_depends_on_seed_and_step_alone_and_the_network_stays_as_it_was(store, rows):
    network, losses = UNet(1, 4, SMALL), {}
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        training = autoencoder(Work(network, store, rows, 6, seed), AutoencoderStage(stage="autoencoder"))
        losses.setdefault(seed, []).append([training.step_loss(step).item() for step in (2, 1, 2)])
    assert losses[0][0] == losses[0][1]
    assert losses[0][0][0] == losses[0][0][2] != losses[0][0][1]
    assert losses[1][0][0] != losses[0][0][0]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_features_are_the_means_of_each_slice_whatever_the_batch(store, rows, trained, monkeypatch):
    vae = trained[0]
    found = features(work(store, rows, saved(vae)))
    assert found.shape == (len(rows), 8)
    with torch.no_grad():
        alone = np.stack([vae.encode(store.batch(rows[i : i + 1]).image)[0][0].numpy() for i in (0, 7, len(rows) - 1)])
    np.testing.assert_allclose(found[[0, 7, -1]], alone, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(clustering, "BATCH", 7)
    other = features(work(store, rows[::-1].copy(), saved(vae)))
    np.testing.assert_allclose(other[::-1], found, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- clusters


LINE = np.array([[5.0], [0.0], [1.1], [0.1], [1.0], [5.3]])


def test_clusters_of_points_on_a_line():
    """Cut between the distances of merges, numbered by the first row."""
    assert clusters_of(LINE, stage(clusters=3)).tolist() == [0, 1, 2, 1, 2, 0]
    assert clusters_of(LINE, stage(clusters=2)).tolist() == [0, 1, 1, 1, 1, 0]
    assert clusters_of(LINE, stage(clusters=6)).tolist() == [0, 1, 2, 3, 4, 5]
    assert clusters_of(LINE, stage(cluster_distance=0.2)).tolist() == [0, 1, 2, 1, 2, 3]
    # the two pairs near 0 and 1 are 1.1 apart at most, 1.0 on average and √2 by Ward
    chain = {"complete": (1.09, 1.11), "average": (0.99, 1.01), "ward": (1.41, 1.42)}
    for linkage, distances in chain.items():
        counts = [clusters_of(LINE, stage(linkage=linkage, cluster_distance=d)).max() + 1 for d in distances]
        assert counts == [3, 2], linkage


@pytest.mark.parametrize("linkage", ["ward", "average", "complete"])
def test_cuts_equal_those_of_scipy(linkage):
    feature = np.random.default_rng(0).normal(size=(120, 6))
    tree = linkage_matrix(feature, linkage)
    assert tree.shape == (119, 4)
    for merge in (20, 60, 110):
        distance = tree[merge : merge + 2, 2].mean()
        cut = clusters_of(feature, stage(linkage=linkage, cluster_distance=distance))
        assert adjusted_rand_score(cut, fcluster(tree, distance, "distance")) == 1
    for count in (2, 7, 50):
        cut = clusters_of(feature, stage(linkage=linkage, clusters=count))
        assert adjusted_rand_score(cut, fcluster(tree, count, "maxclust")) == 1


def test_pseudo_classes_are_stable_hierarchical_and_change_with_k(store, rows, trained):
    def found(**fields):
        return pseudo_classes(work(store, rows, trained[2]), stage(**fields))[1][rows].numpy()

    coarse, fine = found(clusters=3), found(clusters=9)
    assert np.array_equal(found(clusters=3), coarse)
    for count, cluster in ((3, coarse), (9, fine)):
        assert pd.unique(cluster).tolist() == list(range(count))  # numbered by their first row
    assert purity(fine, coarse) == 1  # 9 clusters lie inside the 3
    assert purity(coarse, fine) < 1
    assert adjusted_rand_score(found(clusters=9, linkage="average"), fine) < 1


def test_every_pre_training_slice_has_a_pseudo_class_and_no_other(store, rows, trained):
    table, cluster = pseudo_classes(work(store, rows, trained[2]), stage())
    assert cluster.shape == (len(store.slices),)
    assert cluster.dtype == torch.int64
    assert np.flatnonzero(cluster >= 0).tolist() == rows.tolist()
    assert cluster.min() == -1
    assert list(table.columns) == ["row", "subject", "phase", "slice", "position", "cluster"]
    assert table["row"].tolist() == rows.tolist()
    assert table["cluster"].tolist() == cluster[rows].tolist()
    expected = [subject for subject in store.subjects[2:7] for _ in store.rows([subject])]
    assert table["subject"].tolist() == expected
    assert table["slice"].tolist() == store.slices["slice"][rows].tolist()
    assert table["position"].tolist() == store.slices["position"][rows].tolist()


def test_other_subjects_are_never_read(store, rows, monkeypatch):
    """Whatever is in the slices that are not passed: the same losses, features and clusters."""

    def numbers():
        network = UNet(1, 4, SMALL)
        vae, losses, weights = train(store, rows, 4)
        torch.manual_seed(0)
        training = contrast(Work(network, store, rows, 6, 0, earlier=weights), stage())
        losses += [training.step_loss(step).item() for step in range(3)]
        return losses, features(work(store, rows, saved(vae))).tolist(), training.tables["clusters"]["cluster"].tolist()

    torch.manual_seed(0)
    clean = numbers()
    poisoned = np.array(store.images)
    poisoned[np.setdiff1d(np.arange(len(poisoned)), rows)] = np.nan
    monkeypatch.setattr(store, "images", poisoned)
    torch.manual_seed(0)
    assert numbers() == clean


def test_of_very_many_slices_a_sample_is_clustered_and_the_others_join(monkeypatch, capsys):
    generator = np.random.default_rng(1)
    blob = generator.integers(4, size=300)
    feature = np.eye(4)[blob] * 10 + generator.normal(size=(300, 4))
    whole = clusters_of(feature, stage())
    assert adjusted_rand_score(whole, blob) == 1
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(clustering, "LARGEST", 40)
    assert clusters_of(feature, stage()).tolist() == whole.tolist()
    assert "40 of 300 slices" in capsys.readouterr().out


def test_purity():
    assert purity([0, 0, 0, 1, 1], ["a", "a", "b", "c", "c"]) == pytest.approx(4 / 5)
    assert purity([0] * 4, [1, 1, 2, 3]) == pytest.approx(2 / 4)
    assert purity([0, 1, 2, 3], [1, 1, 2, 3]) == 1


# --------------------------------------------------------------------------------------------------------- the contrast


def test_positives_are_the_cluster_or_the_view_and_negatives_other_clusters(store, rows, trained):
    _, cluster = pseudo_classes(work(store, rows, trained[2]), stage())
    image, whole = draw_batch(work(store, rows), stage(), 5, cluster)
    same, views = draw_batch(work(store, rows), stage(positives="view"), 5, cluster)
    assert all(map(torch.equal, image, same))
    assert torch.equal(whole.negative, views.negative)
    place = torch.arange(24)
    twin = place[:, None] % 12 == place[None, :] % 12
    assert torch.equal(views.positive, twin.fill_diagonal_(False))
    assert torch.equal(whole.positive, ~whole.negative & ~torch.eye(24, dtype=torch.bool))  # nothing is neither
    assert whole.positive.sum() > views.positive.sum()
    assert (whole.positive & twin).sum() == 24


@pytest.mark.parametrize("positives", ["cluster", "view"])
def test_cluster_contrast_learns(store, rows, trained, positives):
    torch.manual_seed(0)
    network = UNet(1, 4, SMALL)
    training = contrast(Work(network, store, rows, 12, 0, earlier=trained[2]), stage(positives=positives))
    assert set(training.learning) == {"encoder", "head"}
    assert set(training.tables) == {"clusters"}
    optimiser = torch.optim.Adam([p for part in training.learning.values() for p in part.parameters()], 3e-3)
    losses = []
    for step in range(180):
        loss = training.step_loss(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-15:]) < 0.9 * np.mean(losses[:15])


def test_blocks_are_clustered_and_contrasted_in_3d(tmp_path):
    store = prepared(tmp_path, VOLUME)
    rows = store.rows(store.subjects[1:5])
    vae, losses, weights = train(store, rows, 30)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    training = contrast(Work(UNet(1, 4, SMALL, 3), store, rows, 6, 0, earlier=weights), stage())
    table = training.tables["clusters"]
    assert table["row"].tolist() == rows.tolist()
    assert table["cluster"].nunique() == 4
    expected = clusters_of(features(work(store, rows, saved(vae))), stage())
    assert table["cluster"].tolist() == expected.tolist()
    assert training.step_loss(0).isfinite()


@pytest.mark.parametrize(
    ("fields", "weights", "message"),
    [
        ({}, False, "need the weights of an autoencoder stage"),
        ({"clusters": 1000}, True, "do not make 1000 clusters; lower clusters"),
        ({"cluster_distance": 1e9}, True, "all slices are one cluster; lower it"),
    ],
)
def test_what_cannot_be_clustered_is_refused(store, rows, trained, fields, weights, message):
    earlier = trained[2] if weights else {"encoder.levels.0.0.0.weight": torch.ones(1)}
    with pytest.raises(RequestError, match=message):
        contrast(work(store, rows, earlier), stage(**fields))


def test_a_run_records_the_pseudo_classes_of_its_subjects(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    small = ["dataset.options.subjects=8", "dataset.protocols.seeded.test=2", "dataset.protocols.seeded.validation=2"]
    overrides = [*small, "pretrain.steps=3", "stages.1.clusters=5"]
    fields = {"dataset": "phantom", "profile": "smoke", "method": "ufc", "overrides": overrides}
    run = runs.do(runs.pretrain_run(PretrainParameters(**fields, stage=1)))
    store = runs.open_store(run.experiment)
    split, table = runs.split_of(run, store), run.read("clusters")
    assert set(table["subject"]) == {*split.pretrain}
    assert not set(table["subject"]) & {*split.test}
    assert sorted(table["row"]) == store.rows(split.pretrain).tolist()
    assert set(table["cluster"]) == set(range(5))
    weights = [load_file(r.folder / "weights.safetensors") for r in (run.parent, run)]
    own = [name for name in weights[0] if name.startswith("autoencoder.")]
    assert own
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in own)
    network = UNet(1, 4, run.experiment.network)
    assert all(name.startswith("encoder.") for name in transfer(network, weights[1], "weights"))
