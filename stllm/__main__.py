"""`python -m stllm <command>`, the same as `stllm <command>`."""

import sys

from stllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
