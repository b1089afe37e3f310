"""The ledger of a judge: a line for each item that was asked, written as soon as its verdict is known.

Scores are made from it alone, so they can be made again without a network. It begins with a line that says by what the
items are judged; another judge, other instructions or other predictions do not join it. A process that is killed
leaves at most half a line, which the next one removes. Of several lines of an item the last one counts.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from stllm.common.errors import UserError
from stllm.common.json_text import loads
from stllm.evaluation.judge_parser import Unparsable, Verdict, parse_reply
from stllm.evaluation.judge_predictions import JudgeItem

MAX_NEW_TOKENS = 128  # of a local judge; a verdict takes a dozen, but a judge that thinks first needs --max-tokens
RUN = "run"  # the key of a line that says by what items are judged
COMPARED = {  # settings that a ledger does not mix, in words
    "axis": "axis",
    "requested_model": "judge (--model)",
    "prompt_digest": "digest of the instructions (--prompts)",
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
}


@dataclass(frozen=True)
class JudgeRun:
    """By what items are judged. unanswered: items without a prediction, why by key. num_items: those to be judged."""

    axis: str
    requested_model: str
    base_url: str | None
    prompt_version: str
    prompt_digest: str
    temperature: float
    max_tokens: int | None
    num_items: int
    unanswered: dict[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Tokens of a reply; an endpoint without --max-tokens is taken to have no limit."""
        return self.max_tokens or (MAX_NEW_TOKENS if self.base_url is None else math.inf)


@dataclass(frozen=True)
class Entry:
    """A line: the item, the judge's reply, and the reason why there is no score (error), if so.

    model: the exact id that the server returned with the reply. attempts: the number of requests for the item.
    """

    key: str
    axis: str
    name: str
    question: str | list[str]
    answer: str
    prediction: str | list[str]
    model: str | None
    reply: str | None
    parsed: dict[str, Any] | None
    prompt_digest: str
    attempts: int
    error: str | None
    cut: bool = False  # whether the reply was stopped at the limit of tokens; written only if so

    @classmethod
    def of(cls, item: JudgeItem, run: JudgeRun, **fields: Any) -> "Entry":
        """The line of an item. fields: model, reply, parsed, attempts, error, cut."""
        question, prediction = (_plain(texts) for texts in (item.questions, item.predictions))
        return cls(
            key=item.key,
            axis=run.axis,
            name=item.name,
            question=question,
            answer=item.answer,
            prediction=prediction,
            prompt_digest=run.prompt_digest,
            **fields,
        )

    def is_of(self, item: JudgeItem) -> bool:
        """Whether it is about the same texts."""
        texts = (_plain(item.questions), item.answer, _plain(item.predictions))
        return texts == (self.question, self.answer, self.prediction)

    def outcome(self) -> Verdict | str:
        """The verdict of the reply, parsed again, or the reason why there is none."""
        if self.reply is None:
            return self.error or "there is no reply"
        try:
            return parse_reply(self.reply, self.axis, cut=self.cut)
        except Unparsable as fault:
            return f"the reply cannot be read: {fault}"

    def is_scored(self) -> bool:
        """Whether its reply states a score."""
        return isinstance(self.outcome(), Verdict)


