"""What a grid will cost: time, from earlier runs of the same kind on this machine or from passes timed now; disk."""

import json
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.autograd.graph import saved_tensors_hooks

from clseg.loop import device
from clseg.models import UNet
from clseg.settings import NetworkConfig
from clseg.study.archive import provenance
from clseg.study.grid import Grid
from clseg.study.runs import Run

# Image passes through the network per slice of a batch, forward and back, beside those of the plain kind: measured on
# the phantom at `laptop`; what is not named counts as plain.
PASSES = {"weak_to_strong": 2.5, "mean_teacher": 2.5, "self_training": 2.0, "adversarial": 2.5, "contrast": 1.2}


@dataclass(frozen=True)
class Cost:
    """Of the runs that are not done: seconds with one at a time, megabytes they leave, and how that is known."""

    seconds: float
    megabytes: float
    runs: int
    of_earlier: int  # runs whose time is that of earlier ones

    def text(self, jobs: int = 1) -> str:
        """One sentence."""
        how = f"as {self.of_earlier} of them took earlier" if self.of_earlier else "from a few passes timed now"
        if 0 < self.of_earlier < self.runs:
            how = f"{self.of_earlier} as earlier ones took, the others from a few passes timed now"
        at_once = f", {jobs} at a time" if jobs > 1 else ""
        return f"about {minutes(self.seconds / jobs)}{at_once} ({how}) and {self.megabytes:,.0f} MB"


def minutes(seconds: float) -> str:
    """A length of time for a person."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{max(seconds / unit, 1):.0f} {name}"
    return f"{seconds / 3600:.0f} h"


def estimate(grid: Grid, done: Iterable[str] = ()) -> Cost:
    """The cost of the runs of a grid but those that are `done`, without reading any data."""
    done = set(done)
    earlier = _seconds_per_step([run for run in grid.all if run.name in done])
    todo = [run for run in grid.all if run.name not in done]
    kinds = Counter(_kind(run) for run in todo)
    of_step = {_kind(run): earlier.get(_kind(run)) or _timed_step(run) for run in todo}
    seconds = sum(run.steps * of_step[_kind(run)] for run in todo)
    known = sum(count for kind, count in kinds.items() if kind in earlier)
    return Cost(seconds, sum(_megabytes(run) for run in todo), len(todo), known)


def _kind(run: Run) -> str:
    """What decides how long a step takes."""
    experiment = run.experiment
    part = run.stage.stage if run.kind == "pretrain" else experiment.recipe.recipe
    size, images = experiment.geometry.size, run.stage.slices if run.kind == "pretrain" else run.finetune.batch
    return json.dumps([run.kind, part, size, images, experiment.precision, experiment.network.model_dump()])


def _seconds_per_step(runs: Iterable[Run]) -> dict[str, float]:
    """Of finished runs that this kind of machine made, the median by kind."""
    here, found = provenance(), defaultdict(list)
    for run in runs:
        with suppress(OSError, ValueError, KeyError):
            record = json.loads((run.folder / "record.json").read_bytes())
            if all(record["provenance"][part] == here[part] for part in ("cpu", "cpus", "gpu")):
                found[_kind(run)].append(record["training_seconds"] / record["steps"])
    return {kind: statistics.median(values) for kind, values in found.items()}


def _timed_step(run: Run) -> float:
    experiment = run.experiment
    pretraining = run.kind == "pretrain"
    part = run.stage.stage if pretraining else experiment.recipe.recipe
    whole = not pretraining or part not in ("contrast", "rotation", "pirl")
    about = experiment.dataset.channels, len(experiment.dataset.classes) + 1, tuple(experiment.geometry.size), whole
    seconds, _ = pass_cost(experiment.network.model_dump_json(), *about, experiment.threads, experiment.precision)
    return seconds * (2 * run.stage.slices if pretraining else run.finetune.batch) * PASSES.get(part, 1)


def _megabytes(run: Run) -> float:
    """Weights, and half as much again for tables and the executed notebook, at least 0.2."""
    experiment = run.experiment
    with torch.device("meta"):
        sizes = experiment.dataset.channels, len(experiment.dataset.classes) + 1
        network = UNet(*sizes, experiment.network, len(experiment.geometry.size))
    return sum(value.numel() for value in network.parameters()) * 4e-6 + 0.2


@lru_cache(maxsize=256)
def pass_cost(
    network: str,
    channels: int,
    classes: int,
    size: tuple[int, ...],
    whole: bool = True,
    threads: int = 1,
    precision: str = "float32",
) -> tuple[float, float]:
    """Seconds and bytes that an image takes, forward and back, in a network (as JSON) or in its encoder alone."""
    torch.set_num_threads(threads)
    low = torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")
    unet = UNet(channels, classes, NetworkConfig.model_validate_json(network), len(size)).to(device())
    module, image = unet if whole else unet.encoder, torch.rand(4, channels, *size, device=device())
    seconds, kept = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    for _ in range(3):  # the first time also sets things up
        kept.clear()
        start = time.perf_counter()
        with low, saved_tensors_hooks(keep, lambda tensor: tensor):
            result = module(image)
            loss = sum(part.square().mean() for part in (result if isinstance(result, list) else [result]))
        loss.backward()
        loss.item()  # waits for a GPU
        seconds.append((time.perf_counter() - start) / len(image))
    return min(seconds), sum(kept.values()) / len(image)
