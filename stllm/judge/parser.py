r"""Parser of a judge's reply: a score from 0 to 5 and, for the axis qa, yes or no.

A reply is parsed in three steps:

1. Reasoning is removed (`<think>...</think>` and the tags of other models). The rest is the answer.
2. Dictionaries and Markdown tables with a score are the verdict.
3. If there are none, a clearly worded verdict counts: "Score: 4", "I would rate 3", "4/5", `\boxed{4}`, "Yes, 5".

A reply without a verdict, or with two different ones, raises `Unparsable`. The parser does not guess, and it never
evaluates a reply as Python code.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from stllm.evaluation.axes import HIGHEST, LOWEST, QA

_T = TypeVar("_T")
MAX_LENGTH = 20_000  # characters of an answer without reasoning; a longer answer is rejected


class Unparsable(ValueError):
    """A reply without a readable verdict. The message gives the reason."""


class CutOff(Unparsable):
    """A reply that was cut off before its verdict. The same request would be cut off again."""

    def __init__(self) -> None:
        super().__init__("it was cut off before its verdict: raise --max-tokens")


@dataclass(frozen=True)
class Verdict:
    """A score from 0 to 5, and whether the prediction is correct (None for axes without this decision)."""

    score: float
    pred: str | None = None  # "yes" or "no"


def parse_reply(reply: str, axis: str, *, cut: bool = False) -> Verdict:
    """Parse the verdict in a reply. Raises Unparsable.

    cut: whether the reply was stopped at the limit of tokens. Such a reply counts only if it begins with a dictionary
        or is only a verdict; otherwise it may be unfinished reasoning.
    """
    answer = _without_thoughts(reply).translate(_STRAIGHT)
    if len(answer) > MAX_LENGTH:
        raise Unparsable(f"a reply of {len(answer)} characters")
    answer = _IN_WORDS.sub(lambda match: match[1] + _DIGITS[match[2].lower()], answer)
    if cut and not _DICTIONARY.match(answer) and not _WHOLE.fullmatch(answer):
        raise CutOff
    if scale := _OTHER_SCALE.search(answer):
        raise Unparsable(f"it mentions a scale up to {scale[1] or scale[2]}, not {HIGHEST}")
    final = list(_FINAL.finditer(answer))
    if final:  # only the text from "Final verdict: ..." on counts
        answer = answer[final[-1].start() :]
    scores, decisions, rest = _tabulated(answer)
    if scores:
        scores |= _worded_scores(rest, _STATED)  # "Score: 4" beside {'score': 2} is a contradiction
        decisions |= _labelled_decisions(rest)
    else:
        scores = _worded_scores(rest, _STATED + _MENTIONED)
    score = _only(scores, "score")
    if not LOWEST <= score <= HIGHEST:  # NaN, too
        raise Unparsable(f"its score {score:g} is not from {LOWEST} to {HIGHEST}")
    if axis != QA:
        return Verdict(score)
    if not decisions and not (decisions := _labelled_decisions(rest)):
        first = _FIRST_WORD.match(_MARKUP.sub("", rest).strip())
        decisions = {first[2].lower()} if first else set()
    decision = _only(decisions, "yes or no")
    if not decision:
        raise Unparsable("its pred is neither yes nor no")
    return Verdict(score, decision)


def parse_decision(reply: str, right: str | None, *, cut: bool = False) -> Verdict:
    """Parse a reply about TempCompass: yes or no, or the option that a caption matches. Raises Unparsable.

    right: the correct option ("B. ...") for a caption; None if the reply is yes or no. The official scripts' forms are
    accepted, too: "Correct", "Incorrect", "Answer: B. ...", "None of the choices are correct". The score is 5 or 0.
    """
    answer = _without_thoughts(reply).translate(_STRAIGHT)
    if cut and not _DICTIONARY.match(answer):
        raise CutOff
    dictionaries = [_FIELD.finditer(match[1]) for match in _DICTIONARY.finditer(answer)]
    fields = [(_bare(one["key"]).lower(), _bare(one["value"])) for found in dictionaries for one in found]
    if right is None:
        words = [value.lower() for key, value in fields if key == "pred"] or re.findall(r"\A\W*(\w+)", answer.lower())
        decision = _only({_DECISIONS.get(word, "") for word in words}, "yes or no")
        if not decision:
            raise Unparsable("it states no yes or no")
    else:
        said = [value for key, value in fields if key == "answer"] or re.findall(r"(?mi)^\W*answer\W*:(.*)$", answer)
        options = {_CHOICE.match(text) or _NO_CHOICE.search(text) for text in map(str.strip, said or [answer])}
        chosen = _only({option[0][:1] if option and option.re is _CHOICE else "" for option in options}, "option")
        if not chosen and None in options:
            raise Unparsable("it states no option")
        decision = "yes" if chosen == right[:1] else "no"
    return Verdict(float(HIGHEST if decision == "yes" else LOWEST), decision)


def _only(found: set[_T], what: str) -> _T:
    if len(found) != 1:
        raise Unparsable(f"it states no {what}" if not found else f"it states more than one {what}")
    return next(iter(found))


# ---- 1. reasoning ---------------------------------------------------------------------------------------------------

_NAMES = r"(?:\w+:)?(?:think(?:ing)?|thoughts?|reasoning|reflection|analysis|rationale|scratchpad)"
_OPEN = (
    rf"<{_NAMES}(?:\s[^<>]*)?>"  # <think>, <thinking>, <seed:think>
    r"|\[THINK(?:ING)?\]|◁think▷"
    r"|<\|(?:begin_of|start)_(?:thought|thinking)\|>|<\|inner_prefix\|>|<unused94>"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought)|\Aanalysis(?=[A-Z])"  # gpt-oss, with its tokens or without
)
_CLOSE = (
    rf"</\s*{_NAMES}\s*>"
    r"|\[/THINK(?:ING)?\]|◁/think▷"
    r"|<\|end(?:_of)?_(?:thought|thinking)\|>|<\|inner_suffix\|>"
    r"|<\|channel\|>\s*final|<channel\|>|assistantfinal|<unused95>|\[BEGIN FINAL RESPONSE\]"
)
_THOUGHT_TAG = re.compile(rf"(?P<close>{_CLOSE})|{_OPEN}", re.IGNORECASE)
_WRAPPING = re.compile(r"<\|[^|<>]{0,40}\|>|</?[a-z_]{1,20}>|```[a-z]*", re.IGNORECASE)  # <|end|>, </s>, <answer>


def _without_thoughts(reply: str) -> str:
    """Remove reasoning. An end tag without a start tag means that the reply began with reasoning. Raises CutOff."""
    pieces: list[str] = []
    start, inside = 0, False
    for tag in _THOUGHT_TAG.finditer(reply):
        if tag["close"]:
            if not inside:
                pieces.clear()
            start, inside = tag.end(), False
        elif not inside:
            pieces.append(reply[start : tag.start()])
            inside = True
    if inside:
        raise CutOff
    return _WRAPPING.sub(" ", "".join([*pieces, reply[start:]])).strip()


# ---- 2. dictionaries and tables -------------------------------------------------------------------------------------

_STRAIGHT = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "\N{MINUS SIGN}": "-"})
_STRING = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\\n]|\\.)*'"
_DICTIONARY = re.compile(rf"\{{((?:[^{{}}'\"]|{_STRING})*)\}}")  # innermost; strings may hold braces
_COMMENT = re.compile(rf"({_STRING})|(?:#|//)[^\n]*|/\*.*?\*/", re.DOTALL)
_FIELD = re.compile(
    rf"(?P<key>{_STRING}|\w+)\s*[:=]\s*"
    rf"(?P<value>(?:{_STRING})(?=\s*(?:[,\n]|\Z))|[^,\n]*(?:,\s?\d[^,\n]*)?)"  # 4,5 is one value, and no number
)
_EXAMPLE = re.compile(  # text before a dictionary that is not the verdict but an example, a format or a supposition
    r"\b(?:e\.g\.|for instance|maybe|perhaps|(?<!this )example"
    r"|(?:in the form(?: of)?|formatted as|the format is|such as|like(?: this)?|wants|expected output)\W*\Z"
    r"|\bnot[ `\"']*\Z"
    r"|(?:if|unless|could|might)\b[^.\n]*\b(?:would|could|might|be)\b)[^.\n]*\Z|(?:^|\n)\W*format\W*\Z",
    re.IGNORECASE,
)
_REJECTED = re.compile(  # text after a dictionary that is not the verdict
    r"[ `\"']*(?:(?:is|was|would be) (?:not|never|wrong|incorrect|too)\b|does not\b|(?:is|was|would|does)n't\b)",
    re.IGNORECASE,
)
_OTHER_SCALE = re.compile(  # a scale that does not end at 5: "out of 10", "on a scale of 1 to 10", 'max': 10
    r"\b(?:out of (?=[6-9]|\d\d)|scale (?:(?:of|from|between) )?(?:\d+(?: ?[-–—] ?| to | and ))?(?!5\b))"
    r"(\d+)\b(?! ?[A-Za-z–—-])"
    r"|\b(?:out_?of|max(?:imum)?(?:_score)?|scale)['\"]?\s*:\s*['\"]?"
    r"(?:\d+ ?[-–—] ?)?(?!5(?:\.0)?\b)(\d+)\b(?! ?[–—-])",
    re.IGNORECASE,
)
_ROW = r"[^\n|]*\|[^\n]*"
_TABLE = re.compile(rf"^({_ROW})\n[ |:]*-[ |:-]*\n((?:{_ROW}(?:\n|\Z))+)", re.MULTILINE)
_CHOICE = re.compile(r"[A-Z](?=[.):,]|\s*\Z)")
_NO_CHOICE = re.compile(r"(?i)\bnone\b")
_DECISIONS = dict.fromkeys(("yes", "true", "correct"), "yes") | dict.fromkeys(
    ("no", "false", "incorrect", "wrong"), "no"
)
_OF_FIVE = re.compile(r"\s*(?:/|out of)\s*5(?:\.0)?$")


def _tabulated(answer: str) -> tuple[set[float], set[str], str]:
    """Return scores and decisions from dictionaries and tables, and the text without these. Raises Unparsable."""
    scores: set[float] = set()
    decisions: set[str] = set()

    def read(fields: Iterable[tuple[str, str]]) -> bool:
        known = [(key, value) for key, value in fields if key in ("score", "pred")]
        scores.update(_number(value) for key, value in known if key == "score")
        decisions.update(_DECISIONS.get(value.rstrip(".!").lower(), "") for key, value in known if key == "pred")
        return bool(known)

    def dictionary(match: re.Match[str]) -> str:
        before = _EXAMPLE.search(answer, max(0, match.start() - 120), match.start())
        if before or _REJECTED.match(answer, match.end()):
            return "\n"
        fields = _FIELD.finditer(_COMMENT.sub(r"\1", match[1]))
        return "\n" if read((_bare(field["key"]).lower(), _bare(field["value"])) for field in fields) else match[0]

    def table(match: re.Match[str]) -> str:
        lines = (match[1], *match[2].splitlines())
        keys, *rows = ([_bare(cell) for cell in line.strip(" |").split("|")] for line in lines)
        fields = ((key.lower(), cell) for row in rows for key, cell in zip(keys, row, strict=False))
        return "\n" if read(fields) else match[0]

    around = _DICTIONARY.sub(dictionary, answer)
    return scores, decisions, _TABLE.sub(table, around)


def _bare(text: str) -> str:
    return text.strip(" \t\n\r'\"*`")


def _number(value: str) -> float:
    value = _OF_FIVE.sub("", value.lower())
    if "_" in value:  # Python's float reads 0_5
        raise Unparsable("its score is no number")
    try:
        return float(value)
    except ValueError:
        raise Unparsable("its score is no number") from None


# ---- 3. a verdict in words ------------------------------------------------------------------------------------------

_OUT_OF = r" ?\(?(?:/|(?:out )?of) ?"
_NUMERAL = (
    rf"(?<!\.)([-+]?\d+(?:\.\d+)?)(?:{_OUT_OF}5(?:\.0)?\b\)?)?"
    rf"(?![\w%+^?]|[.,]\d| ?[*×/½]|{_OUT_OF}\d| percent| and a (?:half|quarter)\b"
    r"| point (?:zero|one|two|three|four|five|six|seven|eight|nine)\b)"
)
_OR = r" ?(?:-|–|—|~|\+|=|->|→|or|to|and|minus|plus|times|x) ?\d| \d+/\d"  # "3 or 4", "5 minus 1", "2 1/2"
_ANOTHER = re.compile(_OR, re.IGNORECASE)
_END = (
    rf"(?=\W*$|\s*[,:;()|\"']|\s+[-–—]|\s+(?-i:[A-Z])|{_OR}"
    r"|\s+(?:for|because|since|as|based|due|points?(?! (?:are |is |were )?deducted)|stars?|here|overall|to|and|pred)\b)"
)
_LABEL = r"(?:score|rating|grade|verdict|final answer)[sd]?"
_GAP = r"[^\w.!?,;\n<>≤≥]{0,8}?"  # signs and spaces
_STATED = (  # the judge's own verdict
    rf"^\W*(?:[^\W_]+[ _]){{0,2}}{_LABEL}(?:{_GAP}[:=|]|\s+(?:is|would be|should be)\b){_GAP}{_NUMERAL}{_END}",
    r"\bI(?:'d|'ll| would| will)?(?: \w+ly)? (?:rate|give|gave|score|grade|assign)(?: [^\W\d]+){0,6}?:? "
    rf"{_NUMERAL}{_END}\D*$",
    rf"\b(?:actually|correction|should)\b.{{0,40}}?\b(?:{_LABEL}|be){_GAP}(?:\b(?:is|be|of)\b)?{_GAP}{_NUMERAL}{_END}",
    rf"\\boxed\{{(?:\\text\{{)?\s*{_NUMERAL}",
)
_MENTIONED = (  # a verdict only if no dictionary has one
    rf"{_LABEL}{_GAP}(?:\b(?:is|was|of|as|at|would be|should be)\b{_GAP})?{_NUMERAL}{_END}",
    rf"(?<![\w.,/])([-+]?\d+(?:\.\d+)?) ?(?:/|out of) ?5(?:\.0)?(?![\w%/]|[.,]\d){_END}",
)
_FINAL = re.compile(
    r"(?<!'s )\b(?:final|overall|my)[ _](?:\w+[ _])?"
    r"(?:verdict|answer|score|rating|grade|evaluation|judge?ment|decision)\b"
    r"(?=[^\w.]*(?:is\b[^\w.]*)?(?:\d|\{|\\boxed|yes\b|no\b|['\"]?(?:pred|score)))",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[*`]{1,3}(?![ \t]*[\d*`])|(?<![\d\s*`])[*`]{1,3}")  # but not the sign in 0.8 * 5
_SCALE = re.compile(r"(?:\bon a scale )?\b(?:from |between )?0(?: ?[-–—] ?| to | and |, ?(?=5\]))5\b", re.IGNORECASE)
_HEADING = re.compile(
    rf"^([^\w\n]{{0,8}}(?:[^\W_]+[ _])?{_LABEL})[:=\s]{{0,8}}\n\s{{0,8}}(?=\W?\d)", re.IGNORECASE | re.MULTILINE
)
_CLAUSE = re.compile(r"(?<=[.!?;])\s+|\n")
_SUPPOSED = re.compile(  # a clause about a hypothetical answer, or about the scale
    r"\b(?:if|unless|requires?|required|otherwise|could|might|example|maximum|highest|minimum|lowest)\b"
    r"|\bwould (?!be|rate|give|score|grade|assign)|\bwould be (?:too|over|under|generous|harsh|unfair|excessive)"
    r"|\btoo (?:high|low|generous|harsh|lenient|strict)\b|\b(?:was|were) going to\b|\balmost\b|\bhesita"
    r"|\bnot (?:warranted|appropriate|justified|deserved|merited|earned)\b"
    r"|\b(?:not|never|cannot|\w+n't) (?:be |deserve |merit |warrant |worth |get |reach |give |have )?(?:it )?a "
    rf"{_LABEL}"
    rf"|\b(?:says|states|claims|mentions|shows|reports|reads)\b[^,;:]*\b{_LABEL}"  # a score in the video or an answer
    rf"|\b(?:player|team|film|movie|game)(?:'?s'?)?(?: \w+)? {_LABEL}|, (?:says|according to)\b",
    re.IGNORECASE,
)
_THEN = r"['\"*]*\s*[,;|\n]\s*['\"*]*"  # between a score and the yes or no after it
_WHOLE = re.compile(
    rf"(?:[\w ]{{0,30}}:\s*)?[^\w+<>≤≥-]*(?:(?:yes|no)(?:[\s,;:/|.()*'\"]+|\s+[-–—]\s+))?{_NUMERAL}"
    rf"(?:{_THEN}(?:yes|no))?\W*",
    re.IGNORECASE,
)
_DIGITS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "ten": "10"}
_IN_WORDS = re.compile(  # "Score: four", "out of five", "Four", "Yes, four"
    rf"({_LABEL}{_GAP}(?:[:=|]|\b(?:is|was|of|as|be)\b){_GAP}|\bout of |\A\W*(?:(?:yes|no)[,;:.|]\s*)?)"
    rf"({'|'.join(_DIGITS)})\b",
    re.IGNORECASE,
)
_DECIDED = re.compile(
    r"\b(pred(?:iction)?|match(?:es)?|verdict|decision|final answer)"
    r"(?:[^\w\n.!?,;]{0,4}[:=|]|(?<!prediction) is\b)[^\w\n]{0,4}(yes|no)\b",
    re.IGNORECASE,
)
_RESTATED = re.compile(r"\banswer[^\w\n]{0,4}[:=|][^\w\n]{0,4}(?:yes|no)\b", re.IGNORECASE)
_FIRST_WORD = re.compile(
    rf"(?:(?:[\w ]{{0,30}}:\s*)?[^\w+<>≤≥-]*{_NUMERAL}{_THEN})?\W*(yes|no)"
    r"(?=[.,:;!/|()'\"\n]|\s+[-–—\d(\n]|\s*$)",
    re.IGNORECASE,
)


def _worded_scores(text: str, patterns: tuple[str, ...]) -> set[float]:
    """Return the scores that match the patterns, except in suppositions. A text that is only a number is a score."""
    text = _HEADING.sub(r"\1: ", _SCALE.sub(" ", _MARKUP.sub("", text))).strip()
    if whole := _WHOLE.fullmatch(text):
        return {float(whole[1])}
    scores = set()
    for clause in _CLAUSE.split(text):
        if _SUPPOSED.search(clause):
            continue
        for pattern in patterns:
            for match in re.finditer(pattern, clause, re.IGNORECASE):
                if _ANOTHER.match(clause, match.end()):
                    raise Unparsable("it states more than one score")
                scores.add(float(match[1]))
    return scores


def _labelled_decisions(text: str) -> set[str]:
    """Return each yes or no after a label.

    "Prediction: no" is left out if the reply also has "Answer: no", because the judge then quotes the item.
    """
    found = [(match[1].lower(), match[2].lower()) for match in _DECIDED.finditer(_MARKUP.sub("", text))]
    restated = _RESTATED.search(_MARKUP.sub("", text))
    return {decision for label, decision in found if label != "prediction" or not restated}
