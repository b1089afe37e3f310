"""Start-up: wall-clock seconds of `stllm --help`, `stllm chat --help` and `import stllm`, each a new process.

The baseline is the interpreter alone (`python -c pass`) in the same run; `import torch` stands beside them as what a
command would cost that imported it first. Goal: --help within 0.5 s.

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
    """One process from its start to its end. Raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, *arguments_], check=True, capture_output=True)


def main() -> None:
    """Measures, prints and writes."""
    args = arguments(__doc__ or "")
    repeats = 3 if args.quick else 10
    times = take_turns({name: partial(start, words) for name, words in CASES.items()}, repeats=repeats)
    rows = [
        {"": name, "seconds": spent, "× the interpreter alone": spent / times[BASELINE]}
        for name, spent in times.items()
    ]
    report("startup", "the interpreter alone, `python -c pass`", rows, {"least of": repeats}, args.output_dir)


if __name__ == "__main__":
    main()
