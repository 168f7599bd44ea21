import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from scipy.ndimage import label as components
from scipy.stats import rankdata

from clseg.data import phantom
from clseg.data.phantom import phantom_volume

RV, MYO, LV = 1, 2, 3
SUBJECTS = [f"phantom{i:03d}" for i in range(16)]


@pytest.fixture(scope="module")
def volumes():
    return [phantom_volume(subject) for subject in SUBJECTS]


@pytest.fixture(scope="module")
def systole():
    return [phantom_volume(subject, "ES") for subject in SUBJECTS]


def areas(volume):
    """Pixels of every class in every slice: [Z, 4]."""
    return np.array([np.bincount(plane.ravel(), minlength=4) for plane in volume.label])


def around(region):
    return binary_dilation(region) & ~region


def digest(volume):
    return hashlib.sha256(volume.image.tobytes() + volume.label.tobytes()).hexdigest()


# ------------------------------------------------------------------------------------------------- one id, one volume


def test_same_bytes_in_another_process_with_other_hash_seed():
    script = """
import hashlib
from clseg.data.phantom import phantom_volume
phantom_volume("somebody else")
for phase in ("ES", "ED"):
    volume = phantom_volume("phantom007", phase)
    print(hashlib.sha256(volume.image.tobytes() + volume.label.tobytes()).hexdigest())
"""
    answers = []
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(phantom.__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        answers.append(done.stdout.split())
    assert answers[0] == answers[1] == [digest(phantom_volume("phantom007", phase)) for phase in ("ES", "ED")]


def test_global_random_state_is_neither_read_nor_changed():
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    first = digest(phantom_volume("phantom001"))
    assert np.random.random() == expected  # noqa: NPY002
    assert digest(phantom_volume("phantom001")) == first


def test_ids_and_phases_differ(volumes, systole):
    assert len({digest(volume) for volume in [*volumes, *systole]}) == 2 * len(SUBJECTS)
    assert digest(phantom_volume("a")) != digest(phantom_volume("A"))


def test_a_changed_voxel_needs_a_new_version(volumes):
    """The store is keyed by VERSION. Does this fail? Then the voxels changed: raise VERSION and renew the numbers."""
    volume = volumes[0]
    assert phantom.VERSION == 1
    assert volume.image.shape == (1, 9, 136, 136)
    assert areas(volume).sum(0).tolist() == [156129, 3545, 2647, 4143]
    assert volume.image.mean(dtype=np.float64) == pytest.approx(786.4988, abs=0.001)  # of whole numbers


def test_unknown_phase():
    with pytest.raises(ValueError, match="'diastole'"):
        phantom_volume("phantom000", "diastole")


# ---------------------------------------------------------------------------------------------------------- the volume


def test_shape_type_and_units(volumes):
    for subject, volume in zip(SUBJECTS, volumes, strict=True):
        channels, *shape = volume.image.shape
        assert channels == 1
        assert volume.label.shape == tuple(shape)
        assert (volume.image.dtype, volume.label.dtype) == (np.float32, np.uint8)
        assert 8 <= shape[0] <= 12
        assert all(128 <= size <= 160 for size in shape[1:])
        assert (volume.image >= 0).all()
        assert (volume.image == np.rint(volume.image)).all()
        assert volume.image.max() > 100  # the scanner's unit, not normalised
        assert set(np.unique(volume.label)) == {0, RV, MYO, LV}
        assert (volume.subject, volume.phase, volume.flips) == (subject, "ED", (False, False, False))


def test_spacing_and_affine_agree(volumes):
    for volume in volumes:
        z_mm, y_mm, x_mm = volume.spacing_mm
        assert all(type(value) is float for value in volume.spacing_mm)
        assert 8 <= z_mm <= 10
        assert y_mm == x_mm
        assert 1.4 <= y_mm <= 1.8
        np.testing.assert_array_equal(volume.affine, np.diag([x_mm, y_mm, z_mm, 1.0]))


def test_subjects_and_scanners_differ(volumes):
    assert len({volume.spacing_mm for volume in volumes}) > len(volumes) // 2
    assert len({volume.image.shape for volume in volumes}) > len(volumes) // 2
    blood = np.array([np.median(volume.image[0][volume.label == LV]) for volume in volumes])
    muscle = np.array([np.median(volume.image[0][volume.label == MYO]) for volume in volumes])
    assert blood.max() / blood.min() > 4
    assert (blood / muscle).min() < 1.7
    assert (blood / muscle).max() > 2.5
    cavity_ml = [(v.label == LV).sum() * np.prod(v.spacing_mm) / 1000 for v in volumes]
    share = [(v.label == MYO).sum() / (v.label == LV).sum() for v in volumes]  # thick or thin walls
    assert max(cavity_ml) / min(cavity_ml) > 2
    assert max(share) / min(share) > 2


# --------------------------------------------------------------------------------------------------------- the anatomy


def test_heart_lies_inside_the_image_and_in_one_piece(volumes, systole):
    for volume in [*volumes, *systole]:
        assert not volume.label[:, [0, -1]].any()
        assert not volume.label[:, :, [0, -1]].any()
        for plane in volume.label:
            pieces = [components(plane == k, np.ones((3, 3)))[1] for k in (RV, MYO, LV)]
            assert pieces[0] <= 1
            assert pieces[1:] == [1, 1]


def test_right_ventricle_ends_before_the_apex(volumes, systole):
    for volume in [*volumes, *systole]:
        has_rv = areas(volume)[:, RV] > 0
        assert has_rv[: len(has_rv) // 2].all()
        assert not has_rv[-1]
        assert (np.diff(has_rv.astype(int)) <= 0).all()  # once gone, it stays away


def test_left_ventricle_is_walled_in_except_at_the_base(volumes, systole):
    for volume in [*volumes, *systole]:
        leaks = [(plane[around(plane == LV)] != MYO).sum() for plane in volume.label]
        assert leaks[0] > 0
        assert not any(leaks[1:])


def test_right_ventricle_touches_the_myocardium(volumes, systole):
    for volume in [*volumes, *systole]:
        for plane in volume.label:
            if (plane == RV).any():
                assert (plane[around(plane == RV)] == MYO).any()


def test_chambers_shrink_towards_the_apex(volumes):
    for volume in volumes:
        base, middle, apex = (part.mean(0) for part in np.array_split(areas(volume), 3))
        assert (base[[RV, LV]] > middle[[RV, LV]]).all()
        assert (middle[[RV, LV]] > apex[[RV, LV]]).all()
        assert middle[MYO] > apex[MYO]


def test_papillary_muscles_are_dark_and_count_as_cavity(volumes):
    for volume in volumes:
        middle = len(volume.label) // 2
        image, cavity = volume.image[0, middle], volume.label[middle] == LV
        blood, muscle = (np.median(image[volume.label[middle] == k]) for k in (LV, MYO))
        assert (image[cavity] < (blood + muscle) / 2).sum() >= 5


def test_systole_has_a_smaller_cavity_and_a_thicker_wall(volumes, systole):
    for diastole, contracted in zip(volumes, systole, strict=True):
        assert contracted.spacing_mm == diastole.spacing_mm
        before, after = areas(diastole).sum(0), areas(contracted).sum(0)
        assert 0.2 < after[LV] / before[LV] < 0.95
        assert after[RV] < before[RV]
        assert after[MYO] == pytest.approx(before[MYO], rel=0.1)  # muscle keeps its volume, so its wall thickens


# -------------------------------------------------------------------------------------------------- not by grey value


def best_window_dice(image, region):
    """The highest Dice of any rule `low <= intensity < high`, over 60 quantiles."""
    edges = np.quantile(image, np.linspace(0, 1, 61))
    everything, inside = (np.r_[0, np.histogram(values, edges)[0].cumsum()] for values in (image, image[region]))
    chosen, hit = everything[None] - everything[:, None], inside[None] - inside[:, None]
    return (2 * hit / np.where(chosen < 0, np.inf, chosen + region.sum())).max()


def test_no_window_of_intensities_segments_the_heart(volumes):
    found = [
        [
            best_window_dice(v.image[0], mask)
            for mask in (np.isin(v.label, [RV, LV]), *(v.label == k for k in (RV, MYO, LV)))
        ]
        for v in volumes
    ]
    assert (np.mean(found, 0) < [0.5, 0.4, 0.35, 0.4]).all()
    assert np.max(found) < 0.75


def test_intensity_alone_does_not_rank_the_myocardium(volumes):
    for volume in volumes:
        rank = rankdata(volume.image[0]).reshape(volume.label.shape)
        for k, low, high in ((MYO, 0.4, 0.85), (RV, 0.5, 0.98), (LV, 0.6, 0.98)):
            mask = volume.label == k
            auc = (rank[mask].mean() - (mask.sum() + 1) / 2) / (~mask).sum()
            assert low < auc < high
