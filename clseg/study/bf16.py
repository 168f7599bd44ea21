"""bf16 on a processor that does not have it.

There, torch's own bf16 is 10 to 20 times slower than float32, and its backward pass rounds partial sums. Products of
numbers rounded to bf16, summed in float32 and rounded at the end are what processors and GPUs with bf16 compute.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clseg.loop import device

# What autocast computes in bf16 on a CPU, as far as networks, augmentations and losses multiply at all.
PRODUCTS = {
    *(torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d, F.linear),
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm),
}


class Emulated(TorchFunctionMode):
    """Inside, products under autocast on a CPU and their gradients are those of hardware, but for the order of sums."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            rounded = func(*map(_rounded, args), **{key: _rounded(value) for key, value in kwargs.items()})
        return rounded.bfloat16()


def _rounded(value: Any) -> Any:
    return value.bfloat16().float() if isinstance(value, Tensor) else value


def in_hardware() -> bool:
    """Whether the GPU or CPU that computes here multiplies bf16 itself."""
    return device().type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def arithmetic(precision: str) -> AbstractContextManager:
    """Where a training in "float32" or "bf16" runs."""
    return Emulated() if precision == "bf16" and not in_hardware() else nullcontext()
