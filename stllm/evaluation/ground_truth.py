"""Ground truth as files have it: records read and checked, their media found, the settings that decide on both.

Records are read and checked by the code of `stllm doctor`, so that a run and a check say the same about a file.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from stllm.common.errors import UserError, unknown_name
from stllm.common.evaluation_section import EvaluationSettings
from stllm.conversation.requests import Media, Request
from stllm.conversation.templates import Turn
from stllm.datasets.annotations import Fields
from stllm.datasets.doctor_checks import Fault, Finding
from stllm.datasets.doctor_checks import Item as Medium
from stllm.datasets.doctor_sources import records_of
from stllm.datasets.find_media import EXTENSIONS, MediaFinder
from stllm.datasets.sampling import sample_indices
from stllm.evaluation.items import Item


def read_records(path: str | Path, form: str) -> Iterator[tuple[str, Fields]]:
    """(file and record, its fields) of every record. form: of `doctor_sources.EXPECTED`.

    Raises UserError for what concerns the whole file: missing, no JSON, of another format, no record, or a record that
    is no mapping.
    """
    for where, fields in records_of(Path(path).expanduser(), form):
        if isinstance(fields, Fault):
            raise UserError(fault_sentence(fields))
        yield where, fields


def fault_sentence(fault: Fault) -> str:
    """A fault of the doctor's as one sentence that names its place."""
    place = fault.where if fault.subject in (fault.where, "file", "format", "record", "line") else ""
    return f"{place or f'{fault.where}, {fault.subject}'}: {fault.sentence.removeprefix(f'{fault.where}, ')}"


def examined(findings: Iterable[Finding]) -> tuple[Medium | None, str]:
    """What a record's check says: its medium, and the first fault as a sentence ("" when there is none)."""
    medium, fault = None, ""
    for finding in findings:
        if isinstance(finding, Fault):
            fault = fault or fault_sentence(finding)
        else:
            medium = finding
    return medium, fault


class MediaFolders:
    """Finds a benchmark's media below folders and gives them the frames that the settings ask for.

    Raises UserError for a root that is no folder, and for frames that no video could give.
    """

    def __init__(self, root: str | Path | None, settings: EvaluationSettings) -> None:
        if root is None:
            raise UserError("no folder of media was named: give the one that holds the videos with --video-dir DIR")
        self.root = str(Path(root).expanduser())
        if not os.path.isdir(self.root):
            raise UserError(f"{self.root}: there is no such folder of media: name it with --video-dir DIR")
        _check_frames(settings)
        self._frames = Media("-", settings.num_frames, sampling=settings.sampling, reader=settings.reader)
        self._finder = MediaFinder()

    def find(
        self, medium: Medium, folders: Sequence[str] = ("",), *, bounded: bool = True, stems: Sequence[str] = ()
    ) -> Media | None:
        """The medium of that name, None when it is in none of the folders.

        folders: below the root, the first one first. bounded: whether the record's start and end count. stems: names
        without an extension that are tried before the name itself.
        """
        places = self._places(folders)
        found = self._finder.by_stem(stems, places) if stems else []
        exact = None if found else self._finder.by_path(medium.name, places)
        name, extension = os.path.splitext(medium.name)
        if not found and exact is None and extension.lower() in EXTENSIONS:  # it was converted
            found = self._finder.by_stem([name], places)
        path = exact or next(iter(found), None)
        if path is None:
            return None
        start, end = (medium.bounds if bounded else None) or (None, None)
        return replace(self._frames, path=path, start=start, end=None if end == float("inf") else end, fps=medium.fps)

    def missing(self, name: str, folders: Sequence[str] = ("",)) -> str:
        """What to say of a medium that was not found."""
        places = ", ".join(self._places(folders))
        return f"{name}: there is no such file in {places}; fetch it, or name another folder with --video-dir"

    def _places(self, folders: Sequence[str]) -> list[str]:
        return [os.path.join(self.root, folder) if folder else self.root for folder in folders]


def check_any_found(items: Sequence[Item], path: str | Path) -> None:
    """Raises UserError when not one item has its medium: the folder is most likely another one."""
    if not any(item.media for item in items):
        raise UserError(f"{path}: none of its {len(items)} items can be asked, the first one because: {items[0].error}")


def chosen_tasks(known: Sequence[str], settings: EvaluationSettings) -> list[str]:
    """The tasks that the settings name, in the benchmark's order, whatever their case, spaces or hyphens; all of them
    when none is named. Raises UserError for an unknown one."""
    wanted, there = {_snake_case(name) for name in settings.tasks}, {_snake_case(name) for name in known}
    for name in settings.tasks:
        if _snake_case(name) not in there:
            raise UserError(unknown_name("task", name, known))
    return [name for name in known if not wanted or _snake_case(name) in wanted]


def system_of(settings: EvaluationSettings) -> str | None:
    """The system sentence as `Request.system` has it: None for the template's own, "" for none."""
    return None if settings.system == "template" else str(settings.system or "")  # None: an empty value in a YAML


def open_requests(item: Item, system: str | None) -> tuple[Request, ...]:
    """A request a question, in the template's own prompt, none knowing of the others."""
    return tuple(Request(turns=(Turn(question),), media=item.media, system=system) for question in item.questions)


def _snake_case(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _check_frames(settings: EvaluationSettings) -> None:
    """Raises UserError for a rule that is unknown, needs randomness, or cannot give that number of frames."""
    count = 1 if settings.num_frames is None else settings.num_frames
    try:
        sample_indices(settings.sampling, num_frames=count, total_frames=100, fps=25.0)
    except UserError as error:
        raise UserError(f"evaluation.sampling is {settings.sampling!r} with num_frames {count}: {error}") from None
