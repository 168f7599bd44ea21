"""Pretext stages: what makes each that method, that it learns, that it trains only what it should, that it resumes."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from clseg.errors import RequestError
from clseg.loop import Work, fit
from clseg.models import UNet
from clseg.settings import (
    ContextRestorationStage,
    InpaintingStage,
    NetworkConfig,
    Optimisation,
    PirlStage,
    RotationStage,
)
from clseg.stages import STAGES, pirl
from clseg.stages.pretext import Memory, box_mask, jigsaw, patch_swaps, rearrange, turns
from clseg.study.archive import Checkpoints

SMALL = NetworkConfig(filters=[8, 16, 16, 32, 32, 32], norm_momentum=0.3)
SETTINGS = {
    "rotation": RotationStage(stage="rotation"),
    "inpainting": InpaintingStage(stage="inpainting"),
    "context_restoration": ContextRestorationStage(stage="context_restoration"),
    "pirl": PirlStage(stage="pirl"),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start(store, stage, rows=None, network_config=SMALL, slices=8):
    torch.manual_seed(0)
    network = UNet(1, 4, network_config)
    rows = store.rows(store.subjects) if rows is None else rows
    return network, STAGES[stage.stage](Work(network, store, rows, slices, 0), stage)


def seen_by(network, training, step=0):
    """The images that enter the encoder in one step."""
    seen = []
    with network.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())):
        training.step_loss(step)
    return seen


# ------------------------------------------------------------------------------------------------------------ all four


@pytest.mark.parametrize("name", SETTINGS)
def test_it_learns_and_trains_only_what_it_should(store, name):
    network, training = start(store, SETTINGS[name])
    restoring = name in ("inpainting", "context_restoration")
    assert set(training.learning) == {"encoder", "head", *(["decoder"] if restoring else [])}
    weights = [p for module in training.learning.values() for p in module.parameters()]
    optimiser = torch.optim.Adam(weights, lr=3e-3)
    losses = []
    for step in range(30):
        optimiser.zero_grad()
        loss = training.step_loss(step)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert all(p.grad is not None for p in weights)
    idle = [network.output] if restoring else [network.decoder, network.output]
    assert all(p.grad is None for module in idle for p in module.parameters())


@pytest.mark.parametrize("name", SETTINGS)
def test_it_works_with_the_other_network_and_sides_that_no_grid_divides(store, name):
    _, training = start(
        store, SETTINGS[name], network_config=NetworkConfig(architecture="pcl", filters=[4, 8, 8, 8, 8])
    )
    first, again, other = training.step_loss(0), training.step_loss(0), training.step_loss(1)
    assert torch.isfinite(first)
    assert first.shape == ()
    assert first != other
    assert name == "pirl" or first == again  # the memory of pirl has changed in between


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["rotation", "pirl"])
def test_a_killed_run_resumes_to_the_same_numbers(store, tmp_path, name):
    def go(folder, kill_at=None):
        folder.mkdir(exist_ok=True)
        network, training = start(store, SETTINGS[name], slices=4)
        inner = training.draw

        def draw(step):
            if step == kill_at:
                raise Killed
            return inner(step)

        training.draw = draw
        fit(network, training, Optimisation(), 6, keeper=Checkpoints(folder, 2, 6, "this"))
        modules = {"network": network} | training.learning | training.state
        return {f"{k}.{name}": v.clone() for k, m in modules.items() for name, v in m.state_dict().items()}

    expected = go(tmp_path / "whole")
    for kill in (3, 5):
        with pytest.raises(Killed):
            go(tmp_path / "killed", kill)
    resumed = go(tmp_path / "killed")
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)
    assert name != "pirl" or "memory.bank" in expected


# ------------------------------------------------------------------------------------------------------------ rotation


def test_turning_back_by_the_label_gives_the_slice():
    image = torch.rand(3, 2, 8, 8, generator=generator())
    turned, label = turns(image)
    assert sorted(label.tolist()) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    for k, (one, times) in enumerate(zip(turned, label, strict=True)):
        quarters = [one.rot90(-quarter, (1, 2)) for quarter in range(4)]
        assert [torch.equal(back, image[k % 3]) for back in quarters] == [quarter == times for quarter in range(4)]


def test_the_classifier_is_asked_for_the_turn_of_each_image(store):
    """With a head that knows the answer (the place in the batch of four turns) the loss is almost 0."""
    network, training = start(store, SETTINGS["rotation"], slices=5)
    (seen,) = seen_by(network, training)
    assert seen.shape == (20, 1, 32, 32)
    for k, block in enumerate(seen.chunk(4)):
        assert torch.equal(block, seen[:5].rot90(k, (2, 3)))
    answer = 50.0 * F.one_hot(torch.arange(4).repeat_interleave(5), 4)
    with training.learning["head"].register_forward_hook(lambda *_: answer):
        assert training.step_loss(0) < 1e-6
    with training.learning["head"].register_forward_hook(lambda *_: answer.roll(1, dims=1)):
        assert training.step_loss(0) > 40


def test_images_that_are_not_square_cannot_be_turned(store, monkeypatch):
    monkeypatch.setattr(store, "size", [32, 64])
    with pytest.raises(RequestError, match="square images, not \\[32, 64\\]"):
        start(store, SETTINGS["rotation"])


# ---------------------------------------------------------------------------------------------------------- inpainting


def test_the_published_box():
    stage = InpaintingStage(stage="inpainting", place="centre")
    box = box_mask(2, (192, 160), stage, generator())
    assert box.shape == (2, 1, 192, 160)
    expected = torch.zeros(192, 160, dtype=torch.bool)
    expected[46:146, 38:121] = True  # 100 of 192, and as large a part of 160
    assert (box == expected).all()
    assert box_mask(1, (192, 192), stage.model_copy(update={"box": 1.0}), generator()).all()


def test_a_random_box_lies_anywhere_inside():
    stage = InpaintingStage(stage="inpainting", box=6 / 8)
    boxes = box_mask(200, (8, 8), stage, generator())[:, 0]
    assert (boxes.sum(dim=(1, 2)) == 36).all()
    corners = {tuple(box.nonzero()[0].tolist()) for box in boxes}
    assert corners == {(row, column) for row in range(3) for column in range(3)}
    assert all(box.any(dim=1).sum() == 6 and box.any(dim=0).sum() == 6 for box in boxes)


def test_only_the_box_is_hidden_and_only_the_box_counts(store):
    stage = InpaintingStage(stage="inpainting", place="centre", box=0.5)
    network, training = start(store, stage, rows=np.array([12]))
    network.eval()  # batch norm cannot train on one slice
    (spoilt,) = seen_by(network, training)
    image, box = store.batch(np.array([12])).image, box_mask(1, (32, 32), stage, generator())
    assert (image[box] != 0).any()
    assert torch.equal(spoilt, image * ~box)

    def loss_of(answer):
        with training.learning["head"].register_forward_hook(lambda *_: answer):
            return training.step_loss(0).item()

    assert loss_of(image) == 0
    assert loss_of(image + 7.0 * ~box) == 0
    assert loss_of(image + 3.0 * box) == pytest.approx(9)  # a mean over the box, not over the image


# -------------------------------------------------------------------------------------------------- context restoration


@pytest.mark.parametrize(("size", "patch"), [((192, 192), 5), ((32, 32), 4), ((64, 96), 4)])
def test_patches_swap_in_pairs_and_swapping_again_restores(size, patch):
    stage = SETTINGS["context_restoration"]
    source = patch_swaps(3, size, stage, generator())
    image = torch.rand(3, 2, *size, generator=generator(1))
    spoilt = rearrange(image, source)
    assert torch.equal(rearrange(spoilt, source), image)
    assert torch.equal(spoilt.flatten(2).sort().values, image.flatten(2).sort().values)
    moved = source != torch.arange(size[0] * size[1])
    assert (moved.sum(dim=1) == 20 * patch * patch).all()  # ten pairs, no two patches overlap
    assert not torch.equal(moved[0], moved[1])
    whole = F.avg_pool2d(moved[:1].reshape(1, *size).float(), patch, stride=1) > 1 - 1e-6
    assert whole.sum() >= 20  # squares of that side
    shift = (source - torch.arange(size[0] * size[1]))[0][moved[0]]
    assert (shift.unique(return_counts=True)[1] % patch**2 == 0).all()  # whose pixels go the same way


def test_every_pixel_may_move():
    stage = ContextRestorationStage(stage="context_restoration", swaps=12, patch=4 / 24)
    source = patch_swaps(200, (24, 24), stage, generator())
    assert (source != torch.arange(24 * 24)).any(dim=0).all()


def test_more_patches_than_fit_are_refused():
    stage = ContextRestorationStage(stage="context_restoration", patch=0.25)
    with pytest.raises(RequestError, match="20 patches of 8 pixels do not fit"):
        patch_swaps(1, (32, 32), stage, generator())


def test_the_whole_slice_is_to_be_restored(store):
    network, training = start(store, SETTINGS["context_restoration"], rows=np.array([12]))
    network.eval()  # batch norm cannot train on one slice
    (spoilt,) = seen_by(network, training)
    image = store.batch(np.array([12])).image
    assert not torch.equal(spoilt, image)
    assert torch.equal(spoilt.flatten().sort().values, image.flatten().sort().values)
    with training.learning["head"].register_forward_hook(lambda *_: image + 2.0):
        assert training.step_loss(0).item() == pytest.approx(4)
    with training.learning["head"].register_forward_hook(lambda *_: spoilt):
        assert training.step_loss(0).item() == pytest.approx((spoilt - image).square().mean().item())


# ---------------------------------------------------------------------------------------------------------------- pirl


@pytest.mark.parametrize(("size", "grid", "top", "left"), [((9, 12), 3, 0, 0), ((32, 32), 3, 1, 1), ((11, 8), 4, 1, 0)])
def test_the_jigsaw_is_a_permutation_of_the_patches(size, grid, top, left):
    image = torch.rand(4, 2, *size, generator=generator())
    patches, order = jigsaw(image, grid, generator(1))
    height, width = size[0] // grid, size[1] // grid
    assert patches.shape == (4, grid * grid, 2, height, width)
    assert (order.sort(dim=1).values == torch.arange(grid * grid)).all()
    assert not torch.equal(order[0], order[1])
    for k in range(4):
        for patch, place in zip(patches[k], order[k].tolist(), strict=True):
            row, column = top + place // grid * height, left + place % grid * width
            assert torch.equal(patch, image[k, :, row : row + height, column : column + width])


def test_negatives_are_different_others_never_the_slice_itself():
    memory, index = Memory(10), torch.tensor([3, 0, 9, 3])
    for seed in range(20):
        few = memory.others(index, 4, generator(seed))
        assert few.shape == (4, 4)
        assert all(len(set(row)) == 4 and own not in row for row, own in zip(few.tolist(), index.tolist(), strict=True))
    every = memory.others(index, 1024, generator())
    assert [sorted(row) for row in every.tolist()] == [[k for k in range(10) if k != own] for own in index]


def test_the_loss_is_the_formula():
    torch.manual_seed(0)
    memory = Memory(6).double()
    embedding, index = 3 * torch.randn(2, 128, dtype=torch.float64), torch.tensor([4, 1])
    others = memory.others(index, 3, generator())
    total = 0.0
    for z, own, rivals in zip(embedding, index, others, strict=True):
        e = [(F.cosine_similarity(z, memory.bank[k], dim=0) / 0.07).exp() for k in (own, *rivals)]
        total -= (e[0] / sum(e)).log() / 2
    torch.testing.assert_close(memory.loss(embedding, index, others, 0.07), total)


def test_the_memory_of_the_slices_of_a_step_moves_that_of_others_stays(store):
    rows = store.rows(store.subjects[1:3])
    stage = PirlStage(stage="pirl", momentum=0.75)
    _, training = start(store, stage, rows=rows, slices=4)
    memory, embeddings = training.state["memory"], []
    assert memory.bank.shape == (len(rows), 128)  # the slices of pre-training, no other
    before = memory.bank.clone()
    with training.learning["head"].register_forward_hook(lambda _m, _i, out: embeddings.append(out[0].detach())):
        training.step_loss(0)
    moved = (memory.bank != before).any(dim=1)
    assert moved.sum() == 4
    step = (memory.bank - before)[moved]  # 0.25 of the way to the direction of the embedding, in some order
    target = before[moved] + step / 0.25
    match = F.normalize(embeddings[0], dim=1) @ target.T
    torch.testing.assert_close(match.max(dim=0).values, torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(target.norm(dim=1), torch.ones(4), atol=1e-4, rtol=0)


def test_a_slice_moves_its_own_entry():
    torch.manual_seed(0)
    memory = Memory(5)
    before, embedding = memory.bank.clone(), torch.randn(2, 128, requires_grad=True)
    memory.update(embedding, torch.tensor([3, 1]), 0.5)
    expected = before.clone()
    expected[[3, 1]] = 0.5 * before[[3, 1]] + 0.5 * F.normalize(embedding.detach(), dim=1)
    torch.testing.assert_close(memory.bank, expected)
    assert not memory.bank.requires_grad


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_two_terms_are_weighted_and_compared_with_the_memory_of_before(store, weight, monkeypatch):
    values, entries = [], []
    original = Memory.loss

    def spy(memory, embedding, index, others, temperature):
        entries.append((index.clone(), memory.bank.clone()))
        values.append(original(memory, embedding, index, others, temperature))
        return values[-1]

    monkeypatch.setattr(Memory, "loss", spy)
    _, training = start(store, PirlStage(stage="pirl", weight=weight, grid=2), slices=3)
    before = training.state["memory"].bank.clone()
    patches_seen = []
    with training.learning["head"].register_forward_hook(lambda _m, inputs, out: patches_seen.append(out)):
        loss = training.step_loss(0)
    (whole, puzzle), (index, bank) = patches_seen[0], entries[0]
    assert torch.equal(bank, before)
    others = training.state["memory"].others(index, 1024, generator())  # all others: their order does not matter
    monkeypatch.undo()
    memory = Memory(len(before))
    memory.bank.copy_(before)
    terms = [memory.loss(z, index, others, 0.07) for z in (puzzle, whole)]
    torch.testing.assert_close(loss, weight * terms[0] + (1 - weight) * terms[1])


def test_patches_pass_the_encoder_one_by_one(store):
    network, training = start(store, PirlStage(stage="pirl", grid=3), slices=4)
    image, patches = seen_by(network, training)
    assert (image.shape, patches.shape) == ((4, 1, 32, 32), (36, 1, 32, 32))  # 10 pixels, resized to 32
    with pytest.raises(RequestError, match="grid 40 is more than"):
        pirl(Work(network, store, store.rows(store.subjects), 4, 0), PirlStage(stage="pirl", grid=40))
