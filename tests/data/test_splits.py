"""Splits: the published lists exactly, nested seeded draws, and no subject where it must not be."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from clseg import config
from clseg.config import FoldsProtocol, ListProtocol, RequestError, SeededProtocol
from clseg.data.splits import available_draws, make_split, unlabelled


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
    return config.read_dataset("acdc").protocols["chaitanya"]


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


def test_folds_say_aloud_that_the_pretraining_sees_their_test_subjects():
    with pytest.raises(RequestError, match="transductive: true"):
        folds(ALL, 2, 1, transductive=False)
    assert available_draws(FoldsProtocol(kind="folds", transductive=True), "all") == [1, 2, 3, 4, 5]


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


@pytest.mark.parametrize("name", config.names("datasets"))
def test_data_sets_have_every_profile(name):
    dataset = config.read_dataset(name)
    assert set(dataset.geometry) == {"smoke", "laptop", "paper"}
    assert all(
        (dataset.title, dataset.description, dataset.source, dataset.licence, dataset.citation or name == "phantom")
    )
    assert (dataset.threshold is None) == (dataset.positions == "unknown")
    for profile in dataset.geometry:
        for dimensions in (2, 3) if dataset.geometry_3d else (2,):
            geometry = config.resolve(name, profile, "random", dimensions=dimensions).geometry  # sizes fit the network
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
    lists, subjects = config.read_dataset(name).protocols[protocol], [pattern.format(n) for n in range(first, last + 1)]
    assert {n: len(available_draws(lists, n)) for n in lists.labelled} == draws
    for n, count in draws.items():
        for draw in range(1, count + 1):
            split = make_split(lists, subjects, subjects, n, draw)
            assert (len(split.labelled), len(split.validation)) == (n, 2)
            assert (len(set(split.pretrain)), len(set(split.test))) == (pretrain, test)
