"""`KeyTable`: how one format names its weights, declared once and read in both directions.

A table is data: prefixes and inner names, theirs and ours, fused tensors, and the keys that are known and not used. A
key that fits nothing raises; nothing is dropped silently. Everything here is a pure function of keys and tensors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Pairs = tuple[tuple[str, str], ...]


class UnknownKeyError(KeyError):
    """A key that the table neither renames nor ignores."""


@dataclass(frozen=True)
class Split:
    """One fused tensor of theirs that is several of ours, equal parts of the first dimension.

    fused: the end of the renamed key. parts: what stands there in ours, in order; None for a part that must be zero.
    """

    fused: str
    parts: tuple[str | None, ...]


@dataclass(frozen=True)
class Target:
    """Where one of their tensors goes: our key, and which of how many equal parts of it; None for a part kept zero."""

    key: str | None
    part: int = 0
    num_parts: int = 1

    def take(self, tensor: Tensor) -> Tensor:
        """This target's rows of their tensor."""
        return tensor.tensor_split(self.num_parts)[self.part]

    def shape(self, theirs: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `take` for a tensor of that shape."""
        return theirs if self.num_parts == 1 else (theirs[0] // self.num_parts, *theirs[1:])


@dataclass(frozen=True)
class KeyTable:
    """One format's names.

    prefixes: (theirs, ours), the first that fits is replaced; longer ones stand before those that they begin with.
    inner: (theirs, ours) replaced anywhere behind one of `inner_prefixes` (theirs).
    splits: fused tensors.
    ignored: regular expressions of keys that are known and not ours, matched from the start.
    """

    name: str
    prefixes: Pairs
    inner: Pairs = ()
    inner_prefixes: tuple[str, ...] = ()
    splits: tuple[Split, ...] = ()
    ignored: tuple[str, ...] = ()

    @cached_property
    def _ignored(self) -> re.Pattern[str] | None:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.ignored)) if self.ignored else None

    def ignores(self, key: str) -> bool:
        """Whether their key is known and not ours."""
        return self._ignored is not None and self._ignored.match(key) is not None

    def ignoring(self, *patterns: str) -> "KeyTable":
        """The same table with more keys that are known and not ours."""
        return replace(self, ignored=(*patterns, *self.ignored))

    def to_ours(self, key: str) -> str | None:
        """Our name of their key; None when it is to be ignored. Raises UnknownKeyError."""
        if self.ignores(key):
            return None
        for theirs, ours in self.prefixes:
            if key.startswith(theirs):
                rest = key[len(theirs) :]
                if theirs in self.inner_prefixes:
                    for their_part, our_part in self.inner:
                        rest = rest.replace(their_part, our_part)
                return ours + rest
        raise UnknownKeyError(key)

    def targets(self, key: str) -> list[Target]:
        """Where their tensor goes; empty when it is to be ignored. Raises UnknownKeyError."""
        renamed = self.to_ours(key)
        if renamed is None:
            return []
        for split in self.splits:
            if renamed.endswith(split.fused):
                stem = renamed[: -len(split.fused)]
                keys = [None if end is None else stem + end for end in split.parts]
                return [Target(ours, part, len(keys)) for part, ours in enumerate(keys)]
        return [Target(renamed)]

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

    def convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their state dict -> ours. Raises UnknownKeyError; ValueError for a part that ought to be zero and is not."""
        converted: dict[str, Tensor] = {}
        for key, tensor in state.items():
            for target in self.targets(key):
                if target.key is None:
                    check_zero(key, target.take(tensor))
                else:
                    converted[target.key] = target.take(tensor)
        return converted


def check_zero(key: str, part: Tensor) -> None:
    """Raises ValueError when a part that this model has no place for carries anything."""
    if torch.count_nonzero(part):
        raise ValueError(
            f"{key}: the encoder has no key bias, but this checkpoint's is not zero (largest "
            f"{part.abs().max().item():.3g}): it is not an EVA-ViT of the BLIP-2 line"
        )
