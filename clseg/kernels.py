"""Warm kernels: processes forked from one that has imported what every run needs, but has started no thread.

Importing takes seconds, forking milliseconds. The process that is forked is the standard library's fork server; workers
of a grid and the kernels of their notebooks all come from it, each with a namespace, a session and a fate of its own.
"""

import multiprocessing
import os
import sys
import threading
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import ipykernel.kernelapp
import papermill  # noqa: F401 - so that a forked worker has it
import torch
from jupyter_client import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from clseg import plots, runs  # noqa: F401 - so that a forked kernel has them

torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # the first optimiser imports a thousand modules


def context() -> BaseContext:
    """Where processes are forked; numerical libraries get one thread there, a run asks for more itself."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload([__name__])
    return forked


def end_with_parent() -> None:
    """End this process when the one that asked for it is gone, however it went."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _kernel(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    os.setsid()  # signals to the kernel's group reach nobody else
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    end_with_parent()
    os.environ.pop("JPY_PARENT_PID", None)  # the parent is the fork server, which outlives nobody
    sys.argv = ["ipykernel_launcher", *arguments]
    ipykernel.kernelapp.launch_new_instance(argv=arguments)


class _Process:
    """A forked process with the part of `subprocess.Popen` that a provisioner uses."""

    stdin = stdout = stderr = None

    def __init__(self, *arguments: Any) -> None:
        self._process = context().Process(target=_kernel, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
        folder, environment = str(options.get("cwd") or Path.cwd()), dict(options.get("env") or os.environ)
        self.process = _Process(cmd[cmd.index("-f") :], folder, environment, str(self.parent.log_file))
        self.pid = self.pgid = self.process.pid  # it leads a session of its own
        self.cwd = folder
        return self.connection_info


class WarmKernelManager(AsyncKernelManager):
    """Starts forked kernels; what they write to their standard streams goes to `log_file`."""

    log_file: Path = Path(os.devnull)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.provisioner = _Provisioner(kernel_spec=self.kernel_spec, parent=self)
