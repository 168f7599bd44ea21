"""How cost grows: seconds and memory against slices per batch, image size, volumes in the store, and runs in a grid.

Slices and image size: one step of `gd` with the network of `laptop` (draw, two views, loss, backward, optimiser);
memory is that of tensors. Volumes: the phantom, computed and prepared one at a time; a store of many is opened and a
batch drawn from it; its memory is that of Python objects and arrays, for the images stay on disk. Beyond what is
prepared, a store holds the prepared volumes again and again under new names. Runs: the grid is expanded, as for
`--dry-run`, and finished folders are scanned.
"""

import gc
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from common import FEW, Row, absolute, exponent, peak_mb, temporary_root
from scanning import expand, finish

from clseg import paths
from clseg.data.prepare import prepare
from clseg.data.store import Store
from clseg.loop import optimiser_for
from clseg.settings import DatasetConfig
from clseg.stages import STAGES
from clseg.study import runs
from clseg.study.parameters import PretrainParameters, resolve

TITLE = "how cost grows"
GOAL = "no goal: the measured exponents"
PEERS: list[str] = []
RUNS_PER_SEED = 19


Made = TypeVar("Made")


def made_and_mb(make: Callable[[], Made]) -> tuple[Made, float]:
    """What a call makes, and the megabytes of Python objects and arrays that stay with it."""
    tracemalloc.start()
    made = make()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return made, kept / 1e6


def step_of(slices: int, side: int, quick: bool) -> Callable[[], None]:
    overrides = [f"geometry.size=[{side},{side}]", f"stages.0.slices={slices}"]
    overrides += FEW if quick else []
    parameters = PretrainParameters(dataset="phantom", profile="laptop", method="gd", overrides=overrides)
    run = runs.pretrain_run(parameters)
    store = runs.open_store(run.experiment, progress=False)
    work = runs.stage_work(run, store, runs.split_of(run, store))
    training = STAGES[run.stage.stage](work, run.stage)
    optimiser = optimiser_for(training.learning.values(), run.stage)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        training.step_loss(0).backward()
        optimiser.step()

    return step


def large_store(small: Store, volumes: int, folder: Path) -> Path:
    """The folder of a store with the volumes of a small one repeated, each time with other subjects."""
    folder.mkdir()
    index = json.loads((small.folder / "index.json").read_bytes())
    again = -(-volumes // len(index["volumes"]))
    for name in ("images.f16", "labels.u8", "native_labels.zlib"):
        data = (small.folder / name).read_bytes()
        with open(folder / name, "wb") as file:
            for _ in range(again):
                file.write(data)
    copies = [about | {"subject": f"{about['subject']}-{k}"} for k in range(again) for about in index["volumes"]]
    (folder / "index.json").write_text(json.dumps(index | {"volumes": copies}))
    return folder


def timed(call: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return times


class Growth:
    """Rows of one series: points with their size, and at the end the exponents."""

    def __init__(self, series: str) -> None:
        self.series, self.rows = series, []

    def add(self, what: str, size: int, values: list[float], unit: str) -> None:
        row = absolute(f"{size} {self.series}: {what}", values, None, unit)
        self.rows.append(row | {"series": self.series, "what": what, "size": size})

    def finish(self) -> list[Row]:
        exponents = []
        for what in dict.fromkeys(row["what"] for row in self.rows):
            points = [(row["size"], row["value"]) for row in self.rows if row["what"] == what and row["value"] > 0]
            if len(points) > 1:
                slope = exponent(*zip(*points, strict=True))
                row = absolute(f"{self.series}: exponent of {what}", [slope], None, "")
                exponents.append(row | {"series": self.series, "what": what, "size": None})
        return [*self.rows, *exponents]


def batches(quick: bool, rounds: int) -> list[Row]:
    slices, sides = Growth("slices per batch"), Growth("pixels per side")
    for growth, sizes, shape in (
        (slices, (4, 8) if quick else (6, 12, 24, 48, 96), lambda size: (size, 64)),
        (sides, (32, 64) if quick else (32, 64, 96, 128, 192), lambda size: (12, size)),
    ):
        for size in sizes:
            step = step_of(*shape(size), quick)
            step()
            growth.add("seconds per step", size, timed(step, rounds), "s")
            growth.add("memory of a step", size, [peak_mb(step)], "MB")
    return slices.finish() + sides.finish()


def volumes(quick: bool, rounds: int) -> list[Row]:
    growth = Growth("volumes in the store")
    experiment = resolve("phantom", "smoke", "random")
    for size in (2, 4) if quick else (10, 40, 160):
        dataset = experiment.dataset.model_copy(update={"options": {"subjects": size}})

        def build(dataset: DatasetConfig = dataset) -> Store:
            shutil.rmtree(paths.prepared_root(), ignore_errors=True)
            return prepare(dataset, experiment.geometry, progress=False)

        growth.add("seconds to compute and prepare", size, timed(build, 1), "s")
    store = build()
    for size in (8, 16) if quick else (100, 1_000, 10_000):
        folder = large_store(store, size, paths.out_root() / f"store{size}")
        growth.add("seconds to open", size, timed(lambda folder=folder: Store(folder), rounds), "s")
        large, kept = made_and_mb(lambda folder=folder: Store(folder))
        growth.add("memory of the open store", size, [kept], "MB")
        rows = torch.randperm(len(large.slices), generator=torch.Generator().manual_seed(0))[: 50 * 24].split(24)
        draw = timed(lambda large=large, rows=rows: [large.batch(part.numpy()) for part in rows], rounds)
        growth.add("seconds per batch of 24", size, [seconds / len(rows) for seconds in draw], "s")
        shutil.rmtree(folder)
    return growth.finish()


def grids(quick: bool, rounds: int) -> list[Row]:
    growth = Growth("runs in a grid")
    for seeds in (1, 2) if quick else (5, 53, 527):
        size, expanded = seeds * RUNS_PER_SEED, rounds if seeds < 100 else 1
        growth.add("seconds to expand", size, timed(lambda seeds=seeds: expand(seeds, quick), expanded), "s")
        whole, kept = made_and_mb(lambda seeds=seeds: expand(seeds, quick))
        assert len(whole.all) == size
        growth.add("memory of the expanded grid", size, [kept], "MB")
        finish(whole)
        scan = timed(lambda whole=whole: [run.is_done() for run in whole.all], rounds)
        growth.add("seconds to scan", size, scan, "s")
    return growth.finish()


def measure(quick: bool) -> list[Row]:
    rounds = 2 if quick else 5
    with temporary_root():
        return batches(quick, rounds) + volumes(quick, rounds) + grids(quick, rounds)
