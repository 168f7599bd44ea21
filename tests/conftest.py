import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets, one folder each; the test is skipped where there is none."""
    root = os.environ.get("CLSEG_DATA")
    if not root:
        pytest.skip("no real data: CLSEG_DATA is not set")
    if not Path(root).is_dir():
        pytest.skip(f"no real data: CLSEG_DATA={root} is not a folder")
    return Path(root).absolute()
