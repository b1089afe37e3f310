"""Prompt templates of the model families, and the prompt for multiple-choice questions.

The released weights were trained with these strings, so they must not change (tests/snapshots). MVBench and its
training data use the same multiple-choice prompt. Source: the published evaluation of arXiv 2404.00308.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from stllm.common.registry import templates

VISUAL = "<visual>"  # piece of a prompt that stands for all visual tokens
BOS = "<bos>"  # piece of a prompt that stands for the beginning-of-sequence token


@dataclass(frozen=True)
class Turn:
    """A question and its answer. answer: None if it is not known yet. instruction: training data's text before it."""

    question: str
    answer: str | None = None
    instruction: str = ""


@dataclass(frozen=True)
class PromptTemplate:
    """The prompts of one model family.

    opening: the first turn with a medium, as pieces that are tokenized separately, including `VISUAL` and `BOS`.
    text_opening: the first turn without a medium. followup: a later turn.
    {context} in a piece stands for the system message with a separator, {media} for Video or Image, {text} for the
    question with its instruction.
    instruction_in_context: the instruction is part of {context} instead of {text}.
    bos_is_eos: the published tokenizer uses `</s>` for BOS, EOS and UNK, and has an additional `[PAD]`.
    ends_with_eos: answers end with EOS in training; otherwise with the text `end_sym`.
    num_beams, max_new_tokens, repetition_penalty: published settings of generation.
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
        """Return the value of {text}, which is also the Q-Former's text: the instruction, a space, the question."""
        parts = (turn.question,) if self.instruction_in_context else (turn.instruction, turn.question)
        return " ".join(part for part in parts if part)

    def context(self, turn: Turn, system: str) -> str:
        """Return the value of {context} in the first turn."""
        parts = (system, turn.instruction) if self.instruction_in_context else (system,)
        return "".join(part + self.context_separator for part in parts if part)

    def render(self, turn: Turn, *, first: bool, media: str | None, system: str = "") -> list[str]:
        """Return the pieces of one turn's prompt. media: "video", "image" or None."""
        if not first:
            pieces: tuple[str, ...] = (self.followup,)
        else:
            pieces = self.opening if media else self.text_opening
        values = {"context": self.context(turn, system), "media": (media or "").capitalize(), "text": self.text(turn)}
        # a single pass, so that braces inside a question are not replaced
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
        followup="Human: {text} ###Assistant: ",  # the previous answer ends with ###
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


# ---- multiple choice -------------------------------------------------------------------------------------------------

SYSTEM = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question."
)
REQUEST = "Only give the best option."
ANSWER_BEGINS = "Best option:("


def question_block(question: str, candidates: Sequence[str]) -> str:
    """Return the question with its lettered options, without a final newline."""
    return f"Question: {question}\n{lettered(candidates)}"


def lettered(candidates: Sequence[str]) -> str:
    """Return "Options:" and a line per option, such as "(A) left". Raises ValueError for more than 26 options."""
    letters = ascii_uppercase[: len(candidates)]
    lines = [f"({letter}) {candidate}" for letter, candidate in zip(letters, candidates, strict=True)]
    return "\n".join(["Options:", *lines])
