"""Recipes: what makes each of them that method, that it learns, and that a killed run goes on to the same numbers."""

import math
from copy import deepcopy
from functools import wraps

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from clseg.data.prepare import prepare
from clseg.errors import RequestError
from clseg.loop import Work, fit, optimiser_for
from clseg.losses import SEGMENTATION_LOSSES, dice_loss
from clseg.models import UNet
from clseg.recipes import RECIPES
from clseg.recipes.adversarial import Discriminator, discriminator_loss, reverse
from clseg.recipes.evaluation import validation_dice
from clseg.recipes.gan_augmentation import Change, deform
from clseg.recipes.mean_teacher import NOISE
from clseg.recipes.supervised import mixup, one_hot
from clseg.settings import Geometry, NetworkConfig, Optimisation
from clseg.study import runs
from clseg.study.archive import Checkpoints
from clseg.study.files import read_dataset, read_methods
from clseg.study.parameters import FinetuneParameters
from clseg.study.schema import MethodConfig

TINY = NetworkConfig(filters=[4, 8], norm_momentum=0.3)
SEMI = [name for name in RECIPES if name != "supervised"]
BATCH = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return prepared(tmp_path_factory, Geometry(size=[32, 32], spacing_mm=6.5))


@pytest.fixture(scope="module")
def store_3d(tmp_path_factory):
    return prepared(tmp_path_factory, Geometry(size=[4, 16, 16], plane=[32, 32], spacing_mm=6.5))


def prepared(tmp_path_factory, geometry):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLSEG_OUT", str(tmp_path_factory.mktemp("store")))
        about = read_dataset("phantom").model_copy(update={"options": {"subjects": 8}})
        return prepare(about, geometry, progress=False)


def recipe_of(name, **fields):
    return MethodConfig(title="", recipe={"recipe": name, **fields}).recipe


def start(store, name, network=None, steps=10, batch=BATCH, **fields):
    """A network and its training: three subjects have labels, three have none."""
    torch.manual_seed(0)
    network = network or UNet(store.channels, store.num_classes, TINY, store.dimensions)
    rows, others = store.rows(store.subjects[:3]), store.rows(store.subjects[3:6])
    return network, RECIPES[name](Work(network, store, rows, batch, 0, steps, others), recipe_of(name, **fields))


