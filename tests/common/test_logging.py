"""The spinner: for a person who looks, once for all processes, and never among what a program reads."""

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
def test_it_is_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch, stream, rank, shown) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TERM", "xterm")
    with working("looking for it"):
        pass
    assert ("looking for it" in stderr.getvalue()) == shown
    assert shown or stderr.getvalue() == ""


def test_what_is_shown_is_taken_away_when_the_block_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError, match="broken"), working("looking for it"):
        raise ValueError("broken")
    assert stderr.getvalue().endswith("\x1b[2K")  # the line is empty again
