"""A command's output: results on stdout, notes and warnings on stderr, control characters escaped on both.

Names of files, answers of models, ledgers and error messages can hold escape sequences, which would move a terminal's
cursor, hide text or rename its window. They are printed as `\\u001b`, which JSON reads back as the same text. Files
keep the text as it is.
"""

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

ONCE = {"once": True}  # `extra` of a note that a command prints only once, although several of its parts may log it
_PREFIXES = {logging.INFO: "note", logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "error"}
# C0 without tab and newline, DEL, C1, and the marks that change the direction of the text around them.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_BAR_MOVES = re.compile(r"\r|[\n\x1b\[A]*\Z")  # how tqdm moves the cursor, at the beginning of what it writes


class _Handler(logging.Handler):
    """A handler that writes `note: ...` and `warning: ...` to the current stderr; a debug line names its logger."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[str] = set()  # of the lines marked ONCE

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = _PREFIXES.get(record.levelno, f"{record.levelname.lower()} {record.name}")
            line = f"{prefix}: {self.format(record)}"
            if getattr(record, "once", False):
                if line in self.written:
                    return
                self.written.add(line)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # as in every handler: a note that cannot be written stops nothing
            self.handleError(record)


def setup_logging(*, debug: bool = False) -> None:
    """Send stllm's notes to stderr, in the main process only. Call it before a heavy library is imported.

    Unless `debug` is set, advisory messages and deprecation warnings of libraries are off. A verbosity that the user
    set through the libraries' own environment variables is respected.
    """
    logger = logging.getLogger("stllm")
    logger.handlers = [_Handler()]  # one handler, however often this is called
    logger.setLevel(logging.DEBUG if debug else logging.INFO if _is_main() else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns in every forked data loader worker
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises a package for speed at every import
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(accelerate|peft|timm|torch|transformers)\b")


def _is_main() -> bool:
    """Check what torchrun's environment says, as `distributed.is_main` does before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """The text with its control characters as `\\uXXXX`; doing it twice changes nothing."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Escaped:
    """A text stream that escapes what is written to `raw`, the stream below it. Everything else is passed to `raw`."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        moves = ""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("tqdm."):  # every library's bars are tqdm's
            found = _BAR_MOVES.match(text)
            moves = found[0] if found else ""
        self.raw.write(moves + printable(text[len(moves) :]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextmanager
def escaped_output() -> Iterator[None]:
    """Escape control characters on stdout and stderr in this block, and characters that their encoding lacks."""
    before = sys.stdout, sys.stderr
    escape_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def escape_output() -> None:
    """Do the same from now on, in a process that a command has started."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, _Escaped) else cast(TextIO, _Escaped(stream))
        for stream in (sys.stdout, sys.stderr)
    )


def escape_traceback() -> None:
    """Escape the traceback that ends this process, too. The interpreter prints it after the command has ended."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with escaped_output():
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def console(*, stderr: bool = False) -> "Console":
    """rich's console, for tables and spinners: its own styles reach the terminal, control characters in texts do not.

    Texts are no markup: a name that holds `[red]` is printed as it is.
    """
    from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
    from rich.segment import Segment

    class Escaped:
        def __init__(self, content: ConsoleRenderable) -> None:
            self.content = content

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for text, style, control in console.render(self.content, options):
                yield Segment(text if control else printable(text), style, control)

    class Escape(RenderHook):
        def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
            return [Escaped(content) for content in renderables]

    stream = sys.stderr if stderr else sys.stdout
    while isinstance(stream, _Escaped):
        stream = stream.raw
    result = Console(file=stream, markup=False, emoji=False, highlight=False)
    result.push_render_hook(Escape())
    return result


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show `what` beside a spinner on stderr until the block ends.

    Show nothing when stderr is not a terminal, or when this is not the main process.
    """
    if not sys.stderr.isatty() or not _is_main():
        yield
        return
    # The spinner takes the place of both streams, and would read colour codes in what is printed.
    with console(stderr=True).status(what), escaped_output():
        yield
