"""`python -m clseg` is `clseg`."""

import sys

from clseg.cli import main

if __name__ == "__main__":
    sys.exit(main())
