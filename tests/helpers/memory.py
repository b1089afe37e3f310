"""Peak memory of this process and of its children, from /proc."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS = Path("/proc/self/status")


@contextmanager
def peak_below(mebibytes: int) -> Iterator[None]:
    """Assert that the memory of this process does not grow by more within the block, not even briefly."""

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = read("VmRSS")
    yield
    assert (read("VmHWM") - before) / 1024 < mebibytes


def peak_of_children() -> float:
    """Return the largest peak memory of a single child process, in MiB."""
    peaks = [0.0]
    for process in descendants(os.getpid()):
        with suppress(OSError, StopIteration):
            status = Path(f"/proc/{process}/status").read_text().splitlines()
            peaks.append(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024)
    return max(peaks)


def descendants(process: int) -> list[int]:
    """Return the children of this process, and their children."""
    found = []
    with suppress(OSError):
        for task in Path(f"/proc/{process}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found + [one for child in found for one in descendants(child)]
