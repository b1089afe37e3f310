"""Checks of one record's fields, format by format, without a look at any file.

Each check yields the record's faults and, if its medium can be looked for, an `Item`. `stllm doctor` lists the faults;
`stllm evaluate` uses the checks of the benchmarks' formats when it reads a ground truth.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any

from stllm.datasets.annotations import AnnotationError, Fields, bounds_of, text_of, turns_of
from stllm.datasets.replacement import TOO_LONG
from stllm.datasets.samples import LengthCheck, Sample, SampleKey
from stllm.media.sampling import Bounds

MEDIA_KEYS = ("video", "image")

# Each kind of fault, with what it does to a run.
KINDS = {
    "annotation": "the file or record cannot be read; training skips the record or stops",
    "refused": "a benchmark's ground truth or media folder that cannot be used as a whole",
    "incomplete": "fields are missing; the record is skipped",
    "missing": "media that are not there; their samples are skipped, a benchmark's task is left out",
    "empty file": "media of 0 bytes",
    "unreadable": "media that cannot be opened or decoded, or are cut short",
    "wrong medium": "an image where a video is expected, or the reverse",
    "outside": "media outside the media folder, which nobody else will find there",
    "bounds": "start and end that are no part of the video",
    "too long": "records that exceed the language model's positions; training skips them",
    "empty answer": "nothing to learn, or nothing to score against",
    "empty question": "nothing is asked",
    "candidates": "options that do not hold the answer, or hold an option twice",
    "colliding names": "names that stand for several files, here or on another system",
    "duplicate id": "one id for several questions; their answers cannot be told apart",
    "contradiction": "one question about one medium with different answers",
}
SHORT = 3  # words; longer answers may differ and both be right


Pairs = tuple[tuple[str, str], ...]  # question, answer


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    kind: of KINDS. where: file and record. subject: the medium, or the field. sentence: what was found, what was
    expected, what to do. note: True if it does not stop an evaluation; the doctor lists it and exits with 0.
    """

    kind: str
    where: str
    subject: str
    sentence: str
    note: bool = False


@dataclass(frozen=True)
class Item:
    """A record's medium, and what is asked about it.

    name: as the record names it. expects: "video", "image", "frames", or "text" alone. num_frames, fps: of a frame
    folder. pairs: questions and answers.
    """

    where: str
    name: str
    expects: str
    bounds: Bounds | None = None
    num_frames: int | None = None
    fps: float | None = None
    pairs: Pairs = ()


Finding = Fault | Item


@dataclass(frozen=True)
class Lengths:
    """The length check of a record, and the settings by which training makes its text.

    check: the model's own, or `at_least_words`. num_frames: of a video. multi_turn: all pairs of a record are one
    conversation. instruction: the texts of which training draws one for a pair without an instruction.
    """

    check: LengthCheck
    num_frames: int = 0
    multi_turn: bool = False
    instruction: tuple[str, ...] = ()

    def faults(self, fields: Fields, where: str, media: str | None) -> Iterator[Fault]:
        """A fault for each sample of the record that is too long. media: "video", "image", or None for text alone."""
        try:
            turns = [turn for turn in turns_of(fields, where) if turn.answer is not None]
        except AnnotationError:  # `check_training` reports it
            return
        longest = max(self.instruction, key=len, default="")
        turns = [turn if turn.instruction else replace(turn, instruction=longest) for turn in turns]
        later = [replace(turn, instruction="") for turn in turns[1:]]
        samples = [(turns[0], *later)] if self.multi_turn else [(turn,) for turn in turns]
        num_frames = {"video": self.num_frames, "image": 1}.get(media or "", 0)
        for number, sample in enumerate(samples, start=1):
            try:
                self.check(Sample(SampleKey(0, 0, 0, 0), where, sample, media), num_frames)
            except AnnotationError as error:  # noqa: PERF203
                subject = "QA" if self.multi_turn else f"QA {number}"
                yield Fault(error.cause, where, subject, str(error).removeprefix(f"{where}: "))


VICUNA_POSITIONS = 2048  # of the published language model, Vicuna 7B


def at_least_words(sample: Sample, num_frames: int) -> None:
    """A `LengthCheck` without a tokenizer: each word of a question is one token or more.

    Answers do not count, as training cuts them; nor do visual tokens.
    """
    found = sum(len(f"{turn.instruction} {turn.question}".split()) for turn in sample.turns)
    if found > VICUNA_POSITIONS:
        raise AnnotationError(
            f"{sample.name}: the question has {found} words, so at least as many tokens, but Vicuna has "
            f"{VICUNA_POSITIONS} positions for prompt, answer and visual tokens: shorten it, or check with --cfg-path, "
            "which counts tokens for your model",
            cause=TOO_LONG,
        )


def check_training(
    fields: Fields, where: str, *, media: str | None = None, lengths: Lengths | None = None
) -> Iterator[Finding]:
    """A record of VideoChat2-IT, of caption pairs or of JSONL.

    media: "video", "image" or "text" when the data set is of that alone: records of another kind are not checked.
    """
    kind = next((key for key in MEDIA_KEYS if fields.get(key) is not None), None)
    if media is not None and kind is not None and kind != media:
        return
    pairs = yield from _training_pairs(fields, where)
    if lengths is not None:
        yield from lengths.faults(fields, where, None if media == "text" else kind)
    bounds = yield from _checked_bounds(fields, where)
    if media == "text":
        yield Item(where, "", "text", pairs=pairs)
        return
    name = yield from _name(fields, where, MEDIA_KEYS if media is None else (media,))
    if name is not None:
        count = fields.get("num_frames")
        num_frames = count if isinstance(count, int) else None
        yield Item(where, name, kind or "video", bounds=bounds, num_frames=num_frames, pairs=pairs)


def _training_pairs(fields: Fields, where: str) -> Generator[Finding, None, Pairs]:
    """Yields the faults of a record's pairs; returns (question, answer) of the others."""
    pairs = fields.get("QA")
    if pairs is None and "caption" in fields:
        captions = fields["caption"] if isinstance(fields["caption"], list) else [fields["caption"]]
        pairs = [{"a": caption} for caption in captions]
    if not isinstance(pairs, list) or not pairs:
        found = "is empty" if pairs == [] else "is missing" if pairs is None else "is no list"
        yield Fault("incomplete", where, "QA", f"QA {found}; expected a list of {{i, q, a}}, or a caption")
        return ()
    answered = []
    for number, pair in enumerate(pairs, start=1):
        subject = f"QA {number}" if "QA" in fields else "caption"
        if not isinstance(pair, dict):
            yield Fault("incomplete", where, subject, "found no mapping; expected {i, q, a}")
        elif text_of(pair.get("a")) is None:
            yield Fault(
                "empty answer", where, subject, f"found the answer {pair.get('a')!r}; give one, or drop the pair"
            )
        else:
            answered.append((text_of(pair.get("q")) or "", str(text_of(pair["a"]))))
    return tuple(answered)


def check_mvbench(fields: Fields, where: str, *, bounded: bool) -> Iterator[Finding]:
    """An item of one of MVBench's tasks. bounded: start and end are used.

    A negative start is kept: the sampling rule `segment` clamps it to 0.
    """
    yield from _empty(fields, where, {"question": "empty question", "answer": "empty answer"})
    yield from _candidate_faults(fields, where)
    bounds = (yield from _checked_bounds(fields, where, negative_start=True)) if bounded else None
    if bounds is not None and bounds[0] < 0:
        sentence = f"start is {bounds[0]:g} s: it is clamped to 0, as in the official script"
        yield Fault("bounds", where, "start, end", sentence, note=True)
    if name := (yield from _name(fields, where, ("video",))):
        pairs = _pair(fields.get("question"), fields.get("answer"))
        yield Item(where, name, "video", bounds=bounds, pairs=pairs)


