"""Splits: the published lists exactly, nested seeded draws, and no subject where it must not be."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from clseg.data.splits import Split, available_draws, make_split, unlabelled, write_splits
from clseg.errors import RequestError
from clseg.settings import Fold, FoldsProtocol, ListProtocol, SeededProtocol, SplitsFileProtocol
from clseg.study.files import known_names, read_dataset
from clseg.study.parameters import FinetuneParameters, PretrainParameters, resolve
from clseg.study.runs import finetune_run, pretrain_run


def ids(*numbers):
    return tuple(f"patient{number:03d}" for number in numbers)


# -------------------------------------------------------------------------------------------- lists of Chaitanya et al.

ALL = ids(*range(1, 101))
TEST = ids(7, 8, 9, 10, 27, 28, 29, 30, 47, 48, 49, 50, 67, 68, 69, 70, 87, 88, 89, 90)
ONE = {1: (2,), 2: (42,), 3: (95,), 4: (22,), 5: (62,)}
TWO = {1: (42, 62), 2: (2, 42), 3: (42, 95), 4: (2, 22), 5: (2, 95)}
FIVE = (2, 22, 42, 62, 95)
EIGHT = {1: (*FIVE, 3, 23, 43), 2: (*FIVE, 63, 94, 43), 3: (*FIVE, 3, 94, 23)}
DRAWS = [(n, c, own) for n, draws in ((1, ONE), (2, TWO), (8, EIGHT)) for c, own in draws.items()]
OTHER_VALIDATION = {(1, 2), (2, 1), (2, 3), (8, 2)}


@pytest.fixture(scope="module")
def published():
    return read_dataset("acdc").protocols["chaitanya"]


@pytest.mark.parametrize(("labelled", "draw", "own"), DRAWS)
def test_published_draws(published, labelled, draw, own):
    split = make_split(published, ALL, ALL, labelled, draw)
    assert split.labelled == ids(*own)
    assert split.test == TEST
    assert split.validation == (ids(31, 72) if (labelled, draw) in OTHER_VALIDATION else ids(11, 71))
    assert len(split.pretrain) == len(set(split.pretrain)) == 52
    ranges = [(1, 6), (12, 12), (17, 26), (37, 46), (57, 66), (72, 72), (77, 86), (97, 100)]
    assert split.pretrain == ids(*(number for first, last in ranges for number in range(first, last + 1)))


def test_published_draws_are_all_there(published):
    assert {n: available_draws(published, n) for n in (1, 2, 8)} == {1: [*range(1, 6)], 2: [*range(1, 6)], 8: [1, 2, 3]}
    assert sorted(published.labelled) == [1, 2, 8]
    assert available_draws(published, 3) == []


@pytest.mark.parametrize("count", [100, 150])  # the official release grew by a `testing` folder
def test_benchmark_leaves_out_validation_and_test(published, count):
    subjects = ids(*range(1, count + 1))
    split = make_split(published, subjects, subjects, "all", 1)
    assert len(split.labelled) == 77
    assert not set(split.labelled) & {*TEST, *ids(11, 31, 71)}
    assert split.validation == ids(11, 71)


@pytest.mark.parametrize(
    ("labelled", "draw", "message"),
    [(3, 1, "labelled=3: .* 1, 2, 8"), (8, 4, "draw=4: .* 1, 2, 3"), (1, 6, "draw=6: .* 1, 2, 3, 4, 5")],
)
def test_absent_draw_names_those_that_exist(published, labelled, draw, message):
    with pytest.raises(RequestError, match=message):
        make_split(published, ALL, ALL, labelled, draw)


def test_absent_subjects_are_named(published):
    with pytest.raises(RequestError, match="lacks: patient002, patient067"):
        make_split(published, set(ALL) - set(ids(2, 67)), ALL, 1, 2)


def test_subjects_without_label_are_named(published):
    with pytest.raises(RequestError, match="none: patient042, patient067"):
        make_split(published, ALL, set(ALL) - set(ids(42, 67)), 1, 2)


# --------------------------------------------------------------------------------------------------------------- lists


def lists(**changes):
    plain = {
        "kind": "lists",
        "pretrain": ["a", "b", "c"],
        "validation": ["v"],
        "test": ["t"],
        "labelled": {1: {1: ["a"]}},
    }
    return ListProtocol(**plain | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": {1: {1: ["t"]}}}, "t are both in labelled and test"),
        ({"labelled": {1: {1: ["v"]}}}, "v are both in labelled and validation"),
        ({"validation": ["t"]}, "t are both in validation and test"),
        ({"pretrain": ["a", "t"]}, "t are both in pretrain and test"),
        ({"validation_of": {1: {1: ["a"]}}}, "a are both in labelled and validation"),
    ],
)
def test_overlap_is_refused(changes, message):
    with pytest.raises(RequestError, match=message):
        make_split(lists(**changes), "abctv", "abctv", 1, 1)


def test_transductive_lists_pretrain_on_everyone_once():
    split = make_split(lists(transductive=True, pretrain=["b", "v"]), "abctv", "abctv", 1, 1)
    assert split.pretrain == ("b", "v", "t")


# -------------------------------------------------------------------------------------------------------------- seeded


@given(
    subjects=st.integers(6, 60),
    bare=st.integers(0, 10),
    test=st.integers(1, 20),
    validation=st.integers(1, 5),
    seed=st.integers(0, 5),
    draw=st.integers(1, 5),
    transductive=st.booleans(),
)
def test_seeded(subjects, bare, test, validation, seed, draw, transductive):
    protocol = SeededProtocol(kind="seeded", test=test, validation=validation, seed=seed, transductive=transductive)
    with_label = ids(*range(subjects))
    everyone = (*with_label, *(f"bare{n}" for n in range(bare)))
    pool = subjects - test - validation
    if pool < 1:
        with pytest.raises(RequestError, match=f"{subjects} have labels"):
            make_split(protocol, everyone, with_label, 1, draw)
        return
    splits = [make_split(protocol, everyone, with_label, n, draw) for n in range(1, pool + 1)]
    whole = make_split(protocol, everyone[::-1], with_label[::-1], "all", draw)
    assert set(splits[-1].labelled) == set(whole.labelled)
    for n, split in enumerate(splits, start=1):
        assert split.labelled == splits[-1].labelled[:n]
        assert len(set(split.labelled)) == n
        assert (split.test, split.validation, split.pretrain) == (whole.test, whole.validation, whole.pretrain)
    assert (len(whole.test), len(whole.validation)) == (test, validation)
    assert {*whole.labelled, *whole.validation, *whole.test} == set(with_label)
    assert len(whole.labelled) == pool
    held_out = set() if transductive else {*whole.test, *whole.validation}
    assert set(whole.pretrain) == set(everyone) - held_out
    assert len(whole.pretrain) == len(set(whole.pretrain))
    with pytest.raises(RequestError):
        make_split(protocol, everyone, with_label, pool + 1, draw)


def test_draws_and_seeds_differ():
    def labelled(seed, draw):
        protocol = SeededProtocol(kind="seeded", test=10, validation=2, seed=seed)
        return make_split(protocol, ALL, ALL, 5, draw)

    assert len({labelled(0, draw).labelled for draw in range(1, 21)}) == 20
    assert labelled(0, 1).test == labelled(0, 2).test
    assert labelled(0, 1).test != labelled(1, 1).test
    assert available_draws(SeededProtocol(kind="seeded", test=1, validation=1), 3) is None
    assert available_draws(SeededProtocol(kind="seeded", test=1, validation=1), "all") == [1]


# --------------------------------------------------------------------------------------------------------------- folds


def folds(subjects, labelled, draw, **changes):
    return make_split(
        FoldsProtocol(kind="folds", **{"transductive": True} | changes), subjects, subjects, labelled, draw
    )


FOLD_0 = ids(5, 10, 14, 21, 26, 29, 34, 36, 41, 43, 50, 52, 61, 64, 66, 70, 76, 79, 87, 89)


@pytest.mark.parametrize(
    ("subjects", "draw", "test", "labelled"),
    [
        (ALL, 1, FOLD_0, ids(73, 18)),
        (ALL, 1, FOLD_0, ids(73, 18, 1, 15, 95, 6)),
        (ALL, 1, FOLD_0, ids(73, 18, 1, 15, 95, 6, 13, 16, 58, 39)),
        ([str(n) for n in range(1001, 1021)], 2, ("1001", "1011", "1013", "1016"), ("1019", "1003")),
        ([str(n) for n in range(1001, 1021)], 2, ("1001", "1011", "1013", "1016"), ("1019", "1003", "1002", "1020")),
        ([f"pat{n}" for n in range(10)], 2, ("pat3", "pat9"), ("pat8", "pat0")),
    ],
)
def test_folds_and_subjects_of_the_released_code(subjects, draw, test, labelled):
    split = folds(subjects, len(labelled), draw)
    assert (split.test, split.labelled) == (test, labelled)


@given(subjects=st.integers(11, 90), count=st.integers(2, 6), seed=st.integers(0, 99), draw_seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_folds(subjects, count, seed, draw_seed):
    everyone, options = ids(*range(subjects)), {"folds": count, "seed": seed, "draw_seed": draw_seed}
    expected = KFold(count, shuffle=True, random_state=seed).split(everyone)
    wholes = [folds(everyone, "all", draw, **options) for draw in range(1, count + 1)]
    for draw, (whole, (_, test)) in enumerate(zip(wholes, expected, strict=True), start=1):
        assert whole.test == ids(*test)
        assert set(whole.pretrain) == set(everyone)
        assert whole.pretrain == wholes[0].pretrain  # whatever is tested, it is one pre-training
        assert {*whole.labelled, *whole.validation, *whole.test} == set(everyone)
        splits = [folds(everyone, n, draw, **options) for n in range(1, len(whole.labelled) + 1)]
        assert all(split.labelled == splits[-1].labelled[:n] for n, split in enumerate(splits, start=1))
        assert {split.validation for split in splits} == {whole.validation}
        with pytest.raises(RequestError, match=f"leaves {len(splits)} subjects"):
            folds(everyone, len(splits) + 1, draw, **options)
    with pytest.raises(RequestError, match=f"draw={count + 1}: .* {count} folds"):
        folds(everyone, 1, count + 1, **options)


def test_folds_that_are_not_transductive_leave_their_test_subjects_out_of_pretraining():
    """And those that validate; the sets with labels stay as they are."""
    everyone = (*ALL, "bare1", "bare2")
    protocol = FoldsProtocol(kind="folds")
    assert available_draws(FoldsProtocol(kind="folds"), "all") == [1, 2, 3, 4, 5]
    seen = [make_split(protocol, everyone, ALL, 2, draw) for draw in range(1, 6)]
    assert sorted(subject for split in seen for subject in split.test) == sorted(ALL)
    for draw, split in enumerate(seen, start=1):
        assert set(split.pretrain) == set(everyone) - {*split.validation, *split.test}
        other = make_split(protocol.model_copy(update={"transductive": True}), everyone, ALL, 2, draw)
        assert (split.labelled, split.validation, split.test) == (other.labelled, other.validation, other.test)


# ------------------------------------------------------------------------------------------------- folds of nnU-Net


def from_file(path, validation=2, **options):
    folds = [Fold(**fold) for fold in json.loads(path.read_text())]
    return SplitsFileProtocol(kind="splits_file", folds=folds, validation=validation, **options)


@pytest.fixture
def nnunet(tmp_path):
    """What nnU-Net writes for twelve cases: five folds of scikit-learn, seed 12345."""
    cases = ids(*range(1, 13))
    parts = KFold(5, shuffle=True, random_state=12345).split(cases)
    folds = [{"train": [cases[k] for k in train], "val": [cases[k] for k in test]} for train, test in parts]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds, indent=4, sort_keys=True))
    return tmp_path / "splits_final.json"


@pytest.mark.parametrize("transductive", [False, True])
def test_folds_of_a_file(nnunet, transductive):
    """`val` is tested; of `train` the last of a random order validate and the others get labels, or only pre-train."""
    cases, bare, stray = ids(*range(1, 13)), ("bare1", "bare2"), "patient999"  # in no fold, though it has labels
    protocol, folds = from_file(nnunet, transductive=transductive), json.loads(nnunet.read_text())
    assert available_draws(protocol, 3) == available_draws(protocol, "all") == [1, 2, 3, 4, 5]
    for draw, fold in enumerate(folds, start=1):
        given = protocol, (*cases, *bare, stray), (*cases, stray)
        whole = make_split(*given, "all", draw)
        splits = [make_split(*given, n, draw) for n in range(1, len(whole.labelled) + 1)]
        assert set(whole.test) == set(fold["val"])
        assert {*whole.labelled, *whole.validation} == set(fold["train"])
        assert len(whole.validation) == 2
        assert set(splits[-1].labelled) == set(whole.labelled)
        for n, split in enumerate(splits, start=1):
            assert split.labelled == splits[-1].labelled[:n]
            assert (split.pretrain, split.validation, split.test) == (whole.pretrain, whole.validation, whole.test)
        everyone = {*fold["train"], *bare} - {*whole.validation}
        assert set(whole.pretrain) == ({*cases, *bare, stray} if transductive else everyone)
        with pytest.raises(RequestError, match=f"leaves {len(splits)} subjects"):
            make_split(*given, len(splits) + 1, draw)
    with pytest.raises(RequestError, match=r"draw=6: .* 5 folds"):
        make_split(*given, 1, 6)


def test_training_subjects_of_a_file_that_have_no_labels_pre_train(nnunet):
    cases, protocol = ids(*range(1, 13)), from_file(nnunet)
    fold = protocol.folds[0]
    with_label = [*fold.train[:5], *fold.val]
    split = make_split(protocol, cases, with_label, "all", 1)
    assert {*split.labelled, *split.validation} == set(fold.train[:5])
    assert set(split.pretrain) == set(fold.train) - set(split.validation)
    with pytest.raises(RequestError, match=f"labels of subjects that have none: {fold.val[0]}"):
        make_split(protocol, cases, [case for case in with_label if case != fold.val[0]], 1, 1)
    with pytest.raises(RequestError, match="labelled=all: fold 1 leaves 0 subjects"):
        make_split(protocol, cases, [*fold.train[:2], *fold.val], "all", 1)


@given(
    subjects=st.integers(10, 40),
    kind=st.sampled_from(["seeded", "folds", "lists"]),
    labelled=st.sampled_from([1, 2, "all"]),
    transductive=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_written_splits_are_read_as_they_were(tmp_path_factory, subjects, kind, labelled, transductive, seed):
    with_label, path = ids(*range(subjects)), tmp_path_factory.mktemp("written") / "splits_final.json"
    everyone = (*with_label, "bare")
    lists = {"pretrain": list(with_label[4:]), "test": list(with_label[:2]), "validation": list(with_label[2:4])}
    lists |= {"labelled": {n: {draw: list(with_label[4 : 4 + n]) for draw in (1, 2)} for n in (1, 2)}}
    options = {
        "seeded": {"test": 3, "validation": 2, "seed": seed},
        "folds": {"folds": 3, "seed": seed},
        "lists": lists,
    }
    protocol = {"seeded": SeededProtocol, "folds": FoldsProtocol, "lists": ListProtocol}[kind](
        kind=kind, transductive=transductive, **options[kind]
    )
    splits = [
        make_split(protocol, everyone, with_label, labelled, d) for d in available_draws(protocol, labelled) or [1]
    ]
    write_splits(path, splits)
    found = from_file(path, transductive=transductive)
    again = [make_split(found, everyone, with_label, len(splits[d - 1].labelled), d) for d in available_draws(found, 1)]
    assert again == list(dict.fromkeys(splits))
    for fold, split in zip(json.loads(path.read_text()), again, strict=True):  # as nnU-Net reads it
        assert (tuple(fold["train"]), tuple(fold["val"])) == (split.labelled, split.test)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(RequestError, match=r"splits_final\.json: cannot be written"):
        write_splits(tmp_path / "none" / "splits_final.json", [Split((), ("a",), ("v",), ("t",))])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def cases(nnunet, monkeypatch):
    """Parameters of runs on twelve labelled cases whose folder holds the folds of nnU-Net."""
    monkeypatch.setenv("CLSEG_DATA", str(nnunet.parent))
    about = read_dataset("hippocampus").model_dump(exclude_defaults=True)
    about |= {"name": "cases", "folder": ".", "protocols": {"nnunet": {"kind": "splits_file"}}}
    (nnunet.parent / "cases.yaml").write_text(json.dumps(about))  # JSON is YAML
    return {"dataset": str(nnunet.parent / "cases.yaml"), "profile": "smoke", "method": "gd+lr"}


def test_a_study_reads_the_file_and_its_runs_are_named_by_what_it_holds(cases, nnunet):
    def run(**changes):
        return finetune_run(FinetuneParameters(**cases | changes))

    first, second = run(), run(draw=2)
    assert first.experiment.division.folds == from_file(nnunet).folds
    names = {r.name for draw in (first, second) for r in (draw, draw.parent, draw.parent.parent)}
    assert len(names) == 6  # a pre-training for each draw, as they differ in their test subjects
    assert all(f"draw{draw}" in r.name for draw, base in ((1, first), (2, second)) for r in base.ancestors)
    assert run(labelled=2).parent.name == first.parent.name
    again = pretrain_run(PretrainParameters(**cases, stage=1, draw=2))
    assert again.name == second.parent.name
    shared = {name: run(overrides=["dataset.protocols.nnunet.transductive=true"], draw=name).parent for name in (1, 2)}
    assert shared[1].name == shared[2].name
    folds = json.loads(nnunet.read_text())
    nnunet.with_name("moved.json").write_text(json.dumps(folds))
    about = json.loads((nnunet.parent / "cases.yaml").read_text())
    about["protocols"]["nnunet"]["file"] = "moved.json"
    (nnunet.parent / "moved.yaml").write_text(json.dumps(about))
    assert run(dataset=str(nnunet.parent / "moved.yaml")).name == first.name
    nnunet.with_name("moved.json").write_text(json.dumps(folds[1:]))
    assert run(dataset=str(nnunet.parent / "moved.yaml")).name != first.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[]", "at least 1 item"),
        ("{}", "valid list"),
        ('[{"train": ["a"]}]', "0.val: Field required"),
        ('[{"train": ["a"], "val": "b"}]', "0.val: .*valid list"),
        ('[{"train": ["a"], "val": ["b"], "vall": []}]', "unknown key 'vall', did you mean 'val'"),
        ('[{"train": ["a"', "not valid YAML"),
        ('[{"train": ["a", "a", "b"], "val": ["c"]}]', "train: names a twice"),
    ],
)
def test_a_file_that_holds_no_folds_is_refused_by_name(cases, nnunet, text, message):
    nnunet.unlink() if text is None else nnunet.write_text(text)
    with pytest.raises(RequestError, match=f"splits_final.json: .*{message}"):
        resolve(cases["dataset"], "smoke", "random")


def test_cases_that_are_not_there_are_named(nnunet):
    with pytest.raises(RequestError, match="lacks: patient001, patient007"):
        make_split(from_file(nnunet), set(ids(*range(1, 13))) - set(ids(1, 7)), ids(2, 3, 4, 5, 6), 1, 1)


def test_limit_of_unlabelled_subjects_is_nested(published):
    split = make_split(published, ALL, ALL, 1, 1)
    assert unlabelled(split, None) == split.pretrain
    assert unlabelled(split, 5) == ids(1, 2, 3, 4, 5)
    with pytest.raises(RequestError, match="unlabelled=53: only 52"):
        unlabelled(split, 53)


@pytest.mark.parametrize(("labelled", "draw"), [(0, 1), (1, 0)])
def test_counting_starts_at_one(published, labelled, draw):
    with pytest.raises(ValueError, match="start at 1"):
        make_split(published, ALL, ALL, labelled, draw)


@pytest.mark.parametrize("name", known_names("datasets"))
def test_data_sets_have_every_profile(name):
    dataset = read_dataset(name)
    assert set(dataset.geometry) == {"smoke", "laptop", "paper"}
    assert all(
        (dataset.title, dataset.description, dataset.source, dataset.licence, dataset.citation or name == "phantom")
    )
    assert (dataset.threshold is None) == (dataset.positions == "unknown")
    for profile in dataset.geometry:
        for dimensions in (2, 3) if dataset.geometry_3d else (2,):
            geometry = resolve(name, profile, "random", dimensions=dimensions).geometry  # sizes fit the network
            assert geometry.resize == (dataset.channels == 3)
    assert any(isinstance(protocol, SeededProtocol) for protocol in dataset.protocols.values())
    assert all(p.transductive for p in dataset.protocols.values() if isinstance(p, FoldsProtocol))


LISTS = {  # by protocol: subjects from and to; pre-training, test and benchmark subjects; draws by labelled
    ("msd_prostate", "chaitanya"): ("prostate_{:02d}", 0, 47, 17, 15, {1: 5, 2: 5, 8: 3}),
    ("mmwhs_mr", "chaitanya"): ("{}", 1001, 1020, 10, 10, {1: 5, 2: 4, 8: 3}),
    ("mmwhs_ct", "candidate"): ("{}", 1001, 1020, 16, 4, {2: 2, 4: 2, 8: 1}),
}


@pytest.mark.parametrize(("name", "protocol"), LISTS)
def test_published_lists(name, protocol):
    pattern, first, last, pretrain, test, draws = LISTS[name, protocol]
    lists, subjects = read_dataset(name).protocols[protocol], [pattern.format(n) for n in range(first, last + 1)]
    assert {n: len(available_draws(lists, n)) for n in lists.labelled} == draws
    for n, count in draws.items():
        for draw in range(1, count + 1):
            split = make_split(lists, subjects, subjects, n, draw)
            assert (len(split.labelled), len(split.validation)) == (n, 2)
            assert (len(set(split.pretrain)), len(set(split.test))) == (pretrain, test)


SEMI_VALIDATION = ids(2, 19, 28, 30, 39, 45, 78, 82, 85, 87)  # of the literature, used by nobody here


def test_the_split_of_the_semi_supervised_literature():
    """Its lists as published; our further draws label nobody who chose a setting, and are nested."""
    protocols = read_dataset("acdc").protocols
    semi, development = protocols["semi"], protocols["development"]
    assert (len(semi.pretrain), len(semi.test), semi.validation) == (70, 20, [])
    everyone = {f"patient{n:03d}" for n in range(1, 101)}
    assert {*semi.pretrain} == everyone - {*semi.test} - {*SEMI_VALIDATION}
    assert semi.labelled[7][1] == [f"patient{n:03d}" for n in (99, 38, 50, 100, 58, 21, 49)]
    chose = {
        *development.test,
        *(one for draws in development.labelled.values() for ids in draws.values() for one in ids),
    }
    for draw in range(1, 6):
        seven = semi.labelled[7][draw]
        assert (semi.labelled[1][draw], semi.labelled[3][draw]) == (seven[:1], seven[:3])
        assert {*seven} <= {*semi.pretrain}
        assert draw == 1 or not chose & {*seven}


def test_nobody_who_chose_a_setting_is_in_a_list_that_is_reported():
    """Labelled or scored in `development`. What folds test is not asked: it is everyone."""
    protocols = read_dataset("acdc").protocols
    development, published, semi = (protocols[name] for name in ("development", "chaitanya", "semi"))

    def named(draws):
        return {one for some in draws.values() for own in some.values() for one in own}

    chose = {*development.test, *named(development.labelled)}
    assert not chose & {*published.test, *published.validation, *named(published.validation_of)}
    assert not chose & named(published.labelled)
    assert not chose & {*make_split(protocols["folds"], ALL, ALL, 10, 1).labelled}  # fold 0, of most labels
    assert not chose & {*semi.test, *SEMI_VALIDATION, *semi.labelled[7][1]}
    assert named(development.labelled) <= {*development.pretrain} == {*published.pretrain} - {*development.test}
    assert (len(development.test), len(chose)) == (20, 33)
