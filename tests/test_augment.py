"""Augmentation: what moves, by how much, and that image and label move together."""

import pytest
import torch
from torch.nn import functional as F

from clseg import augment
from clseg.recipes.supervised import one_hot


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(batch=16, side=64):
    """Smooth images, so that interpolation hardly changes values."""
    axis = torch.linspace(0, 3, side)
    return (0.5 + 0.3 * torch.sin(axis)[:, None] * torch.cos(axis)[None, :]).expand(batch, 1, side, side).clone()


def test_crop_covers_100_of_192_of_the_side_within_the_published_corners():
    side = 192
    rows = ((torch.arange(side) + 0.5) / side).view(1, 1, side, 1).expand(500, 1, side, side).contiguous()
    for image in (rows, rows.transpose(2, 3).contiguous()):
        view = augment.crop_resize(image, generator())
        line = view[:, 0, :, side // 2] if image is rows else view[:, 0, side // 2]
        low, high = line[:, 0], line[:, -1]
        extent = (high - low) * side / (side - 1)
        torch.testing.assert_close(extent, torch.full_like(extent, 100 / 192), atol=2e-3, rtol=0)
        corner = low * side
        assert corner.min() >= 10
        assert corner.max() < 71
        assert corner.min() < 12
        assert corner.max() > 68


def test_intensity_is_affine_per_image_within_the_published_ranges():
    image = torch.rand(200, 2, 16, 16, generator=generator()) * 0.2 + 0.5
    view = augment.intensity(image, generator(1))
    centred = (image - image.mean(dim=(2, 3), keepdim=True)).flatten(2)
    factor = (view.flatten(2) * centred).sum(2) / (centred**2).sum(2)  # slope of view against image, [B, C]
    torch.testing.assert_close(factor[:, 0], factor[:, 1], atol=1e-4, rtol=0)
    assert 0.7 <= factor.min() < 0.72
    assert 1.28 < factor.max() <= 1.3
    shift = (view - image).mean(dim=(1, 2, 3))
    assert -0.3001 <= shift.min() < -0.29
    assert 0.29 < shift.max() <= 0.3001
    assert (augment.intensity(image + 5, generator(1)) <= 1.5).all()
    assert (augment.intensity(image - 5, generator(1)) >= 0).all()
    z_scores = torch.randn(50, 1, 16, 16, generator=generator())
    view = augment.intensity(z_scores, generator(1), "z_score")
    assert (view == 0).sum() == 0  # half of them lie below
    torch.testing.assert_close(view.flatten(1).std(1) / z_scores.flatten(1).std(1), view.new_ones(50), atol=0.3, rtol=0)


def test_views_depend_on_the_generator_only():
    image = smooth()
    first, again, other = (augment.contrast_view(image, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.allclose(first[0], first[1])


def deformed(grid_of, image, label, generator):
    """An image and the probabilities of its labels [B, classes, ...] on one grid."""
    grid = grid_of(image, generator)
    return augment.warp(image, grid), augment.warp_label(one_hot(label, 3), grid)


def test_image_and_label_are_deformed_alike():
    side = 96
    axis = torch.arange(side, dtype=torch.float32)
    blob = ((axis[:, None] - 40) ** 2 / 300 + (axis[None, :] - 55) ** 2 / 500 < 1).float()
    image = blob.expand(64, 1, side, side).clone()
    label = blob.long().expand(64, side, side).clone()
    view, moved = deformed(augment.finetune_grid, image, label, generator())
    torch.testing.assert_close(moved[:, 1], view[:, 0])
    torch.testing.assert_close(moved[:, 0], 1 - view[:, 0])
    changed = (moved.argmax(dim=1) != label).flatten(1).any(dim=1)
    assert changed.sum() > 32  # elastic deformation reaches most of the batch


def test_fine_tuning_choices_keep_the_published_limits():
    """A disc's area changes by at most the published scales, where no elastic deformation is applied."""
    side = 96
    axis = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 < 20**2).float()
    areas = []
    for seed in range(60):
        label = disc.long().expand(20, side, side).clone()
        _, moved = deformed(augment.finetune_grid, label[:, None].float(), label, generator(seed))
        areas.append(moved[0, 1].sum() / disc.sum())  # the first image is never deformed elastically
    areas = torch.stack(areas)
    assert areas.min() >= 0.95**2 - 0.02
    assert areas.max() <= 1.05**2 + 0.02
    assert areas.std() > 0.005


def test_rotation_keeps_angles_in_images_that_are_not_square():
    height, width = 64, 128
    rows = torch.arange(height, dtype=torch.float32)[:, None] - (height - 1) / 2
    columns = torch.arange(width, dtype=torch.float32)[None, :] - (width - 1) / 2
    disc = (rows**2 + columns**2 < 15**2).long()
    for seed in range(40):
        label = disc.expand(8, height, width).clone()
        _, moved = deformed(augment.finetune_grid, label[:, None].float(), label, generator(seed))
        extent = [int((moved[0, 1] > 0.5).any(dim=axis).sum()) for axis in (0, 1)]
        assert abs(extent[0] - extent[1]) <= 3


def test_elastic_fields_have_the_published_standard_deviation():
    image = torch.empty(4000, 1, 9, 9)
    still, nodes = torch.eye(2, 3).expand(4000, -1, -1), augment.elastic_nodes(image, generator())
    field = augment.sampling_grid(image, still, nodes) - augment.sampling_grid(image, still)
    corner_px = field[:, 0, 0] * 192 / 2
    torch.testing.assert_close(corner_px.std(), torch.tensor(5.0), atol=0.15, rtol=0)


@pytest.mark.parametrize("sides", [(12, 20), (5, 12, 20)])
def test_the_grid_is_the_one_that_pytorch_makes(sides):
    """An affine grid plus a field that was upsampled, here with the functions of the library."""
    image, dimensions = torch.empty(3, 2, *sides), len(sides)
    theta, nodes = torch.randn(3, 2, 3), torch.randn(3, dimensions, *[4] * dimensions)
    whole = theta if dimensions == 2 else F.pad(theta, (0, 1, 0, 1))
    if dimensions == 3:
        whole[:, :2, 2], whole[:, :2, 3], whole[:, 2, 2] = 0, theta[:, :, 2], 1
    affine = F.affine_grid(whole, [3, 1, *sides], align_corners=False)
    torch.testing.assert_close(augment.sampling_grid(image, theta), affine)
    field = F.interpolate(nodes, size=sides, mode="bicubic" if dimensions == 2 else "trilinear", align_corners=True)
    torch.testing.assert_close(augment.sampling_grid(image, theta, nodes), affine + field.movedim(1, -1))


@pytest.mark.parametrize("name", ["contrast_view", "spatial_view"])
@pytest.mark.parametrize("sides", [(24, 24), (6, 24, 24)])
def test_views_are_the_same_under_autocast(name, sides):
    image = torch.rand(4, 1, *sides)
    view = getattr(augment, name)(image, generator())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(getattr(augment, name)(image, generator()), view)


def test_the_views_of_zeng_et_al_move_pixels_and_change_no_intensity():
    image = torch.ones(400, 1, 16, 16)
    view = augment.spatial_view(image, generator())
    assert (view[:, :, 8, 8] > 0.999).all()  # the middle stays inside
    inside = (view > 0.999).all(dim=(1, 2, 3))
    still = inside.float().mean()  # not turned: the border stays inside, too
    assert 0.28 < still < 0.42  # 1 - 0.67, and images that were only enlarged
    ramp = torch.arange(16.0).expand(400, 1, 16, 16)
    mirrored = augment.spatial_view(ramp, generator())[inside]
    assert {tuple(row) for row in mirrored[:, 0, 8].round().int().tolist()} >= {
        tuple(range(16)),
        tuple(range(15, -1, -1)),
    }


def test_blocks_are_deformed_alike_in_every_slice_and_keep_their_place():
    column = torch.rand(6, 1, 1, 16, 16).expand(-1, -1, 8, -1, -1)  # every slice the same
    for view in (augment.crop_resize(column, generator()), augment.intensity(column, generator())):
        torch.testing.assert_close(view, view[:, :, :1].expand_as(view), atol=1e-5, rtol=0)
    depth = torch.arange(8.0)[None, None, :, None, None].expand(6, 1, 8, 16, 16)
    torch.testing.assert_close(augment.crop_resize(depth, generator()), depth, atol=1e-4, rtol=0)
    label = torch.randint(0, 3, (6, 8, 16, 16), generator=generator())
    for grid_of in augment.FINETUNE_GRIDS.values():
        image, moved = deformed(grid_of, label[:, None].float(), label, generator())
        assert image.shape == (6, 1, 8, 16, 16)
        torch.testing.assert_close(image[:, 0], moved[:, 1] + 2 * moved[:, 2])  # what the label says
        torch.testing.assert_close(moved.sum(dim=1), torch.ones(6, 8, 16, 16))
