"""Notes and warnings of the command line, on stderr; results alone go to stdout. Libraries are kept quiet."""

import logging
import os
import sys
import warnings

from stllm.common.distributed import is_main

ONCE = {"once": True}  # `extra` of a note that a command says once, though several of its parts come upon the matter
_PREFIXES = {logging.INFO: "note", logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "error"}


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """`note: ...` and `warning: ...`; a debug line names its logger."""
        prefix = _PREFIXES.get(record.levelno, f"{record.levelname.lower()} {record.name}")
        return f"{prefix}: {super().format(record)}"


class _Handler(logging.Handler):
    """Writes to what stderr is at that moment: under a spinner, that is what keeps the two apart."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if getattr(record, "once", False):
                if line in self.said:
                    return
                self.said.add(line)
            print(line, file=sys.stderr, flush=True)
        except Exception:  # as every handler: a note that cannot be written stops nothing
            self.handleError(record)


def setup_logging(*, debug: bool = False) -> None:
    """Sends stllm's notes to stderr, those of the main process alone; call it before a heavy library is imported.

    Unless `debug`, libraries' advisory messages and deprecation warnings are off. A verbosity that the user set
    through the libraries' own environment variables is respected.
    """
    handler = _Handler()
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("stllm")
    logger.handlers = [handler]  # not one more with each call
    logger.setLevel(logging.DEBUG if debug else logging.INFO if is_main() else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in every forked data loader worker
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(accelerate|peft|timm|torch|transformers)\b")
