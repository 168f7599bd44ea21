"""Leaks: nothing that training must not see can change a weight, and who asks for it is refused.

Every folder of outputs holds the same small data set, in some of them spoilt after it was prepared. What must not be
seen leaves every byte of weights, losses, pseudo-classes and checkpoint selection as it was, for every method; what is
seen does not, so these tests can fail.
"""

import json
from functools import cache

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clseg import paths
from clseg.data.prepare import prepare
from clseg.data.splits import available_draws, make_split
from clseg.data.store import Store
from clseg.errors import RequestError
from clseg.recipes import evaluation
from clseg.settings import Fold, FoldsProtocol, Geometry, ListProtocol, SeededProtocol, SplitsFileProtocol
from clseg.study import runs
from clseg.study.files import read_dataset, read_methods
from clseg.study.parameters import FinetuneParameters

METHODS = read_methods()
SMALL = ["dataset.options.subjects=9", "dataset.protocols.seeded.test=2", "dataset.protocols.seeded.validation=1"]
SHORT = ["pretrain.steps=3", "finetune.steps=5", "finetune.batch=4", "finetune.validate_every=2"]
PROTOCOLS = {  # parameters of runs
    "seeded": {},
    "transductive": {"overrides": ["dataset.protocols.seeded.transductive=true"]},
    "folds": {
        "protocol": "folds",
        "overrides": ["dataset.protocols.folds.transductive=false", "dataset.protocols.folds.validation=1"],
    },
}


def hidden(split):
    """Subjects whose labels no one may see: of test subjects they are for scoring alone."""
    return {*split.test, *split.pretrain} - {*split.labelled, *split.validation}


SPOILT = {  # of a split: the subjects whose images are spoilt, and those whose labels are
    "nothing": lambda split: ((), ()),
    "unseen": lambda split: (split.test, hidden(split)),
    "test": lambda split: (split.test, split.test),
    "hidden labels": lambda split: ((), hidden(split)),
    "validation": lambda split: (split.validation, split.validation),
    "seen": lambda split: (split.pretrain, split.labelled),
}


def finetuning(method, protocol="seeded", **changes):
    fields = {"dataset": "phantom", "profile": "smoke", "method": method, "labelled": 2} | PROTOCOLS[protocol] | changes
    fields["overrides"] = [*SMALL, *SHORT, *fields.get("overrides", [])]
    return runs.finetune_run(FinetuneParameters(**fields))


@pytest.mark.parametrize(("protocol", "leaks"), [("folds", True), ("seeded", False)])
def test_another_name_for_the_same_files_hides_no_test_subject(protocol, leaks, tmp_path, monkeypatch):
    """A pre-training on another data set may hold who is tested, if its files are the same."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path / "out"))
    about = (paths.PROJECT / "params" / "datasets" / "phantom.yaml").read_text(encoding="utf-8")
    (tmp_path / "again.yaml").write_text(about.replace("name: phantom", "name: again"))
    run = finetuning("gr", protocol, pretrain_dataset=str(tmp_path / "again.yaml"))
    everyone = runs.subjects_of(run.experiment)
    if not leaks:  # both leave out the same subjects
        assert runs.split_of(run, everyone).test
        return
    with pytest.raises(
        RequestError,
        match=r"pretrain_dataset: again has images of phantom, and pre-trains on subject phantom00\d, who is tested",
    ):
        runs.split_of(run, everyone)


def spoil(store, images, labels):
    """Noise in place of these subjects' images, other classes in place of the labels of those."""
    for name, kind, subjects in (("images.f16", np.float16, images), ("labels.u8", np.uint8, labels)):
        values = np.memmap(store.folder / name, kind, "r+").reshape(len(store.slices), -1)
        rows = store.rows(subjects)
        noise = np.random.default_rng(0).normal(size=values[rows].shape)
        values[rows] = noise if kind == np.float16 else (values[rows] + 1) % store.num_classes
        values.flush()


