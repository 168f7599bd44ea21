"""What a grid will cost: time, from earlier runs of the same kind on this machine or from passes timed now; disk."""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.autograd.graph import saved_tensors_hooks

from clseg.loop import device
from clseg.models import UNet
from clseg.settings import NetworkConfig
from clseg.study.archive import provenance
from clseg.study.bf16 import arithmetic
from clseg.study.grid import Grid
from clseg.study.runs import Run

# How much longer a step takes than one pass of every image, forward and back; rough, and 1 for what is not named.
PASSES = {"weak_to_strong": 2.5, "mean_teacher": 2.5, "self_training": 2.0, "adversarial": 2.5, "contrast": 1.2}
LOOKED_AT = 9  # finished runs of a kind


@dataclass(frozen=True)
class Cost:
    """Of the runs that are not done."""

    seconds: float  # one run at a time
    chain: float  # seconds of those that must follow each other
    shortest_longest: tuple[float, float]  # seconds of one run
    megabytes: float  # that they leave
    runs: int
    of_earlier: int  # runs whose time is that of earlier ones

    def text(self, jobs: int = 1) -> str:
        """One sentence."""
        how = f"as {self.of_earlier} of them took earlier" if self.of_earlier else "from a few passes timed now"
        if 0 < self.of_earlier < self.runs:
            how = f"{self.of_earlier} as earlier ones took, the others from a few passes timed now"
        at_once = f", {jobs} at a time" if jobs > 1 else ""
        each = " to ".join(dict.fromkeys(map(minutes, self.shortest_longest)))
        whole = minutes(max(self.seconds / jobs, self.chain))
        return f"about {whole}{at_once}, {each} a run ({how}), and {self.megabytes:,.0f} MB"


def minutes(seconds: float) -> str:
    """A length of time for a person."""
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min")):
        if seconds < limit:
            return f"{max(seconds / unit, 1):.0f} {name}"
    return f"{seconds / 3600:.0f} h"


def estimate(grid: Grid, done: Iterable[str] = ()) -> Cost:
    """The cost of the runs of a grid but those that are `done`, without reading any data."""
    done = set(done)
    todo: dict[str, list[Run]] = defaultdict(list)
    finished: dict[str, list[Run]] = defaultdict(list)
    for run in grid.all:
        (finished if run.name in done else todo)[_kind(run)].append(run)
    seconds = megabytes = known = 0.0
    chains: dict[str, float] = {}  # seconds of a run and those before it
    for kind, runs in todo.items():
        of_step = _earlier_step(finished.get(kind, ()))
        known += len(runs) if of_step else 0
        of_step = of_step or _timed_step(runs[0])
        seconds += of_step * sum(run.steps for run in runs)
        chains |= {run.name: of_step * run.steps for run in runs}
        megabytes += _megabytes(runs[0]) * len(runs)
    each = (min(chains.values(), default=0.0), max(chains.values(), default=0.0))
    for run in grid.all:  # parents come first
        if run.name in chains and run.parent:
            chains[run.name] += chains.get(run.parent.name, 0.0)
    return Cost(seconds, max(chains.values(), default=0.0), each, megabytes, sum(map(len, todo.values())), int(known))


def _kind(run: Run) -> str:
    """What decides how long a step takes, and how large the weights are."""
    experiment, classes = run.experiment, len(run.experiment.dataset.classes)
    about = [run.kind, _part(run), _images(run), experiment.geometry.size, experiment.dataset.channels, classes]
    return json.dumps([*about, experiment.precision, experiment.network.model_dump()])


def _part(run: Run) -> str:
    return run.stage.stage if run.kind == "pretrain" else run.experiment.recipe.recipe


def _images(run: Run) -> int:  # of a step
    return 2 * run.stage.slices if run.kind == "pretrain" else run.finetune.batch


def _earlier_step(runs: Sequence[Run]) -> float | None:
    """Median seconds of a step of a few finished runs of a kind, if this kind of machine made them."""
    here, found = provenance(), []
    for run in runs[-LOOKED_AT:]:
        with suppress(OSError, ValueError, KeyError):
            record = json.loads((run.folder / "record.json").read_bytes())
            if all(record["provenance"][part] == here[part] for part in ("cpu", "cpus", "gpu")):
                found.append(record["training_seconds"] / record["steps"])
    return statistics.median(found) if found else None


def _network(run: Run) -> tuple[str, int, int, tuple[int, ...]]:
    experiment = run.experiment
    sizes = experiment.dataset.channels, len(experiment.dataset.classes) + 1
    return experiment.network.model_dump_json(), *sizes, tuple(experiment.geometry.size)


def _timed_step(run: Run) -> float:
    whole = run.kind == "finetune" or _part(run) not in ("contrast", "rotation", "pirl")
    seconds, _ = pass_cost(*_network(run), whole, run.experiment.threads, run.experiment.precision)
    return seconds * _images(run) * PASSES.get(_part(run), 1)


def _megabytes(run: Run) -> float:
    """Of the weights, and 0.2 of tables and the executed notebook."""
    return weights_in(*_network(run)) * 4e-6 + 0.2


def weights_in(network: str, channels: int, classes: int, size: tuple[int, ...]) -> int:
    """How many numbers a network (as JSON) learns; `size` says in how many dimensions."""
    with torch.device("meta"):
        unet = UNet(channels, classes, NetworkConfig.model_validate_json(network), len(size))
    return sum(value.numel() for value in unet.parameters())


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
    low = torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16")
    unet = UNet(channels, classes, NetworkConfig.model_validate_json(network), len(size)).to(device())
    module, image = unet if whole else unet.encoder, torch.rand(4, channels, *size, device=device())
    seconds, kept = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):  # the first time also sets things up
            kept.clear()
            start = time.perf_counter()
            with low, arithmetic(precision), saved_tensors_hooks(keep, lambda tensor: tensor):
                result = module(image)
                loss = sum(part.square().mean() for part in (result if isinstance(result, list) else [result]))
            loss.backward()
            loss.item()  # waits for a GPU
            seconds.append((time.perf_counter() - start) / len(image))
    finally:
        torch.set_num_threads(usual)
    return min(seconds), sum(kept.values()) / len(image)
