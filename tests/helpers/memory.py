"""The peak of this process's memory, read from /proc."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


@contextmanager
def peak_below(mebibytes: int) -> Iterator[None]:
    """Asserts that the process's memory does not grow by more, even for a moment."""

    def read(name: str) -> int:
        return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = read("VmRSS")
    yield
    assert (read("VmHWM") - before) / 1024 < mebibytes