def cheaply_scored(patch):
    """Test subjects are segmented as ever, but not brought to their native grid: that is half of the time."""
    row = {"class_name": "all", "hd95": 0.0, "hd95_unit": "px", "missed": 0}
    patch.setattr(Store, "to_native", lambda store, volume, probability: probability)
    patch.setattr(evaluation, "score", lambda prediction, *_: [row | {"dice": float(prediction[:, 1].mean())}])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run on data of which something is spoilt: its split is that of draw 1."""

    @cache
    def root(spoilt, protocol):
        folder = tmp_path_factory.mktemp("root")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLSEG_OUT", str(folder))
            run = finetuning("random", protocol)
            store = runs.open_store(run.experiment, progress=False)
            spoil(store, *SPOILT[spoilt](runs.split_of(run, store)))
        return folder

    @cache
    def train(spoilt, method, protocol="seeded", draw=1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLSEG_OUT", str(root(spoilt, protocol)))
            cheaply_scored(patch)
            run = runs.do(finetuning(method, protocol, draw=draw))
            return [left_by(one) for one in (*run.ancestors, run)]

    return train


def left_by(run):
    """What a run left: bytes, or numbers."""
    left = {"method": run.method, "weights": (run.folder / "weights.safetensors").read_bytes()}
    left["losses"], left["log"] = run.read("log")["loss"].tolist(), (run.folder / "log.csv").read_bytes()
    left["best step"] = json.loads((run.folder / "record.json").read_bytes())["best_step"]
    for name in ("clusters", "metrics"):
        path = run.folder / f"{name}.csv"
        left[name] = path.read_bytes() if path.exists() else None
    return left


def equal(clean, spoilt, *names):
    """Per run, the pre-trainings first, whether all of this is the same."""
    return [all(a[name] == b[name] for name in names) for a, b in zip(clean, spoilt, strict=True)]


# ----------------------------------------------------------------------------------------------- what cannot be learned


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_neither_test_subjects_nor_hidden_labels_change_a_byte(trained, method):
    """Pre-training, pseudo-classes, fine-tuning, self-training and which checkpoint is kept."""
    clean, spoilt = trained("nothing", method), trained("test" if METHODS[method].all_labels else "unseen", method)
    assert len(clean) == len(METHODS[method].stages) + 1
    assert all(equal(clean, spoilt, "weights", "log", "best step", "clusters"))
    assert equal(clean, spoilt, "metrics")[-1] is False  # it was there


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_validation_subjects_choose_the_checkpoint_and_teach_nothing(trained, method):
    clean, spoilt = trained("nothing", method), trained("validation", method)
    assert all(equal(clean, spoilt, "losses", "clusters"))
    assert all(equal(clean[:-1], spoilt[:-1], "weights"))
    assert not equal(clean, spoilt, "log")[-1]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_what_is_learned_from_changes_the_weights(trained, method):
    clean, spoilt = trained("nothing", method), trained("seen", method)
    assert not any(equal(clean, spoilt, "weights"))


@pytest.mark.parametrize("method", ["gd", "self_training"])
def test_a_transductive_study_says_so_and_still_hides_labels(trained, method):
    """Pre-training sees images of test subjects, a recipe does not."""
    clean = trained("nothing", method, "transductive")
    assert all(equal(clean, trained("hidden labels", method, "transductive"), "weights", "log", "best step"))
    assert not any(equal(clean[:-1], trained("test", method, "transductive")[:-1], "weights"))
    assert clean[-1]["method"] == {"gd": "gd (transductive)", "self_training": "self_training"}[method]
    assert clean[-1]["method"].encode() in clean[-1]["metrics"]
    if method == "self_training":
        assert all(equal(clean, trained("test", method, "transductive"), "weights", "log", "best step"))


def test_each_fold_pre_trains_without_its_test_subjects(trained):
    first, second = ([trained(what, "gd", "folds", draw) for what in ("nothing", "test")] for draw in (1, 2))
    assert all(equal(*first, "weights", "log", "best step"))
    assert not any(equal(*second, "weights"))  # it trains on those of the first
    assert first[0][-1]["method"] == "gd"


def test_files_of_test_subjects_change_neither_what_is_prepared_of_others_nor_weights(tmp_path, monkeypatch):
    """Normalisation, resampling and cropping are those of each volume alone."""
    folder, cases, learned, prepared = tmp_path / "data" / "cases", [f"case{k}" for k in range(7)], [], []
    about = {"name": "cases", "title": "", "description": "", "adapter": "msd", "folder": "cases"}
    about |= {"geometry": {"smoke": {"size": [32, 32], "spacing_mm": 1.5}}, "threshold": 0.3}
    about["protocols"] = {"seeded": {"kind": "seeded", "test": 2, "validation": 1}}
    monkeypatch.setenv("CLSEG_DATA", str(tmp_path / "data"))
    cheaply_scored(monkeypatch)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    listed = [{"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"} for case in cases]
    (folder / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "a"}, "training": listed}))
    (tmp_path / "cases.yaml").write_text(json.dumps(about))  # JSON is YAML

    def write(case, seed, scale, spacing_mm):
        rng, affine = np.random.default_rng(seed), np.diag([spacing_mm, spacing_mm, 4, 1])
        image, label = scale * rng.normal(size=(40, 36, 6)) ** 2, (rng.random((40, 36, 6)) < 0.3).astype(np.uint8)
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / "imagesTr" / f"{case}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"{case}.nii.gz")

    for number, case in enumerate(cases):
        write(case, number, 100, 1.4)
    fields = {"dataset": str(tmp_path / "cases.yaml"), "profile": "smoke", "method": "pcl+lr", "labelled": 2}
    fields |= {"overrides": SHORT, "variant": "recipe.mixup=0.1"}
    for out in ("clean", "spoilt"):
        monkeypatch.setenv("CLSEG_OUT", str(tmp_path / out))
        run = runs.finetune_run(FinetuneParameters(**fields))
        store = runs.open_store(run.experiment, progress=False)
        split = runs.split_of(run, store)
        others = store.rows(set(cases) - set(split.test))
        prepared.append((store.folder.name, store.images[others].tobytes(), store.labels[others].tobytes()))
        runs.do(run)
        learned.append([left_by(one) for one in (*run.ancestors, run)])
        for number, case in enumerate(split.test):
            write(case, 70 + number, 1e5, 0.9)
    assert prepared[0][0] != prepared[1][0]
    assert prepared[0][1:] == prepared[1][1:]
    assert all(equal(*learned, "weights", "log", "best step"))
    assert not equal(*learned, "metrics")[-1]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))


def first_row(store, subject):
    return int(store.volumes.loc[store.volumes["subject"] == subject, "first_row"].iloc[0])


def first_volume(store, subject):
    return int(np.flatnonzero(store.volumes["subject"] == subject)[0])


ASKED = {  # how slices of a subject can be asked for
    "a batch": lambda store, own, other: store.batch(np.array([own, first_row(store, other)])),
    "rows": lambda store, own, other: store.rows([other]),
    "rows with labels": lambda store, own, other: store.rows([other], labelled=True),
    "an image": lambda store, own, other: store.images[first_row(store, other)],
    "some images": lambda store, own, other: store.images[
        slice(first_row(store, other), first_row(store, other) + 2), 0
    ],
    "all images": lambda store, own, other: store.images[...],
    "images by a mask": lambda store, own, other: store.images[np.ones(len(store.slices), bool)],
    "a wider view": lambda store, own, other: store.only([other]).images[first_row(store, other)],
}
LABELS_ASKED = {  # and its labels
    "a label": lambda store, own, other: store.labels[first_row(store, other)],
    "labels of a batch": lambda store, own, other: store.batch([own, first_row(store, other)]).label[0],
    "some labels": lambda store, own, other: store.labels[first_row(store, other) :, ::2],
    "labels in a wider view": lambda store, own, other: store.only([other]).labels[first_row(store, other)],
    "a native label": lambda store, own, other: store.native_label(first_volume(store, other)),
}


@pytest.mark.parametrize("kind", ["stage", "recipe"])
def test_a_stage_or_recipe_that_asks_for_what_it_must_not_see_is_refused(out, monkeypatch, kind):
    """Slices of subjects that validate or are tested, and labels other than those of the draw."""
    run = finetuning("gd" if kind == "stage" else "self_training")
    run = run.parent or run
    split, found = runs.split_of(run, runs.open_store(run.experiment, progress=False)), {}
    own = set(split.pretrain) - (set(split.labelled) if kind == "recipe" else set())
    victims = {"test": split.test, "validation": split.validation, "own": own}

    def cheat(work, _):
        for of, subjects in victims.items():
            victim = max(subjects, key=lambda subject: first_row(work.store, subject))
            for asked, ask in (ASKED | LABELS_ASKED).items():
                try:
                    ask(work.store, int(work.rows[0]), victim)
                except (ValueError, TypeError) as error:
                    found[of, asked] = type(error), victim in str(error)
        assert work.store.batch(work.rows).image.isfinite().all()
        assert (work.store.batch(work.rows).label is None) == (kind == "stage")
        assert not len(work.unlabelled) or work.store.batch(work.unlabelled).label is None
        raise KeyboardInterrupt

    known, name = (runs.STAGES, "contrast") if kind == "stage" else (runs.RECIPES, "self_training")
    cheat.__module__ = known[name].__module__  # whose digest is in the run's name
    monkeypatch.setitem(known, name, cheat)
    with pytest.raises(KeyboardInterrupt):
        runs.do(run)
    named, none = (ValueError, True), (TypeError, False)  # there are no labels to take the first of
    for asked in (*ASKED, *LABELS_ASKED):
        assert found.pop(("test", asked)) == found.pop(("validation", asked)) == named
    expected = dict.fromkeys(LABELS_ASKED, named) | {"labels of a batch": none}
    expected |= dict.fromkeys(("all images", "images by a mask"), (ValueError, False))  # others are named
    assert found == {("own", asked): outcome for asked, outcome in expected.items()}


def test_test_subjects_are_not_handed_over_before_training_has_ended(out, monkeypatch):
    handed, only, fit = [], Store.only, runs.train.fit

    def view(store, labelled=(), unlabelled=()):
        handed.append({*labelled, *unlabelled})
        return only(store, labelled, unlabelled)

    def fitted(*arguments, **options):
        result = fit(*arguments, **options)
        handed.append("fit")
        return result

    monkeypatch.setattr(Store, "only", view)
    monkeypatch.setattr(runs.train, "fit", fitted)
    run = runs.do(finetuning("random"))
    split = runs.split_of(run, runs.open_store(run.experiment, progress=False))
    everyone = set(split.pretrain)
    assert handed == [{*split.validation}, everyone, "fit", {*split.test}]


@pytest.mark.parametrize("geometry", [{"size": [32, 32]}, {"size": [4, 16, 16], "plane": [32, 32]}])
def test_a_view_hands_over_the_same_slices(out, geometry):
    about = read_dataset("phantom").model_copy(update={"options": {"subjects": 5}})
    store = prepare(about, Geometry(**geometry, spacing_mm=6.5), progress=False)
    labelled, unlabelled = store.subjects[1:3], store.subjects[3:4]
    view = store.only(labelled, unlabelled)
    assert (view.subjects, view.labelled_subjects) == ((*labelled, *unlabelled), labelled)
    assert store.labelled_subjects == store.subjects  # as it was
    for subjects in (labelled, unlabelled, (*unlabelled, *labelled)):
        rows = store.rows(subjects)
        assert view.rows(subjects).tolist() == rows.tolist()
        first, second = (s.batch(rows, generator=torch.Generator().manual_seed(0)) for s in (store, view))
        for name in ("image", "row", "volume", "position"):
            assert torch.equal(getattr(first, name), getattr(second, name))
        assert [view.subjects[k] for k in second.subject] == [store.subjects[k] for k in first.subject]
        assert torch.equal(first.label, second.label) if subjects == labelled else second.label is None
    assert view.rows(unlabelled, labelled=True).size == 0
    with pytest.raises(ValueError, match=store.subjects[0]):
        view.rows(store.subjects)


# ------------------------------------------------------------------------------------------------------- both phases


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_OUT", str(tmp_path_factory.mktemp("phases")))
        changes = {"options": {"subjects": 10}, "phases": ["ED", "ES"]}
        about = read_dataset("phantom").model_copy(update=changes)
        return prepare(about, Geometry(size=[32, 32], spacing_mm=6.5), progress=False)


@st.composite
def protocols(draw, subjects):
    kind, common = draw(st.sampled_from(["seeded", "folds", "lists", "file"])), {"transductive": draw(st.booleans())}
    order, seed = draw(st.permutations(subjects)), draw(st.integers(0, 99))
    if kind == "seeded":
        sizes = {"test": draw(st.integers(1, 4)), "validation": draw(st.integers(1, 3))}
        return SeededProtocol(kind=kind, seed=seed, **sizes, **common)
    if kind == "folds":
        return FoldsProtocol(kind=kind, folds=draw(st.integers(2, 5)), seed=seed, validation=1, **common)
    if kind == "lists":
        sets = {"test": order[:3], "validation": order[3:5], "pretrain": order[draw(st.integers(3, 5)) :]}
        return ListProtocol(
            kind=kind, **sets, labelled={1: {1: order[6:7]}, 2: {1: order[5:7], 2: order[7:9]}}, **common
        )
    folds = [Fold(train=order[k:] + order[: k - 3], val=order[k - 3 : k]) for k in (3, 6, 9)]
    return SplitsFileProtocol(kind="splits_file", folds=folds, draw_seed=seed, **common)


@given(data=st.data(), labelled=st.sampled_from([1, 2, "all"]))
@settings(max_examples=60, deadline=None)
def test_both_phases_of_a_subject_stay_on_one_side(two_phases, data, labelled):
    store = two_phases
    protocol = data.draw(protocols(list(store.subjects)))
    draw = data.draw(st.sampled_from(available_draws(protocol, labelled) or [1, 2, 3]))
    split = make_split(protocol, store.subjects, store.labelled_subjects, labelled, draw)
    sets = {name: set(store.rows(getattr(split, name)).tolist()) for name in ("labelled", "validation", "test")}
    assert not sets["labelled"] & sets["validation"]
    assert not sets["test"] & (sets["labelled"] | sets["validation"])
    assert protocol.transductive or not sets["test"] & set(store.rows(split.pretrain).tolist())
    for rows in (*sets.values(), store.rows(split.pretrain).tolist()):
        volumes = store.volumes.iloc[store.slices["volume"].iloc[sorted(rows)].unique()]
        assert (volumes.groupby("subject")["phase"].agg(set) == {"ED", "ES"}).all()
        assert volumes["slices"].sum() == len(rows)
