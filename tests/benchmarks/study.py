"""`make study` after installation: the label-fraction study on the phantom at profile `laptop`, everything from the
start.
"""

import subprocess
import sys
import time

from common import FEW, Row, absolute, temporary_root

TITLE = "`make study` after installation"
GOAL = "under 6 minutes on two cores"
PEERS: list[str] = []


def measure(quick: bool) -> list[Row]:
    narrow = ["study.methods=[random]", "study.labelled=[1]", "study.draws=[1]", "finetune.steps=2", *FEW]
    with temporary_root() as root:
        command = [sys.executable, "-m", "clseg", "run", "quickstart", "--out", str(root)]
        command += ["--profile", "smoke" if quick else "laptop"]
        began = time.perf_counter()
        subprocess.run([*command, *(word for text in narrow * quick for word in ("--set", text))], check=True)
        return [absolute("minutes from command to figures", [(time.perf_counter() - began) / 60], 6.0, "min")]
