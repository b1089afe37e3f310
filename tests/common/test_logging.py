"""The spinner: shown only at a terminal, only by rank 0, and only on stderr."""

import io
import sys

import pytest

from stllm.common.logging import working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "rank", "shown"), [(Terminal, 0, True), (io.StringIO, 0, False), (Terminal, 1, False)]
)
def test_the_spinner_is_shown_only_at_the_terminal_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, stream, rank, shown
) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TERM", "xterm")
    with working("looking for it"):
        pass
    assert ("looking for it" in stderr.getvalue()) == shown
    assert shown or stderr.getvalue() == ""


def test_the_spinner_is_erased_when_the_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError, match="broken"), working("looking for it"):
        raise ValueError("broken")
    assert stderr.getvalue().endswith("\x1b[2K")  # the line is empty again
