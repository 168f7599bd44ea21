"""The training loop: minimises, keeps the best, resumes to the same numbers, never leaves half a file."""

import pandas as pd
import pytest
import torch
from torch import nn

from clseg.loop import Training, fit, learning_rate, optimiser_for, seed_of, step_generator
from clseg.settings import Optimisation
from clseg.study.archive import Checkpoints, write_atomically


class Killed(Exception):
    pass


def problem(folder, steps=12, kill_at=None, checkpoint_every=3, scores=None, code="this", **settings):
    """A small regression whose batches depend on the step alone; `kill_at` raises before that step."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    folder.mkdir(exist_ok=True)

    def draw(step):
        if step == kill_at:
            raise Killed
        return [torch.randn(16, 5, generator=step_generator(7, "test", step))]

    def loss(x):
        return (network(x) - x.sum(dim=1, keepdim=True)).square().mean()

    def evaluate():
        return -network[0].weight.detach().abs().sum().item() if scores is None else next(scores)

    training, settings = Training({"network": network}, draw, loss), Optimisation(**{"learning_rate": 1e-2, **settings})
    keeper = Checkpoints(folder, checkpoint_every, steps, code)
    result = fit(network, training, settings, steps, "float32", evaluate, 4, keeper)
    return result, {k: v.clone() for k, v in network.state_dict().items()}


def test_it_minimises(tmp_path):
    result, _ = problem(tmp_path, steps=150)
    assert result.log["loss"].iloc[-10:].mean() < 0.3 * result.log["loss"].iloc[:10].mean()


SGD = {"optimiser": "sgd", "learning_rate": 1e-3, "schedule": "cosine", "weight_decay": 1e-3}


@pytest.mark.parametrize(("kills", "settings"), [([5], {}), ([1, 4, 8], SGD), ([11], {}), ([3, 6, 9], SGD)])
def test_a_killed_run_resumes_to_the_same_numbers(tmp_path, kills, settings):
    expected, weights = problem(tmp_path / "whole", **settings)
    for kill in kills:
        with pytest.raises(Killed):
            problem(tmp_path / "killed", kill_at=kill, **settings)
    result, resumed = problem(tmp_path / "killed", **settings)
    pd.testing.assert_frame_equal(result.log, expected.log, check_exact=True)
    assert result.best_step == expected.best_step
    assert all(torch.equal(weights[k], resumed[k]) for k in weights)
    assert all(torch.equal(expected.best_state[k], result.best_state[k]) for k in weights)


def test_what_else_learns_and_what_only_has_state_survives_a_kill(tmp_path):
    """A head that learns and a teacher that is only a running average, beside a network that is evaluated."""

    def go(folder, kill_at=None):
        torch.manual_seed(0)
        network, head, teacher = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(3, 1)
        folder.mkdir(exist_ok=True)

        def draw(step):
            if step == kill_at:
                raise Killed
            teacher.weight.lerp_(head.weight, 0.1)
            return [torch.randn(8, 3, generator=step_generator(1, "test", step))]

        def loss(x):
            return (head(network(x)) - teacher(x)).square().mean()

        training = Training({"network": network, "head": head}, draw, loss, state={"teacher": teacher})
        result = fit(network, training, Optimisation(), 9, keeper=Checkpoints(folder, 2, 9, "this"))
        return result.log["loss"].tolist(), teacher.weight.tolist()

    expected = go(tmp_path / "whole")
    with pytest.raises(Killed):
        go(tmp_path / "killed", 5)
    assert go(tmp_path / "killed") == expected


@pytest.mark.parametrize(
    ("optimiser", "first", "second"),
    [("adam", 3 - 0.1, 2.8001), ("adamw", 3 * 0.95, 3 * 0.95**2), ("sgd", 3 * 0.95, 2.85 - 0.1 * (0.9 * 1.5 + 1.425))],
)
def test_weight_decay_by_hand(optimiser, first, second):
    """Without a gradient adamw shrinks a weight by a share, adam goes by the sign of the decay, sgd has momentum."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 3.0)
    taking = optimiser_for([module], Optimisation(optimiser=optimiser, learning_rate=0.1, weight_decay=0.5))
    for expected in (first, second):
        module.weight.grad = torch.zeros(1, 1)
        taking.step()
        assert module.weight.item() == pytest.approx(expected, abs=1e-4)


def test_the_learning_rate_follows_half_a_cosine():
    cosine = Optimisation(learning_rate=0.1, schedule="cosine", final_learning_rate=0.02)
    assert [round(learning_rate(cosine, step, 4), 4) for step in range(5)] == [0.1, 0.0883, 0.06, 0.0317, 0.02]
    assert learning_rate(Optimisation(learning_rate=0.1), 3, 4) == 0.1


def test_a_damaged_checkpoint_means_starting_again(tmp_path, capsys):
    expected, _ = problem(tmp_path / "whole")
    with pytest.raises(Killed):
        problem(tmp_path / "killed", kill_at=7)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    result, _ = problem(tmp_path / "killed")
    assert "starts from the beginning" in capsys.readouterr().out
    pd.testing.assert_frame_equal(result.log, expected.log, check_exact=True)


def test_a_checkpoint_of_other_code_means_starting_again(tmp_path, capsys):
    expected, _ = problem(tmp_path / "whole")
    with pytest.raises(Killed):
        problem(tmp_path / "killed", kill_at=7, code="another")
    result, _ = problem(tmp_path / "killed")
    assert (
        "checkpoint.pt was made by other code, or of other images or masks; training starts from the beginning"
        in capsys.readouterr().out
    )
    pd.testing.assert_frame_equal(result.log, expected.log, check_exact=True)


def test_best_is_the_first_of_the_highest_scores(tmp_path):
    result, _ = problem(tmp_path, scores=iter([0.2, 0.9, 0.9]))
    assert result.best_step == 8
    assert result.log["validation"].dropna().tolist() == [0.2, 0.9, 0.9]


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step():
    network = nn.Linear(1, 1)

    def draw(step):
        return [torch.tensor(float("nan") if step == 2 else 1.0)]

    with pytest.raises(FloatingPointError, match="step 3 "):
        fit(network, Training({"network": network}, draw, lambda x: network.weight.sum() * x), Optimisation(), 5)


def test_streams_steps_and_seeds_are_independent():
    draws = {
        (seed, stream, step): torch.rand(1, generator=step_generator(seed, stream, step)).item()
        for seed in range(3)
        for stream in ("contrast", "local")
        for step in range(5)
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[0, "contrast", 0] == torch.rand(1, generator=step_generator(0, "contrast", 0)).item()
    assert seed_of(0, "network") == seed_of(0, "network") != seed_of(1, "network")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda p: p.write_text("old"))

    def fails(p):
        p.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
