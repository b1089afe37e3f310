"""What every measurement shares: timing, the machine and versions, and where results go."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "timm", "av")


def arguments(description: str) -> argparse.Namespace:
    """--quick for smaller sizes, --output-dir for where JSON and markdown go, --device."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, a rough figure")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def seconds(work: Callable[[], Any], *, repeats: int = 5, device: torch.device | None = None) -> float:
    """Least wall-clock seconds of `work` after one warm-up: what else the machine does only ever adds to it."""
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """Processor, cores, threads and accelerator of this run."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def report(name: str, baseline: str, rows: list[dict[str, Any]], sizes: dict[str, Any], output_dir: Path) -> None:
    """Writes `<name>.json` and `<name>.md` and prints the table. baseline: in words, what the ratios stand against."""
    output_dir.mkdir(parents=True, exist_ok=True)
    result = {"name": name, "baseline": baseline, "sizes": sizes, "rows": rows, "machine": machine()}
    (output_dir / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    columns = list(rows[0])
    lines = [f"## {name}", "", f"Baseline: {baseline}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    sizes_line = ", ".join(f"{key} {value}" for key, value in sizes.items())
    about = result["machine"]
    lines += ["", f"Sizes: {sizes_line}. Machine: {about['processor']}, {about['cores']} cores, "]
    lines[-1] += ", ".join(f"{key} {value}" for key, value in about["versions"].items()) + "."
    (output_dir / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
