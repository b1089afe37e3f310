"""`KeyTable`: how one format names its weights, declared once and read in both directions.

A table is data: prefixes and inner names, theirs and ours, and the keys that are known and not used. A key that fits
nothing raises; nothing is dropped silently.
"""

import re
from dataclasses import dataclass

Pairs = tuple[tuple[str, str], ...]


class UnknownKeyError(KeyError):
    """A key that the table neither renames nor ignores."""


@dataclass(frozen=True)
class KeyTable:
    """One format's names.

    prefixes: (theirs, ours), the first that fits is replaced; longer ones stand before the shorter ones they begin with.
    inner: (theirs, ours) replaced anywhere behind one of `inner_prefixes` (theirs).
    ignored: regular expressions of keys that are known and not ours, matched from the start.
    """

    name: str
    prefixes: Pairs
    inner: Pairs = ()
    inner_prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def to_ours(self, key: str) -> str | None:
        """Our name of their key; None when it is to be ignored. Raises UnknownKeyError."""
        if any(re.match(pattern, key) for pattern in self.ignored):
            return None
        for theirs, ours in self.prefixes:
            if key.startswith(theirs):
                rest = key[len(theirs) :]
                if theirs in self.inner_prefixes:
                    for their_part, our_part in self.inner:
                        rest = rest.replace(their_part, our_part)
                return ours + rest
        raise UnknownKeyError(key)

    def to_theirs(self, key: str) -> str:
        """Their name of our key. Raises UnknownKeyError when the format has no place for it."""
        for theirs, ours in sorted(self.prefixes, key=lambda pair: -len(pair[1])):
            if key.startswith(ours):
                rest = key[len(ours) :]
                if theirs in self.inner_prefixes:
                    for their_part, our_part in self.inner:
                        rest = rest.replace(our_part, their_part)
                return theirs + rest
        raise UnknownKeyError(key)
