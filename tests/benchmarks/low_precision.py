"""A training step of the laptop profile's network in bf16 on a CPU: as runs compute it, as torch alone does,
and in float32. Where the processor has bf16 the first two are the same code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from common import Row, against, in_turn
from torch.nn import functional as F

from clseg.models import UNet
from clseg.settings import NetworkConfig
from clseg.study.bf16 import arithmetic, in_hardware

TITLE = "a training step in bf16 on a CPU: U-Net, 12 slices of 64 x 64 pixels"
GOAL = "no more time than torch's autocast; at most 1.5 of float32, whether the processor has bf16 or not"
PEERS: list[str] = []
NOTES = [f"the processor {'has' if in_hardware() else 'does not have'} bf16"]


def step_of(size: int, filters: list[int], *settings: Callable[[], AbstractContextManager]) -> Callable[[], None]:
    torch.manual_seed(0)
    network = UNet(1, 4, NetworkConfig(filters=filters))
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    image, label = torch.rand(12, 1, size, size), torch.randint(4, (12, size, size))

    def step() -> None:
        with ExitStack() as entered:
            for setting in settings:
                entered.enter_context(setting())
            optimiser.zero_grad()
            logits = network(image)
            F.cross_entropy(logits.float(), label).backward()
            optimiser.step()

    return step


def low() -> AbstractContextManager:
    return torch.autocast("cpu", torch.bfloat16)


def measure(quick: bool) -> list[Row]:
    about = (16, [4, 8]) if quick else (64, NetworkConfig().filters)
    calls = {
        "ours": step_of(*about, lambda: arithmetic("bf16"), low),
        "torch": step_of(*about, low),
        "float32": step_of(*about, nullcontext),
    }
    samples = in_turn(calls, 2 if quick else 7, 0)
    return [
        against("bf16 against torch's autocast", samples, "torch", 1.0),
        against("bf16 against float32", samples, "float32", 1.5),
    ]
