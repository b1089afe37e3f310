"""Start-up: wall-clock seconds of `stllm --help`, `stllm chat --help` and `import stllm`, each in a new process.

The baseline is the interpreter alone (`python -c pass`). For comparison, `import torch` is measured as well: a command
that imports torch takes at least as long. Goal: --help within 0.5 s.

    python -m benchmarks.startup [--quick]
"""

import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from benchmarks.common import arguments, report, take_turns

CASES: dict[str, Sequence[str]] = {
    "python -c pass": ("-c", "pass"),
    "import stllm": ("-c", "import stllm"),
    "stllm --help": ("-m", "stllm", "--help"),
    "stllm chat --help": ("-m", "stllm", "chat", "--help"),
    "import torch": ("-c", "import torch"),
}
BASELINE = "python -c pass"


def start(arguments_: Sequence[str]) -> None:
    """Run Python with these arguments. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, *arguments_], check=True, capture_output=True)


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    repeats = 3 if args.quick else 10
    times = take_turns({name: partial(start, words) for name, words in CASES.items()}, repeats=repeats)
    rows = [
        {"": name, "seconds": spent, "× the interpreter alone": spent / times[BASELINE]}
        for name, spent in times.items()
    ]
    sizes = {"repeats (fastest counts)": repeats}
    report("startup", "the interpreter alone, `python -c pass`", rows, sizes, args.output_dir)


if __name__ == "__main__":
    main()
