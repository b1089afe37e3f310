"""Finds the files that annotations name: by path, by name without extension, or as a segment of a video.

Each folder is listed once, instead of checking for every file. On network disks this takes minutes instead of hours.
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
    """The names in one folder. A folder that does not exist or cannot be read has none."""

    def __init__(self, folder: str) -> None:
        try:
            self.names, self.exists = frozenset(os.listdir(folder)), True
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            self.names, self.exists = frozenset(), False

    def called(self, name: str) -> str | None:
        """Return the name of a file as it is on disk, in any Unicode form, or None if there is none."""
        return name if name in self.names else self._by_form.get(_composed(name))

    def like(self, name: str) -> list[str]:
        """Return the names that equal `name` if case is ignored."""
        return self._by_lower.get(name.lower(), [])

    def with_stem(self, stem: str) -> list[str]:
        """Return the media files named `stem` plus an extension, in the order of `EXTENSIONS`."""
        return self._by_stem.get(_composed(stem), [])

    def segments(self, stem: str, bounds: Bounds) -> list[str]:
        """Return the media files named `<stem>_<start>_<end>` plus an extension, with these bounds in seconds."""
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
    """Finds media below folders, and caches the names in each folder."""

    def __init__(self) -> None:
        self._listings: dict[str, Listing] = {}

    def listing(self, folder: str | Path) -> Listing:
        """Return the names in a folder, from the cache if it was listed before."""
        folder = os.path.normpath(folder)
        if folder not in self._listings:
            self._listings[folder] = Listing(folder)
        return self._listings[folder]

    def by_path(self, name: str, folders: Sequence[str]) -> str | None:
        """Return the file or folder of a relative path in the first of the folders that has it, or None."""
        for folder in folders:
            parent, last = os.path.split(os.path.normpath(os.path.join(folder, name)))
            if found := self.listing(parent or ".").called(last):
                return os.path.join(parent, found)
        return None

    def by_stem(self, stems: Sequence[str], folders: Sequence[str]) -> list[str]:
        """Return the media files of the first stem that exists, in the first of the folders that has one of the stems.

        stems: file names without extension. Returns one path for each extension found, or an empty list.
        """
        for folder in folders:
            for stem in stems:
                parent, last = os.path.split(os.path.normpath(os.path.join(folder, stem)))
                if found := self.listing(parent or ".").with_stem(last):
                    return [os.path.join(parent, name) for name in found]
        return []

    def segments(self, name: str, bounds: Bounds | None, folder: str) -> list[str]:
        """Return the files in a folder that hold one part of a video, cut out beforehand.

        name: the video's name, with or without extension. bounds: the part in seconds; None gives an empty list.
        """
        stem, extension = os.path.splitext(name)
        stem = stem if extension.lower() in EXTENSIONS else name
        parent, last = os.path.split(os.path.normpath(os.path.join(folder, stem)))
        return [os.path.join(parent, file) for file in self.listing(parent).segments(last, bounds)] if bounds else []


def _composed(name: str) -> str:
    """Return a name in Unicode's composed form ("é"). Files from a Mac have the decomposed form ("e" and an accent)."""
    return unicodedata.normalize("NFC", name)


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
