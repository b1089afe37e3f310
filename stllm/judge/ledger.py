"""The ledger of a judge: a JSON Lines file with one line per item, written as soon as its verdict is known.

Scores are computed from the ledger, so they can be recomputed without asking the judge. Its first line describes the
run: judge, instructions and settings. Verdicts of another judge or about other predictions are not added to it. If an
item has several lines, the last one counts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from stllm.common.errors import UserError
from stllm.common.files import locked
from stllm.common.jsonl import Appender, read_records
from stllm.evaluation.axes import TEMPCOMPASS
from stllm.judge.items import JudgeItem
from stllm.judge.parser import Unparsable, Verdict, parse_decision, parse_reply

MAX_NEW_TOKENS = 128  # default of a local judge; a verdict needs about 12, but a reasoning model needs --max-tokens
ADVICE = "not a line of a judge's ledger; restore the file, or begin anew in another --output-dir"
RUN = "run"  # the key of a line that describes the run
COMPARED = {  # settings that must be the same in all of a ledger -> their names in messages
    "axis": "axis",
    "requested_model": "judge (--model)",
    "prompt_digest": "digest of the instructions (--prompts)",
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
}


@dataclass(frozen=True)
class JudgeRun:
    """The judge and its settings. num_items: items to be judged. unanswered: item without a prediction -> reason."""

    axis: str
    requested_model: str
    base_url: str | None
    prompt_version: str
    prompt_digest: str
    temperature: FiniteFloat
    max_tokens: int | None
    num_items: Annotated[int, Field(ge=0, lt=1 << 31)]
    unanswered: dict[str, str] = field(default_factory=dict)

    @property
    def limit(self) -> float:
        """Return the maximum number of tokens of a reply; infinity for an endpoint without --max-tokens."""
        return self.max_tokens or (MAX_NEW_TOKENS if self.base_url is None else math.inf)


@dataclass(frozen=True)
class JudgeReply:
    """A judge's reply to an item.

    reply: the text; None if there is none. model: the exact id that the server returned. attempts: number of requests.
    error: the reason why there is no reply. cut: whether the reply was stopped at the limit of tokens.
    """

    reply: str | None = None
    model: str | None = None
    attempts: int = 1
    error: str | None = None
    cut: bool = False


def verdict_of(item: JudgeItem, axis: str, reply: str, *, cut: bool) -> Verdict:
    """Parse a reply about an item; see parser.py. Raises Unparsable."""
    if axis == TEMPCOMPASS:
        return parse_decision(reply, item.answer if item.form else None, cut=cut)
    return parse_reply(reply, axis, cut=cut)


@dataclass(frozen=True)
class LedgerEntry(JudgeItem):
    """A line of a ledger: an item and the judge's reply, as in `JudgeReply`. error: the reason if there is no score."""

    axis: str
    model: str | None
    reply: str | None
    parsed: dict[str, Any] | None
    prompt_digest: str
    attempts: int
    error: str | None
    cut: bool = False  # written only if True

    @cached_property
    def outcome(self) -> Verdict | str:
        """The verdict in the stored reply, which is parsed again, or the reason why there is none."""
        if self.reply is None:
            return self.error or "there is no reply"
        try:
            return verdict_of(self, self.axis, self.reply, cut=self.cut)
        except Unparsable as fault:
            return f"the reply cannot be read: {fault}"

    @property
    def is_scored(self) -> bool:
        """Check whether the reply has a score."""
        return isinstance(self.outcome, Verdict)


_RUN, _ENTRY = TypeAdapter(JudgeRun), TypeAdapter(LedgerEntry)  # check the types of a file's values


