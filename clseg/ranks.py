"""Several processes that pre-train one network together, as `torchrun` starts them; alone, all of this does nothing.

All draw the same batch, which depends only on seed and step, and each computes its part: embeddings are gathered
(`gather`), batch norm sees the rows of all, gradients are averaged. So they take the steps of one process with
the whole batch. *Deviation* from one data loader a process: every process augments the whole batch, for exactly this.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from clseg.errors import RequestError

PATIENCE = timedelta(days=7)  # the first process does alone what cannot be shared, and others wait for it
_alone = False


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def number() -> int:
    """Which of them this is; number 0 writes the files."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Here this process works by itself."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def _launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that `torchrun` started, if it did."""
    if not _launched():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave() -> None:
    """End a process that `torchrun` started, all being well, without taking Python down.

    Threads of gloo may still let go of tensors then, which now and then aborts the process
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if _launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def agreed(answer: bool) -> bool:
    """The answer of number 0, for all; they wait for each other here."""
    if count() == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers)
    return answers[0]


def part(rows: Tensor) -> Tensor:
    """The rows [B / W, ...] of [B, ...] that this process computes. Raises `RequestError` if B is not W equal parts."""
    if len(rows) % count():
        raise RequestError(f"{len(rows)} images of a batch are not {count()} equal parts; change --nproc-per-node")
    return rows.chunk(count())[number()]


def connect(modules: Iterable[nn.Module]) -> None:
    """Let the batch norms of these modules see the rows of all processes."""
    for module in modules if count() > 1 else ():
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.__class__ = _Norm


def average_gradients(optimiser: torch.optim.Optimizer) -> None:
    """The mean gradient over all processes, for all."""
    weights = [weight for group in optimiser.param_groups for weight in group["params"] if weight.grad is not None]
    if count() == 1 or not weights:
        return
    flat = torch.cat([weight.grad.flatten() for weight in weights])
    dist.all_reduce(flat)
    for weight, gradient in zip(weights, (flat / count()).split([w.numel() for w in weights]), strict=True):
        weight.grad.copy_(gradient.view_as(weight))


def gather(tensor: Tensor) -> Tensor:
    """The rows of all ranks, rank after rank, [W B, ...], with gradient; the tensor itself where there is one process.

    With embeddings and all that `clseg.pairs` needs gathered, every rank has the loss of one process. Backward sums
    what the W equal losses say about a rank's rows: W times their gradient, so that the mean over ranks that
    `average_gradients` takes is the gradient of one process. tensor: [B, ...], as many rows on every rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    """`torch.distributed.nn.functional.all_gather`, which is deprecated, and whose successor is private."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class _Norm(_BatchNorm):
    """Batch norm over all processes, on any device (PyTorch's own knows GPUs only)."""

    def _check_input_dim(self, rows: Tensor) -> None:
        pass

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return super().forward(rows)
        axes, shape = [0, *range(2, rows.ndim)], [1, -1, *[1] * (rows.ndim - 2)]
        value = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean = gather(value.mean(axes)[None]).mean(0)  # [C]
        centred = value - mean.view(shape)
        variance = gather(centred.square().mean(axes)[None]).mean(0)  # [C]
        with torch.no_grad():
            values = rows.numel() // rows.shape[1] * count()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * values / (values - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()  # [C]
        return (centred * scale.view(shape) + self.bias.view(shape)).to(rows.dtype)
