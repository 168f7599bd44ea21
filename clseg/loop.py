"""The one training loop: steps, schedule, precision, log. It knows no method and writes no file.

What a step does depends only on (seed, step): batches and augmentations are drawn from `step_generator`. So a training
that was interrupted goes on from a saved `State` to the same numbers as one that was not.
"""

import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from clseg import ranks
from clseg.graphs import Replay
from clseg.settings import Optimisation

if TYPE_CHECKING:
    from clseg.data.store import Store
    from clseg.models import UNet


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from numbers and words; the same on every machine."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def step_generator(seed: int, stream: str, step: int) -> Generator:
    """The random numbers of one step of one stream ('contrast', 'supervised', ...), on the CPU."""
    return Generator().manual_seed(seed_of(seed, stream, step))


def device() -> torch.device:
    """A GPU if there is one, the first or that of this process under `torchrun`, else the CPU; `$CLSEG_DEVICE` decides
    otherwise."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(os.environ.get("CLSEG_DEVICE") or (gpu if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Work:
    """What a stage or a recipe works on: `slices` of `rows` make a batch of step 0, 1, ... `steps` - 1.

    `rows` are slice ids: of a stage those of the pre-training subjects, of a recipe those with labels, and `unlabelled`
    the others. `store` hands over these alone, and labels to a recipe alone, of `rows`. `earlier`: the weights that
    earlier stages left.
    """

    network: "UNet"
    store: "Store"
    rows: np.ndarray
    slices: int
    seed: int
    steps: int = 0
    unlabelled: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    earlier: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def generator(self, stream: str, step: int) -> Generator:
        return step_generator(self.seed, stream, step)


@dataclass
class Training:
    """What a stage or a recipe gives the loop: the loss of a step is `loss(*draw(step))`.

    `learning`: modules the optimiser changes, by the prefix of their weights; `draw`: what happens before a step and
    the tensors of its batch, on the device; `loss`: of these tensors; from step `steady` on it is the same computation
    in every step, without a question to the device, so that a GPU may record it (None: never); `state`: what else must
    survive an interruption; `tables`: what was found on the way, to be kept with the run.
    """

    learning: dict[str, nn.Module]
    draw: Callable[[int], Sequence[Tensor]]
    loss: Callable[..., Tensor]
    steady: int | None = 0
    state: dict[str, nn.Module] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def step_loss(self, step: int) -> Tensor:
        """The loss of a step."""
        return self.loss(*self.draw(step))


@dataclass(frozen=True)
class Fit:
    """What training leaves: `log` (step, loss, validation where it was measured), the best step by validation and the
    network's weights then (None without validation), seconds of training over all sittings."""

    log: pd.DataFrame
    best_step: int | None
    best_state: dict[str, Tensor] | None
    seconds: float