class Ledger:
    """The lines of one axis in `path`; open it with `with` to append, which no two processes can do at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: JudgeRun | None = None  # of the last line that says it
        self.entries: dict[str, Entry] = {}  # the last one of each key, in the order of the first
        self.model: str | None = None  # the judge that made the scores, by the server's id without its route
        self._size = 0  # bytes of whole lines
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._stream: Any = None
        if path.is_file():
            self._read()

    def __enter__(self) -> "Ledger":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{self.path}: another process writes to it: wait until it ends, or name another --output-dir"
            ) from None
        try:
            if self.path.is_file():
                self._read()  # what came before the lock
                os.truncate(self.path, self._size)
            self._stream = self.path.open("ab", buffering=0)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._lock.release()

    def begin(self, run: JudgeRun, items: Iterable[JudgeItem]) -> None:
        """Sees that these items, judged so, join what is there, and notes it.

        Raises UserError, saying what differs, when they do not. A ledger without a score is begun anew instead.
        """
        try:
            self.check(run, items)
        except UserError:
            if self.model is not None:
                raise
            self._stream.truncate(0)
            self.run, self.entries = None, {}
        if run != self.run:
            self.run = run
            self._write({RUN: asdict(run)})

    def check(self, run: JudgeRun, items: Iterable[JudgeItem] | None) -> None:
        """Raises UserError, saying what differs, when these items, judged so, are not what is there."""
        if self.run is not None:
            self._check_run(self.run, run)
        if items is not None:
            self._check_items({item.key: item for item in items})

    def append(self, entry: Entry) -> None:
        """Writes a line at once. Raises UserError when the judge is not the one of the lines before."""
        if entry.is_scored() and self.model not in (None, name := self._judge(entry.model)):
            raise UserError(
                f"{self.path}: {self.model} made the scores so far, and the server now replies as {name}: ask "
                "for one exact model with --model (at a router, for one provider as well), or begin anew in another "
                "--output-dir"
            )
        self._write({name: value for name, value in asdict(entry).items() if name != "cut" or value})
        self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        if self.model is None and entry.is_scored():
            self.model = self._judge(entry.model)

    def _judge(self, model: str | None) -> str | None:
        """The id without the route that a router appends (`family/model:route`), unless --model asks for that one."""
        name, _, route = (model or "").rpartition(":")
        asked = self.run is not None and self.run.requested_model.endswith(f":{route}")
        return name if "/" in name and not asked else model

    def _check_run(self, old: JudgeRun, new: JudgeRun) -> None:
        for name, words in COMPARED.items():
            before, now = getattr(old, name), getattr(new, name)
            raised = name == "max_tokens" and new.limit >= old.limit  # replies that were whole remain as they are
            if before != now and not raised:
                raise UserError(
                    f"{self.path} holds scores with another {words}: it was {before!r} and is now {now!r}; set it back "
                    "to continue, or begin anew in another --output-dir"
                )

    def _check_items(self, items: Mapping[str, JudgeItem]) -> None:
        for key, entry in self.entries.items():
            if key not in items or not entry.is_of(items[key]):
                what = "has other texts now" if key in items else "is not there any more"
                raise UserError(
                    f"{self.path} holds scores of other predictions: item {key} {what}; name the same --pred-path to "
                    "continue, or begin anew in another --output-dir"
                )

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        while data:  # a signal or a nearly full disk may take a part
            data = data[self._stream.write(data) :]

    def _read(self) -> None:
        self.run, self.model, self.entries = None, None, {}
        data = self.path.read_bytes()
        self._size = data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._size].splitlines(), start=1):
            self._read_line(line, number)

    def _read_line(self, line: bytes, number: int) -> None:
        try:
            fields = loads(line)
            if RUN in fields:
                self.run = JudgeRun(**fields[RUN])
            else:
                self._keep(Entry(**fields))
        except (ValueError, TypeError):
            raise UserError(
                f"{self.path}, line {number}: not a line of a judge's ledger; restore the file, or begin anew in "
                "another --output-dir"
            ) from None


def read_ledger(path: Path) -> tuple[JudgeRun, Ledger]:
    """A ledger that was begun, to be read. Raises UserError when there is none."""
    ledger = Ledger(path)
    if ledger.run is None:
        what = "holds no line yet" if path.is_file() else "there is no such ledger"
        raise UserError(f"{path}: {what}; judge the axis first, without --offline")
    return ledger.run, ledger


def _plain(texts: tuple[str, ...]) -> str | list[str]:
    return texts[0] if len(texts) == 1 else list(texts)
