"""Functions that all measurements share: options, timing, memory, the description of the machine, and the report."""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from stllm.common.device import resolve_device
from stllm.common.errors import UserError
from stllm.evaluation.reports.tables import table

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "timm", "av")


def arguments(description: str, *, published: bool = False, engine: bool = False) -> argparse.Namespace:
    """Parse the options --quick, --output-dir and --device. published, engine: add the options of these names."""
    parser = argparse.ArgumentParser(description=description)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="smaller sizes and rough figures")
    if published:
        sizes.add_argument("--published", action="store_true", help="the published 7B model's sizes; needs a GPU")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--device", default="auto")
    if engine:
        parser.add_argument("--engine", metavar="URL", help="also measure with this server, which decodes")
    return parser.parse_args()


def cuda_device(name: str) -> torch.device:
    """Return the GPU of this name, which the published size needs. Raises UserError if it is not a CUDA device."""
    device = resolve_device(name)
    if device.type != "cuda":
        raise UserError(
            f"the device is {device}, but the published 7B model is measured on a CUDA GPU of 80 GB: run this where "
            "torch sees one, and name it (--device cuda)"
        )
    return device


def exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code: 1 after a UserError, whose sentence goes to stderr, otherwise 0."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def seconds(work: Callable[[], Any], *, repeats: int = 5, device: torch.device | None = None) -> float:
    """Return the shortest wall-clock time of `work` after one warm-up. Other processes can only make it longer."""
    return take_turns({"": work}, repeats=repeats, device=device)[""]


def take_turns(
    works: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 3,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the shortest time of each of several works, measured in turns, so that a slow minute affects all of them.

    clock: time.process_time measures CPU seconds, which depend less on other processes.
    """
    rounds = [{name: _once(work, device, clock) for name, work in works.items()} for _ in range(repeats + 1)]
    return {name: min(times[name] for times in rounds[1:]) for name in works}


def _once(work: Callable[[], Any], device: torch.device | None, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    work()
    _wait(device)
    return clock() - start


def now(device: torch.device) -> float:
    """Return a time in seconds. On a CPU it is CPU time, which other processes affect little; on a GPU the clock."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_rise(work: Callable[[], Any]) -> int:
    """Run `work` and return by how many bytes the memory of this process grew at its peak (Linux only)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def resident_bytes(name: str, process: int | str = "self") -> int:
    """Return the resident memory of a process in bytes. name: VmRSS (now) or VmHWM (its peak).

    Without /proc, returns the peak of this process.
    """
    for line in _lines(f"/proc/{process}/status"):
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Describe the machine of this run: processor, cores, threads, the GPU if `device` is one, and library versions."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "absent"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def report(
    name: str,
    baseline: str,
    rows: list[dict[str, Any]],
    sizes: dict[str, Any],
    output_dir: Path,
    also: dict[str, Any] | None = None,
    *,
    device: torch.device | None = None,
    published: bool = False,
) -> None:
    """Write a result as `<name>.json` and print it as on the page.

    baseline: what the ratios compare with, in words. rows: column -> value, for each row of the table. sizes: the
    parameters of the measurement; only results of equal sizes are compared. also: further results, and facts about the
    machine. device: the device that was used (None: the CPU). published: writes `<name>_published.json` instead.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    name = f"{name}_published" if published else name
    result = {"name": name, "baseline": baseline, "sizes": sizes, "rows": rows, "also": also or {}}
    result["machine"] = machine(device)
    (output_dir / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"## {name}\n\n{markdown(result)}")


def markdown(result: Mapping[str, Any]) -> str:
    """Return a result in Markdown: its table, then baseline, sizes, machine and versions."""
    columns = list(result["rows"][0])
    rows = [[_cell(row[column]) for column in columns] for row in result["rows"]]
    texts = len(list(takewhile(lambda value: isinstance(value, str), result["rows"][0].values())))
    about, versions = result["machine"], result["machine"]["versions"]
    where = about["accelerator"] or f"{about['processor']}, {about['threads']} threads on {about['cores']} cores"
    lines = [f"Baseline: {result['baseline']}.", f"Sizes: {_pairs(result['sizes'])}."]
    lines += [f"Also: {_pairs(result['also'])}."] if result.get("also") else []
    lines += [f"Machine: {where}; Python {about['python']}, {_pairs(versions)}."]
    return table(columns, rows, texts=texts) + "\n" + "\n".join(lines) + "\n"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_words(value)}" for key, value in values.items())


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"({_pairs(value)})"
    return " / ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
