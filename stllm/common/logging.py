"""A command's output: results on stdout, notes and warnings on stderr, control characters escaped on both.

File names, models' answers and error messages can contain escape sequences, which could move a terminal's cursor, hide
text or rename its window. So a control character is printed as its JSON escape, such as `\\u001b`. Texts in files are
not changed.
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

ONCE = {"once": True}  # pass as `extra` with a note that several parts may log but a command should print once
_PREFIXES = {logging.INFO: "note", logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "error"}
# C0 without tab and newline, DEL, C1, and the characters that change the direction of text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_BAR_MOVES = re.compile(r"\r|[\n\x1b\[A]*\Z")  # how tqdm moves the cursor, at the beginning of what it writes


class _Handler(logging.Handler):
    """Logging handler that prints `note: ...` or `warning: ...` to stderr; debug lines name their logger."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[str] = set()  # lines marked ONCE that were printed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = _PREFIXES.get(record.levelno, f"{record.levelname.lower()} {record.name}")
            line = f"{prefix}: {self.format(record)}"
            if getattr(record, "once", False):
                if line in self.written:
                    return
                self.written.add(line)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # as in logging's own handlers: a failure to print must not stop the command
            self.handleError(record)


def setup_logging(*, debug: bool = False) -> None:
    """Send stllm's log messages to stderr; ranks other than 0 log warnings only. Call before importing heavy libraries.

    Unless `debug` is set, advice and deprecation warnings of libraries are turned off. A verbosity that the user set
    through a library's own environment variable is kept.
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
    """Check whether this is rank 0 by torchrun's environment; `distributed.is_main` would be a circular import."""
    return os.environ.get("RANK", "0") == "0"


def printable(text: str) -> str:
    """Return the text with control characters replaced by `\\uXXXX`. Applying it twice changes nothing more."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class _Escaped:
    """Wrapper of the text stream `raw` that escapes control characters in what is written to it."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw

    def write(self, text: str) -> int:
        moves = ""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("tqdm."):  # all progress bars are drawn by tqdm
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
    """Escape control characters on stdout and stderr in the block, and characters missing from their encoding."""
    before = sys.stdout, sys.stderr
    escape_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def escape_output() -> None:
    """Escape as in `escaped_output` until the process ends; for worker processes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (
        stream if isinstance(stream, _Escaped) else cast(TextIO, _Escaped(stream))
        for stream in (sys.stdout, sys.stderr)
    )


def escape_traceback() -> None:
    """Escape the traceback of an uncaught exception, too. Python prints it after `escaped_output` has ended."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        with escaped_output():
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def console(*, stderr: bool = False) -> "Console":
    """Return a rich console for tables and spinners that escapes control characters in texts, but not its own styles.

    rich's markup is off: a name that contains `[red]` is printed as it is.
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

    Shows nothing when stderr is not a terminal, or in a rank other than 0.
    """
    if not sys.stderr.isatty() or not _is_main():
        yield
        return
    # rich replaces both streams while the spinner runs, and would interpret colour codes in printed texts.
    with console(stderr=True).status(what), escaped_output():
        yield
