"""Types of command-line values, for argparse: each says what was found and what was expected."""

import argparse
from collections.abc import Callable

from stllm.common.device import DEVICE_PATTERN


def path(text: str) -> str:
    """A path, as it is; not nothing."""
    if not text:  # an unset variable in a script; "" would mean this folder
        raise argparse.ArgumentTypeError("found nothing, expected a path")
    return text


def host(text: str) -> str:
    """An address or a host's name. An empty one, as of an unset variable, would open every address of the machine."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found nothing, expected an address such as 127.0.0.1 (0.0.0.0: all of them)")
    return text.strip()


def names(text: str) -> list[str]:
    """Names between commas, at least one."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected names between commas")
    return found


def whole(low: int, high: int = 2**32 - 1) -> Callable[[str], int]:
    """A whole number from `low` to `high`: by default one that is not too large for a seed or a size."""

    def parse(text: str) -> int:
        is_number = text.isascii() and text.isdigit() and len(text) < 20
        if not is_number or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number from {low} to {high}")
        return int(text)

    return parse


def number(low: float) -> Callable[[str], float]:
    """A finite number of at least `low`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a number of at least {low}")
        return value

    return parse


def device_name(text: str) -> str:
    """The form of a device's name; whether it is there, the command sees."""
    if not DEVICE_PATTERN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected auto, cpu, cuda, cuda:N or mps")
    return text


def gpu_number(text: str) -> str:
    """The published --gpu-id: N is the device cuda:N."""
    return f"cuda:{whole(0)(text)}"
