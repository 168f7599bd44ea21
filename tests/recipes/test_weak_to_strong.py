"""Weak-to-strong consistency: which pseudo-labels count, what they cost, what a strong view changes, who teaches."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from clseg.augment import blur, cutmix_boxes, strong_view
from clseg.loop import Work
from clseg.losses import dice_loss
from clseg.models import UNet
from clseg.recipes.average import follow, ramp_up
from clseg.recipes.weak_to_strong import consistency_loss, pseudo_labels, weak_to_strong
from clseg.settings import NetworkConfig, WeakToStrongRecipe

SMALL = NetworkConfig(filters=[4, 8, 8])


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def started(store, batch=4, **fields):
    """A network and its training: one subject has labels, three have none."""
    torch.manual_seed(0)
    network = UNet(store.channels, store.num_classes, SMALL)
    few, others = store.subjects[:1], store.subjects[1:4]
    work = Work(network, store.only(few, others), store.rows(few), batch, 0, steps=10, unlabelled=store.rows(others))
    return network, weak_to_strong(work, WeakToStrongRecipe(**fields))


def test_a_pseudo_label_counts_from_its_probability_on():
    logits = torch.tensor([[0.9, 0.96], [0.1, 0.04]]).log()[None]  # [1, 2 classes, 2 pixels]
    label, sure = pseudo_labels(logits, 0.95)
    assert label.tolist() == [[0, 0]]
    assert sure.tolist() == [[False, True]]


def test_the_consistency_loss_by_hand():
    logits = torch.tensor([[0.5, 0.25], [0.5, 0.75]]).log()[None]
    label, sure = torch.tensor([[0, 1]]), torch.tensor([[True, False]])
    assert consistency_loss(logits, label, sure).item() == pytest.approx(-math.log(0.5) / 2)  # of all pixels
    assert consistency_loss(logits, label, ~sure).item() == pytest.approx(-math.log(0.75) / 2)
    assert consistency_loss(logits, label, torch.zeros(1, 2, dtype=torch.bool)).item() == 0


def test_a_strong_view_changes_intensities_of_most_images_and_no_place():
    image = torch.rand((400, 1, 8, 8), generator=seeded())
    view = strong_view(image, seeded(1))
    assert view.shape == image.shape
    same = (view - image).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert same.float().mean() == pytest.approx(0.2 * 0.5, abs=0.04)  # neither of the two changes
    flat = torch.full((400, 1, 8, 8), 0.5)  # a contrast around the mean and a blur leave it, brightness is at most 0.3
    shift = (strong_view(flat, seeded(2)) - flat).flatten(1)
    assert torch.allclose(shift, shift[:, :1].expand_as(shift), atol=1e-6)
    assert shift.abs().max() <= 0.3 + 1e-6
    assert torch.equal(view, strong_view(image, seeded(1)))


def test_blur_is_that_of_scipy_for_each_image():
    from scipy.ndimage import gaussian_filter

    image = torch.rand((2, 2, 12, 10), generator=seeded())
    found = blur(image, torch.tensor([0.0, 1.2]))
    assert torch.allclose(found[0], image[0], atol=1e-6)
    expected = [gaussian_filter(plane, 1.2, mode="nearest", radius=4) for plane in image[1].numpy()]
    assert found[1].numpy() == pytest.approx(np.stack(expected), abs=1e-5)
    block = image[:, :, None].expand(-1, -1, 3, -1, -1).contiguous()  # blocks: in the plane only
    assert torch.allclose(blur(block, torch.tensor([0.0, 1.2]))[:, :, 1], found, atol=1e-6)


def test_boxes_are_there_half_of_the_time_and_have_the_published_areas():
    box = cutmix_boxes(torch.zeros(2000, 1, 64, 64), seeded())
    assert box.shape == (2000, 64, 64)
    area = box.float().mean(dim=(1, 2))
    assert (area > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert area[area > 0].min() > 0.005
    assert area.max() < 0.45
    first = box[area > 0][0]
    rows, columns = first.any(dim=1), first.any(dim=0)
    assert torch.equal(first, rows[:, None] & columns[None, :])  # a box
    assert cutmix_boxes(torch.zeros(3, 1, 4, 8, 8), seeded()).shape == (3, 1, 8, 8)


def test_an_average_follows_by_hand():
    average, model = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        average.weight.fill_(1.0)
        model.weight.fill_(3.0)
        model.running_mean.fill_(2.0)
    follow(average, model, 0.9, step=9)  # a = min(1 - 1 / 10, 0.9)
    assert average.weight.item() == pytest.approx(0.9 * 1 + 0.1 * 3)
    assert average.running_mean.item() == pytest.approx(0.2)
    follow(average, model, 0.9, step=0)  # a = 0: a copy
    assert average.weight.item() == 3
    follow(average, model, 0.9, step=0, statistics=False)
    assert [ramp_up(step, 10) for step in (0, 10, 20)] == pytest.approx([math.exp(-5), 1, 1])
    assert ramp_up(0, 0) == 1


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_only_the_student_learns_and_the_teacher_sees_no_label(store, statistics):
    network, training = started(store, confidence=0.3, statistics=statistics)
    student = training.learning["student"]
    before = copy.deepcopy(network.state_dict())
    training.step_loss(0).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    moved = not torch.equal(before["encoder.levels.0.0.1.running_mean"], network.encoder.levels[0][0][1].running_mean)
    assert moved is (statistics == "batch")  # of the batches that the teacher sees itself


def test_the_teacher_sees_the_weak_view_and_the_student_the_strong_one_with_boxes_of_others(store):
    """Pseudo-labels, and whether they count, come along with the pixels of a box."""
    network, training = started(store, 12, augmentation="none", confidence=0.6, weight=2.0)
    student, calls = training.learning["student"], {"teacher": [], "student": []}
    nn.init.normal_(student.output[-1].weight)  # or nothing would be sure; the teacher takes the student's weights
    for name, module in (("teacher", network), ("student", student)):
        module.register_forward_hook(lambda _, given, made, name=name: calls[name].append((given[0], made)))
    batch = image, label, weak, strong, box, other, _ = training.draw(0)
    slices = {store.images[row].tobytes() for row in store.rows(store.subjects[1:4])}
    kept = [[one.half().numpy().tobytes() in slices for one in view] for view in (weak, strong)]
    assert all(kept[0])
    assert sum(kept[1]) < 6
    found = training.loss(*batch)
    ((taught, opinion),), ((own, first), (lesson, second)) = calls["teacher"], calls["student"]
    assert torch.equal(taught, weak)
    assert torch.equal(own, image)
    guess, sure = pseudo_labels(opinion, 0.6)
    mixed = strong.clone(), guess.clone(), sure.clone()
    for row, (inside, donor) in enumerate(zip(box, other, strict=True)):
        for after, before in zip(mixed, (strong, guess, sure), strict=True):
            after[row][..., inside] = before[donor][..., inside]
    assert not any(map(torch.equal, mixed, (strong, guess, sure)))
    assert torch.equal(lesson, mixed[0])
    torch.testing.assert_close(found, dice_loss(first, label) + 2 * consistency_loss(second, *mixed[1:]))


def test_the_weight_of_the_lesson_grows(store):
    _, training = started(store, weight=2.0, ramp=0.5)
    assert [training.draw(step)[-1].item() for step in (0, 5, 9)] == pytest.approx([2 * math.exp(-5), 2, 2])