@dataclass
class State:
    """Where a training stands after `step` steps: all that must survive an interruption."""

    modules: nn.ModuleList
    optimiser: torch.optim.Optimizer
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)  # of every step so far, where the network is
    scores: list[tuple[int, float]] = field(default_factory=list)  # step and validation
    best_step: int | None = None
    best_state: dict[str, Tensor] | None = None
    seconds: float = 0.0

    def losses_so_far(self) -> Tensor:
        """The loss of every step [step], float32. Raises `FloatingPointError` when one is not finite."""
        losses = torch.cat(self.losses)
        self.losses = [losses]
        if not torch.isfinite(losses).all():
            bad = int((~torch.isfinite(losses)).nonzero()[0, 0]) + 1
            raise FloatingPointError(f"the loss of step {bad} is not finite; lower the learning rate")
        return losses

    def tree(self) -> dict[str, Any]:
        """What to save."""
        kept = ("step", "scores", "best_step", "best_state", "seconds")
        tree = {name: getattr(self, name) for name in kept} | {"losses": self.losses_so_far().cpu()}
        return tree | {"modules": self.modules.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load(self, tree: Mapping[str, Any]) -> None:
        """Go back to what `tree` once said."""
        where = next(self.modules.parameters()).device
        self.modules.load_state_dict(tree["modules"])
        rates = [group["lr"] for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(tree["optimiser"])
        for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
            group["lr"] = rate  # where it is; the loop sets it
        self.losses, self.scores = [tree["losses"].to(where)], [tuple(pair) for pair in tree["scores"]]
        self.step, self.seconds = tree["step"], tree["seconds"]
        self.best_step, self.best_state = tree["best_step"], tree["best_state"]


class Keeper(Protocol):
    """What survives an interruption is given to the loop: `clseg.study` has one that keeps files."""

    def restore(self, state: State) -> None:
        """Called before the first step: bring back an earlier sitting, if there was one."""

    def after(self, state: State, last: bool) -> None:
        """Called after every step."""


def optimiser_for(modules: Iterable[nn.Module], settings: Optimisation) -> torch.optim.Optimizer:
    """Adam, AdamW, or stochastic gradient descent with momentum 0.9, over every weight of these modules."""
    weights = [parameter for module in modules for parameter in module.parameters()]
    about: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if weights[0].device.type == "cuda":  # the learning rate is there, too, so that a recorded step reads it
        about |= {"lr": torch.tensor(settings.learning_rate, device=weights[0].device), "fused": True}
    if settings.optimiser == "sgd":
        return torch.optim.SGD(weights, momentum=0.9, **about)
    if "fused" in about:
        about["capturable"] = True
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimiser](weights, **about)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate, where it is."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(settings: Optimisation, step: int, steps: int) -> float:
    """The learning rate of a step: constant, or half a cosine from the first to the final one."""
    if settings.schedule == "constant":
        return settings.learning_rate
    low = settings.final_learning_rate
    return low + (settings.learning_rate - low) * (1 + math.cos(math.pi * step / steps)) / 2


def fit(
    network: nn.Module,
    training: Training,
    settings: Optimisation,
    steps: int,
    precision: str = "float32",
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 0,
    keeper: Keeper | None = None,
    title: str = "training",
) -> Fit:
    """Minimise `training.loss(*training.draw(step))` for `steps` steps.

    precision: "float32", or "bf16" (autocast). `evaluate()` (higher is better) runs every `evaluate_every` steps and
    after the last one; the network's weights of its best value are kept (the earliest of equals).
    Raises `FloatingPointError` when a loss is not finite.
    """
    where = next(network.parameters()).device
    modules = nn.ModuleList([network, *training.learning.values(), *training.state.values()])
    optimiser = optimiser_for(training.learning.values(), settings)
    state = State(modules, optimiser)
    if keeper:
        keeper.restore(state)
    ranks.connect(modules)

    def take(batch: Sequence[Tensor]) -> Tensor:
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = training.loss(*batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average_gradients(optimiser)
        optimiser.step()
        return loss.detach().float().reshape(1)

    replay = Replay(take) if where.type == "cuda" and training.steady is not None and ranks.count() == 1 else None
    before, began = state.seconds, time.monotonic()
    bar = {"desc": title, "unit": "step", "mininterval": 1, "leave": False, "disable": ranks.number() > 0}
    for step in tqdm(range(state.step, steps), initial=state.step, total=steps, **bar):
        modules.train()
        set_learning_rate(optimiser, learning_rate(settings, step, steps))
        with torch.no_grad(), torch.autocast(where.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            batch = training.draw(step)
        state.losses.append((replay if replay and step >= training.steady else take)(batch))
        state.step = done = step + 1
        if evaluate and (done == steps or (evaluate_every and done % evaluate_every == 0)):
            score = evaluate()
            if state.best_step is None or score > max(value for _, value in state.scores):
                state.best_step = done
                state.best_state = {name: value.detach().clone() for name, value in network.state_dict().items()}
            state.scores.append((done, score))
        state.seconds = before + time.monotonic() - began
        if keeper:
            keeper.after(state, last=done == steps)
    log = pd.DataFrame({"step": np.arange(1, steps + 1), "loss": state.losses_so_far().cpu().numpy()})
    if evaluate:
        log["validation"] = log["step"].map(dict(state.scores))
    return Fit(log, state.best_step, state.best_state, state.seconds)
