"""Code that benchmarks share for reading a ground truth and finding its media."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, unknown_name
from stllm.common.files import user_path
from stllm.common.jsonl import loads
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Media, Request
from stllm.datasets.annotations import read_file
from stllm.datasets.faults import Fault, Finding, Medium
from stllm.evaluation.benchmarks.base import Entry, Item
from stllm.media.find import EXTENSIONS, MediaFinder
from stllm.media.sampling import sample_indices
from stllm.processors.templates import Turn


@dataclass(frozen=True)
class Search:
    """Places to search for a medium. Folders are relative to the root folder of all media.

    folders: searched in this order. stems: file names without extension that are tried first. segments: those of the
    folders whose files are already cut to start and end. frames: those of the folders that contain folders of numbered
    frames -> frames per second.
    """

    folders: Sequence[str] = ("",)
    stems: Sequence[str] = ()
    segments: Sequence[str] = ()
    frames: dict[str, float] | None = None


class MediaFolders:
    """Finds a benchmark's media below a root folder, and applies the configured frames and sampling.

    Raises UserError if the root is not a folder, or if the sampling settings are invalid.
    """

    def __init__(self, root: str | Path | None, settings: EvaluationSettings) -> None:
        if root is None:
            raise UserError("no folder of media was named: give the one that holds the videos with --video-dir DIR")
        self.root = str(user_path(root))
        if not os.path.isdir(self.root):
            is_file = os.path.exists(self.root)
            found = "found a file, expected the folder of media" if is_file else "there is no such folder of media"
            raise UserError(f"{self.root}: {found}: name it with --video-dir DIR")
        count = 1 if settings.num_frames is None else settings.num_frames
        try:  # raises for an unknown rule, a random one, or one that cannot give this number of frames
            sample_indices(settings.sampling, num_frames=count, total_frames=100, fps=25.0)
        except UserError as error:
            raise UserError(f"evaluation.sampling is {settings.sampling!r} with num_frames {count}: {error}") from None
        sampling, reader = settings.sampling, settings.reader
        self._frames = Media("-", settings.num_frames, sampling=sampling, reader=reader, own_times=False)
        self._finder = MediaFinder()

    def entry(self, item: Item, findings: Iterable[Finding], search: Search, *, needs_bounds: bool = False) -> Entry:
        """Search for the record's medium. Return its entry; the item has the medium, or the error that prevents it.

        findings: what the check of the record found. needs_bounds: start and end are required, unless the medium is a
        segment.
        """
        found = list(findings)
        faults = [finding for finding in found if isinstance(finding, Fault)]
        medium = next((finding for finding in found if isinstance(finding, Medium)), None)
        if medium is None:
            error = next((fault.in_words for fault in faults if not fault.note), "")
            return Entry(replace(item, error=error), faults=tuple(faults))
        folder, paths = self._find(medium, search)
        place = paths[0] if paths else os.path.join(self.root, search.folders[0], medium.name)
        if folder is not None:
            if folder in search.segments:
                medium = replace(medium, bounds=None)
            elif needs_bounds and medium.bounds is None and not any(fault.kind == "bounds" for fault in faults):
                sentence = "found none, expected the part of the video that is asked about: add it"
                faults.append(Fault("bounds", medium.where, "start, end", sentence))
            if rate := (search.frames or {}).get(folder):
                medium = replace(medium, expects="frames", fps=rate)
                if not os.path.isdir(place):
                    sentence = "found a file, expected a folder of numbered frames"
                    faults.append(Fault("wrong medium", medium.where, place, sentence))
            if len(paths) > 1:
                names = ", ".join(map(os.path.basename, paths))
                sentence = f"several files have this name ({names}); the first is used: keep one"
                faults.append(Fault("colliding names", medium.where, os.path.join(folder, medium.name), sentence, True))
        media, error = None, next((fault.in_words for fault in faults if not fault.note), "")
        if folder is None and not error:
            places = ", ".join(map(self._place, search.folders))
            error = f"{medium.name}: there is no such file in {places}"
            error += "; fetch it, or name another folder with --video-dir"
        elif not error:
            start, end = medium.bounds or (None, None)
            media = replace(self._frames, path=place, start=start, end=None if end == inf else end, fps=medium.fps)
        return Entry(replace(item, media=media, error=error), medium, place, folder, tuple(faults))

    def _find(self, medium: Medium, search: Search) -> tuple[str | None, list[str]]:
        """Return the first folder that has the medium, and the files there with its name; callers use the first."""
        finder, (name, extension) = self._finder, os.path.splitext(medium.name)
        converted = [name] if extension.lower() in EXTENSIONS else []
        ways: list[tuple[Sequence[str], Callable[[str], list[str]]]] = [
            (search.folders, lambda place: finder.by_stem(search.stems, [place])),
            (search.folders, lambda place: list(filter(None, [finder.by_path(medium.name, [place])]))),
            (search.folders, lambda place: finder.by_stem(converted, [place])),
            (search.segments, lambda place: finder.segments(medium.name, medium.bounds, place)),
        ]
        for folders, way in ways:
            for folder in folders:
                if paths := way(self._place(folder)):
                    return folder, paths
        return None, []

    def _place(self, folder: str) -> str:
        return os.path.join(self.root, folder) if folder else self.root


def find_files(path: Path, title: str, names: Mapping[str, str], places: Sequence[str]) -> dict[str, Path]:
    """Return task -> file for each task whose file exists. Raises UserError if none does.

    path: a folder of the benchmark, or one of the files. title: the benchmark's name in the message. names: task ->
    name of its file. places: folders to search, relative to `path`; "" for itself.
    """
    found = {task: file for task, name in names.items() if (file := find_file(path, name, places))}
    if not found:
        listed = ", ".join(os.path.join(places[0], name) for name in names.values())
        raise UserError(f"{path}: found none of {title}'s files ({listed}): name the folder that holds them")
    return found


def find_file(path: Path, name: str, places: Sequence[str]) -> Path | None:
    """Return the file of this name, or None; arguments as for `find_files`."""
    if path.is_file():
        return path if path.name == name else None
    return next((file for place in places if (file := path / place / name).is_file()), None)


def root_of(files: Mapping[str, Path], folder: str) -> Path:
    """Return a benchmark's folder. files: result of `find_files`. folder: the subfolder in which a release has them."""
    place = next(iter(files.values())).parent
    return place.parent if place.name == folder else place


