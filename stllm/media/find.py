"""Finds the media that annotations name: by their path, by a name without extension, or as a segment of a video.

Each folder is listed once and not asked for every file: on network disks that is the difference of minutes to hours.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from stllm.media.sampling import Bounds

SEGMENT = re.compile(r"(.+)_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)")  # such as USNP1_1.2999999999999998_15.4
SAME_BOUNDS = 0.01  # seconds by which the bounds in a segment's name may differ from a record's
EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
T = TypeVar("T")


class Listing:
    """The names in one folder; none when it is not there or may not be read."""

    def __init__(self, folder: str) -> None:
        try:
            self.names, self.exists = frozenset(os.listdir(folder)), True
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            self.names, self.exists = frozenset(), False

    def called(self, name: str) -> str | None:
        """The file of this name, whatever the Unicode form of its letters; None when there is none."""
        return name if name in self.names else self._by_form.get(_composed(name))

    def like(self, name: str) -> list[str]:
        """The names that are equal to this one but for their case."""
        return self._by_lower.get(name.lower(), [])

    def with_stem(self, stem: str) -> list[str]:
        """The media called `stem` and an extension, those first that stand first in `EXTENSIONS`."""
        return self._by_stem.get(_composed(stem), [])

    def segments(self, stem: str, bounds: Bounds) -> list[str]:
        """The media called `<stem>_<start>_<end>` and an extension, with these bounds in seconds."""
        return [
            name
            for name, *found in self._segments.get(stem, [])
            if all(abs(a - b) < SAME_BOUNDS for a, b in zip(found, bounds, strict=True))
        ]

    @cached_property
    def _segments(self) -> dict[str, list[tuple[str, float, float]]]:
        matches = ((name, SEGMENT.fullmatch(os.path.splitext(name)[0])) for name in sorted(self.names))
        return _grouped((match[1], (name, float(match[2]), float(match[3]))) for name, match in matches if match)

    @cached_property
    def _by_form(self) -> dict[str, str]:
        return {_composed(name): name for name in sorted(self.names)}

    @cached_property
    def _by_lower(self) -> dict[str, list[str]]:
        return _grouped((name.lower(), name) for name in sorted(self.names))

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        split = [os.path.splitext(name) for name in sorted(self.names)]
        media = [(stem, extension) for stem, extension in split if extension.lower() in EXTENSIONS]
        media.sort(key=lambda parts: EXTENSIONS.index(parts[1].lower()))
        return _grouped((_composed(stem), stem + extension) for stem, extension in media)


class MediaFinder:
    """Finds media below folders, and remembers what is in them."""

    def __init__(self) -> None:
        self._listings: dict[str, Listing] = {}

    def listing(self, folder: str | Path) -> Listing:
        """The names in a folder."""
        folder = os.path.normpath(folder)
        if folder not in self._listings:
            self._listings[folder] = Listing(folder)
        return self._listings[folder]

    def by_path(self, name: str, folders: Sequence[str]) -> str | None:
        """The first of the folders' files (or folders) of that relative path; None when there is none."""
        for folder in folders:
            parent, last = os.path.split(os.path.normpath(os.path.join(folder, name)))
            if found := self.listing(parent or ".").called(last):
                return os.path.join(parent, found)
        return None

    def by_stem(self, stems: Sequence[str], folders: Sequence[str]) -> list[str]:
        """The files called by the first of `stems` there is, with any medium's extension, in the first such folder."""
        for folder in folders:
            for stem in stems:
                parent, last = os.path.split(os.path.normpath(os.path.join(folder, stem)))
                if found := self.listing(parent or ".").with_stem(last):
                    return [os.path.join(parent, name) for name in found]
        return []

    def segments(self, name: str, bounds: Bounds | None, folder: str) -> list[str]:
        """The files in the folder that hold this part of the video `name`, which may have an extension."""
        stem, extension = os.path.splitext(name)
        stem = stem if extension.lower() in EXTENSIONS else name
        parent, last = os.path.split(os.path.normpath(os.path.join(folder, stem)))
        return [os.path.join(parent, file) for file in self.listing(parent).segments(last, bounds)] if bounds else []


def _composed(name: str) -> str:
    """The name in Unicode's composed form: files from a Mac have "e" and an accent where annotations have "é"."""
    return unicodedata.normalize("NFC", name)


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