def _candidate_faults(fields: Fields, where: str) -> Iterator[Finding]:
    candidates, answer = fields.get("candidates"), fields.get("answer")
    if not isinstance(candidates, list) or len(candidates) < 2 or not all(map(text_of, candidates)):
        expected = "expected a list of two texts or more"
        yield Fault("candidates", where, "candidates", f"found {_short(candidates)}, {expected}: correct it")
        return
    if len(candidates) > len(ascii_uppercase):
        expected = "expected at most one a letter: leave some out"
        yield Fault("candidates", where, "candidates", f"found {len(candidates)} candidates, {expected}")
    if text_of(answer) and answer not in candidates:
        options = ", ".join(map(repr, candidates))
        yield Fault("candidates", where, "answer", f"{answer!r} is none of the candidates {options}: correct either")
    for twice in sorted({repr(option) for option in candidates if candidates.count(option) > 1}):
        sentence = f"{twice} is listed twice, so no letter is sure; the official script takes the last: correct it"
        yield Fault("candidates", where, "candidates", sentence, note=True)


def check_vcgbench(fields: Fields, where: str, questions: tuple[str, ...]) -> Iterator[Finding]:
    """An item of VcgBench: its questions, A, video_name. questions: the fields that hold them."""
    yield from _empty(fields, where, {**dict.fromkeys(questions, "empty question"), "A": "empty answer"})
    if name := (yield from _name(fields, where, ("video_name",))):
        pairs = _pair(fields.get("Q"), fields.get("A")) if questions == ("Q",) else ()
        yield Item(where, name, "video", pairs=pairs)


def check_videoqa(fields: Fields, where: str, keys: tuple[str, ...]) -> Iterator[Finding]:
    """An item of MSVD-QA, MSRVTT-QA, ActivityNet-QA or TGIF-QA. keys: the fields that may name the video."""
    yield from _empty(fields, where, {"question": "empty question", "answer": "empty answer"})
    if name := (yield from _name(fields, where, keys)):
        yield Item(where, name, "video", pairs=_pair(fields.get("question"), fields.get("answer")))


def _pair(question: Any, answer: Any) -> Pairs:
    asked, answered = text_of(question), text_of(answer)
    return ((asked, answered),) if asked and answered else ()


def _empty(fields: Fields, where: str, needed: dict[str, str]) -> Iterator[Fault]:
    """Faults of fields that must hold text. needed: field -> kind of the fault when it is empty."""
    for field, kind in needed.items():
        if field not in fields:
            yield Fault("incomplete", where, field, f"the field is missing (found {', '.join(fields)}): add it")
        elif text_of(fields[field]) is None:
            yield Fault(kind, where, field, f"found {_short(fields[field])}; give one, or leave the record out")


def _name(fields: Fields, where: str, keys: tuple[str, ...]) -> Generator[Finding, None, str | None]:
    """Yields a fault when no field names the medium; returns the name, or None."""
    names = (text_of(fields.get(key)) for key in keys)
    name = next((name for name in names if name is not None), None)
    if name is None:
        yield Fault("incomplete", where, keys[0], f"no medium is named; expected a text in {' or '.join(keys)}: add it")
    return name


def _checked_bounds(
    fields: Fields, where: str, *, negative_start: bool = False
) -> Generator[Finding, None, Bounds | None]:
    """Yields a fault of start and end; returns them, or None."""
    try:
        return bounds_of(fields, where, negative_start=negative_start)
    except AnnotationError as error:
        yield Fault("bounds", where, "start, end", str(error).removeprefix(f"{where}: "))
        return None


def short_answer(answer: str) -> str | None:
    """What an answer says, whatever its case and full stop, to compare answers by; None for one of many words."""
    words = answer.lower().strip(" .!?\"'").split()
    return " ".join(words) if len(words) <= SHORT else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