def chosen_tasks(known: Sequence[str], settings: EvaluationSettings) -> list[str]:
    """Return the configured tasks in the benchmark's order, or all tasks if none is configured.

    Case is ignored; spaces and hyphens count as underscores. Raises UserError for an unknown task.
    """

    def plain(name: str) -> str:
        return name.strip().lower().replace(" ", "_").replace("-", "_")

    by_name = {plain(name): name for name in known}
    for name in settings.tasks:
        if plain(name) not in by_name:
            raise UserError(unknown_name("task", name, known))
    wanted = set(map(plain, settings.tasks))
    return [name for name in known if not wanted or plain(name) in wanted]


def open_requests(item: Item, system: str | None) -> tuple[Request, ...]:
    """Return one request per question of the item, each with the template's default prompt."""
    return tuple(Request(turns=(Turn(question),), media=item.media, system=system) for question in item.questions)


def read_mapping(path: Path, expected: str) -> dict[str, Any]:
    """Return the JSON object in a file. expected: description of its format, used in error messages.

    Raises UserError if the file is missing, not JSON or not an object, or if a key occurs twice in one of its objects.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}: {twice!r} occurs twice, so that one of its records would be lost: keep one")
        return found

    text = read_file(path, expected)[1]
    try:
        content = loads(text, object_pairs_hook=once)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); expected {expected}") from None
    if not isinstance(content, dict) or not content:
        found = json.dumps(content, ensure_ascii=False)[:60]
        raise UserError(f"{path}: found {found}, expected {expected}: it is another file, or of another benchmark")
    return content
