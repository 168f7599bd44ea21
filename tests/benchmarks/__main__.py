"""Measure: `python tests/benchmarks [NAME ...] [--quick]`; each in a process of its own, on a machine with nothing else
to do.

Without a name all are measured that have no full result of this code yet, so an interrupted call goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import common

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__main__", "common"))
LONG = ["speedrun", "study"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="smallest sizes: shows that it runs, not how fast")
    parser.add_argument("--full", action="store_true", help="without names: also what takes long: speedrun, study")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    if len(options.names) == 1:
        common.report(options.names[0], options.quick)
        return 0
    failed = []
    for name in options.names or [name for name in NAMES if options.full or name not in LONG]:
        if not options.names and common.current(name):
            print(f"{name}: measured with this code")
            continue
        command = [sys.executable, str(FOLDER), name, *["--quick"] * options.quick]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
