"""What a user can get wrong, said in one sentence: what was found, what was expected, what to do.

The command line prints a `UserError` as that one sentence and exits with 1; anything else is a defect of ours.
"""

import difflib
import textwrap
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can put right: a name, a file, a value, a device."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely meant, whatever its case; None when nothing is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is close: the end of a message."""
    guess = nearest(name, known)
    return f"; did you mean {guess!r}?" if guess is not None else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that is not among `known`: lists them all, and the nearest."""
    names = sorted(known)
    listed = ", ".join(names) if names else "none so far"
    return f"unknown {kind} {name!r}: known are {listed}{did_you_mean(name, names)}"


def reason(error: Exception) -> str:
    """The error's kind and text in one line, for the brackets of a message."""
    if "trust_remote_code" in str(error):  # transformers advises the user to allow it, which stllm never does
        return "it needs Python code from its own folder or repository, and stllm runs no code from checkpoints"
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 240)}"
