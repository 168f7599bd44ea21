"""Each loss: literal cases, slow reference, outside library, reductions, invariances, gradients, precision, ranks."""

import importlib.util
import math
import os
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clseg.losses import (
    SEGMENTATION_LOSSES,
    contrastive_loss,
    cross_entropy,
    dice_cross_entropy,
    dice_loss,
    local_contrastive_loss,
)
from clseg.pairs import Pairs, cluster_pairs, instance_pairs, partition_pairs, position_pairs
from clseg.ranks import gather
from clseg.regions import nearest_neighbours, region_embeddings, region_grid
from clseg.settings import SupervisedRecipe

DENOMINATORS = ["all", "pair"]


def close(value, expected, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(value).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


def with_gradient(loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Value of a loss and its gradient with respect to each input."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


def under_autocast(loss, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    """The loss computed under autocast; its gradient is computed outside, as in training."""

    def value(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return loss(*inputs)

    return value


# ===================================================================================================== global contrast


def slow_contrastive_loss(z: Tensor, pairs: Pairs, temperature: float, denominator: str) -> Tensor:
    """The two formulas as they are written, in float64."""
    z = z.double()

    def s(i, j):
        lengths = z[i].norm() * z[j].norm()
        return z[i] @ z[j] / lengths / temperature if lengths > 0 else (z[i] * 0 + z[j] * 0).sum()

    anchors, terms = [], []
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if pairs.positive[i, j]]
        negatives = [j for j in range(len(z)) if pairs.negative[i, j]]
        if not positives:
            continue
        log_shares = []
        for j in positives:
            rivals = positives + negatives if denominator == "all" else [j, *negatives]
            log_shares.append(torch.log(s(i, j).exp() / sum(s(i, k).exp() for k in rivals)))
        anchors.append(-sum(log_shares) / len(positives))
        terms += [-share for share in log_shares]
    return sum(anchors) / len(anchors) if denominator == "all" else sum(terms) / len(terms)


def random_pairs(rows: int, random: torch.Generator, share: float = 0.3) -> Pairs:
    """Any masks: not symmetric, with anchors that have no positive, or no negative, and rows that are neither."""
    draw = torch.rand(rows, rows, generator=random).fill_diagonal_(1)
    positive, negative = draw < share, (draw > share) & (draw < 0.8)
    negative[torch.rand(rows, generator=random) < 0.3] = False
    positive[torch.rand(rows, generator=random) < 0.3] = False
    positive[0, -1], negative[0, -1] = True, False
    return Pairs(positive, negative)


# -------------------------------------------------------------------------------------------------------- literal cases


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_two_slices_two_views(denominator):
    z = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    pairs = instance_pairs(torch.tensor([0, 0, 1, 1]))
    # s is 1 / T with the other view and 0 with both rows of the other slice
    close(contrastive_loss(z, pairs, 1.0, denominator), math.log(1 + 2 / math.e))
    close(contrastive_loss(z, pairs, 0.5, denominator), math.log(1 + 2 / math.e**2))


def test_the_temperature_is_a_tenth_and_the_denominator_all_unless_said_otherwise():
    random = torch.Generator().manual_seed(0)
    z, pairs = torch.randn(6, 3, generator=random), random_pairs(6, random)
    assert contrastive_loss(z, pairs) == contrastive_loss(z, pairs, 0.1, "all")
    assert contrastive_loss(z, pairs) != contrastive_loss(z, pairs, 0.1, "pair")


def test_three_alike_and_one_alone():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pairs = cluster_pairs(torch.arange(4), torch.tensor([0, 0, 0, 1]))  # the last anchor has no positive: left out
    close(contrastive_loss(z, pairs, 0.5, "all"), math.log(2 * math.e**2 + 1) - 2)
    close(contrastive_loss(z, pairs, 0.5, "pair"), math.log(math.e**2 + 1) - 2)


def test_opposite_positives():
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    pairs = cluster_pairs(torch.arange(3), torch.tensor([0, 0, 1]))
    # anchor 0: positive at -1, negative at 1; anchor 1: both at -1; mean of log(1 + e²) and log 2
    close(contrastive_loss(z, pairs, 1.0), (math.log(1 + math.e**2) + math.log(2)) / 2)


def test_means_are_over_anchors_or_over_pairs():
    # anchor 0 has two positives (s = 1 and 0) and no negative, anchor 3 one positive (s = 0) and one negative (s = 0)
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    positive = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)
    negative = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    pairs = Pairs(positive, negative)
    first, second = math.log(math.e + 1) - 0.5, math.log(1 + math.e)
    close(contrastive_loss(z, pairs, 1.0, "all"), (first + second) / 2)
    close(contrastive_loss(z, pairs, 1.0, "pair"), (0 + 0 + second) / 3)


# ------------------------------------------------------------------------------------------------------- slow reference


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("seed", range(12))
def test_value_and_gradient_of_the_formula(seed, denominator):
    random = torch.Generator().manual_seed(seed)
    rows, channels = (int(n) for n in torch.randint(2, 8, (2,), generator=random))
    z = torch.randn(rows, channels, generator=random)
    pairs, temperature = random_pairs(rows, random), (0.07, 0.1, 0.5, 3.0)[seed % 4]
    expected = with_gradient(lambda z: slow_contrastive_loss(z, pairs, temperature, denominator), z.double())
    for tensor, tolerance in ((z.double(), 1e-10), (z, 2e-5)):
        found = with_gradient(lambda z: contrastive_loss(z, pairs, temperature, denominator), tensor)
        assert found[0].dtype == tensor.dtype
        for a, b in zip(found, expected, strict=True):
            close(a, b, tolerance)


@pytest.mark.parametrize(
    ("position", "threshold"),
    [
        ([0.25, 0.5, 0.75, 1.0, 0.2, 0.4, 0.6, 0.8, 1.0], 0.21),  # two volumes whose positions overlap, 1.0 in both
        ([0.2, 0.4, 0.6, 0.8, 1.0], 0.35),  # one volume
        ([0.2, 0.4, 0.6, 0.8, 1.0], 2.0),  # every row is a positive, none a negative
        ([0.1, 0.2, 0.3, 0.4], 0.1),  # neighbours at exactly t are negatives: SimCLR
    ],
)
def test_the_positional_loss_is_the_published_formula(position, threshold):
    """-1/|P_i| Σ_{j in P_i} log( e^{s_ij} / Σ_{k != i} e^{s_ik} ), P_i: |p_i - p_j| < t; two views of each slice."""
    exact = [Fraction(str(p)) for p in position] * 2
    z = torch.randn(len(exact), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = 0.0
    for i in range(len(exact)):
        s = [(z[i] @ z[j] / (z[i].norm() * z[j].norm()) / 0.1).item() for j in range(len(exact))]
        alike = [j for j in range(len(exact)) if j != i and abs(exact[i] - exact[j]) < Fraction(str(threshold))]
        everyone = sum(math.exp(s[k]) for k in range(len(exact)) if k != i)
        total -= sum(math.log(math.exp(s[j]) / everyone) for j in alike) / len(alike)
    pairs = position_pairs(torch.tensor(position).repeat(2), threshold)
    close(contrastive_loss(z, pairs, 0.1, "all"), total / len(exact))


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("rows", [2, 3])
def test_smallest_batches(rows, denominator):
    z = torch.randn(rows, 1, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    pairs = instance_pairs(torch.tensor([0, 0, 1])[:rows])
    close(contrastive_loss(z, pairs, 0.3, denominator), slow_contrastive_loss(z, pairs, 0.3, denominator), 1e-12)


# ------------------------------------------------------------------------------------------------------ outside library


@pytest.mark.parametrize("name", ["instance", "classes"])
def test_pytorch_metric_learning_agrees(name):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    random = torch.Generator().manual_seed(3)
    z = torch.randn(18, 5, generator=random)
    label = torch.arange(9).repeat(2) if name == "instance" else torch.randint(0, 3, (18,), generator=random)
    pairs = cluster_pairs(torch.arange(18), label)
    for outside, denominator in ((losses.SupConLoss(0.1), "all"), (losses.NTXentLoss(0.1), "pair")):
        expected = with_gradient(lambda z, outside=outside: outside(z, label), z)
        found = with_gradient(lambda z, denominator=denominator: contrastive_loss(z, pairs, 0.1, denominator), z)
        for a, b in zip(found, expected, strict=True):
            close(a, b, 1e-5)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_monai_agrees(denominator):
    losses = pytest.importorskip("monai.losses")
    random = torch.Generator().manual_seed(4)
    first, second = torch.randn(2, 7, 5, generator=random)
    found = contrastive_loss(torch.cat([first, second]), instance_pairs(torch.arange(7).repeat(2)), 0.5, denominator)
    close(found, losses.ContrastiveLoss(0.5)(first, second))


def test_cross_entropy_agrees():
    # with one positive per anchor the loss is the classification of the positive among all other rows
    z = torch.randn(10, 4, generator=torch.Generator().manual_seed(5))
    unit = F.normalize(z, dim=1)
    logits = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(logits, torch.arange(10).roll(5))
    close(contrastive_loss(z, instance_pairs(torch.arange(5).repeat(2)), 0.2), expected)


# ----------------------------------------------------------------------------------------------------------- reductions


def test_losses_with_the_same_pairs_are_the_same():
    random = torch.Generator().manual_seed(6)
    z, k = torch.randn(16, 4, generator=random), torch.arange(8).repeat(2)
    instance = instance_pairs(k)
    position = (k + 1) / 8
    for denominator in DENOMINATORS:
        value = contrastive_loss(z, instance, 0.1, denominator)
        for pairs in (
            cluster_pairs(k, k),
            position_pairs(position, 0.1),
            partition_pairs(k, k, "gd-"),
            partition_pairs(k, k, "gd"),
        ):
            assert contrastive_loss(z, pairs, 0.1, denominator) == value
        one_class = contrastive_loss(z, cluster_pairs(k, torch.zeros_like(k)), 0.1, denominator)
        assert contrastive_loss(z, position_pairs(position, torch.inf), 0.1, denominator) == one_class
        two_classes = contrastive_loss(z, cluster_pairs(k, k % 2), 0.1, denominator)
        assert contrastive_loss(z, partition_pairs(k, k % 2, "gd"), 0.1, denominator) == two_classes


@pytest.mark.parametrize("strategy", ["instance", "gd-"])
def test_the_denominators_agree_where_an_anchor_has_one_positive(strategy):
    z, k = torch.randn(16, 4, generator=torch.Generator().manual_seed(7)), torch.arange(8).repeat(2)
    pairs = instance_pairs(k) if strategy == "instance" else partition_pairs(k, k % 4, "gd-")
    close(contrastive_loss(z, pairs, 0.1, "all"), contrastive_loss(z, pairs, 0.1, "pair"))


def test_without_negatives():
    z, k = torch.randn(6, 3, generator=torch.Generator().manual_seed(8)), torch.arange(6)
    pairs = cluster_pairs(k, torch.zeros_like(k))
    value, gradient = with_gradient(lambda z: contrastive_loss(z, pairs, 0.1, "pair"), z)
    assert value == 0
    assert not gradient.any()
    collapsed = torch.ones(6, 3)
    close(contrastive_loss(collapsed, pairs, 0.1, "all"), math.log(5))  # its least value: five equal shares


# ---------------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_invariances(denominator):
    random = torch.Generator().manual_seed(9)
    z, pairs = torch.randn(9, 4, generator=random, dtype=torch.float64), random_pairs(9, random)
    value = contrastive_loss(z, pairs, 0.2, denominator)
    order = torch.randperm(9, generator=random)
    permuted = Pairs(pairs.positive[order][:, order], pairs.negative[order][:, order])
    close(contrastive_loss(z[order], permuted, 0.2, denominator), value, 1e-12)
    lengths = 10.0 ** torch.randint(-5, 6, (9, 1), generator=random)
    close(contrastive_loss(z * lengths, pairs, 0.2, denominator), value, 1e-12)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=random, dtype=torch.float64))[0]
    close(contrastive_loss(z @ rotation, pairs, 0.2, denominator), value, 1e-12)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_views_change_places(denominator):
    first, second = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(10))
    slice_id, view = torch.arange(6).repeat(2), torch.arange(2).repeat_interleave(6)
    pairs = partition_pairs(slice_id, slice_id % 3, "gd", view)
    value = contrastive_loss(torch.cat([first, second]), pairs, 0.1, denominator)
    close(contrastive_loss(torch.cat([second, first]), pairs, 0.1, denominator), value)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_rows_that_are_neither_take_no_part(denominator):
    random = torch.Generator().manual_seed(11)
    z, pairs = torch.randn(7, 3, generator=random), random_pairs(7, random)
    positive, negative = F.pad(pairs.positive, (0, 1, 0, 1)), F.pad(pairs.negative, (0, 1, 0, 1))
    padded, gradient = with_gradient(
        lambda z: contrastive_loss(z, Pairs(positive, negative), 0.1, denominator), torch.cat([z, torch.ones(1, 3)])
    )
    close(padded, contrastive_loss(z, pairs, 0.1, denominator))
    assert not gradient[-1].any()


# ----------------------------------------------------------------------------------------------- gradient and precision


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("seed", range(3))
def test_gradcheck(seed, denominator):
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 3, generator=random, dtype=torch.float64, requires_grad=True)
    pairs = random_pairs(6, random)
    assert torch.autograd.gradcheck(lambda z: contrastive_loss(z, pairs, 0.3, denominator), z)
    assert torch.autograd.gradgradcheck(lambda z: contrastive_loss(z, pairs, 0.3, denominator), z)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype, denominator):
    random = torch.Generator().manual_seed(12)
    z = torch.randn(16, 8, generator=random)
    near_identical = torch.cat([z, z + 1e-3 * torch.randn(16, 8, generator=random)]).to(dtype)
    pairs = instance_pairs(torch.arange(16).repeat(2))
    value, gradient = with_gradient(lambda z: contrastive_loss(z, pairs, 0.07, denominator), near_identical)
    exact, exact_gradient = with_gradient(
        lambda z: contrastive_loss(z, pairs, 0.07, denominator), near_identical.float()
    )
    assert value.dtype == torch.float32
    assert value == exact
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert torch.equal(gradient, exact_gradient.to(dtype))
    close(exact, slow_contrastive_loss(near_identical, pairs, 0.07, denominator), 1e-5)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_autocast_does_not_reach_the_similarities(denominator):
    random = torch.Generator().manual_seed(13)
    z, pairs = torch.randn(9, 32, generator=random), random_pairs(9, random)
    expected = with_gradient(lambda z: contrastive_loss(z, pairs, 0.07, denominator), z)
    found = with_gradient(under_autocast(lambda z: contrastive_loss(z, pairs, 0.07, denominator)), z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_a_tiny_temperature_overflows_nothing(denominator):
    random = torch.Generator().manual_seed(14)
    z, pairs = torch.randn(8, 4, generator=random), random_pairs(8, random)
    found = with_gradient(lambda z: contrastive_loss(z, pairs, 1e-3, denominator), z)
    assert all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_vector_of_length_zero(dtype, denominator):
    random = torch.Generator().manual_seed(15)
    z, pairs = torch.randn(7, 3, generator=random).to(dtype), random_pairs(7, random)
    z[0], z[-1] = 0, 0  # an anchor and its positive
    value, gradient = with_gradient(lambda z: contrastive_loss(z, pairs, 0.1, denominator), z)
    close(value, slow_contrastive_loss(z, pairs, 0.1, denominator), 1e-5)
    assert gradient.isfinite().all()
    assert not gradient[0].any()
    assert gradient[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_on_the_gpu_under_autocast(denominator):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    random = torch.Generator().manual_seed(16)
    z, pairs = torch.randn(64, 32, generator=random).half(), random_pairs(64, random)
    there = Pairs(pairs.positive.cuda(), pairs.negative.cuda())
    loss = under_autocast(lambda z: contrastive_loss(z, there, 0.07, denominator), "cuda", torch.float16)
    found = with_gradient(loss, z.cuda())
    expected = with_gradient(lambda z: contrastive_loss(z, pairs, 0.07, denominator), z)
    close(found[0].cpu(), expected[0], 1e-5)
    close(found[1].cpu(), expected[1], 1e-3)


# ------------------------------------------------------------------------------------------------- lean, and its errors


class Watch(TorchDispatchMode):
    """Counts operations and remembers the largest tensor that one returns."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_no_loop_over_anchors_and_no_tensor_above_rows_squared(denominator):
    operations = set()
    for slices in (8, 32):
        z, pairs = torch.randn(2 * slices, 50), cluster_pairs(torch.arange(2 * slices), torch.arange(2 * slices) % 4)
        with Watch() as watch:
            with_gradient(lambda z, pairs=pairs: contrastive_loss(z, pairs, 0.1, denominator), z)
        operations.add(watch.operations)
        assert watch.largest <= max((2 * slices) ** 2, z.numel())
    assert len(operations) == 1


PAIR = instance_pairs(torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contrastive_loss(torch.rand(3), PAIR), r"embedding must be \[B, D\], not \[3\]"),
        (lambda: contrastive_loss(torch.rand(3, 2, 2), PAIR), r"embedding must be \[B, D\]"),
        (lambda: contrastive_loss(torch.rand(4, 2), PAIR), "4 embeddings, but pairs of 3"),
        (lambda: contrastive_loss(torch.rand(3, 2), PAIR, 0.0), "temperature must be positive, not 0.0"),
        (lambda: contrastive_loss(torch.rand(3, 2), PAIR, -0.1), "temperature must be positive, not -0.1"),
        (lambda: contrastive_loss(torch.rand(3, 2), PAIR, float("nan")), "temperature must be positive"),
        (
            lambda: contrastive_loss(torch.rand(3, 2), PAIR, 0.1, "one"),
            "denominator must be 'all' or 'pair', not 'one'",
        ),
        (lambda: contrastive_loss(torch.rand(3, 2), instance_pairs(torch.arange(3))), "no anchor has a positive"),
    ],
)
def test_contrastive_loss_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ====================================================================================================== local contrast


def slow_local_loss(first, second, neighbours, temperature, image_pairs=None) -> Tensor:
    """The formula as it is written, in float64."""
    first, second = first.double(), second.double()

    def s(p, q):
        return p @ q / p.norm() / q.norm() / temperature

    def term(a, b, r):
        unlike = sum(s(a[r], a[m]).exp() + s(a[r], b[m]).exp() for m in neighbours[r])
        alike = s(a[r], b[r]).exp()
        return -torch.log(alike / (alike + unlike))

    terms = []
    for i, r in product(range(len(first)), range(len(neighbours))):
        terms += [term(first[i], second[i], r), term(second[i], first[i], r)]
        for j in range(len(first)):
            if image_pairs is not None and image_pairs[i, j]:
                terms.append(term(first[i], first[j], r))
    return sum(terms) / len(terms)


def random_local(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """first, second [B, R', D], neighbours [R, M], image_pairs [B, B] of any size, R <= R'."""
    random = torch.Generator().manual_seed(seed)
    images, extra, anchors, near, channels = (int(n) for n in torch.randint(1, 5, (5,), generator=random))
    regions = anchors + extra - 1 + (anchors == 1)
    first, second = torch.randn(2, images, regions, channels, generator=random, dtype=torch.float64)
    neighbours = torch.randint(0, regions, (anchors, near), generator=random)
    image_pairs = (torch.rand(images, images, generator=random) < 0.5).fill_diagonal_(False)
    return first, second, neighbours, image_pairs


def test_local_loss_of_one_image_by_hand():
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    second = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    near = torch.tensor([[1], [0]])
    # every region finds itself at s = 1 / T and its neighbour, in either map, at 0
    close(local_contrastive_loss(first, second, near, 1.0), math.log(1 + 2 / math.e))
    close(local_contrastive_loss(first, second, near), math.log1p(2 * math.exp(-10)))


def test_local_loss_of_both_directions_by_hand():
    first = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    second = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    near = torch.tensor([[1], [0]])
    e = math.e
    # alike, neighbour in the own map, neighbour in the other map
    forth = [math.log((e + e + 1) / e), math.log((1 + e + e) / 1)]
    back = [math.log((e + 1 + e) / e), math.log((1 + 1 + 1) / 1)]
    close(local_contrastive_loss(first, second, near, 1.0), sum(forth + back) / 4)


def test_image_pairs_by_hand():
    first = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    image_pairs = torch.tensor([[False, True], [False, False]])
    own = local_contrastive_loss(first, first, torch.tensor([[1]]), 1.0)
    close(own, (2 * math.log((math.e + 2) / math.e) + 2 * math.log(3)) / 4)
    # one more term: region 0 of image 0 is at 0 from that of image 1, from its neighbour here and from that there
    found = local_contrastive_loss(first, first, torch.tensor([[1]]), 1.0, image_pairs)
    close(found, (4 * own + math.log(3)) / 5)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_local_value_and_gradient_of_the_formula(seed, paired):
    first, second, neighbours, image_pairs = random_local(seed)
    image_pairs, temperature = image_pairs if paired else None, (0.1, 0.5, 2.0)[seed % 3]
    maps = first, second
    expected = with_gradient(lambda a, b: slow_local_loss(a, b, neighbours, temperature, image_pairs), *maps)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        found = with_gradient(
            lambda a, b: local_contrastive_loss(a, b, neighbours, temperature, image_pairs),
            *(embedding.to(dtype) for embedding in maps),
        )
        assert found[0].dtype == dtype
        for a, b in zip(found, expected, strict=True):
            close(a, b, tolerance)


def test_local_loss_is_the_kernel_with_other_pairs():
    random = torch.Generator().manual_seed(1)
    corners, neighbours = region_grid((48, 48), 3, 13)
    regions, anchors = len(corners), len(neighbours)
    first, second = torch.randn(2, 3, regions, 6, generator=random)
    positive = torch.zeros(2 * regions, 2 * regions, dtype=torch.bool)
    negative = torch.zeros_like(positive)
    for r, (here, there) in product(range(anchors), ((0, regions), (regions, 0))):
        positive[here + r, there + r] = True
        negative[here + r, neighbours[r]] = True
        negative[here + r, regions + neighbours[r]] = True
    pairs, images = Pairs(positive, negative), torch.cat([first, second], dim=1)
    expected = sum(contrastive_loss(embedding, pairs, 0.1, "pair") for embedding in images) / len(images)
    close(local_contrastive_loss(first, second, neighbours, 0.1), expected)


def test_local_invariances():
    first, second, neighbours, image_pairs = random_local(6)
    assert image_pairs.any()
    assert len(first) > 2
    value = local_contrastive_loss(first, second, neighbours, 0.2)
    close(local_contrastive_loss(second, first, neighbours, 0.2), value, 1e-12)
    close(local_contrastive_loss(first, second, neighbours.flip(1), 0.2), value, 1e-12)
    close(local_contrastive_loss(7 * first, second / 9, neighbours, 0.2), value, 1e-12)
    nobody = torch.zeros_like(image_pairs)
    close(local_contrastive_loss(first, second, neighbours, 0.2, nobody), value, 1e-12)
    paired = local_contrastive_loss(first, second, neighbours, 0.2, image_pairs)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))
    permuted = local_contrastive_loss(first[order], second[order], neighbours, 0.2, image_pairs[order][:, order])
    close(permuted, paired, 1e-12)
    more = torch.cat([first, torch.ones_like(first)], dim=1), torch.cat([second, torch.ones_like(first)], dim=1)
    close(local_contrastive_loss(*more, neighbours, 0.2, image_pairs), paired, 1e-12)


@pytest.mark.parametrize("paired", [False, True])
def test_local_gradcheck(paired):
    first, second, neighbours, image_pairs = random_local(6)
    inputs = first.requires_grad_(), second.requires_grad_()
    image_pairs = image_pairs if paired else None
    assert torch.autograd.gradcheck(lambda a, b: local_contrastive_loss(a, b, neighbours, 0.3, image_pairs), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_local_loss_in_half_precision(dtype):
    random = torch.Generator().manual_seed(2)
    _, neighbours = region_grid((48, 48), 1, 13)
    first = torch.randn(4, 13, 16, generator=random)
    second = first + 1e-3 * torch.randn(4, 13, 16, generator=random)
    first, second, image_pairs = first.to(dtype), second.to(dtype), ~torch.eye(4, dtype=torch.bool)
    first[0, 0] = 0
    expected = local_contrastive_loss(first.float(), second.float(), neighbours, 0.07, image_pairs)
    loss = under_autocast(lambda a, b: local_contrastive_loss(a, b, neighbours, 0.07, image_pairs))
    found = with_gradient(loss, first, second)
    assert found[0] == expected
    assert all(tensor.isfinite().all() for tensor in found)
    assert not found[1][0, 0].any()


LINE = torch.tensor([[1], [2], [0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 5), LINE), r"both be \[B, R, D\], not \[2, 3, 4\] and \[2, 3, 5\]"),
        ((torch.rand(3, 4), torch.rand(3, 4), LINE), r"both be \[B, R, D\]"),
        ((torch.rand(0, 3, 4), torch.rand(0, 3, 4), LINE), r"both be \[B, R, D\]"),
        (
            (torch.rand(2, 2, 4), torch.rand(2, 2, 4), LINE),
            r"must be \[R, M\] with R from 1 to 2, not \[3, 1\]",
        ),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE[0]), r"neighbours must be \[R, M\]"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE[:, :0]), r"neighbours must be \[R, M\]"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE + 1), "neighbours must be region indices from 0 to 2"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE - 1), "neighbours must be region indices from 0 to 2"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE, 0.0), "temperature must be positive"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE, 0.1, torch.eye(2)), r"image_pairs must be bool \[2, 2\]"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE, 0.1, torch.eye(3) > 1), r"image_pairs must be bool \[2, 2\]"),
        ((torch.rand(2, 3, 4), torch.rand(2, 3, 4), LINE, 0.1, torch.eye(2) > 0), "pairs an image with itself"),
    ],
)
def test_local_contrastive_loss_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        local_contrastive_loss(*arguments)


# ------------------------------------------------------------------------------------------------------------- regions

# The negatives as tabulated for the released code: A, K -> region: five negatives.
TABLES = {
    (13, 3): """
        (0,0): (0,h)(q,q)(q,h)(h,0)(h,q)
        (0,h): (0,0)(0,1)(q,q)(q,t)(h,h)
        (0,1): (0,h)(q,h)(q,t)(h,t)(h,1)
        (h,0): (0,0)(q,q)(h,h)(1,0)(t,q)
        (h,h): (q,q)(q,t)(t,q)(t,t)(h,0)
        (h,1): (0,1)(h,h)(1,1)(q,t)(t,t)
        (1,0): (h,0)(h,q)(1,h)(t,q)(t,h)
        (1,h): (h,h)(1,0)(1,1)(t,q)(t,t)
        (1,1): (h,t)(h,1)(1,h)(t,t)(t,h)
        (q,q): (0,0)(0,h)(h,0)(h,h)(q,t)
        (q,t): (0,h)(0,1)(q,q)(h,h)(h,1)
        (t,q): (h,0)(h,h)(1,0)(1,h)(t,t)
        (t,t): (h,h)(h,1)(1,h)(1,1)(t,q)""",
    (13, 1): """
        (0,0): (0,h)(h,0)(h,h)(q,q)(q,t)
        (0,h): (0,0)(0,1)(h,h)(q,q)(q,t)
        (0,1): (0,h)(h,h)(h,1)(t,q)(q,t)
        (h,0): (0,0)(h,h)(1,0)(q,q)(t,q)
        (h,h): (q,q)(q,t)(t,q)(t,t)(h,0)
        (h,1): (0,1)(h,h)(1,1)(q,t)(t,t)
        (1,0): (h,0)(h,h)(1,h)(t,q)(q,q)
        (1,h): (h,h)(1,0)(1,1)(t,q)(t,t)
        (1,1): (h,h)(h,1)(1,h)(t,t)(t,q)
        (q,q): (0,0)(0,h)(h,0)(h,h)(q,t)
        (q,t): (0,h)(0,1)(h,h)(h,1)(t,t)
        (t,q): (h,0)(h,h)(1,0)(0,h)(q,q)
        (t,t): (h,h)(h,1)(1,h)(1,1)(q,t)""",
    (9, 3): """
        (0,0): (0,h)(h,0)(h,h)(0,1)(1,0)
        (0,h): (0,0)(0,1)(h,0)(h,h)(h,1)
        (0,1): (0,0)(0,h)(h,h)(h,1)(1,1)
        (h,0): (0,0)(0,h)(h,h)(1,0)(1,h)
        (h,h): (0,0)(0,h)(h,0)(h,1)(1,h)
        (h,1): (0,h)(0,1)(h,h)(1,h)(1,1)
        (1,0): (0,0)(h,0)(h,h)(1,h)(1,1)
        (1,h): (h,0)(h,h)(h,1)(1,0)(1,1)
        (1,1): (0,1)(h,h)(h,1)(1,0)(1,h)""",
}
TABLES[9, 1] = TABLES[9, 3]
GRIDS = sorted(TABLES)


def coordinates(text: str, side: dict[str, int]) -> list[tuple[int, int]]:
    return [tuple(side[part] for part in place.split(",")) for place in text.strip(" ()").split(")(")]


@pytest.mark.parametrize(("regions", "size"), GRIDS)
def test_regions_and_negatives_of_the_released_code(regions, size):
    # 192 pixels, three decoder blocks: a map of 48 x 48
    side = {3: {"0": 0, "q": 11, "h": 22, "t": 33, "1": 44}, 1: {"0": 0, "q": 11, "h": 23, "t": 35, "1": 47}}[size]
    corners, neighbours = region_grid((48, 48), size, regions)
    places = [tuple(corner) for corner in corners.tolist()]
    rows = [line.split(":") for line in TABLES[regions, size].strip().splitlines()]
    assert places[:regions] == [coordinates(region, side)[0] for region, _ in rows]
    assert [[places[m] for m in row] for row in neighbours.tolist()] == [coordinates(row, side) for _, row in rows]


@pytest.mark.parametrize(("regions", "size"), GRIDS)
@pytest.mark.parametrize("map_size", [(48, 48), (8, 8), (12, 40), (20, 20), (96, 17)])
def test_region_grids_are_sound(regions, size, map_size):
    corners, neighbours = region_grid(map_size, size, regions)
    assert corners.dtype == neighbours.dtype == torch.int64
    assert len(corners) == (17 if (regions, size) == (13, 3) else regions)
    assert len(set(map(tuple, corners.tolist()))) == len(corners)
    assert neighbours.shape == (regions, 5)
    for r, row in enumerate(neighbours.tolist()):
        assert len(set(row)) == 5
        assert r not in row
    embedding = region_embeddings(torch.rand(2, 3, *map_size), corners, size)  # all inside, or an error
    assert local_contrastive_loss(embedding, embedding, neighbours).isfinite()


def test_region_grid_of_an_oblong_map():
    corners, _ = region_grid((12, 40), 3, 9)
    assert corners.tolist() == [[r, c] for r in (0, 4, 8) for c in (0, 18, 36)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((48, 48), 3, 10), "regions must be 9 or 13 and size 1 or 3, not 10 and 3"),
        (((48, 48), 2, 13), "regions must be 9 or 13 and size 1 or 3, not 13 and 2"),
        (((48, 7), 3, 13), "13 regions of size 3 need a map of 8 x 8 pixels, this one has 48 x 7"),
        (((5, 48), 3, 9), "need a map of 6 x 6"),
        (((4, 4), 1, 13), "need a map of 5 x 5"),
        (((2, 2), 1, 9), "need a map of 3 x 3"),
    ],
)
def test_region_grid_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        region_grid(*arguments)


def test_nearest_neighbours():
    line = torch.tensor([[0, 0], [0, 4], [0, 6], [0, 12]])
    assert nearest_neighbours(line, 1).tolist() == [[1], [2], [1], [2]]
    assert nearest_neighbours(line, 3).tolist() == [[1, 2, 3], [2, 0, 3], [1, 0, 3], [2, 1, 0]]
    corners, _ = region_grid((48, 48), 3, 9)
    assert nearest_neighbours(corners, 4)[4].tolist() == [1, 3, 5, 7]  # the centre: above, left, right, below
    assert nearest_neighbours(corners, 2)[0].tolist() == [1, 3]
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count must be from 1 to 3, not {count}"):
            nearest_neighbours(line, count)


def test_region_embeddings_by_hand():
    feature_map = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)  # channel 0 counts 0..15, channel 1 counts 16..31
    found = region_embeddings(feature_map, torch.tensor([[0, 0], [1, 2]]), 2)
    assert found.tolist() == [[[0, 16, 1, 17, 4, 20, 5, 21], [6, 22, 7, 23, 10, 26, 11, 27]]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_region_embeddings_are_slices(size):
    random = torch.Generator().manual_seed(0)
    feature_map = torch.randn(2, 5, 7, 9, generator=random)
    corners = torch.tensor([[0, 0], [2, 3], [7 - size, 9 - size], [2, 3]])
    patches = [feature_map[:, :, r : r + size, c : c + size] for r, c in corners.tolist()]
    expected = torch.stack([patch.permute(0, 2, 3, 1).flatten(1) for patch in patches], dim=1)
    assert torch.equal(region_embeddings(feature_map, corners, size), expected)
    strided = feature_map.contiguous(memory_format=torch.channels_last)
    assert torch.equal(region_embeddings(strided, corners, size), expected)


def test_region_embeddings_gradcheck():
    feature_map = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    corners = torch.tensor([[0, 0], [1, 1], [1, 1]])  # regions that overlap
    assert torch.autograd.gradcheck(lambda x: region_embeddings(x, corners, 3), feature_map)


@pytest.mark.parametrize(
    ("shape", "corners", "size", "message"),
    [
        (
            (2, 3, 4),
            [[0, 0]],
            1,
            r"must be \[B, D, H, W\] and corners \[R, 2\], not \[2, 3, 4\] and \[1, 2\]",
        ),
        ((1, 2, 4, 4), [[0, 0, 0]], 1, r"corners \[R, 2\]"),
        ((1, 2, 4, 6), [[2, 0]], 3, "a region of size 3 is not inside the map of 4 x 6"),
        ((1, 2, 4, 6), [[0, 4]], 3, "not inside"),
        ((1, 2, 4, 6), [[0, 0], [-1, 0]], 1, "not inside"),
        ((1, 2, 4, 6), [[0, 0]], 0, "not inside"),
    ],
)
def test_region_embeddings_says_what_is_wrong(shape, corners, size, message):
    with pytest.raises(ValueError, match=message):
        region_embeddings(torch.rand(shape), torch.tensor(corners), size)


# ======================================================================================================== segmentation


def slow_dice_loss(logits: Tensor, label: Tensor) -> Tensor:
    scores = []
    for image, truth in zip(logits.double(), label, strict=True):
        exponential = image.exp()
        probability = exponential / exponential.sum(dim=0)
        for k in range(len(image)):
            inside = (truth == k).double()
            scores.append(2 * (probability[k] * inside).sum() / (probability[k].sum() + inside.sum() + 1e-10))
    return 1 - sum(scores) / len(scores)


def slow_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    terms = []
    for image, truth in zip(logits.double(), label, strict=True):
        for place in product(*map(range, truth.shape)):
            exponential = image[(slice(None), *place)].exp()
            terms.append(-torch.log(exponential[truth[place]] / exponential.sum()))
    return sum(terms) / len(terms)


def test_segmentation_losses_by_hand():
    # two pixels, two classes; p = (3/4, 1/4) and (1/2, 1/2), labels 0 and 1
    logits = torch.tensor([[[[math.log(3.0), 0.0]], [[0.0, 0.0]]]])
    label = torch.tensor([[[0, 1]]])
    dice = 1 - (2 * 0.75 / (1.25 + 1) + 2 * 0.5 / (0.75 + 1)) / 2
    entropy = -(math.log(0.75) + math.log(0.5)) / 2
    close(dice_loss(logits, label), dice)
    close(cross_entropy(logits, label), entropy)
    close(dice_cross_entropy(logits, label), dice + entropy)


def test_dice_of_a_perfect_prediction_and_of_an_absent_class():
    label = torch.tensor([[[0, 1], [2, 2]]])
    logits = 100.0 * F.one_hot(label, 3).permute(0, 3, 1, 2)
    close(dice_loss(logits, label), 0)
    # the same with a fourth class that neither has: it counts 0 of 4, as released
    close(dice_loss(F.pad(logits, (0, 0, 0, 0, 0, 1), value=-100.0), label), 0.25)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 4, 5, 6), (2, 3, 2, 3, 4)])
def test_segmentation_losses_are_their_formulas(shape):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=random, dtype=torch.float64)
    label = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=random)
    for loss, slow in ((dice_loss, slow_dice_loss), (cross_entropy, slow_cross_entropy)):
        expected = with_gradient(lambda x, slow=slow: slow(x, label), logits)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            found = with_gradient(lambda x, loss=loss: loss(x, label), logits.to(dtype))
            assert found[0].dtype == dtype
            for a, b in zip(found, expected, strict=True):
                close(a, b, tolerance)


def test_monai_dice_agrees():
    losses = pytest.importorskip("monai.losses")
    random = torch.Generator().manual_seed(1)
    logits, label = torch.randn(3, 4, 8, 8, generator=random), torch.randint(0, 3, (3, 8, 8), generator=random)
    outside = losses.DiceLoss(softmax=True, to_onehot_y=True, smooth_nr=0, smooth_dr=1e-10)
    close(dice_loss(logits, label), outside(logits, label[:, None]))


@pytest.mark.parametrize("name", SEGMENTATION_LOSSES)
def test_segmentation_losses_gradcheck_and_half_precision(name):
    random = torch.Generator().manual_seed(2)
    loss = SEGMENTATION_LOSSES[name]
    logits = torch.randn(2, 3, 3, 2, generator=random, dtype=torch.float64, requires_grad=True)
    label = torch.randint(0, 3, (2, 3, 2), generator=random)
    assert torch.autograd.gradcheck(lambda x: loss(x, label), logits)
    half = (100 * logits.detach()).half()
    value, gradient = with_gradient(under_autocast(lambda x: loss(x, label)), half)
    assert value == loss(half.float(), label)
    assert gradient.isfinite().all()
    order = torch.tensor([1, 0])
    close(loss(logits[order], label[order]), loss(logits, label), 1e-12)


def test_every_loss_that_a_method_can_name_is_there():
    assert set(SEGMENTATION_LOSSES) == set(get_args(SupervisedRecipe.model_fields["loss"].annotation))


@pytest.mark.parametrize("loss", SEGMENTATION_LOSSES.values())
@pytest.mark.parametrize(("logits", "label"), [((2, 3, 4, 4), (2, 4, 5)), ((2, 3, 4, 4), (2, 1, 4, 4)), ((2, 3), (2,))])
def test_segmentation_losses_say_what_is_wrong(loss, logits, label):
    with pytest.raises(ValueError, match=r"logits must be \[B, K, ...\] and label \[B, ...\], not"):
        loss(torch.rand(logits), torch.zeros(label, dtype=torch.int64))


# =========================================================================================================== two ranks


def test_gather_of_one_process_is_the_tensor_itself():
    tensor = torch.rand(2, 3, requires_grad=True)
    assert gather(tensor) is tensor


def test_two_ranks_are_one_process(tmp_path):
    program = Path(__file__).with_name("two_ranks.py")
    spec = importlib.util.spec_from_file_location("two_ranks", program)
    two_ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(two_ranks)

    random = torch.Generator().manual_seed(0)
    about = {
        "slice_id": torch.arange(6).repeat(2),  # the two views of a slice are on different ranks
        "partition": torch.arange(3).repeat(4),
        "augmented": torch.arange(2).repeat_interleave(6).bool(),
        "position": (torch.rand(6, generator=random) + 0.01).repeat(2),
    }
    image = torch.randn(12, 8, generator=random, dtype=torch.float64)
    weight = torch.randn(30, 8, generator=random, dtype=torch.float64)
    torch.save({"about": about, "image": image, "weight": weight}, tmp_path / "inputs.pt")
    paths = os.pathsep.join([str(program.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), str(tmp_path)]
    processes = [subprocess.Popen([*command, rank], env=environment) for rank in ("0", "1")]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()

    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, loss in two_ranks.LOSSES.items():
        network = two_ranks.linear(weight)
        value = loss(network(image), about)
        value.backward()
        for rank in ranks:
            close(rank[name][0], value.detach(), 1e-12)
            close(rank[name][1], network.weight.grad, 1e-10)
        assert network.weight.grad.any()
