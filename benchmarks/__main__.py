"""Runs all measurements of speed and memory, each in its own process, and writes their JSON files, charts and a page.

The page also compares the results with the last committed ones. (experiments/ measures answers instead.)

    python -m benchmarks [--quick] [--only NAME ...] [--output-dir DIR] [--device DEVICE] [--page]
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.comparison import committed
from benchmarks.measurements import MEASUREMENTS
from benchmarks.page import write_page

WITHOUT_DEVICE = ("startup", "data_pipeline", "decoding", "loading")  # they run on the CPU only


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the page and print the changes. Returns 1 if a measurement failed, otherwise 0."""
    args = _arguments(argv)
    home = RESULTS / "quick" if args.quick else RESULTS
    folder = args.output_dir or home
    folder.mkdir(parents=True, exist_ok=True)
    names = [] if args.page else args.only or list(MEASUREMENTS)
    done = [name for name in names if _measure(name, folder, quick=args.quick, device=args.device)]
    before = {name: result for name in done if (result := committed(home / f"{name}.json")) is not None}
    compared = write_page(folder, before, quick=args.quick)
    print(f"\n{compared or 'Nothing committed to compare with.'}\nThe page: {folder / 'README.md'}")
    failed = [name for name in names if name not in done]
    if failed:
        print(f"error: failed: {', '.join(failed)}; the others are on the page", file=sys.stderr)
    return 1 if failed else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes and rough figures")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", nargs="+", choices=MEASUREMENTS, metavar="NAME", help=", ".join(MEASUREMENTS))
    what.add_argument("--page", action="store_true", help="measure nothing; write the page from existing results")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="(default: benchmarks/results, with --quick results/quick)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    return parser.parse_args(argv)


def _measure(name: str, folder: Path, *, quick: bool, device: str) -> bool:
    """Run one measurement in a new process, whose memory no other has used. Returns whether it succeeded."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--output-dir", str(folder)]
    command += ["--quick"] if quick else []
    command += [] if name in WITHOUT_DEVICE else ["--device", device]
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, check=False).returncode
    print(f"== {name}: {time.perf_counter() - start:.0f} s{f', exit code {code}' if code else ''}", flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
