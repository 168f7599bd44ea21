import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from clseg.metrics import dice, hd95, score, volume_dice

NAMES = {1: "right ventricle", 2: "myocardium"}


def blob(seed: int, shape=(7, 22, 18), share=0.25) -> np.ndarray:
    """A smooth random mask; it may touch the border of the image and have several parts."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), (0.8, 2.5, 2.5))
    return noise > np.quantile(noise, 1 - share)


def one_hot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32))  # [1, 2, Z, Y, X]


def monai_hd95(prediction, reference, spacing):
    metrics = pytest.importorskip("monai.metrics")
    value = metrics.compute_hausdorff_distance(
        one_hot(prediction), one_hot(reference), percentile=95, spacing=list(spacing)
    )
    return value.item()


# ------------------------------------------------------------------------------------------------------ literal cases


def test_dice_literal():
    a, b = np.array([1, 1, 1, 0], bool), np.array([0, 1, 1, 0], bool)
    assert dice(a, b) == pytest.approx(4 / 5)
    assert dice(a, ~a) == 0
    assert math.isnan(dice(np.zeros(3, bool), np.zeros(3, bool)))


def test_hd95_of_two_voxels_is_their_distance_in_mm():
    a, b = np.zeros((4, 9, 9), bool), np.zeros((4, 9, 9), bool)
    a[0, 1, 2], b[2, 4, 6] = True, True
    assert hd95(a, b) == pytest.approx(math.sqrt(4 + 9 + 16))
    assert hd95(a, b, (10.0, 1.5, 2.0)) == pytest.approx(math.sqrt(20**2 + 4.5**2 + 8**2))


def test_hd95_ignores_five_percent_of_the_surface_but_not_more():
    reference = np.zeros((1, 3, 140), bool)
    reference[0, 1, :100] = True  # a line: all of it is surface
    near, far = reference.copy(), reference.copy()
    near[0, 1, 100:104] = True  # 4 of 104 voxels stick out
    far[0, 1, 100:112] = True  # 12 of 112
    assert hd95(near, reference) == 0
    assert hd95(far, reference) == pytest.approx(np.percentile([0] * 100 + list(range(1, 13)), 95))
    assert hd95(far, reference) > 0


def test_hd95_is_the_larger_of_both_directions():
    small, large = np.zeros((5, 21, 21), bool), np.zeros((5, 21, 21), bool)
    small[2, 10, 10] = True
    large[2, 10, 2:19] = True  # from the large one 8 px, from the small one 0
    assert hd95(small, large) == hd95(large, small) == pytest.approx(np.percentile(np.abs(np.arange(-8, 9)), 95))


def test_a_single_slice_is_two_dimensional():
    square, hollow = np.zeros((1, 20, 20), bool), np.zeros((1, 20, 20), bool)
    square[0, 4:16, 4:16] = True
    hollow[0, 4:16, 4:16] = True
    hollow[0, 7:13, 7:13] = False  # its inner rim is 2 px from the outline; a solid square has no surface there
    assert hd95(square, hollow) == 2


def test_empty_mask_has_no_distance():
    with pytest.raises(ValueError, match="empty"):
        hd95(np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool))


# ------------------------------------------------------------------------------------------------- the empty-mask rule


def rows_of(prediction, reference, spacing_mm=(10.0, 1.0, 2.0)):
    return {row["class_name"]: row for row in score(prediction, reference, NAMES, spacing_mm)}


def test_missed_false_and_absent_structures():
    shape, diagonal = (4, 8, 8), math.sqrt(40**2 + 8**2 + 16**2)
    empty, ventricle = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    ventricle[1:3, 2:5, 2:5] = 1

    missed = rows_of(empty, ventricle)
    assert missed["right ventricle"] == {
        "class_name": "right ventricle",
        "dice": 0,
        "hd95": pytest.approx(diagonal),
        "hd95_unit": "mm",
        "missed": 1,
    }
    assert math.isnan(missed["myocardium"]["dice"])
    assert math.isnan(missed["myocardium"]["hd95"])
    assert missed["myocardium"]["missed"] == 0

    false = rows_of(ventricle, empty)["right ventricle"]
    assert (false["dice"], false["missed"]) == (0, 0)
    assert false["hd95"] == pytest.approx(diagonal)

    perfect = rows_of(ventricle, ventricle)["right ventricle"]
    assert (perfect["dice"], perfect["hd95"], perfect["missed"]) == (1, 0, 0)


def test_missing_is_never_better_than_finding():
    reference, corner = np.zeros((3, 6, 6), np.uint8), np.zeros((3, 6, 6), np.uint8)
    reference[0, 0, 0], corner[2, 5, 5] = 1, 1  # the worst place
    worst, missed = (rows_of(p, reference)["right ventricle"]["hd95"] for p in (corner, np.zeros_like(corner)))
    assert worst < missed


def test_structures_are_scored_one_by_one_in_the_order_of_the_names():
    reference = np.zeros((2, 6, 6), np.int64)
    reference[:, :2], reference[:, 4:] = 1, 2
    swapped = np.select([reference == 1, reference == 2], [2, 1], 0)
    assert [row["class_name"] for row in score(reference, reference, NAMES, None)] == list(NAMES.values())
    assert [row["dice"] for row in score(reference, reference, NAMES, None)] == [1, 1]
    assert [row["dice"] for row in score(swapped, reference, NAMES, None)] == [0, 0]
    assert [row["missed"] for row in score(swapped, reference, NAMES, None)] == [0, 0]


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing"),
    [
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 5)), None),
        (np.zeros((3, 4)), np.zeros((3, 4)), None),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), (1.0, 0.0, 1.0)),
        (np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), (float("nan"), 1.0, 1.0)),
    ],
)
def test_wrong_arguments(prediction, reference, spacing):
    with pytest.raises(ValueError, match="must be"):
        score(prediction, reference, NAMES, spacing)


# --------------------------------------------------------------------------------------------------- without a spacing


def test_without_spacing_a_slice_step_is_one_pixel():
    a, b = np.zeros((5, 9, 9), np.uint8), np.zeros((5, 9, 9), np.uint8)
    a[1, 4, 4], b[3, 4, 4] = 1, 1
    row = score(a, b, {1: "x"}, None)[0]
    assert (row["hd95"], row["hd95_unit"]) == (2, "px")
    assert score(a, np.zeros_like(b), {1: "x"}, None)[0]["hd95"] == pytest.approx(math.sqrt(25 + 81 + 81))


@given(st.integers(0, 10_000), st.floats(1, 12))
@settings(max_examples=25, deadline=None)
def test_pixels_are_a_lower_bound_where_slices_are_thick(seed, ratio):
    a, b = blob(seed), blob(seed + 1)
    assert hd95(a, b) <= hd95(a, b, (ratio, 1.0, 1.0)) + 1e-9


def test_millimetres_are_pixels_times_the_side_of_an_isotropic_voxel():
    a, b = blob(1), blob(2)
    assert hd95(a, b, (1.5, 1.5, 1.5)) == pytest.approx(1.5 * hd95(a, b))


# ------------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (9.3, 1.367, 0.8)])
def test_hd95_equals_monai(seed, spacing):
    prediction, reference = blob(seed, share=0.1 + 0.1 * (seed % 3)), blob(seed + 100)
    assert hd95(prediction, reference, spacing) == pytest.approx(monai_hd95(prediction, reference, spacing), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_hd95_of_one_slice_equals_monai_in_two_dimensions(seed):
    metrics = pytest.importorskip("monai.metrics")
    a, b = blob(seed, (1, 30, 26)), blob(seed + 50, (1, 30, 26))
    flat = [torch.from_numpy(np.stack([~mask[0], mask[0]])[None].astype(np.float32)) for mask in (a, b)]
    expected = metrics.compute_hausdorff_distance(*flat, percentile=95, spacing=[0.7, 1.9]).item()
    assert hd95(a, b, (5.0, 0.7, 1.9)) == pytest.approx(expected, rel=1e-5)


def test_structure_in_one_slice_of_a_volume_is_three_dimensional():
    a, b = np.zeros((5, 30, 26), bool), np.zeros((5, 30, 26), bool)
    a[2], b[2] = blob(1, (1, 30, 26))[0], blob(2, (1, 30, 26))[0]
    spacing = (5.0, 0.7, 1.9)
    assert hd95(a, b, spacing) == pytest.approx(monai_hd95(a, b, spacing), rel=1e-5)
    assert hd95(a, b, spacing) != pytest.approx(hd95(a[2:3], b[2:3], spacing), rel=1e-3)


def test_dice_equals_monai():
    metrics = pytest.importorskip("monai.metrics")
    reference, prediction = np.zeros((7, 22, 18), int), np.zeros((7, 22, 18), int)
    for index in (1, 2, 3):
        reference[blob(index, share=0.2)] = index
        prediction[blob(10 + index, share=0.2)] = index
    encoded = [
        torch.nn.functional.one_hot(torch.from_numpy(v), 4).movedim(-1, 0)[None] for v in (prediction, reference)
    ]
    expected = metrics.DiceMetric(include_background=False, reduction="none")(*encoded)[0]
    rows = score(prediction, reference, {1: "a", 2: "b", 3: "c"}, None)
    assert [row["dice"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)
    assert volume_dice(prediction, reference, range(1, 4)) == pytest.approx(expected.mean().item(), abs=1e-6)


# ------------------------------------------------------------------------------------------------ invariances, volumes


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_symmetric_and_blind_to_flips_and_margins(seed):
    a, b, spacing = blob(seed), blob(seed + 7), (8.0, 1.2, 1.5)
    value = hd95(a, b, spacing)
    assert hd95(b, a, spacing) == value
    assert hd95(a[::-1, :, ::-1], b[::-1, :, ::-1], spacing) == pytest.approx(value)
    margins = ((2, 3), (5, 0), (1, 4))
    assert hd95(np.pad(a, margins), np.pad(b, margins), spacing) == pytest.approx(value)


def test_repeated_score_is_the_same():
    a, b = blob(3).astype(np.uint8), blob(4).astype(np.uint8)
    assert score(a, b, {1: "x"}, (8.0, 1.2, 1.5)) == score(a, b, {1: "x"}, (8.0, 1.2, 1.5))


def test_volume_dice_leaves_absent_classes_out():
    reference, prediction = np.zeros((2, 4, 4), int), np.zeros((2, 4, 4), int)
    reference[:, :2], prediction[:, :2] = 1, 1
    assert volume_dice(prediction, reference, [1, 2]) == 1  # class 2 is nowhere
    prediction[:, 3] = 2
    assert volume_dice(prediction, reference, [1, 2]) == 0.5  # now it is a false structure
    assert math.isnan(volume_dice(prediction * 0, reference * 0, [1, 2]))
