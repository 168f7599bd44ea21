"""`python -m clseg` is `clseg`."""

import sys

from clseg.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
