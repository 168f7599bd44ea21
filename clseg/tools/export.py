"""Weight files: read with every check, and taken elsewhere.

MONAI's `BasicUNet` holds a `pcl` network of five levels whose filters double, with the same logits in evaluation: its
PReLU is our LeakyReLU (0.01) and in the deepest level our ReLU (0), its batch norm there is the identity, and what its
last upsampling has beyond ours is zero. No network of MONAI holds another decoder of ours, but `BasicUNet` holds the
first five levels of any encoder.
"""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clseg.errors import RequestError
from clseg.models import SLOPE, UNet
from clseg.settings import Count, Geometry, LabelValue, Natural, NetworkConfig, Normalisation, Strict
from clseg.study.archive import write_atomically

PARTS = ("encoder.", "decoder.", "output.")  # of a network; all else served its training
LEVELS = 5  # of BasicUNet
REMEDY = "use the weights.safetensors of a finished run"


class Adaptation(Strict):
    """What must fit for weights to be used: the record that a run writes into its weight file."""

    run: str
    dataset: str
    method: str
    network: NetworkConfig
    geometry: Geometry
    normalisation: Normalisation
    channels: Count
    channel: Natural | None  # of files with several, the one that is used
    photograph: bool
    orient: bool  # axes are turned toward the positive world axes on reading
    slice_axis: Literal["", "x", "y", "z"] = ""  # the world axis along which slices run
    nan: float | int | None = None  # what stands for intensities that are none
    classes: dict[str, str]  # class index from 1 on -> name
    label_values: list[LabelValue]  # in files, of the background and every class
    prefixes: dict[str, list[str]]

    @model_validator(mode="after")
    def _fits(self) -> "Adaptation":
        self.network.require_sides(self.geometry.size)
        return self

    def build(self) -> UNet:
        return UNet(self.channels, len(self.label_values), self.network, self.geometry.dimensions)


def read_weights(path: Path) -> tuple[dict[str, Tensor], Adaptation]:
    """The network's tensors and the adaptation record in a weight file; nothing in the file is ever executed.

    Raises `RequestError`: no complete safetensors file, no valid record, a value that is not finite, or a tensor that
    is unknown, missing (the decoder and output of a pre-training may be) or not of the shape and type of the record.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys() if name.startswith(PARTS)}  # noqa: SIM118
            adaptation = Adaptation.model_validate_json((file.metadata() or {}).get("clseg", "{}"))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
        raise RequestError(f"{path}: carries no valid adaptation record ({problem}); {REMEDY}") from None
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:150]
        raise RequestError(f"{path}: is not a complete safetensors file ({reason}); {REMEDY}") from None
    with torch.device("meta"):  # no memory for what the record says before everything fits
        own = adaptation.build().state_dict()
    for name in own | weights:
        there, needed = (f"{list(s[name].shape)} {s[name].dtype}" if name in s else "absent" for s in (weights, own))
        later = there == "absent" and not segments(weights) and not name.startswith("encoder.")
        if there != needed and not later:
            architecture = adaptation.network.architecture
            raise RequestError(f"{path}: {name} is {there}, network {architecture!r} has it {needed}; {REMEDY}")
        if name in weights and not weights[name].isfinite().all():
            raise RequestError(f"{path}: {name} holds values that are NaN or infinite; {REMEDY}")
    return weights, adaptation


def segments(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of a fine-tuning."""
    return any(name.startswith("output.") for name in weights)


def _renamed(name: str) -> str:
    """What `BasicUNet` calls a tensor of ours; "" where it has none such."""
    if match := re.fullmatch(r"encoder\.levels\.([0-4])\.(\d)\.([01])\.(\w+)", name):
        block = f"down_{match[1]}.convs" if match[1] != "0" else "conv_0"
    elif match := re.fullmatch(r"decoder\.blocks\.([0-3])\.merge\.(\d)\.([01])\.(\w+)", name):
        block = f"upcat_{LEVELS - 1 - int(match[1])}.convs"
    elif match := re.fullmatch(r"decoder\.blocks\.([0-3])\.up\.(\w+)", name):
        return f"upcat_{LEVELS - 1 - int(match[1])}.upsample.deconv.{match[2]}"
    else:
        return {"output.0.weight": "final_conv.weight"}.get(name, "")
    return f"{block}.conv_{match[2]}.{('conv', 'adn.N')[int(match[3])]}.{match[4]}"


