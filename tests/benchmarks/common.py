"""What every benchmark shares: contenders timed in turn, peak memory, rows with a ratio, and one JSON each.

A benchmark is a module with `TITLE`, `GOAL` (as the issue of a release states it, in words), `PEERS` (distributions
whose versions are recorded) and `measure(quick)`, which returns rows. All contenders of a row are measured in one
process and in turn, round after round, so that what slows the machine slows all of them.
"""

import gc
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from clseg import paths
from clseg.study import archive
from clseg.study.archive import write_json
from clseg.study.grid import CODE

THREADS = 1  # of every contender, as a run has by default: as many runs as cores go on at once
ROUNDS = 7
# A phantom of few subjects, for `--quick`: overrides as `--set` has them
FEW = ["dataset.options.subjects=10", *(f"dataset.protocols.seeded.{part}" for part in ("test=3", "validation=1"))]
Samples = Mapping[str, Sequence[float]]
Row = dict[str, Any]


def json_path(name: str) -> Path:
    return paths.out_root() / "paper_figures" / "benchmarks" / f"{name}.json"


@contextmanager
def temporary_root() -> Iterator[Path]:
    """An empty output root for what a benchmark writes; what it changes in the environment ends with it."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="clseg-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["CLSEG_OUT"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)


def import_peer(name: str) -> Any:
    """A module of another project, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def in_turn(contenders: Mapping[str, Callable[[], object]], rounds: int = ROUNDS, least_s: float = 0.05) -> Samples:
    """Seconds per call of each contender, one number per round; fast ones are called often enough to be timed."""

    def clock(call: Callable[[], object], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls

    calls = {}
    for name, call in contenders.items():
        call()  # what is done once only is not part of the price
        calls[name] = max(1, math.ceil(least_s / max(clock(call, 1), 1e-6))) if least_s else 1
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()
    try:
        for shift in range(rounds):
            names = list(contenders)
            for name in names[shift % len(names) :] + names[: shift % len(names)]:
                samples[name].append(clock(contenders[name], calls[name]))
    finally:
        gc.enable()
    return samples


def peak_mb(call: Callable[[], object]) -> float:
    """Most megabytes of tensors that were alive at once during a call, beside those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most / 1e6


def fastest(samples: Samples, among: Sequence[str]) -> str:
    return min(among, key=lambda name: statistics.median(samples[name]))


def against(case: str, samples: Samples, peer: str, goal: float | None, ours: str = "ours", unit: str = "s") -> Row:
    """A row: ours over a peer, the median of the ratios of the rounds with the lowest and highest."""
    ratios = [a / b for a, b in zip(samples[ours], samples[peer], strict=True)]
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return _row(case, ratios, goal, "x", peer) | {"medians": medians, "medians_unit": unit, "ours": ours}


def absolute(case: str, values: Sequence[float], goal: float | None, unit: str) -> Row:
    """A row about ours alone."""
    return _row(case, values, goal, unit, None)


def _row(case: str, values: Sequence[float], goal: float | None, unit: str, peer: str | None) -> Row:
    value = statistics.median(values)
    row = {"case": case, "value": value, "low": min(values), "high": max(values), "n": len(values), "unit": unit}
    met = None if goal is None else 0 < round(value / goal, 2) <= 1  # below 0 is noise of a difference
    return row | {"peer": peer, "goal": goal, "met": met}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost against log size, by least squares: 1 where twice the size costs twice as much."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def same(case: str, values: Mapping[str, float], tolerance: float = 1e-4) -> None:
    """Raise `AssertionError` unless all contenders computed the same number."""
    for name, value in values.items():
        assert math.isclose(value, values["ours"], rel_tol=tolerance), (
            f"{case}: {name} is {value}, not {values['ours']}"
        )


def versions(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Versions of the peers that are installed, and the names of the others."""
    found, missing = {}, []
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return found, missing


def code_of(name: str) -> str:
    """Changes with the package's code and with that of the benchmark."""
    shared = {"growth": ["scanning"]}.get(name, [])
    texts = [Path(__file__).with_name(f"{part}.py").read_bytes() for part in (name, "common", *shared)]
    return hashlib.sha256(b"".join([CODE.encode(), *texts])).hexdigest()[:16]


def current(name: str) -> bool:
    """Whether the benchmark was measured in full with the code as it is now."""
    try:
        about = json.loads(json_path(name).read_bytes())
        return not about["quick"] and about["code"] == code_of(name)
    except (OSError, ValueError, KeyError):
        return False


def report(name: str, quick: bool) -> None:
    """Measure one benchmark, print its rows and write its JSON."""
    torch.set_num_threads(THREADS)
    benchmark = importlib.import_module(name)
    began = time.monotonic()
    rows = benchmark.measure(quick)
    peers, missing = versions(benchmark.PEERS)
    notes = getattr(benchmark, "NOTES", [])
    about = {"benchmark": name, "title": benchmark.TITLE, "goal": benchmark.GOAL, "quick": quick, "threads": THREADS}
    about |= {
        "peers": peers,
        "missing_peers": missing,
        "notes": notes,
        "rows": rows,
        "provenance": archive.provenance(),
    }
    about |= {"seconds": round(time.monotonic() - began, 1), "code": code_of(name)}
    print(f"{benchmark.TITLE} ({about['seconds']:.0f} s{', quick: says nothing about speed' if quick else ''})")
    for row in rows:
        goal = "" if row["goal"] is None else f"goal {row['goal']:.3g}, {'met' if row['met'] else 'MISSED'}"
        spread = f"{row['value']:.3g} {row['unit']} ({row['low']:.3g} to {row['high']:.3g}, n = {row['n']})"
        print(f"  {row['case']:58} {spread:44} {'of ' + row['peer'] if row['peer'] else '':28} {goal}")
    json_path(name).parent.mkdir(parents=True, exist_ok=True)
    write_json(json_path(name), about)
