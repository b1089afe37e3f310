"""`python -m benchmarks.temporal`, the former name of `python -m experiments.temporal`."""

import sys

from experiments.temporal.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
