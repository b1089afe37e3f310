"""Settings of generation: beams, length, sampling; transformers' `generate` does the work."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from stllm.common.errors import UserError, unknown_name
from stllm.common.schema import CONTEXTS, PUBLISHED
from stllm.conversation.requests import PUBLISHED_LENGTH
from stllm.processors.templates import PromptTemplate

MIN_TEMPERATURE = 1e-5  # chosen here, vLLM's value too; scores divided by less than about 1e-36 overflow


@dataclass(frozen=True)
class Decoding:
    """num_beams; max_new_tokens; temperature (below 1e-5: no sampling); top_p; repetition_penalty (1: none).

    context: the rule for long prompts, `published` or `all`; see requests.py.
    The repetition penalty applies to generated tokens only, and an answer may be empty: the published `min_length` of 1
    counts an id that the library of that time put before every answer.
    """

    num_beams: int = 5
    max_new_tokens: int = 300
    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    context: str = PUBLISHED

    def __post_init__(self) -> None:
        """Raise UserError for a number out of range, an unknown rule, and so many new tokens that no prompt is left."""
        if self.num_beams < 1 or self.max_new_tokens < 1:
            raise UserError(
                f"num_beams is {self.num_beams} and max_new_tokens {self.max_new_tokens}: both must be at least 1"
            )
        if self.context not in CONTEXTS:
            raise UserError(unknown_name("context", self.context, CONTEXTS))
        if self.context == PUBLISHED and self.max_new_tokens >= PUBLISHED_LENGTH:
            raise UserError(
                f"max_new_tokens is {self.max_new_tokens}, but the published context rule has {PUBLISHED_LENGTH} "
                "positions for the prompt and the new tokens: ask for fewer new tokens, or keep the whole prompt "
                "(--context all)"
            )
        finite = math.isfinite(self.temperature) and math.isfinite(self.repetition_penalty)
        if not finite or self.temperature < 0 or self.repetition_penalty <= 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"temperature is {self.temperature}, repetition_penalty {self.repetition_penalty} and top_p "
                f"{self.top_p}: expected at least 0, above 0, and above 0 up to 1"
            )

    @classmethod
    def published(cls, template: PromptTemplate) -> "Decoding":
        """Return the settings that the published demo and open-ended benchmarks use with this family of weights."""
        return cls(
            num_beams=template.num_beams,
            max_new_tokens=template.max_new_tokens,
            repetition_penalty=template.repetition_penalty,
        )

    def with_options(
        self,
        *,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        context: str | None = None,
        stream: bool = False,
    ) -> "Decoding":
        """Return these settings with a user's options over them.

        Sampling and streaming follow one beam, so either sets `num_beams` to 1 unless the user named a number.
        Raises UserError for streaming with several beams.
        """
        if num_beams is None and (stream or temperature):
            num_beams = 1
        options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
        options |= {"temperature": temperature, "context": context}
        wanted = replace(self, **{name: value for name, value in options.items() if value is not None})
        if stream:
            wanted.check_streaming()
        return wanted

    def check_streaming(self) -> None:
        """Raise UserError for several beams: the best of them is known only at the end."""
        if self.num_beams > 1:
            raise UserError(
                f"streaming follows one beam, but {self.num_beams} were asked for: name 1 beam (--num-beams 1, "
                "num_beams=1), or do not stream"
            )

    def arguments(self, *, eos_token_id: int, pad_token_id: int, stop_strings: list[str]) -> dict[str, Any]:
        """Return the arguments of `generate`; a checkpoint's own generation defaults are not used."""
        samples = self.temperature >= MIN_TEMPERATURE
        sampling = {"temperature": float(self.temperature), "top_p": self.top_p} if samples else {}
        config = GenerationConfig(
            num_beams=self.num_beams,
            max_new_tokens=self.max_new_tokens,
            do_sample=samples,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            stop_strings=stop_strings,
            **sampling,
        )
        # Not by `config.repetition_penalty`: given embeddings instead of ids, transformers 5.23 takes the left padding
        # of a batch for already generated tokens and leaves as many of them without a penalty.
        penalties = LogitsProcessorList()
        if self.repetition_penalty != 1:
            penalties.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        return {"generation_config": config, "logits_processor": penalties}


class NoNumbersError(UserError):
    """Numbers of the model were NaN or infinite."""

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        kind = str(dtype).removeprefix("torch.")
        hint = "" if kind == "float32" else f", or numbers grow too large for {kind}: use --dtype float32"
        super().__init__(f"{what} are no numbers (NaN or infinite): the weights are damaged, get them again{hint}")


class NaNWatch(LogitsProcessor):
    """Notes which rows had a score that was NaN; generation itself would continue with the first token."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.error = NoNumbersError("the language model's scores", dtype)
        self._found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores, (B, vocabulary), unchanged, without waiting for the GPU."""
        found = scores.isnan().any(dim=-1)
        self._found = found if self._found is None else self._found | found
        return scores

    def found(self, num_rows: int) -> list[bool]:
        """Return for each row of the batch, which may have several beams, whether a score of it was NaN."""
        if self._found is None:
            return [False] * num_rows
        return [bool(one) for one in self._found.view(num_rows, -1).any(dim=-1).tolist()]
