"""What can be wrong with media: found or not, and what opening them and decoding them shows."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from tqdm import tqdm

from stllm.common.distributed import CHUNK, mapping
from stllm.common.errors import UserError
from stllm.datasets.faults import Fault, Medium
from stllm.doctor.checks import short_answer
from stllm.media import info as media_info
from stllm.media.find import MediaFinder
from stllm.media.info import MediaError, MediaInfo
from stllm.media.open import open_media
from stllm.media.sampling import Bounds, sample_indices
from stllm.media.time_bound import keep_reading, read_within

DECODE = ("none", "first", "all")
SECONDS_OPTION = "--media-seconds"
SLACK = 1.0  # seconds that an end may lie behind the video's; rounding in annotations explains so much

Task = Callable[[], list[Fault]]


@dataclass
class Use:
    """A medium, and all that records ask of it.

    where: the first record, and how many others. clips: bounds, and the record that has them. rule: the sampling rule
    (sampling.py) of a benchmark; "" for training data.
    """

    path: str
    expects: str
    where: str
    fps: float | None = None
    num_frames: int | None = None
    num_records: int = 1
    rule: str = ""
    clips: list[tuple[Bounds, str]] = field(default_factory=list)

    @property
    def whose(self) -> str:
        """The records, for a message."""
        return self.where if self.num_records == 1 else f"{self.where} and {self.num_records - 1} more"


class Survey:
    """Takes items, gathers each medium once with all its records, and names what shows without opening any.

    uses: the media that are there, by path and what they are expected to be.
    """

    def __init__(self) -> None:
        self.finder = MediaFinder()
        self.uses: dict[tuple[str, str], Use] = {}
        self._missing: dict[str, Use] = {}
        self._answers: dict[int, tuple[str, str]] = {}

    def add(
        self, item: Medium, place: str, *, found: bool, root: str = "", fps: float | None = None, rule: str = ""
    ) -> Iterator[Fault]:
        """Adds an item. Yields the faults of its name and its answer.

        place: the path of its medium, or where it should be if it was not found. root: the folder outside which no
        medium may lie, "" for none. fps: of a frame folder, if the item has none. rule: as in `Use`.
        """
        if root and _is_outside(place, root):
            sentence = f"it lies outside the media folder {root}; move it there, and name it relative to that"
            yield Fault("outside", item.where, item.name, sentence)
        yield from self._contradictions(item, place)
        if not found:
            self._note_missing(item, place)
            return
        key = place, item.expects
        if key not in self.uses:
            self.uses[key] = Use(place, item.expects, item.where, item.fps or fps, item.num_frames, rule=rule)
            yield from self._same_but_case(item, place)
        else:
            self.uses[key].num_records += 1
        if item.bounds is not None:
            self.uses[key].clips.append((item.bounds, item.where))

    def missing(self) -> Iterator[Fault]:
        """Media that are nowhere: one fault a medium, or one for a whole folder that is not there."""
        folders: dict[str, Use] = {}
        for path, use in self._missing.items():
            parent = os.path.dirname(path)
            if self.finder.listing(parent or ".").exists:
                yield Fault("missing", use.whose, path, f"there is no such file{self._hint(path)}")
            elif parent in folders:
                folders[parent].num_records += use.num_records
            else:
                folders[parent] = Use(parent, use.expects, use.where, num_records=use.num_records)
        for parent, use in folders.items():
            sentence = "there is no such folder; check the media root, or fetch the media"
            yield Fault("missing", use.whose, parent, sentence)

    def _note_missing(self, item: Medium, place: str) -> None:
        if place in self._missing:
            self._missing[place].num_records += 1
        else:
            self._missing[place] = Use(place, item.expects, item.where)

    def _hint(self, path: str) -> str:
        """A file that could have been meant."""
        folder, name = os.path.split(path)
        listing = self.finder.listing(folder or ".")
        near = [*listing.like(name), *listing.with_stem(os.path.splitext(name)[0])]
        return f"; there is {near[0]}: correct the name" if near else "; fetch it, or leave the record out"

    def _same_but_case(self, item: Medium, place: str) -> Iterator[Fault]:
        folder, name = os.path.split(place)
        others = [other for other in self.finder.listing(folder or ".").like(name) if other != name]
        if others:
            sentence = f"there is {', '.join(others)}, too; where case does not count, they are one file: rename one"
            yield Fault("colliding names", item.where, place, sentence)

    def _contradictions(self, item: Medium, place: str) -> Iterator[Fault]:
        for question, answer in item.pairs:
            short = short_answer(answer)
            if not question.strip() or short is None:
                continue
            key = hash((place, item.bounds, question.strip().lower()))
            first, where = self._answers.setdefault(key, (short, item.where))
            if first != short:
                sentence = f"{question.strip()!r} is answered {answer!r} here and {first!r} in {where}: keep one"
                yield Fault("contradiction", item.where, place, sentence)


def _is_outside(place: str, root: str) -> bool:
    inside = place.startswith(os.path.join(root, ""))  # the quick answer, for most of millions
    return not (inside and os.pardir not in place) and os.path.relpath(place, root).startswith(os.pardir)


def check_use(use: Use, decode: str, media_seconds: float = 0) -> list[Fault]:
    """What is wrong with a medium that is there. decode: "none" of it (its size alone), its "first" frame, or "all".

    media_seconds: the limit on reading it; 0: none. Raises StorageError.
    """
    with _notes() as notes:
        try:
            faults = read_within(media_seconds, partial(_look, use, decode), medium=use.path, setting=SECONDS_OPTION)
        except MediaError as error:
            faults = [Fault("unreadable", use.whose, use.path, str(error).removeprefix(f"{use.path}: "))]
    if any(fault.kind == "unreadable" for fault in faults):  # the notes say the same
        return faults
    return faults + [Fault("unreadable", use.whose, use.path, note) for note in notes]


def _look(use: Use, decode: str) -> list[Fault]:
    """See `check_use`. Raises MediaError for a medium that cannot be read."""
    try:
        if not os.path.isdir(use.path) and os.path.getsize(use.path) == 0:
            return [Fault("empty file", use.whose, use.path, "the file holds 0 bytes; copy or download it again")]
    except OSError as error:
        return [Fault("unreadable", use.whose, use.path, f"it cannot be read ({error.strerror}); check disk and link")]
    if decode == "none":
        return []
    with open_media(use.path, fps=use.fps) as medium:
        info = medium.info
        faults = [*_wrong_medium(use, info), *_wrong_bounds(use, info), *_too_few(use, info)]
        indices = range(info.first_index, info.first_index + info.num_frames)
        medium.times(indices[-1:])  # raises when the file ends before its last frame
        for _ in medium.frames(indices if decode == "all" else indices[:1]):
            keep_reading()
        return faults


def _wrong_medium(use: Use, info: MediaInfo) -> Iterator[Fault]:
    if use.expects == "video" and info.kind == "image":
        yield Fault("wrong medium", use.whose, use.path, "found an image, expected a video: correct the record's key")
    if use.expects == "image" and info.kind in ("video", "frames"):
        found = "a video" if info.kind == "video" else "a folder"
        yield Fault("wrong medium", use.whose, use.path, f"found {found}, expected an image: correct the record's key")


def _wrong_bounds(use: Use, info: MediaInfo) -> Iterator[Fault]:
    if info.kind == "image":
        return
    for bounds, where in use.clips:
        try:
            sample_indices(
                use.rule or "middle", num_frames=1, total_frames=info.num_frames, fps=info.fps, bounds=bounds
            )
        except UserError as error:
            yield Fault("bounds", where, use.path, str(error))
            continue
        if info.duration + SLACK < bounds[1] < float("inf"):
            todo = "it is clamped, as in the official script" if use.rule else "correct it"
            sentence = f"end is {bounds[1]:g} s, but the video lasts {info.duration:.2f} s: {todo}"
            yield Fault("bounds", where, use.path, sentence, note=bool(use.rule))


def _too_few(use: Use, info: MediaInfo) -> Iterator[Fault]:
    if info.kind == "frames" and use.num_frames is not None and info.num_frames < use.num_frames:
        sentence = f"found {info.num_frames} frames, but the record says {use.num_frames}: extract them again"
        yield Fault("unreadable", use.where, use.path, sentence)


@contextmanager
def _notes() -> Iterator[list[str]]:
    """Catches what a reader would only note, such as damage that the decoder mends."""
    notes: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notes.append(str(record.args[1]))  # type: ignore[method-assign, index]
    logger = media_info.logger
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    media_info.warn_once.cache_clear()
    try:
        yield notes
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def run_tasks(tasks: Sequence[Task], *, num_workers: int) -> Iterator[Fault]:
    """What the tasks find, in their order, under a progress bar. num_workers: processes; 0: this one alone."""
    died = (
        "a process died while it decoded: memory ran out, or a decoder crashed on a damaged file; run again "
        "with --num-workers 0 --debug to see on which"
    )
    with (
        tqdm(total=len(tasks), desc="media", disable=None, delay=1, leave=False) as bar,
        mapping(num_workers if len(tasks) > CHUNK else 0, died=died) as each,
    ):
        for faults in each(_call, tasks):
            yield from faults
            bar.update()


def _call(task: Task) -> list[Fault]:
    return task()
