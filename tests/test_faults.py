"""Faults: whatever breaks, nothing done is lost, nothing half-written is taken for done, and the resumed grid leaves
the tables of one that was left alone. What was wrong is said once.

`CLSEG_KILLS=25 python -m pytest tests/test_faults.py -k random_moments` is the long loop; `faults.md` has its outcome.
"""

import json
import os
import random
import resource
import shutil
import signal
import time

import psutil
import pytest

from clseg.study import archive, runs
from clseg.tools import cli

KILLS = int(os.environ.get("CLSEG_KILLS", "3"))


def kernels(process):
    """The processes that execute notebooks; they lead sessions of their own."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        return [child for child in below if os.getsid(child.pid) == child.pid]
    except (psutil.NoSuchProcess, ProcessLookupError):
        return []


def test_killed_at_random_moments(small_grid, whole, tmp_path):
    """The coordinator or a kernel, with kill -9; a kernel's death alone must not end the grid."""
    chance, killed = random.Random(0), {"coordinator": 0, "kernel": 0}
    root, rounds = tmp_path / "0", 0
    while sum(killed.values()) < KILLS:
        process = small_grid.start(root, "--jobs=2")
        victim = chance.choice(["coordinator", "kernel"])
        while process.poll() is None and not kernels(process):  # before, nothing is at stake
            time.sleep(0.01)
        moment = time.monotonic() + chance.uniform(0, 6)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        if victim == "kernel" and (alive := kernels(process)):
            chance.choice(alive).kill()
            _, errors = process.communicate()
            assert process.returncode == 0, errors
            killed["kernel"] += 1
        elif process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed["coordinator"] += 1
        for folder in small_grid.folders(root):
            record = json.loads((folder / "record.json").read_bytes())
            assert all((folder / name).stat().st_size == size for name, size in record["files"].items())
        if process.communicate()[0] is not None and process.returncode == 0:
            assert small_grid.tables(root) == small_grid.tables(whole[0])
            rounds += 1
            root = tmp_path / str(rounds)
    status, _, errors = small_grid.finish(root, "--jobs=2")
    assert status == 0, errors
    assert small_grid.tables(root) == small_grid.tables(whole[0])
    print(f"killed: {killed}; {rounds + 1} grids finished with the tables of one left alone")


def test_a_kernel_that_dies_again_and_again_fails_its_run_only(small_grid, tmp_path):
    process, killed = small_grid.start(tmp_path, "--jobs=1", "--set=study.methods=[random]"), set()
    while process.poll() is None:
        for kernel in kernels(process):
            running = list(tmp_path.glob("runs/phantom/smoke/finetune-random*/notebook.running.ipynb"))
            if running and kernel.pid not in killed:
                kernel.kill()
                killed.add(kernel.pid)
        time.sleep(0.02)
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert "finetune-random" in errors
    assert "its kernel died 3 times" in errors
    assert "Traceback" not in errors
    assert not small_grid.folders(tmp_path)


def test_a_full_disk(small_grid, whole, tmp_path):
    """No file may grow beyond 400 kB: as on a full disk, writing checkpoint and weights fails, and is not signalled."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))

    process = small_grid.start(tmp_path, preexec_fn=limit)
    errors = process.communicate()[1]
    assert process.returncode == 1
    said = [line for line in errors.replace("\r", "\n").splitlines() if line.startswith("clseg:")]
    assert len(said) == 1
    assert "File too large" in said[0]
    assert str(tmp_path / "runs/phantom/smoke") in said[0]
    assert "give the same command: it goes on from here" in said[0]
    assert not small_grid.folders(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))
    status, _, errors = small_grid.finish(tmp_path)
    assert status == 0, errors
    assert small_grid.tables(tmp_path) == small_grid.tables(whole[0])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "weights.safetensors").unlink(), "weights.safetensors is missing"),
        (
            lambda folder: os.truncate(folder / "weights.safetensors", 1000),
            "weights.safetensors has 1000 bytes and had",
        ),
        (lambda folder: (folder / "record.json").write_text("{}"), "its record is not the one it finished with"),
        (lambda folder: (folder / "status.json").write_bytes(b""), "its status or record cannot be read"),
    ],
)
def test_a_finished_run_that_was_damaged_is_made_again(small_grid, whole, tmp_path, damage, said):
    root = tmp_path / "out"
    shutil.copytree(whole[0], root)
    (folder,) = small_grid.folders(root, "pretrain-*")
    others = {path: (path / "status.json").stat().st_mtime_ns for path in small_grid.folders(root, "finetune-*")}
    damage(folder)
    status, output, errors = small_grid.finish(root)
    assert status == 0
    assert "2 of them done" in output
    assert errors.count("it is made again") == 1
    assert f"clseg: {folder}: {said}" in errors
    assert archive.is_done(folder)
    assert {path: (path / "status.json").stat().st_mtime_ns for path in others} == others
    assert small_grid.tables(root) == small_grid.tables(whole[0])


def test_two_coordinators_on_one_folder_do_each_run_once(small_grid, whole, tmp_path):
    both = [small_grid.start(tmp_path, "--jobs=1") for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert small_grid.tables(tmp_path) == small_grid.tables(whole[0])
    for path in tmp_path.glob("runs/phantom/smoke/*/notebook.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert all(cell.get("execution_count") for cell in cells if cell["cell_type"] == "code")
    assert not list(tmp_path.glob("runs/phantom/smoke/*/*.running.ipynb"))


def test_other_code_makes_runs_of_its_own_and_keeps_what_is_done(small_grid, whole, monkeypatch, capsys):
    monkeypatch.setenv("CLSEG_OUT", str(whole[0]))
    done = small_grid.folders(whole[0])
    assert cli.main([*small_grid.words, "--dry-run"]) == 0
    assert "3 of them done" in capsys.readouterr().out
    monkeypatch.setattr(runs, "code_digest", lambda modules: "another")
    assert cli.main([*small_grid.words, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "0 of them done" in output
    names = [line.split()[-1] for line in output.splitlines() if line.startswith("to do")]
    assert len(names) == 3
    assert not {*names} & {folder.name for folder in done}
    assert small_grid.folders(whole[0]) == done


def test_a_changed_parameter_makes_runs_of_its_own(small_grid, whole, tmp_path):
    root = tmp_path / "out"
    shutil.copytree(whole[0], root)
    status, output, _ = small_grid.finish(root, "--set=finetune.steps=3")
    assert status == 0
    assert "1 of them done" in output  # the pre-training
    assert len(small_grid.folders(root)) == 5
    assert small_grid.tables(root)[0] != small_grid.tables(whole[0])[0]
    status, output, _ = small_grid.finish(root)
    assert status == 0
    assert "3 of them done" in output
    assert small_grid.tables(root) == small_grid.tables(whole[0])


def test_a_clock_set_back(small_grid, whole, tmp_path):
    """Whatever was written before the clock was set back is dated in the future."""
    root, future = tmp_path / "out", time.time() + 10 * 365 * 86400
    process = small_grid.start(root)
    while not list(root.glob("runs/phantom/smoke/*/checkpoint.pt")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for path in [*root.rglob("*"), *root.rglob(".*")]:
        os.utime(path, (future, future))
    status, _, errors = small_grid.finish(root)
    assert status == 0, errors
    assert small_grid.tables(root) == small_grid.tables(whole[0])
    status, output, _ = small_grid.finish(root)
    assert "3 of them done" in output
