"""What can be wrong with a file of training data: its records, their lengths, and media of two kinds in one file."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from stllm.common.files import user_path
from stllm.datasets.annotations import EXPECTED, AnnotationError, Fields, question_fault, text_of, turns_of
from stllm.datasets.faults import Fault, Finding, Medium, Pairs, check_bounds, check_name, records_of
from stllm.datasets.samples import TOO_LONG, LengthCheck, Sample, SampleKey

MEDIA_KEYS = ("video", "image")
SHORT = 3  # words; longer answers may differ and both be right


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
    bounds = yield from check_bounds(fields, where)
    if media == "text":
        yield Medium(where, "", "text", pairs=pairs)
        return
    name = yield from check_name(fields, where, MEDIA_KEYS if media is None else (media,))
    if name is not None:
        count = fields.get("num_frames")
        num_frames = count if isinstance(count, int) else None
        yield Medium(where, name, kind or "video", bounds=bounds, num_frames=num_frames, pairs=pairs)


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
        elif fault := question_fault(pair.get("i"), pair.get("q")):
            yield Fault("annotation", where, subject, fault)
        elif text_of(pair.get("a")) is None:
            yield Fault(
                "empty answer", where, subject, f"found the answer {pair.get('a')!r}; give one, or drop the pair"
            )
        else:
            answered.append((text_of(pair.get("q")) or "", str(text_of(pair["a"]))))
    return tuple(answered)


@dataclass(frozen=True)
class Source:
    """One annotation file of training data to be checked.

    name: of the data set. folder: its media are relative to it, and none may lie outside. fps: of frame folders, where
    their file names do not show it. features: a folder of precomputed features, read in place of the media.
    """

    name: str
    findings: Iterator[Finding]
    folder: str
    fps: float | None = None
    features: str | None = None


def training_source(
    name: str,
    path: str | Path,
    media_dir: str,
    *,
    media: str | None = None,
    fps: float | None = None,
    features: str | None = None,
    lengths: Lengths | None = None,
) -> Source:
    """VideoChat2-IT, caption pairs or JSONL.

    media: "video", "image" or "text" when the data set holds only that. lengths: the check of lengths; by default one
    that needs no tokenizer.
    """
    file = user_path(path)
    findings = _checked(file, media, lengths or Lengths(at_least_words))
    return Source(name, _of_one_medium(findings, file, media), media_dir, fps, features)


def _of_one_medium(findings: Iterator[Finding], file: Path, media: str | None) -> Iterator[Finding]:
    """The findings, and a fault at their end when the file as a whole is of no use, or of two."""
    found: set[str | None] = set()
    for finding in findings:
        found.add(finding.expects if isinstance(finding, Medium) else None)
        yield finding
    if not found:
        yield Fault("annotation", str(file), "file", f"found no {media} record; name another file or medium")
    if len(found - {None}) > 1:
        sentence = "found videos and images in one file; name it in two entries, one with media: video, one with image"
        yield Fault("annotation", str(file), "file", sentence)


def _checked(path: Path, media: str | None, lengths: Lengths) -> Iterator[Finding]:
    for where, fields in records_of(path, EXPECTED, ("QA", "caption")):
        if isinstance(fields, Fault):
            yield fields
        else:
            yield from check_training(fields, where, media=media, lengths=lengths)


def short_answer(answer: str) -> str | None:
    """What an answer says, whatever its case and full stop, to compare answers by; None for one of many words."""
    words = answer.lower().strip(" .!?\"'").split()
    return " ".join(words) if len(words) <= SHORT else None
