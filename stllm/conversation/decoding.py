"""Settings of generation with transformers' `generate` (beams, length, sampling), and a check for NaN scores."""

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
from stllm.common.schema import CONTEXTS, MAX_BEAMS, PUBLISHED
from stllm.conversation.requests import PUBLISHED_LENGTH
from stllm.processors.templates import PromptTemplate

MIN_TEMPERATURE = 1e-5  # our choice, the same as vLLM's; scores divided by less than about 1e-36 would overflow


@dataclass(frozen=True)
class Decoding:
    """Settings of generation.

    temperature: below 1e-5, the most probable token is taken. repetition_penalty: applies to generated tokens only; 1:
    none. context: rule for long prompts, `published` or `all`; see requests.py.
    An answer may be empty. The published setting `min_length` of 1 did not prevent that, because it counted an id that
    transformers put before every answer at that time.
    """

    num_beams: int = 5
    max_new_tokens: int = 300
    temperature: float = 0.0
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    context: str = PUBLISHED

    def __post_init__(self) -> None:
        """Raise UserError for a number out of range, an unknown rule, or no room for a prompt beside the new tokens."""
        if not 1 <= self.num_beams <= MAX_BEAMS:
            raise UserError(
                f"num_beams is {self.num_beams}: expected 1 to {MAX_BEAMS}, a limit chosen here because each beam "
                "needs memory"
            )
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
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
        """Return the settings of the published demo and open-ended benchmarks for the template's model family."""
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
        """Return a copy with the options that are not None.

        Sampling and streaming use one beam, so either sets `num_beams` to 1 unless it is given.
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
        """Raise UserError if there are several beams, because the best one is known only at the end."""
        if self.num_beams > 1:
            raise UserError(
                f"streaming follows one beam, but {self.num_beams} were asked for: name 1 beam (--num-beams 1, "
                "num_beams=1), or do not stream"
            )

    def arguments(self, *, eos_token_id: int, pad_token_id: int, stop_strings: list[str]) -> dict[str, Any]:
        """Return the arguments for `generate`. They replace the generation defaults of the checkpoint."""
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
        # `config.repetition_penalty` cannot be used: given embeddings instead of ids, transformers 5.23 treats the left
        # padding of a batch as generated tokens, and leaves that many generated tokens without a penalty.
        penalties = LogitsProcessorList()
        if self.repetition_penalty != 1:
            penalties.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        return {"generation_config": config, "logits_processor": penalties}


class NoNumbersError(UserError):
    """An error for values of the model that are NaN or infinite. what: name of the values. dtype: their type."""

    def __init__(self, what: str, dtype: torch.dtype) -> None:
        kind = str(dtype).removeprefix("torch.")
        hint = "" if kind == "float32" else f", or numbers grow too large for {kind}: use --dtype float32"
        super().__init__(f"{what} are no numbers (NaN or infinite): the weights are damaged, get them again{hint}")


class NaNWatch(LogitsProcessor):
    """Logits processor that records the rows with a NaN score; `generate` would silently take the first token."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.error = NoNumbersError("the language model's scores", dtype)
        self._found: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Record NaN among the scores, (rows, vocabulary), and return them unchanged. Does not wait for the GPU."""
        found = scores.isnan().any(dim=-1)
        self._found = found if self._found is None else self._found | found
        return scores

    def found(self, num_rows: int) -> list[bool]:
        """Return for each of `num_rows` prompts whether a score of any of its beams was NaN."""
        if self._found is None:
            return [False] * num_rows
        return [bool(one) for one in self._found.view(num_rows, -1).any(dim=-1).tolist()]