def train(network, training, steps, **settings):
    optimiser = optimiser_for(training.learning.values(), Optimisation(**settings))
    losses = []
    for step in range(steps):
        for module in (network, *training.learning.values(), *training.state.values()):
            module.train()
        loss = training.step_loss(step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def recorded(monkeypatch, loss=dice_loss):
    """The (logits, label) of every call of the segmentation loss, for which `loss` stands in."""
    calls = []

    def record(logits, label):
        calls.append((logits, label))
        return loss(logits, label)

    monkeypatch.setitem(SEGMENTATION_LOSSES, "dice", record)
    return calls


def nothing(logits, _label):
    return 0.0 * logits.sum()


# --------------------------------------------------------------------------------------------------------- every recipe


def test_every_recipe_of_the_parameters_is_there():
    union = MethodConfig.model_fields["recipe"].annotation.__args__
    assert set(RECIPES) == {kind.model_fields["recipe"].annotation.__args__[0] for kind in union}
    for name in ("mixup", *SEMI, "gd+lr+mixup", "gd+lr+self_training"):
        recipe = read_methods()[name].recipe
        assert recipe.recipe == (name if name in SEMI else "self_training" if "self" in name else "supervised")
        assert (recipe.mixup > 0) == ("mixup" in name)


@pytest.mark.parametrize("name", SEMI)
def test_without_unlabelled_slices_the_request_is_refused(store, name):
    rows = store.rows(store.subjects[:1])
    network = UNet(store.channels, store.num_classes, TINY)
    with pytest.raises(RequestError, match=f"{name}.*label fewer subjects"):
        RECIPES[name](Work(network, store, rows, 2, 0, 10), recipe_of(name))


@pytest.mark.parametrize("name", SEMI)
def test_it_learns_to_segment(store, name):
    torch.manual_seed(0)
    network = UNet(store.channels, store.num_classes, NetworkConfig(filters=[8, 16, 16], norm_momentum=0.3))
    fields = {"average": 0.8} if name == "mean_teacher" else {}
    network, training = start(store, name, network, 40, 6, **fields)
    before = validation_dice(network, store, store.subjects[6:])
    train(network, training, 40, learning_rate=5e-3)
    after = validation_dice(network, store, store.subjects[6:])
    assert after > 0.25 > 5 * before


@pytest.mark.parametrize("options", [{}, {"mixup": 0.2, "loss": "dice+cross_entropy", "augmentation": "pcl"}])
@pytest.mark.parametrize("name", RECIPES)
def test_in_3d_and_with_mixup_all_that_learns_has_a_gradient(store, store_3d, name, options):
    for where in (store, store_3d):
        _, training = start(where, name, steps=4, **options)
        loss = training.step_loss(3)
        loss.backward()
        assert torch.isfinite(loss)
        for prefix, module in training.learning.items():
            for parameter, weight in module.named_parameters():
                assert weight.grad is not None, f"{prefix}.{parameter}"


@pytest.mark.parametrize("name", ["self_training", "mean_teacher", "adversarial"])
def test_slices_with_and_without_labels_are_normalised_apart(store, monkeypatch, name):
    """Their batches reach the segmenter one after the other: labelled slices give the same logits whatever the rest."""
    found = []
    for others in (store.rows(store.subjects[3:6]), store.rows(store.subjects[6:])):
        calls = recorded(monkeypatch)
        torch.manual_seed(0)
        network = UNet(store.channels, store.num_classes, TINY)
        recipe = recipe_of(name, **({"warm_up": 0.1} if name == "self_training" else {}))
        work = Work(network, store, store.rows(store.subjects[:3]), BATCH, 0, 10, others)
        RECIPES[name](work, recipe).step_loss(1)
        found.append(calls[0][0])
    torch.testing.assert_close(found[0], found[1])


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", SEMI)
def test_a_killed_run_resumes_to_the_same_numbers(store, tmp_path, name):
    def go(folder, kill_at=None):
        folder.mkdir(exist_ok=True)
        fields = {"warm_up": 0.3, "rounds": 2} if name == "self_training" else {}
        network, training = start(store, name, steps=7, **fields)  # renewed at 2 and 4, saved at 3 and 6
        whole = training.draw

        def draw(step):
            if step == kill_at:
                raise Killed
            return whole(step)

        training.draw = draw
        result = fit(network, training, Optimisation(), 7, keeper=Checkpoints(folder, 3, 7, "this"))
        return result.log, network.state_dict()

    expected, weights = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "killed", 4)
    log, resumed = go(tmp_path / "killed")
    pd.testing.assert_frame_equal(log, expected, check_exact=True)
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


# ---------------------------------------------------------------------------------------------------------------- mixup


def test_mixup_weights_labels_as_images():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (16, 5, 6), generator=generator)
    image, mixed = mixup(label[:, None].float(), one_hot(label, 3), 0.5, generator)  # the label painted into the image
    torch.testing.assert_close(image[:, 0], mixed[:, 1] + 2 * mixed[:, 2])
    assert ((mixed > 0.01) & (mixed < 0.99)).any()
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(16, 5, 6))


def test_mixup_weights_are_beta_distributed_one_per_image():
    count, alpha = 1000, 0.4
    image = torch.eye(count)[:, :, None, None].expand(-1, -1, 1, 2)  # a channel for each
    label = torch.ones(count, 1, 1, 2)
    mixed = mixup(image, label, alpha, torch.Generator().manual_seed(1))[0]
    own = mixed.diagonal().movedim(-1, 0)[:, 0]  # [count, 2 pixels]
    assert torch.equal(own[:, 0], own[:, 1])
    torch.testing.assert_close(mixed.sum(dim=1), torch.ones(count, 1, 2))
    weight = own[:, 0].double().numpy()
    assert stats.kstest(weight[weight < 1 - 1e-9], stats.beta(alpha, alpha).cdf).pvalue > 0.01


# -------------------------------------------------------------------------------------------------------- self-training


