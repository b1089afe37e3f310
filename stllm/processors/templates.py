"""Prompts as data: the places of visual tokens, system sentence, question and answer; MVBench's wording of a choice.

The strings are part of the interface of the released weights and match them to the byte (tests/snapshots). The
benchmark and the training data that prepare for it word a choice alike. Source: the published evaluation of arXiv
2404.00308.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from stllm.common.registry import templates

VISUAL = "<visual>"  # the block of visual tokens
BOS = "<bos>"


@dataclass(frozen=True)
class Turn:
    """One question and, once it is known, its answer. `instruction` is what training data puts before the question."""

    question: str
    answer: str | None = None
    instruction: str = ""


@dataclass(frozen=True)
class PromptTemplate:
    """The prompts of one family of weights.

    opening: the first turn with a video or image, as pieces that are tokenized apart; `VISUAL`, `BOS` as they are.
    text_opening: the first turn without one. followup: a later turn.
    {context}: system sentence (or instruction, see below) and what separates it; {media}: Video or Image;
    {text}: the question.
    instruction_in_context: the instruction stands before the first turn instead of before the question.
    bos_is_eos: the published tokenizer sets BOS = EOS = UNK = `</s>` and adds `[PAD]`.
    ends_with_eos: the answer's end mark is EOS; otherwise it is `end_sym`, written on to the answer's text.
    num_beams, max_new_tokens, repetition_penalty: published decoding.
    """

    name: str
    opening: tuple[str, ...]
    text_opening: tuple[str, ...]
    followup: str
    system: str
    context_separator: str
    instruction_in_context: bool
    bos_is_eos: bool
    ends_with_eos: bool
    num_beams: int = 5
    max_new_tokens: int = 300
    repetition_penalty: float = 1.0

    def text(self, turn: Turn) -> str:
        """The value of {text}, which the Q-Former reads, too: instruction, a space, question."""
        parts = (turn.question,) if self.instruction_in_context else (turn.instruction, turn.question)
        return " ".join(part for part in parts if part)

    def context(self, turn: Turn, system: str) -> str:
        """The value of {context} in the first turn."""
        parts = (system, turn.instruction) if self.instruction_in_context else (system,)
        return "".join(part + self.context_separator for part in parts if part)

    def render(self, turn: Turn, *, first: bool, media: str | None, system: str = "") -> list[str]:
        """The pieces of one turn's prompt. media: "video", "image" or None."""
        if not first:
            pieces: tuple[str, ...] = (self.followup,)
        else:
            pieces = self.opening if media else self.text_opening
        values = {"context": self.context(turn, system), "media": (media or "").capitalize(), "text": self.text(turn)}
        # In one pass, so that braces inside a question stay what they are.
        return [piece.format_map(values) if "{" in piece else piece for piece in pieces]


INSTRUCTBLIP = templates.register("instructblip")(
    PromptTemplate(
        name="instructblip",
        opening=(VISUAL, BOS, "{context}###Human: {text} ###Assistant: "),
        text_opening=(BOS, "{context}###Human: {text} ###Assistant: "),
        followup="###Human: {text} ###Assistant: ",
        system=(
            "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement "
            "of objects, and the action and pose of persons. Based on your observations, give your answer that best "
            "addresses the question."
        ),
        context_separator="\n",
        instruction_in_context=False,
        bos_is_eos=True,
        ends_with_eos=True,
        repetition_penalty=1.5,
    )
)

MINIGPT4 = templates.register("minigpt4")(
    PromptTemplate(
        name="minigpt4",
        opening=(BOS, "{context}###Human: <{media}>", VISUAL, "</{media}> {text} ###Assistant: "),
        text_opening=(BOS, "{context}###Human: {text} ###Assistant: "),
        followup="Human: {text} ###Assistant: ",  # the answer before it ends with ###
        system=(
            "Give the following video: <Video>VideoContent</Video>. You will be able to see the video once I provide "
            "it to you. Please answer my questions."
        ),
        context_separator=" ",
        instruction_in_context=True,
        bos_is_eos=False,
        ends_with_eos=False,
    )
)


# ---- choices ---------------------------------------------------------------------------------------------------------

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
REQUEST = "Only give the best option."
ANSWER_BEGINS = "Best option:("


def question_block(question: str, candidates: Sequence[str]) -> str:
    """The question and its lettered options, without a newline at the end."""
    return f"Question: {question}\n{lettered(candidates)}"


def lettered(candidates: Sequence[str]) -> str:
    """The options, a line each, after the line "Options:". Raises ValueError for more options than letters."""
    letters = ascii_uppercase[: len(candidates)]
    lines = [f"({letter}) {candidate}" for letter, candidate in zip(letters, candidates, strict=True)]
    return "\n".join(["Options:", *lines])
