"""Warm kernels: processes forked from one that has imported what every run needs, but has started no thread.

Importing takes seconds, forking milliseconds. The process that is forked is the standard library's fork server. Every
kernel has a namespace, a session and a fate of its own, and ends with the process that asked for it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, ClassVar

from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from clseg.study.processes import end_with_parent


def _forked() -> BaseContext:
    """Where processes are forked; numerical libraries get one thread there, a run asks for more itself."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clseg.study.warm", __name__])
    return context


def _kernel(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    import matplotlib
    from ipykernel import kernelapp  # not above: where it is imported, progress bars take themselves for a notebook's

    os.setsid()  # signals to the kernel's group reach nobody else
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    end_with_parent()
    # matplotlib looked for its backend when it was imported, and found no kernel
    matplotlib.rcParams["backend"] = environment.get("MPLBACKEND") or "module://matplotlib_inline.backend_inline"
    os.environ.pop("JPY_PARENT_PID", None)  # ipykernel's own watch looks at the wrong process, the fork server
    sys.argv = ["ipykernel_launcher", *arguments]
    kernelapp.launch_new_instance(argv=arguments)


class _Process:
    """A forked process with the part of `subprocess.Popen` that a provisioner uses; for several threads."""

    stdin = stdout = stderr = None
    running: ClassVar[set["_Process"]] = set()
    lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, *arguments: Any) -> None:
        with self.lock:
            self._process = _forked().Process(target=_kernel, args=arguments)
            self._process.start()
            self.running.add(self)
        self.pid = self._process.pid

    def poll(self) -> int | None:
        with self.lock:
            if (code := self._process.exitcode) is not None:
                self.running.discard(self)
            return code

    def wait(self) -> int | None:
        while self.poll() is None:
            time.sleep(0.05)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def kill_all() -> None:
    """End every kernel of this process at once; what they ran resumes from its last checkpoint."""
    for process in list(_Process.running):
        process.send_signal(signal.SIGKILL)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        folder, environment = (
            str(options.get("cwd") or Path.cwd()),
            dict(options.get("env") or os.environ) | self.parent.environment,
        )
        self.process = _Process(cmd[cmd.index("-f") :], folder, environment, str(self.parent.log_file))
        self.pid = self.pgid = self.process.pid  # it leads a session of its own
        self.cwd = folder
        return self.connection_info


class Warm:
    """A kernel manager whose kernels are forked, with `environment`; their standard streams go to `log_file`."""

    log_file: ClassVar[Path] = Path(os.devnull)
    environment: ClassVar[dict[str, str]] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.provisioner = _Provisioner(kernel_spec=self.kernel_spec, parent=self)


class WarmKernelManager(Warm, AsyncKernelManager):
    """That of papermill."""
