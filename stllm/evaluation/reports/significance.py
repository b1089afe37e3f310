"""Whether a difference could be chance: exact and closed-form tests, the same figures on every machine.

Sources: McNemar's test in its exact form; the interval of matched proportions by Agresti and Min (2005), an adjusted
Wald interval; Pearson's chi-square.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class Paired:
    """The same items, right or wrong in two ways of asking them.

    items: compared. lost: right the first way alone; gained: right the second way alone.
    """

    items: int
    lost: int
    gained: int

    @property
    def difference(self) -> float | None:
        """Second accuracy less the first, in points of percent; None of no items."""
        return 100 * (self.gained - self.lost) / self.items if self.items else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """A 95% interval of that difference, in points; None of no items."""
        if not self.items:
            return None
        count, lost, gained = self.items + 2, self.lost + 0.5, self.gained + 0.5
        centre = (gained - lost) / count
        spread = Z95 * math.sqrt((gained + lost) / count - centre**2) / math.sqrt(count)
        return 100 * max(-1.0, centre - spread), 100 * min(1.0, centre + spread)

    @property
    def p_value(self) -> float:
        """Two-sided: how likely so uneven a split of the items that differ is when neither way is better."""
        changed = self.lost + self.gained
        tail = sum(math.comb(changed, k) for k in range(min(self.lost, self.gained) + 1))
        return min(1.0, 2 * tail / 2**changed)


def paired(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """Compares two lists of right and wrong, item by item."""
    both = list(zip(first, second, strict=True))
    return Paired(items=len(both), lost=both.count((True, False)), gained=both.count((False, True)))


def chi_square(observed: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's sum over the cells; those of which nothing is expected are left out."""
    return sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True) if due)


def chi_square_p(value: float, degrees: int) -> float:
    """How likely a chi-square of so many degrees of freedom is to be that large or larger."""
    if degrees < 1:
        return 1.0
    half = value / 2
    steps = range(degrees // 2) if degrees % 2 == 0 else range((degrees - 1) // 2)
    shift = 0.0 if degrees % 2 == 0 else 0.5
    start = 0.0 if degrees % 2 == 0 else math.erfc(math.sqrt(half))
    return min(1.0, start + sum(math.exp(-half) * half ** (k + shift) / math.gamma(k + 1 + shift) for k in steps))
