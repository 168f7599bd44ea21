"""The one training loop: optimiser steps, precision, log, checkpoint, resume. It knows no method.

What a step does depends only on (seed, step): batches and augmentations are drawn from `step_generator`, so a run that
was killed goes on from its last checkpoint to the same numbers as one that was not.
"""

import hashlib
import io
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from clseg import ranks
from clseg.config import Budget, Optimisation

if TYPE_CHECKING:
    from clseg.data.prepare import Store
    from clseg.models import UNet

PROGRESS_SECONDS = 2.0


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


def _code_digest() -> str:
    package, code = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return code.hexdigest()[:12]


CODE = _code_digest()  # changes with the package's code; of what was imported, should the files change now


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
    """What a stage or a recipe gives the loop.

    `learning`: modules the optimiser changes, by the prefix of their weights; `step_loss`: the loss of a step; `state`:
    what else must survive a kill; `tables`: to be written into the run's folder.
    """

    learning: dict[str, nn.Module]
    step_loss: Callable[[int], Tensor]
    state: dict[str, nn.Module] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """What training leaves: `log` (step, loss, validation where it was measured), the best step by validation and the
    network's weights then (None without validation), seconds of training over all sittings."""

    log: pd.DataFrame
    best_step: int | None
    best_state: dict[str, Tensor] | None
    seconds: float


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Readable JSON, written atomically."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _resume(checkpoint: Path) -> dict | None:
    """The last checkpoint, or None where there is none, it cannot be read or other code made it."""
    if not checkpoint.is_file():
        return None
    try:
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        problem = "" if saved["code"] == CODE else "was made by other code"
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zlib.error, UnpicklingError) as error:
        problem = f"cannot be read ({type(error).__name__})"
    if problem:
        print(f"{checkpoint.name} {problem}; training starts from the beginning")
    return None if problem else saved


def optimiser_for(modules: Iterable[nn.Module], settings: Optimisation) -> torch.optim.Optimizer:
    """Adam, or stochastic gradient descent with momentum 0.9, over every weight of these modules."""
    weights = [parameter for module in modules for parameter in module.parameters()]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "adam":
        return torch.optim.Adam(weights, lr=rate, weight_decay=decay)
    return torch.optim.SGD(weights, lr=rate, momentum=0.9, weight_decay=decay)


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
    folder: Path,
    budget: Budget,
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 0,
    title: str = "training",
) -> Fit:
    """Minimise `training.step_loss(step)` for `steps` steps, resuming from `folder/checkpoint.pt` if it is there.

    `evaluate()` (higher is better) runs every `evaluate_every` steps and after the last one; the network's weights of
    its best value are kept (the earliest of equals). Raises `FloatingPointError` when a loss is not finite.
    """
    where = next(network.parameters()).device
    modules = nn.ModuleList([network, *training.learning.values(), *training.state.values()])
    optimiser = optimiser_for(training.learning.values(), settings)
    checkpoint, progress = folder / "checkpoint.pt", folder / "progress.json"
    losses: list[Tensor] = []
    scores: list[tuple[int, float]] = []
    best_step, best_state, start, before = None, None, 0, 0.0
    if (saved := _resume(checkpoint)) is not None:
        modules.load_state_dict(saved["modules"])
        optimiser.load_state_dict(saved["optimiser"])
        losses, scores = [saved["losses"].to(where)], [tuple(pair) for pair in saved["scores"]]
        best_step, best_state, start, before = saved["best_step"], saved["best_state"], saved["step"], saved["seconds"]
    ranks.connect(modules)
    began = reported = time.monotonic()

    def save(step: int) -> None:
        nonlocal losses
        losses = [torch.cat(losses)]
        if not torch.isfinite(losses[0]).all():
            bad = int((~torch.isfinite(losses[0])).nonzero()[0, 0]) + 1
            raise FloatingPointError(f"the loss of step {bad} is not finite; lower the learning rate")
        if ranks.number():
            return
        state = {
            "code": CODE,
            "step": step,
            "modules": modules.state_dict(),
            "optimiser": optimiser.state_dict(),
            "losses": losses[0].cpu(),
            "scores": scores,
            "best_step": best_step,
            "best_state": best_state,
            "seconds": before + time.monotonic() - began,
        }
        content = io.BytesIO()  # so that a full disk is an `OSError` as everywhere
        torch.save(state, content)
        write_atomically(checkpoint, lambda temporary: temporary.write_bytes(content.getbuffer()))

    bar = {"desc": title, "unit": "step", "mininterval": 1, "leave": False, "disable": ranks.number() > 0}
    for step in tqdm(range(start, steps), initial=start, total=steps, **bar):
        modules.train()
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(settings, step, steps)
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=budget.precision == "bf16"):
            loss = training.step_loss(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        ranks.average_gradients(optimiser)
        optimiser.step()
        losses.append(loss.detach().float().reshape(1))
        done = step + 1
        if evaluate is not None and (done % evaluate_every == 0 or done == steps):
            score = evaluate()
            scores.append((done, score))
            if best_step is None or score > max(value for _, value in scores[:-1]):
                best_step = done
                best_state = {name: value.detach().clone() for name, value in network.state_dict().items()}
        if done % budget.checkpoint_every == 0 or done == steps:
            save(done)
        if time.monotonic() - reported > PROGRESS_SECONDS and not ranks.number():
            reported = time.monotonic()
            write_json(progress, {"step": done, "steps": steps})

    log = pd.DataFrame({"step": np.arange(1, steps + 1), "loss": torch.cat(losses).cpu().numpy()})
    if evaluate is not None:
        log["validation"] = log["step"].map(dict(scores))
    return Fit(log, best_step, best_state, before + time.monotonic() - began)