class Opinion(nn.Module):
    """Predicts one class everywhere, that of the largest bias."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def hold(self, answer):
        self.bias.data = torch.nn.functional.one_hot(torch.tensor(answer), 4).float()

    def forward(self, image):
        return self.bias[:, None, None].expand(len(image), 4, *image.shape[2:])


def test_self_training_replaces_unlabelled_masks_only_and_its_copy_changes_at_rounds_only(store, monkeypatch):
    calls, network = recorded(monkeypatch), Opinion()
    _, training = start(store, "self_training", network, 10, augmentation="none", warm_up=0.4, rounds=2)
    answers = []
    for step in range(10):
        calls.clear()
        network.hold(step % 4)
        training.step_loss(step)
        masks = {store.labels[row].tobytes() for row in store.rows(store.subjects[:3])}
        assert all(mask.argmax(dim=0).numpy().astype(np.uint8).tobytes() in masks for mask in calls[0][1])
        assert all((label.max(dim=1).values == 1).all() for _, label in calls)
        assert len(calls) == (1 if step < 4 else 2)
        if step >= 4:
            assert len(calls[1][1]) == BATCH
            (answer,) = calls[1][1].argmax(dim=1).unique().tolist()
            answers.append(answer)
    assert answers == [4 % 4] * 3 + [7 % 4] * 3  # the network's opinion at steps 4 and 7


def test_its_copy_labels_in_evaluation_mode_and_gets_no_gradient(store):
    _, training = start(store, "self_training", warm_up=0.1)
    copy = training.state["copy"].train()
    before = {key: value.clone() for key, value in copy.state_dict().items()}
    training.step_loss(2).backward()  # no renewal
    assert all(torch.equal(value, before[key]) for key, value in copy.state_dict().items())
    assert all(weight.grad is None for weight in copy.parameters())


def test_predicted_labels_move_with_their_slices(store, monkeypatch):
    """A network that knows bright from dark: image and label of a slice agree after augmentation."""

    class Bright(Opinion):
        def forward(self, image):
            bright = (image[:, 0] > 0.5).float()
            return torch.stack([1 - bright, bright, 0 * bright, 0 * bright], dim=1) + 0 * self.bias[:, None, None]

    calls = recorded(monkeypatch)
    _, training = start(store, "self_training", Bright(), batch=12, warm_up=0.1)
    training.step_loss(1)
    seen, label = (answer.argmax(dim=1) for answer in calls[1])
    assert (seen == label).float().mean() > 0.9
    assert (seen.flip(0) == label).float().mean() < 0.9


def test_test_and_validation_subjects_are_never_seen(tmp_path, monkeypatch):
    """Also where pre-training is transductive, as with the folds."""
    monkeypatch.setenv("CLSEG_OUT", str(tmp_path))
    seen = {}

    @wraps(runs.RECIPES["self_training"])  # of which module it is decides the name of a run
    def spy(work, _):
        subject = work.store.volumes["subject"].to_numpy()[work.store.slices["volume"].to_numpy()]
        seen.update(labelled=set(subject[work.rows]), unlabelled=set(subject[work.unlabelled]))
        seen["all"] = set(work.store.subjects)
        raise Killed

    monkeypatch.setitem(runs.RECIPES, "self_training", spy)
    common = {"dataset": "phantom", "profile": "smoke", "method": "self_training", "labelled": 2}
    sizes = ["dataset.options.subjects=12", "dataset.protocols.seeded.test=3"]
    for protocol in ("seeded", "folds"):
        run = runs.finetune_run(FinetuneParameters(**common, protocol=protocol, overrides=sizes))
        with pytest.raises(Killed):
            runs.do(run)
        split = runs.split_of(run, runs.open_store(run.experiment, progress=False))
        assert len(split.test) == 3
        assert seen["labelled"] == set(split.labelled)
        assert seen["unlabelled"] == seen["all"] - {*split.labelled, *split.validation, *split.test} != set()


# --------------------------------------------------------------------------------------------------------- mean teacher


@pytest.mark.parametrize(
    ("name", "learns"), [("mean_teacher", "student"), ("weak_to_strong", "student"), ("supervised", "network")]
)
def test_the_network_is_the_running_average_of_what_learns_and_has_no_gradient(store, name, learns):
    network, training = start(store, name, average=0.6)
    student = training.learning[learns]
    assert list(training.learning) == [learns]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), student.parameters(), strict=True))
    optimiser = torch.optim.SGD(student.parameters(), lr=0.5)
    expected = [weight.detach().clone() for weight in student.parameters()]
    for step in range(5):
        keep = min(1 - 1 / (step + 1), 0.6)
        for mine, theirs in zip(expected, student.parameters(), strict=True):
            mine.mul_(keep).add_((1 - keep) * theirs.detach())
        optimiser.zero_grad()
        training.step_loss(step).backward()
        optimiser.step()
        for found, mine in zip(network.parameters(), expected, strict=True):
            torch.testing.assert_close(found.detach(), mine)
    assert all(weight.grad is None for weight in network.parameters())
    assert not torch.equal(next(network.parameters()), next(student.parameters()))


def test_without_an_average_the_network_itself_learns(store):
    network, training = start(store, "supervised")
    assert training.learning == {"network": network}


@pytest.mark.parametrize(("step", "expected"), [(0, math.exp(-5)), (2, math.exp(-5 / 4)), (4, 1.0), (9, 1.0)])
def test_they_see_the_same_slices_under_other_noise_and_agreement_weighs_more_and_more(
    store, monkeypatch, step, expected
):
    calls = recorded(monkeypatch)
    network, training = start(store, "mean_teacher", weight=7.0, ramp=0.4)
    student, seen = training.learning["student"], {"teacher": [], "student": []}
    torch.nn.init.normal_(student.output[-1].weight)  # or they would agree at the beginning
    for name, module in (("teacher", network), ("student", student)):
        module.register_forward_hook(lambda _, given, made, name=name: seen[name].append((given[0], made)))
    loss = training.step_loss(step)
    seen = {name: [torch.cat(part) for part in zip(*calls, strict=True)] for name, calls in seen.items()}
    difference = seen["teacher"][0] - seen["student"][0]
    assert len(difference) == 2 * BATCH
    assert difference.std().item() == pytest.approx(NOISE * math.sqrt(2), rel=0.05)
    probability = [seen[name][1].softmax(dim=1) for name in ("teacher", "student")]
    apart = (probability[0] - probability[1]).square().mean().item()
    assert apart > 1e-4 or step == 0  # at step 0 the teacher takes the student's weights
    found = loss.item() - dice_loss(*calls[0]).item()
    assert found == pytest.approx(7 * expected * apart, rel=1e-3, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------- adversarial


def test_reversal_keeps_the_value_and_turns_the_gradient():
    value = torch.tensor([2.0, -3.0], requires_grad=True)
    reversed_ = reverse(value, 0.25)
    assert torch.equal(reversed_, value)
    (reversed_ * torch.tensor([4.0, 8.0])).sum().backward()
    assert value.grad.tolist() == [-1.0, -2.0]


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_discriminator_learns_to_tell(dimensions):
    torch.manual_seed(0)
    discriminator = Discriminator(2, TINY, dimensions)
    size = (16, 2, *[16] * dimensions)
    real, fake = torch.rand(size), torch.rand(size) * 0.5
    assert discriminator(real).shape == (16, 1)
    optimiser = torch.optim.Adam(discriminator.parameters(), 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        discriminator_loss(discriminator, real, fake).backward()
        optimiser.step()
    assert (discriminator(real) > 0).all()
    assert (discriminator(fake) < 0).all()


def test_the_discriminator_descends_and_the_segmenter_ascends_by_what_it_predicts_without_labels(store, monkeypatch):
    recorded(monkeypatch, nothing)
    gradients = {}
    for weight in (0.1, 0.3):
        network, training = start(store, "adversarial", weight=weight)
        outputs = []
        network.register_forward_hook(lambda _, _given, made, outputs=outputs: outputs.append(made))
        loss = training.step_loss(0)
        for logits in outputs:
            logits.retain_grad()
        loss.backward()
        known, guessed = (logits.grad for logits in outputs)
        assert (known == 0).all()
        assert (guessed != 0).any(dim=1).all()
        gradients[weight] = guessed
        for name, better in (("discriminator", True), ("network", False)):
            moved = deepcopy({key: part.state_dict() for key, part in training.learning.items()})
            with torch.no_grad():
                for parameter in training.learning[name].parameters():
                    parameter -= 1e-2 * parameter.grad
            assert (training.step_loss(0) < loss) == better
            for key, part in training.learning.items():
                part.load_state_dict(moved[key])
    torch.testing.assert_close(gradients[0.3], 3 * gradients[0.1])


# ----------------------------------------------------------------------------------------------------- gan_augmentation


@pytest.mark.parametrize("sides", [(12, 16), (6, 12, 16)])
def test_the_deformation_moves_image_and_label_alike(sides):
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (4, *sides), generator=generator)
    image = one_hot(label, 3)[:, 1:]  # the label painted into the image
    displacement = 30 * torch.randn(4, len(sides), *sides, generator=generator)
    moved, moved_label = deform(image, one_hot(label, 3), displacement)
    assert torch.equal(moved, moved_label[:, 1:])
    assert (moved - image).abs().mean() > 0.2
    torch.testing.assert_close(moved_label.sum(dim=1), torch.ones(4, *sides))
    shift = torch.zeros(4, len(sides), *sides)
    shift[:, 0] = 192 / 16  # a sixteenth of the side: one pixel along the last axis
    moved, moved_label = deform(image, one_hot(label, 3), shift)
    torch.testing.assert_close(moved[..., :-1], image[..., 1:])
    assert (moved_label[:, 0, ..., -1] == 1).all()  # background comes in


def test_changes_depend_on_image_and_vector():
    torch.manual_seed(0)
    change = Change(1, 2, TINY, 2)
    image, vector = torch.rand(2, 1, 32, 32), torch.randn(2, 100)
    made = change(image, vector)
    assert made.shape == (2, 2, 32, 32)
    assert (made - change(image, vector.flip(0))).abs().mean() > 0.01
    assert (made - change(image.flip(0), vector)).abs().mean() > 0.01


def test_the_generators_learn_from_the_segmentation_and_only_after_the_warm_up(store):
    tiny = {"adversarial_weight": 1e-30, "size_weight": 1e-30}
    _, training = start(store, "gan_augmentation", warm_up=0.2, **tiny)
    generators = [training.learning[name] for name in ("deformation", "intensity")]
    training.step_loss(1).backward()
    assert all(weight.grad is None for part in generators for weight in part.parameters())
    training.step_loss(2).backward()
    for part in generators:
        assert all(weight.grad.abs().max() > 1e-8 for weight in part.parameters())


def test_the_segmenter_learns_on_original_and_changed_slices(store, monkeypatch):
    calls = recorded(monkeypatch)
    network, training = start(store, "gan_augmentation", augmentation="none")
    network.register_forward_pre_hook(lambda _, given: calls.append(given[0]))
    training.step_loss(5)
    image, label = calls[0], calls[1][1]
    assert len(image) == len(label) == 2 * BATCH
    slices = {store.images[row].tobytes() for row in store.rows(store.subjects[:3])}
    found = [one.detach().numpy().astype(np.float16).tobytes() in slices for one in image]
    assert found == [True] * BATCH + [False] * BATCH
    assert ((label[:BATCH] == 0) | (label[:BATCH] == 1)).all()
    assert not torch.equal(label[:BATCH], label[BATCH:])


def test_changes_are_rewarded_for_their_size_and_for_looking_real(store, monkeypatch):
    recorded(monkeypatch, nothing)

    def descend(**weights):
        """Mean size of displacements and of what is added, and the loss, over six steps of the generators alone."""
        _, training = start(store, "gan_augmentation", **weights)
        sizes = []
        generators = [training.learning[name] for name in ("deformation", "intensity")]
        for part in generators:
            part.register_forward_hook(lambda _, _given, made: sizes.append(made.abs().mean().item()))
        contests = []
        for _ in range(6):
            loss = training.step_loss(5)
            contests.append(loss.item())
            loss.backward()
            with torch.no_grad():
                for weight in (weight for part in generators for weight in part.parameters()):
                    weight -= 1e-2 * weight.grad
                    weight.grad = None
        return sizes[::2], sizes[1::2], contests

    flow, added, _ = descend(adversarial_weight=1e-30, size_weight=1.0)
    assert flow[-1] > 1.02 * flow[0]
    assert added[-1] > 1.02 * added[0]
    *_, contests = descend(adversarial_weight=1.0, size_weight=1e-30)
    assert contests[-1] > contests[0]  # that of the discriminator, which they reverse