class Ledger:
    """The ledger of one axis in the file `path`. Use `continued` to open one for appending.

    Attributes: entries: key -> last line with it, in the order of the keys' first lines. model: id of the judge that
    made the scores, without a router's route. Raises UserError for a damaged line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run: JudgeRun | None = None  # from the last line that describes a run
        self.entries: dict[str, LedgerEntry] = {}
        self.model: str | None = None
        self._lines: Appender | None = None
        for number, record in read_records(path, ADVICE):
            try:
                if RUN in record:
                    self._run = _RUN.validate_python(record[RUN])
                else:
                    self._keep(_ENTRY.validate_python(record))
            except ValidationError as fault:  # noqa: PERF203
                name = ".".join(map(str, fault.errors()[0]["loc"])) or RUN
                raise UserError(f"{path}, line {number}: found an unusable {name!r}, {ADVICE}") from None

    @property
    def run(self) -> JudgeRun:
        """Return the judge and its settings. Only for ledgers from `continued` or `read_ledger`."""
        assert self._run is not None
        return self._run

    def check(self, run: JudgeRun, items: Sequence[JudgeItem] | None) -> None:
        """Raise UserError, which names the difference, if this run's settings or items differ from those in this file.

        run: the judge and its settings. items: None to compare only the settings.
        """
        earlier = self._run or run
        for name, words in COMPARED.items():
            before, now = getattr(earlier, name), getattr(run, name)
            raised = name == "max_tokens" and run.limit >= earlier.limit  # would not change complete replies
            if before != now and not raised:
                raise UserError(
                    f"{self.path} holds scores with another {words}: it was {before!r} and is now {now!r}; set it back "
                    "to continue, or begin anew in another --output-dir"
                )
        if items is None:
            return
        texts = {item.key: item.texts for item in items}
        for key, entry in self.entries.items():
            if texts.get(key) != entry.texts:
                what = "has other texts now" if key in texts else "is not there any more"
                raise UserError(
                    f"{self.path} holds scores of other predictions: item {key} {what}; name the same --pred-path to "
                    "continue, or begin anew in another --output-dir"
                )

    def append(self, item: JudgeItem, reply: JudgeReply) -> LedgerEntry:
        """Write the line of an item. Raises UserError if another judge made the earlier scores."""
        assert self._lines is not None  # set by `continued`
        fields = {**asdict(item), "axis": self.run.axis, "prompt_digest": self.run.prompt_digest, **asdict(reply)}
        entry = LedgerEntry(**fields, parsed=None)
        if isinstance(verdict := entry.outcome, Verdict):
            fields["parsed"] = {"score": verdict.score, **({"pred": verdict.pred} if verdict.pred else {})}
            if self.model not in (None, name := self._judge(entry.model)):
                raise UserError(
                    f"{self.path}: {self.model} made the scores so far, and the server now replies as {name}: ask "
                    "for one exact model with --model (at a router, for one provider as well), or begin anew in "
                    "another --output-dir"
                )
        else:
            fields.update(parsed=None, error=verdict)
        fields = {name: value for name, value in fields.items() if value or name not in ("cut", "form", "video")}
        self._lines.add(fields)
        self._keep(entry)
        return entry

    def _keep(self, entry: LedgerEntry) -> None:
        self.entries[entry.key] = entry
        if self.model is None and entry.is_scored:
            self.model = self._judge(entry.model)

    def _judge(self, model: str | None) -> str | None:
        """Return a model id without a router's route (`family/model:route`), unless --model requests that route."""
        name, _, route = (model or "").rpartition(":")
        asked = self._run is not None and self._run.requested_model.endswith(f":{route}")
        return name if "/" in name and not asked else model


@contextmanager
def continued(path: Path, run: JudgeRun, items: Sequence[JudgeItem]) -> Iterator[Ledger]:
    """Open a ledger for appending during the block. Only one process at a time can do this.

    Raises UserError if the ledger has scores with other items or settings. If it has no score yet, it is replaced.
    """
    busy = f"{path}: another process writes to it: wait until it ends, or name another --output-dir"
    with locked(path.with_name(f".{path.name}.lock"), busy):
        ledger = Ledger(path)
        try:
            ledger.check(run, items)
        except UserError:
            if ledger.model is not None:
                raise
            path.unlink()
            ledger = Ledger(path)
        with Appender(path) as ledger._lines:
            if run != ledger._run:
                ledger._lines.add({RUN: asdict(run)})
                ledger._run = run
            yield ledger


def read_ledger(path: Path) -> Ledger:
    """Read a ledger. Raises UserError if there is none."""
    ledger = Ledger(path)
    if ledger._run is None:
        what = "holds no line yet" if path.is_file() else "there is no such ledger"
        raise UserError(f"{path}: {what}; judge the axis first, without --offline")
    return ledger
