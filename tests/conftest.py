import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clseg.config import Geometry, NetworkConfig, Normalisation
from clseg.models import UNet


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets, one folder each; the test is skipped where there is none."""
    root = os.environ.get("CLSEG_DATA")
    if not root:
        pytest.skip("no real data: CLSEG_DATA is not set")
    if not Path(root).is_dir():
        pytest.skip(f"no real data: CLSEG_DATA={root} is not a folder")
    return Path(root).absolute()


@pytest.fixture
def save_weights():
    """Writes the weight file of an untrained network, by default of three classes with the values 200, 500 and 600."""

    def make(path: Path, seed=0, size=(32, 32), resize=False, values=(0, 200, 500, 600), channels=1, **changes) -> Path:
        network = changes.pop("network", NetworkConfig(filters=[8, 16, 16, 32], norm_momentum=0.3))
        parts, prefixes = changes.pop("parts", ("encoder.", "decoder.", "output.")), {"of a segmenter": ["output."]}
        torch.manual_seed(seed)
        module = UNet(channels, len(values), network, len(size))
        for name, value in module.named_buffers():  # as after some training
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                value.normal_(0, 0.3)
        weights = {name: value for name, value in module.state_dict().items() if name.startswith(parts)}
        geometry = Geometry(size=list(size), spacing_mm=None if resize else 1.4, resize=resize)
        record = {"network": network.model_dump(), "geometry": geometry.model_dump(), "channels": channels}
        record |= {"normalisation": Normalisation().model_dump(), "channel": None, "photograph": False, "orient": True}
        record |= {"classes": {str(k): f"class {k}" for k in range(1, len(values))}, "label_values": list(values)}
        record |= {"prefixes": prefixes, "dataset": "example", "method": "random", "run": "example"} | changes
        save_file(weights, path, {"clseg": json.dumps(record)})
        return path

    return make
