"""Tables in Markdown whose columns also line up as plain text, and how figures are written in them."""

from collections.abc import Sequence

MISSING = "–"


def percent(value: float | None) -> str:
    """One decimal, as the tables of the field have it."""
    return MISSING if value is None else f"{value:.1f}"


def score(value: float | None) -> str:
    """Two decimals: scores from 0 to 5."""
    return MISSING if value is None else f"{value:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, texts: int = 1) -> str:
    """A Markdown table, its lines ended. texts: how many columns are words, to the left; the rest is figures."""
    # one line a cell, and a bar within it is no border
    lines = [[" ".join(str(entry).split()).replace("|", "\\|") for entry in row] for row in (header, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]

    def line(entries: Sequence[str]) -> str:
        padded = [
            entry.ljust(width) if column < texts else entry.rjust(width)
            for column, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |\n"

    rule = ["-" * width if column < texts else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "".join([line(lines[0]), line(rule), *map(line, lines[1:])])
