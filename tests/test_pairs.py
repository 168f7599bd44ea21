"""Who is alike: masks written out, definitions in loops, reductions between the four answers, errors."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from torch import Tensor

from clseg.pairs import Pairs, cluster_pairs, instance_pairs, partition_pairs, position_pairs


def mask(*rows: str) -> Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def same(a: Pairs, b: Pairs) -> bool:
    return torch.equal(a.positive, b.positive) and torch.equal(a.negative, b.negative)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


# --------------------------------------------------------------------------------------------------------------- Pairs


def test_pairs_accepts_rows_that_are_neither():
    pairs = Pairs(mask(".x.", "x..", "..."), mask("...", "..x", "..."))
    assert pairs.positive.sum() == 2
    assert pairs.negative.sum() == 1


NONE = torch.zeros(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (NONE.float(), NONE, "positive must be bool"),
        (NONE, NONE.int(), "negative must be bool"),
        (NONE[:2], NONE, r"positive must be square \[B, B\], not \[2, 3\]"),
        (NONE, NONE[0], r"negative must be square \[B, B\], not \[3\]"),
        (NONE, NONE[:2, :2], "positive has 3 rows, negative 2"),
        (mask("x..", "...", "..."), NONE, "its own positive or negative"),
        (NONE, mask("...", "...", "..x"), "its own positive or negative"),
        (mask(".x.", "...", "..."), mask(".x.", "...", "..."), "positive and negative of one anchor"),
    ],
)
def test_pairs_says_what_is_wrong(positive, negative, message):
    with pytest.raises(ValueError, match=message):
        Pairs(positive, negative)


# ------------------------------------------------------------------------------------------------- masks written out


def test_instance_pairs():
    pairs = instance_pairs(ids(7, 3, 7, 5))
    assert torch.equal(pairs.positive, mask("..x.", "....", "x...", "...."))
    assert torch.equal(pairs.negative, mask(".x.x", "x.xx", ".x.x", "xxx."))


def test_position_pairs():
    # two views of a slice at 0.2, one slice at 0.25, one at 0.9
    pairs = position_pairs(torch.tensor([0.2, 0.2, 0.25, 0.9]), 0.1)
    assert torch.equal(pairs.positive, mask(".xx.", "x.x.", "xx..", "...."))
    assert torch.equal(pairs.negative, mask("...x", "...x", "...x", "xxx."))


def test_cluster_pairs():
    pairs = cluster_pairs(ids(0, 1, 2, 3), ids(4, 4, 1, 4))
    assert torch.equal(pairs.positive, mask(".x.x", "x..x", "....", "xx.."))
    assert torch.equal(pairs.negative, mask("..x.", "..x.", "xx.x", "..x."))


def test_views_of_one_slice_are_alike_in_any_cluster():
    assert cluster_pairs(ids(0, 0, 1), ids(4, 5, 5)).positive[0, 1]


# volumes u, v; partitions 0, 1; two views:     u0  u1  v0  u0' u1' v0'
SLICE, PARTITION, VIEW = ids(0, 1, 2, 0, 1, 2), ids(0, 1, 0, 0, 1, 0), ids(0, 0, 0, 1, 1, 1)
OTHER_PARTITION = mask(".x..x.", "x.xx.x", ".x..x.", ".x..x.", "x.xx.x", ".x..x.")


@pytest.mark.parametrize(
    ("strategy", "view", "positive"),
    [
        ("gd-", None, mask("...x..", "....x.", ".....x", "x.....", ".x....", "..x...")),
        ("gd-", VIEW, mask("...x..", "....x.", ".....x", "x.....", ".x....", "..x...")),
        ("gd", VIEW, mask("..xx..", "....x.", "x....x", "x....x", ".x....", "..xx..")),
        ("gd", None, mask("..xx.x", "....x.", "x..x.x", "x.x..x", ".x....", "x.xx..")),
    ],
)
def test_partition_pairs(strategy, view, positive):
    pairs = partition_pairs(SLICE, PARTITION, strategy, view)
    assert torch.equal(pairs.positive, positive)
    assert torch.equal(pairs.negative, OTHER_PARTITION)


def test_strategy_is_gd_unless_said_otherwise():
    assert same(partition_pairs(SLICE, PARTITION), partition_pairs(SLICE, PARTITION, "gd"))


def test_counts_of_the_released_gd_minus():
    # 12 slices (3 volumes x 4 partitions) and two augmented copies of each: 36 images, 27 negatives, 3 pairs per slice
    slice_id, partition = torch.arange(12).repeat(3), torch.arange(4).repeat(9)
    pairs = partition_pairs(slice_id, partition, "gd-")
    assert (pairs.negative.sum(dim=1) == 27).all()
    assert pairs.positive.sum() == 12 * 3 * 2


def test_counts_of_the_released_gd():
    # two volumes x 4 partitions and one augmented copy of each: 4 pairs in both directions per partition, 12 negatives
    slice_id, partition = torch.arange(8).repeat(2), torch.arange(4).repeat(4)
    pairs = partition_pairs(slice_id, partition, "gd", torch.arange(2).repeat_interleave(8))
    assert (pairs.negative.sum(dim=1) == 12).all()
    assert pairs.positive.sum() == 4 * 4 * 2


# ---------------------------------------------------------------------------------------------- definitions in loops


def by_definition(alike, unlike, rows: int) -> Pairs:
    positive, negative = torch.zeros(rows, rows, dtype=torch.bool), torch.zeros(rows, rows, dtype=torch.bool)
    for i, j in product(range(rows), repeat=2):
        if i != j:
            positive[i, j] = bool(alike(i, j))
            negative[i, j] = bool(unlike(i, j))
    return Pairs(positive, negative)


@pytest.mark.parametrize("seed", range(20))
def test_definitions(seed):
    random = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 12, (), generator=random))
    k = torch.randint(0, 6, (rows,), generator=random)  # slice ids
    s = torch.randint(0, 3, (6,), generator=random)[k]  # partition of the slice, the same for all its views
    c = torch.randint(0, 3, (6,), generator=random)[k]
    v = torch.randint(0, 2, (rows,), generator=random)
    p = torch.rand(rows, generator=random)
    t = float(torch.rand((), generator=random))

    def expect(pairs, alike, unlike=None):
        unlike = unlike or (lambda i, j: not alike(i, j))
        assert same(pairs, by_definition(alike, unlike, rows))

    def apart(i, j):
        return s[i] != s[j]

    expect(instance_pairs(k), lambda i, j: k[i] == k[j])
    expect(position_pairs(p, t), lambda i, j: abs(float(p[i]) - float(p[j])) < t)
    expect(cluster_pairs(k, c), lambda i, j: k[i] == k[j] or c[i] == c[j])
    expect(partition_pairs(k, s, "gd-"), lambda i, j: k[i] == k[j], apart)
    expect(partition_pairs(k, s, "gd"), lambda i, j: s[i] == s[j], apart)
    expect(partition_pairs(k, s, "gd", v), lambda i, j: k[i] == k[j] or (s[i] == s[j] and v[i] == v[j]), apart)


@pytest.mark.parametrize("threshold", ["0.05", "0.1", "0.2", "0.35", "0.5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_difference_of_exactly_the_threshold_is_not_below_it(threshold, dtype):
    # every pair of places m/n of two volumes, compared as fractions, where no rounding can decide
    for n in (9, 10, 17, 40):
        exact = [Fraction(m, n) for m in range(1, n + 1)] + [Fraction(m, 20) for m in range(1, 21)]
        position = torch.tensor([float(p) for p in exact], dtype=dtype)
        expected = torch.tensor([[abs(a - b) < Fraction(threshold) for b in exact] for a in exact])
        assert torch.equal(position_pairs(position, float(threshold)).positive, expected.fill_diagonal_(False))


def test_views_stay_alike_below_any_threshold():
    assert position_pairs(torch.tensor([0.3, 0.3]), 1e-9).positive[0, 1]


# ---------------------------------------------------------------------------------------------------------- reductions


def test_reductions():
    random = torch.Generator().manual_seed(0)
    k = torch.randint(0, 8, (24,), generator=random)
    own = k.double() / 8  # a place, cluster and partition of its own for every slice
    assert same(cluster_pairs(k, k), instance_pairs(k))
    assert same(position_pairs(own, 0.1), instance_pairs(k))
    assert same(partition_pairs(k, k, "gd-"), instance_pairs(k))
    assert same(partition_pairs(k, k, "gd"), instance_pairs(k))
    assert same(position_pairs(own, torch.inf), cluster_pairs(k, torch.zeros_like(k)))
    s = k % 3
    assert same(partition_pairs(k, s, "gd"), cluster_pairs(k, s))  # nothing is left out, once all of it is alike
    assert torch.equal(partition_pairs(k, s, "gd-").negative, partition_pairs(k, s, "gd").negative)
    all_views_apart = partition_pairs(k, s, "gd", torch.arange(24))
    assert same(all_views_apart, partition_pairs(k, s, "gd-"))


def test_permutation_of_rows_permutes_the_masks():
    random = torch.Generator().manual_seed(1)
    k, order = torch.arange(6).repeat(2), torch.randperm(12, generator=random)
    s, v, p = k % 3, torch.arange(2).repeat_interleave(6), k / 6
    for make in (
        lambda o: instance_pairs(k[o]),
        lambda o: partition_pairs(k[o], s[o], "gd-"),
        lambda o: partition_pairs(k[o], s[o], "gd", v[o]),
        lambda o: position_pairs(p[o], 0.25),
        lambda o: cluster_pairs(k[o], s[o]),
    ):
        whole = make(torch.arange(12))
        assert same(make(order), Pairs(whole.positive[order][:, order], whole.negative[order][:, order]))


def test_arguments_stay_as_they_are():
    k, s = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    partition_pairs(k, s)
    assert torch.equal(k, torch.arange(4))
    assert not s.any()


# -------------------------------------------------------------------------------------------------------------- errors

THREE = torch.arange(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: instance_pairs(torch.zeros(2, 2)), r"slice_id must have shape \[B\], not \[2, 2\]"),
        (lambda: partition_pairs(THREE, THREE[:2]), r"partition must have shape \[3\], not \[2\]"),
        (lambda: partition_pairs(THREE, THREE, "gd", THREE[:1]), r"view must have shape \[3\], not \[1\]"),
        (lambda: partition_pairs(THREE, THREE, "gr"), "strategy must be 'gd-' or 'gd', not 'gr'"),
        (lambda: partition_pairs(ids(0, 0), ids(0, 1), "gd-"), "positive and negative of one anchor"),
        (lambda: cluster_pairs(THREE, torch.arange(4)), r"cluster must have shape \[3\], not \[4\]"),
        (lambda: position_pairs(torch.tensor(0.5), 0.1), r"position must have shape \[B\], not \[\]"),
        (lambda: position_pairs(torch.rand(3), 0.0), "threshold must be positive, not 0.0"),
        (lambda: position_pairs(torch.rand(3), float("nan")), "threshold must be positive"),
        (lambda: position_pairs(torch.tensor([0.1, float("nan")]), 0.1), "every position must be a finite number"),
    ],
)
def test_errors_say_which_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
