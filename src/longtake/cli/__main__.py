"""`python -m longtake.cli`, which torchrun starts its processes by."""

import sys

from longtake.cli import main

if __name__ == "__main__":
    sys.exit(main())
