"""The folder of a run: when it counts as done, what is recorded, and how tables are read and written."""

import hashlib
import io
import json
import os
import platform
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pandas as pd
import safetensors
import torch
from filelock import FileLock, Timeout

from clseg import __version__, paths, ranks
from clseg.errors import reading
from clseg.loop import State

TABLE_COLUMNS = [
    *("study", "dataset", "profile", "method", "labelled", "draw", "seed"),
    *("subject", "phase", "class_name", "dice", "hd95", "hd95_unit", "missed", "run"),
]
DECIDING = ("clseg", "params")  # numbers: folders of the project
PACKAGES = ("torch", "numpy", "pandas", "scipy", "nibabel")
PROGRESS_SECONDS = 2.0


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


class Checkpoints:
    """What `loop.fit` is given so that a run that was killed goes on: `checkpoint.pt` every `every` steps, and
    `progress.json` for whoever waits. `made_by`: of a checkpoint that other code made, or of other data, nothing is
    taken."""

    def __init__(self, folder: Path, every: int, steps: int, made_by: str) -> None:
        self.folder, self.every, self.steps, self.made_by = folder, every, steps, made_by
        self.path, self._reported = folder / "checkpoint.pt", time.monotonic()

    def restore(self, state: State) -> None:
        if not self.path.is_file():
            return
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            problem = "" if saved["made_by"] == self.made_by else "was made by other code, or of other images or masks"
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, zlib.error, UnpicklingError) as error:
            problem = f"cannot be read ({type(error).__name__})"
        if problem:
            print(f"{self.path.name} {problem}; training starts from the beginning")
        else:
            state.load(saved)

    def after(self, state: State, last: bool) -> None:
        if last or state.step % self.every == 0:
            tree = state.tree()
            if not ranks.number():
                content = io.BytesIO()  # so that a full disk is an `OSError` as everywhere
                torch.save(tree | {"made_by": self.made_by}, content)
                write_atomically(self.path, lambda temporary: temporary.write_bytes(content.getbuffer()))
        if time.monotonic() - self._reported > PROGRESS_SECONDS and not ranks.number():
            self._reported = time.monotonic()
            write_json(self.folder / "progress.json", {"step": state.step, "steps": self.steps})


def adaptation(weights: Path) -> dict[str, Any]:
    """The adaptation record inside a weight file."""
    with safetensors.safe_open(weights, framework="pt") as file:
        return json.loads(file.metadata()["clseg"])


def write_table(path: Path, table: pd.DataFrame, decimals: str = "%.6f") -> None:
    """CSV, written atomically."""
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False, float_format=decimals))


def read_table(path: Path) -> pd.DataFrame:
    """A table as `write_table` left it: names and ids stay text, also where they are empty or look like numbers."""
    text = ["study", "method", "subject", "phase", "class_name", "hd95_unit", "note", "run", "kind", "parent"]
    text += ["device", "precision", "code", "content", "commit", "torch", "interval_over", "verdict"]
    table = pd.read_csv(path, dtype=dict.fromkeys(text, str), keep_default_na=False, na_values=[""])
    return table.fillna(dict.fromkeys(table.columns.intersection(text), ""))


def _cpu() -> str:
    """The model of the processor, as Linux names it."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.machine()


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware at this moment."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=paths.PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = os.environ.get("CLSEG_COMMIT", "")  # of a copy that left its history behind
    if not commit:
        with suppress(OSError):
            commit = git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", *DECIDING))
    return {
        "commit": commit or "unknown",
        "clseg": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def seal(folder: Path) -> None:
    """Write the status, last: from here on the run counts as done."""
    digest = hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "status.json", {"status": "done", "record_sha256": digest, "finished": finished})
    for leftover in ("checkpoint.pt", "progress.json", "error.txt"):
        (folder / leftover).unlink(missing_ok=True)


def flaw(folder: Path) -> str | None:
    """None for a run that is done: its status, record and files agree; else what is wrong, "" if it never finished."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
        record = (folder / "record.json").read_bytes()
        if status["status"] != "done" or status["record_sha256"] != hashlib.sha256(record).hexdigest():
            return "its record is not the one it finished with"
        for name, size in json.loads(record)["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes and had {size}"
    except OSError as error:
        name = Path(error.filename).name
        return "" if name == "status.json" else f"{name} is missing"
    except (ValueError, KeyError, TypeError):
        return "its status or record cannot be read"
    return None


def is_done(folder: Path) -> bool:
    return flaw(folder) is None


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock, which ends with the process whatever happens to it; yields whether it is held.

    With `wait` it is always held in the end; without, another holder gives False at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:  # releasing what is not held does nothing
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                yield False
                return
            print(f"waiting for another process that holds {path}")
            lock.acquire()
        yield True
    finally:
        lock.release()


def table(folders: Iterable[Path]) -> pd.DataFrame:
    """Tidy results of finished fine-tunings, a row per subject, phase and class.

    `study` is empty, as studies share runs: each has a table of its own. Where any was told more than its names say
    (`--set`, `set` of a study) a last column `overrides` says what.
    """
    tables = [pd.DataFrame(columns=[*TABLE_COLUMNS, "overrides"])]
    for folder in sorted(folders):
        if (folder / "metrics.csv").is_file() and is_done(folder):
            with reading(folder, "finished run", "remove it to have it made again"):
                told = json.loads((folder / "parameters.json").read_text(encoding="utf-8"))["parameters"]
                own = read_table(folder / "metrics.csv").assign(study="")
                tables.append(own[TABLE_COLUMNS].assign(overrides="; ".join(told["overrides"])))
    order = ["dataset", "profile", "method", "labelled", "draw", "seed", "subject", "phase", "class_name", "run"]
    found = pd.concat(tables[1:] or tables).sort_values(order, kind="stable", ignore_index=True)
    return found if found["overrides"].any() else found[TABLE_COLUMNS]