def basic_unet(
    weights: Mapping[str, Tensor], adaptation: Adaptation, source: Path
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Arguments and state of MONAI's `BasicUNet` that holds these weights, and a line on each tensor.

    `RequestError` where it cannot hold a segmenter. Of a pre-training, what it can hold is in the state.
    """
    network, filters = adaptation.network, adaptation.network.filters
    doubling = all(wide == 2 * narrow for narrow, wide in pairwise(filters))
    whole = network.architecture == "pcl" and len(filters) == LEVELS and doubling
    if segments(weights) and not whole:
        holds = f"no network of MONAI holds {network.architecture!r} with filters {filters}, decoder and all"
        raise RequestError(f"{source}: {holds}; export it as safetensors, or its pre-training, whose encoder fits")
    finest = filters[0]
    levels = [*filters, *(filters[-1] * 2**k for k in range(1, LEVELS))][:LEVELS]
    arguments = {"spatial_dims": adaptation.geometry.dimensions, "in_channels": adaptation.channels}
    arguments |= {"out_channels": len(adaptation.label_values), "features": [*levels, finest], "act": "prelu"}
    eps, slope = (1e-5, SLOPE) if network.architecture == "pcl" else (1e-3, 0.0)
    arguments |= {
        "norm": ["batch", {"eps": eps, "momentum": network.norm_momentum}],
        "bias": True,
        "upsample": "deconv",
    }
    state, report = {}, []
    for name, value in weights.items():
        theirs, changed = _renamed(name) if whole or name.startswith("encoder.") else "", ""
        if theirs.startswith("upcat") and theirs.endswith("convs.conv_0.conv.weight"):
            value, changed = value.roll(value.shape[1] // 2, 1), ", its inputs in the other order"  # the skip is first
        if theirs.startswith("upcat_1.") and ("deconv" in theirs or changed):
            axis = min(value.ndim - 1, 1)
            zeros = value.new_zeros([finest if k == axis else n for k, n in enumerate(value.shape)])
            value, changed = torch.cat([value, zeros], axis), f"{changed}, {finest} channels of zeros added"
        state |= {theirs: value} if theirs else {}
        report.append(f"renamed {name} -> {theirs}{changed}" if theirs else f"refused {name}")
    added = {"final_conv.bias": torch.zeros(len(adaptation.label_values))} if segments(weights) else {}
    for conv, value in state.items():
        if conv.endswith(".conv.bias"):
            norm, activation = (conv.replace("conv.bias", f"adn.{layer}") for layer in "NA")
            added[f"{activation}.weight"] = torch.full([1], slope if f"{norm}.weight" in state else 0.0)
            if f"{norm}.weight" not in state:
                one, zero = torch.ones_like(value), torch.zeros_like(value)
                identity = {"weight": one, "bias": zero, "running_mean": zero, "running_var": one - eps}
                identity["num_batches_tracked"] = torch.tensor(0)
                added |= {f"{norm}.{name}": tensor.clone() for name, tensor in identity.items()}
    state |= added
    report += [f"added   {name}" for name in added]
    blocks = ["conv_0", *(f"{part}_{k}" for part in ("down", "upcat") for k in range(1, LEVELS)), "final_conv"]
    held = {name.partition(".")[0] for name in state}
    return arguments, state, report + [f"absent  {block}.*" for block in blocks if block not in held]


def export(source: Path, kind: str, output: Path) -> list[str]:
    """Write a weight file for others, `safetensors` (network and record) or `monai`; returns a report, line by line.

    The metadata hold the adaptation record (`clseg`) and for MONAI what builds its network (`monai`).
    """
    weights, adaptation = read_weights(source)
    if output.suffix != ".safetensors" or (output.exists() and output.samefile(source)):
        raise RequestError(f"{output}: must be a .safetensors file, and another one than --weights; change --output")
    if output.exists():
        raise RequestError(f"{output}: is there already; choose another --output, or remove it")
    metadata, report = {"clseg": adaptation.model_dump_json()}, [f"kept    {name}" for name in weights]
    if kind == "monai":
        arguments, weights, report = basic_unet(weights, adaptation, source)
        metadata["monai"] = json.dumps({"_target_": "BasicUNet"} | arguments)
        report.append(f"network {metadata['monai']}")
    tensors = {name: value.contiguous() for name, value in weights.items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, lambda temporary: save_file(tensors, temporary, metadata))
    except (OSError, SafetensorError) as error:  # the latter where the disk is full
        raise RequestError(f"{output}: cannot be written ({error}); choose another --output") from None
    return report
