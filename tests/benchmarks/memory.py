"""Peak memory of a grid's worker against the same run in a plain process.

The worker is a kernel forked from the warm process, executing the worker notebook; the plain process imports the
package and trains. Both are looked at twenty times a second: the most they had resident, and, where the system says
it, their proportional share, in which what several processes share is divided among them.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import psutil
from common import FEW, Row, against, temporary_root

from clseg.study import runs
from clseg.study.parameters import resolve

TITLE = "memory of a grid worker"
GOAL = "at most 1.3 times that of the single run"
PEERS: list[str] = []
PAUSE_S = 0.05
PLAN = """
from clseg.study import files, grid, parameters, runs
changes = ["study.methods=[random]", "study.labelled=[1]", "study.draws=[1]", "study.seeds=[SEED]"]
study, others = parameters.override_study(files.read_study("quickstart"), [*changes, "finetune.steps=5", *FEW])
plan = grid.expand(study, "phantom", "PROFILE", others)
"""
SINGLE, WORKER = PLAN + "runs.do(plan.finetune[0])", PLAN + "grid.execute(plan, 1)"


def peaks(program: str, look_at: Callable[[psutil.Process], Iterable[psutil.Process]]) -> dict[str, float]:
    """Most megabytes of any process that `look_at` finds below a Python process while it runs a program."""
    most = {"resident": 0.0, "proportional": 0.0}
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    about = psutil.Process(child.pid)
    while child.poll() is None:
        try:
            for process in look_at(about):
                memory = process.memory_full_info()
                most["resident"] = max(most["resident"], memory.rss / 1e6)
                most["proportional"] = max(most["proportional"], getattr(memory, "pss", 0) / 1e6)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        time.sleep(PAUSE_S)
    assert child.returncode == 0, program
    return most


def kernels(about: psutil.Process) -> list[psutil.Process]:
    """What the fork server of a grid has forked."""
    return [kernel for server in about.children() for kernel in server.children()]


def measure(quick: bool) -> list[Row]:
    found: dict[str, dict[str, list[float]]] = {"resident": {}, "proportional": {}}
    profile, rounds, few = ("smoke", 1, FEW) if quick else ("laptop", 5, [])
    with temporary_root():
        runs.open_store(resolve("phantom", profile, "random", overrides=few), progress=False)  # it is no part of a run
        for seed in range(rounds):
            for name, program, look_at in (("plain process", SINGLE, lambda p: [p]), ("ours", WORKER, kernels)):
                # other seeds: the run of another name is not there yet
                number = seed if name == "ours" else seed + rounds
                about = f"FEW = {few}{program}".replace("PROFILE", profile).replace("SEED", str(number))
                for what, most in peaks(about, look_at).items():
                    found[what].setdefault(name, []).append(most)
    return [
        against(f"{what} memory of a worker", samples, "plain process", 1.3, unit="MB")
        for what, samples in found.items()
        if all(all(values) for values in samples.values())
    ]
