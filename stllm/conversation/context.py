"""The context rule: how much of a long prompt enters the language model.

published: the last tokens of the prompt, visual and text, so that with the new tokens they are at most 2,000. This is
    the rule of the published chat, VcgBench and VideoQA; MVBench cuts nothing. A model that was trained for fewer
    positions keeps only as many tokens as it has positions.
all: every token. A model with rotary positions then also reads beyond the positions that it was trained for.

A prompt is refused in two cases: its last question, which is never cut, is too long for the published rule; or it
exceeds positions from a table under `all`. Standard library only: the command line reads the names.
"""

from dataclasses import dataclass
from typing import Any

from stllm.common.errors import UserError, unknown_name

PUBLISHED, ALL = "published", "all"
CONTEXTS = (PUBLISHED, ALL)
PUBLISHED_LENGTH = 2000  # of the prompt and the new tokens together


@dataclass(frozen=True)
class Cut:
    """The number of visual and of text tokens that were cut from the front of a prompt."""

    visual: int = 0
    text: int = 0

    @property
    def total(self) -> int:
        """Return the number of all tokens that were cut."""
        return self.visual + self.text

    def __str__(self) -> str:
        """Return a sentence for the user."""
        return f"The prompt is long: its first {self.total} tokens were cut, {self.visual} of them the video's."


NOTHING_CUT = Cut()


def check_context(context: str, max_new_tokens: int) -> None:
    """Raise UserError for an unknown rule, and for so many new tokens that the published rule leaves no prompt."""
    if context not in CONTEXTS:
        raise UserError(unknown_name("context", context, CONTEXTS))
    if context == PUBLISHED and max_new_tokens >= PUBLISHED_LENGTH:
        raise UserError(
            f"max_new_tokens is {max_new_tokens}, but the published context rule has {PUBLISHED_LENGTH} positions for "
            "the prompt and the new tokens: ask for fewer new tokens, or keep the whole prompt (--context all)"
        )


def has_position_table(text_config: Any) -> bool:
    """Check for position embeddings from a table of fixed size, in contrast to rotary positions, which are computed.

    text_config: of a causal LM of transformers.
    """
    return num_positions(text_config) is not None and not getattr(text_config, "rope_parameters", None)


def num_positions(text_config: Any) -> int | None:
    """Return the positions that a language model was trained for; None where it has no number (ALiBi, state space)."""
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    return positions


def room(context: str, max_new_tokens: int, text_config: Any) -> tuple[int | None, str]:
    """Return the longest prompt of this language model under a context rule (None: any), and the reason in words."""
    positions, rooms = num_positions(text_config), []
    if positions is not None and has_position_table(text_config):
        reason = f"the language model has {positions} positions, which it shares with {max_new_tokens} new tokens"
        rooms.append((positions - max_new_tokens, reason))
    elif positions is not None and context == PUBLISHED:
        rooms.append((positions, f"the language model has {positions} positions"))
    if context == PUBLISHED:
        reason = f"the published context rule has {PUBLISHED_LENGTH} positions, {max_new_tokens} of them for new tokens"
        rooms.append((PUBLISHED_LENGTH - max_new_tokens, reason))
    return min(rooms, key=lambda room: room[0], default=(None, ""))
