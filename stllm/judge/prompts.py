"""The judge's instructions as data: ours, or the user's own copy of the official ones. Their digest identifies them.

An item's texts are data to the judge. Our instructions quote them as JSON strings, so that a prediction cannot end its
quotation.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import yaml

from stllm.common.errors import UserError, did_you_mean
from stllm.common.files import check_regular, user_path
from stllm.evaluation.axes import AXES, CONSISTENCY
from stllm.judge.predictions import JudgeItem

Messages = list[dict[str, str]]  # as chat completions take them

ALIASES = {"pred": "prediction", "pred1": "prediction1", "pred2": "prediction2"}  # of the official scripts
ONE_QUESTION = ("question", "answer", "prediction")
TWO_QUESTIONS = ("question1", "question2", "answer", "prediction1", "prediction2")
QUOTES = ("none", "json")
DIGEST_SIZE = 8  # bytes
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class PromptSet:
    """Instructions of several axes: a system and a user message each, with {fields} for an item's texts.

    quote: "json" or "none". source: the file, for messages.
    """

    version: str
    quote: str
    prompts: dict[str, dict[str, str]]
    source: str

    @property
    def digest(self) -> str:
        """16 hex digits over every word that a judge may read, on any axis. The version's name is not included."""
        texts = {axis: [prompt["system"], prompt["user"]] for axis, prompt in self.prompts.items()}
        content = json.dumps([self.quote, texts], sort_keys=True, ensure_ascii=False)
        return hashlib.blake2b(content.encode(), digest_size=DIGEST_SIZE).hexdigest()

    def messages(self, axis: str, item: JudgeItem) -> Messages:
        """Build the chat that asks about one item. Raises UserError when there are no instructions for the axis."""
        if axis not in self.prompts:
            raise UserError(
                f"{self.source}: found no instructions for the axis {axis} (it has {', '.join(self.prompts)}): add them"
            )
        names = ONE_QUESTION if isinstance(item.question, str) else TWO_QUESTIONS
        values = dict(zip(names, (*_listed(item.question), item.answer, *_listed(item.prediction)), strict=True))

        def value(match: re.Match[str]) -> str:
            text = values.get(ALIASES.get(match[1], match[1]))
            if text is None:  # no field of an item, such as the dictionary in {'score': 4}
                return match[0]
            return json.dumps(text, ensure_ascii=False) if self.quote == "json" else text

        # One pass over the instructions: braces in an item's text are not filled in.
        filled = {role: _FIELD.sub(value, text) for role, text in self.prompts[axis].items()}
        return [{"role": role, "content": text} for role, text in filled.items() if text]


def load_prompts(path: str | None) -> PromptSet:
    """Read the instructions in a YAML or JSON file; None for ours.

    Raises UserError for a file that is none, an unknown axis, or instructions that leave out one of the item's texts.
    """
    if path is None:
        source = "the instructions of stllm"
        with as_file(files("stllm") / "configs" / "judge" / "prompts.yaml") as shipped:
            text = shipped.read_text(encoding="utf-8")
    else:
        source = path
        check_regular(path, "a YAML or JSON file")
        try:
            text = user_path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(f"{path}: the instructions cannot be read ({reason}): give a YAML or JSON file") from None
    try:
        content = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: neither YAML nor JSON ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source}: found no mapping, expected version and, for each axis, system and user texts")
    version, quote = content.pop("version", None), content.pop("quote", "none")
    if not isinstance(version, (str, int, float)) or not str(version):
        raise UserError(f"{source}: found version {version!r}, expected a name for this wording, kept in every result")
    if quote not in QUOTES:
        raise UserError(f"{source}: found quote {quote!r}, expected {' or '.join(QUOTES)}")
    if not content:
        raise UserError(f"{source}: found no instructions, expected an entry for at least one of {', '.join(AXES)}")
    prompts = {axis: _prompt(axis, entry, source) for axis, entry in content.items()}
    return PromptSet(version=str(version), quote=quote, prompts=prompts, source=source)


def without_system(messages: Messages) -> Messages:
    """The same chat in one user message, for models that have no system role."""
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]


def _prompt(axis: Any, entry: Any, source: str) -> dict[str, str]:
    """The messages of one axis by their role, the system message perhaps empty. Raises UserError."""
    if axis not in AXES:
        raise UserError(f"{source}: unknown axis {axis!r}, expected {', '.join(AXES)}{did_you_mean(str(axis), AXES)}")
    if not isinstance(entry, dict) or not isinstance(entry.get("user"), str) or set(entry) - {"system", "user"}:
        raise UserError(f"{source}: {axis} must be a mapping of a user text and, if wanted, a system text")
    if not isinstance(entry.get("system", ""), str):
        raise UserError(f"{source}: {axis}.system must be a text, found {entry['system']!r}")
    prompt = {role: entry.get(role, "").strip() for role in ("system", "user")}
    found = {ALIASES.get(name, name) for name in _FIELD.findall(prompt["system"] + prompt["user"])}
    missing = [name for name in (TWO_QUESTIONS if axis == CONSISTENCY else ONE_QUESTION) if name not in found]
    if missing:
        raise UserError(f"{source}: {axis} does not show the judge {{{missing[0]}}}: write it where that text belongs")
    return prompt


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts
