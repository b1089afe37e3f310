"""Generation from prompts that are read once: every beam of an answer attends to one copy of its prompt.

transformers' `generate` reads a prompt once for each beam, and moves all keys and values at every token: they grow by
concatenation, and beam search reorders them. Here the prompts are read first, without padding, and their keys and
values stay in place; only the answers' own part, which is short, grows and follows the beams. Attention to the two
parts is computed apart and normalised together ("Bifurcated Attention", arXiv 2403.08845). Beam search, sampling and
stopping remain `generate`'s, and the ids are the same.

B prompts, R answers (B times the beams), S positions of a prompt, T of an answer, H heads, G of them to each of the
H/G key heads, D width of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SHARED = "shared_prompt"
# Positions of several prompts in one pass. On a CPU each operation on more than a few prompts gets its memory anew
# from the system: 25 prompts of 560 tokens in one pass had 4.9 million page faults, a quarter of its CPU time.
PREFILL_POSITIONS = {"cpu": 512}
PREFILL_POSITIONS_ELSEWHERE = 16_384  # what bounds the memory
ANSWER_ROOM = 32  # positions, at first


class NotShared(Exception):
    """This architecture does not attend in the way that two parts of keys and values need."""


def generate(model: Any, inputs_embeds: Tensor, attention_mask: Tensor, **generation: Any) -> Tensor:
    """Return new token ids, (B, up to max_new_tokens), as `model.generate` does. model: a causal LM of transformers.

    inputs_embeds: (B, S, D) of prompts padded on the left; attention_mask: (B, S). generation: other arguments of
    transformers' `generate`. Architectures with sliding windows, recurrent layers, or an attention that is not torch's
    SDPA take the way of `model.generate`.
    """
    if inputs_embeds.shape[1] > 1 and shares_prompts(model):
        lengths = attention_mask.sum(dim=1).tolist()
        cache = new_cache(model, lengths)
        try:
            with shared_attention(model):
                _prefill(model, inputs_embeds, lengths, cache)
                generation[_cache_name(model)] = cache
                return model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generation)
        except NotShared:
            generation.pop(_cache_name(model), None)
    return model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generation)


def new_cache(model: PreTrainedModel, lengths: Sequence[int]) -> Cache:
    """Return an empty cache for prompts of these lengths."""
    return Cache(layers=[PromptLayer(lengths) for _ in DynamicCache(config=model.config).layers])


def shares_prompts(model: PreTrainedModel) -> bool:
    """Check whether every layer is plain attention over all earlier positions, computed by torch's SDPA."""
    config = model.config
    if config._attn_implementation != "sdpa" or not model.get_decoder()._supports_attention_backend:
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@contextmanager
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Have the model attend by `attend` in this block; it then makes no masks, as none is registered for the name."""
    config = model.config
    config._attn_implementation = SHARED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def positions_at_once(device: torch.device) -> int:
    """Return the number of positions up to which several prompts are read in one pass."""
    return PREFILL_POSITIONS.get(device.type, PREFILL_POSITIONS_ELSEWHERE)


def _prefill(model: PreTrainedModel, inputs_embeds: Tensor, lengths: Sequence[int], cache: Cache) -> None:
    """Read all of each prompt but its last token, with which `generate` begins.

    Prompts of about one length are read together, padded on the right: causal attention does not see the padding, so no
    mask is needed.
    """
    layers: list[PromptLayer] = cache.layers  # type: ignore[assignment]
    most = positions_at_once(inputs_embeds.device)
    waiting = sorted((row for row, length in enumerate(lengths) if length > 1), key=lengths.__getitem__, reverse=True)
    while waiting:
        count = max(1, most // lengths[waiting[0]])
        rows, waiting = waiting[:count], waiting[count:]
        for layer in layers:
            layer.rows = rows
        prompts = [inputs_embeds[row, inputs_embeds.shape[1] - lengths[row] : -1] for row in rows]
        model.get_decoder()(
            inputs_embeds=pad_sequence(prompts, batch_first=True), use_cache=True, **{_cache_name(model): cache}
        )
    for layer in layers:
        if layer.prompt_keys is None:
            raise NotShared
        layer.rows = None


def _cache_name(model: PreTrainedModel) -> str:
    """Return the name of the cache among the model's arguments, which transformers changed."""
    return "cache" if "cache" in signature(model.get_decoder().forward).parameters else "past_key_values"


class PromptLayer(DynamicLayer):
    """One layer's keys and values: those of the prompts, written once, and those of the answers.

    lengths: of the B prompts. rows: the numbers of the prompts that are being read; None when all have been.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths = [length - 1 for length in lengths]  # `generate` begins with the last token
        self.rows: Sequence[int] | None = None
        self.prompt_keys: Tensor | None = None  # (B, H/G, S, D), padded on the right
        self.prompt_values: Tensor | None = None
        self.padding: Tensor | None = None  # (B, 1, 1, S), true where a prompt has ended; None where all end alike
        self.length = 0  # T

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return those of the part that they belong to: prompts or answers."""
        if self.rows is not None:
            return self._update_prompts(key_states, value_states)
        end = self.length + key_states.shape[2]
        if self.keys is None or self.keys.shape[2] < end:
            room = max(ANSWER_ROOM, 2 * end)
            keys, values = (new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (key_states, value_states))
            if self.keys is not None and self.values is not None:
                keys[:, :, : self.length], values[:, :, : self.length] = self.view()
            self.keys, self.values = keys, values
        assert self.values is not None
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = key_states, value_states
        self.length = end
        keys, values = self.view()
        keys.prompt = self  # type: ignore[attr-defined]
        return keys, values

    def _update_prompts(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        assert self.rows is not None
        if self.prompt_keys is None:
            longest = max(self.lengths)
            self.prompt_keys, self.prompt_values = (
                new.new_zeros(len(self.lengths), new.shape[1], longest, new.shape[3]) for new in (keys, values)
            )
            if min(self.lengths) < longest:
                ends = torch.tensor(self.lengths, device=keys.device)
                self.padding = (torch.arange(longest, device=keys.device) >= ends[:, None])[:, None, None]
        assert self.prompt_values is not None
        for place, row in enumerate(self.rows):
            end = self.lengths[row]
            self.prompt_keys[row, :, :end] = keys[place, :, :end]
            self.prompt_values[row, :, :end] = values[place, :, :end]
        keys.prompt = None  # type: ignore[attr-defined]
        return keys, values

    def view(self) -> tuple[Tensor, Tensor]:
        """Return the answers' keys and values, (R, H/G, T, D)."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Return the number of positions before the next token: while prompts are read, each begins at 0."""
        return 0 if self.rows is not None or self.prompt_keys is None else max(self.lengths) + self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have each answer continue the one of that number; a prompt's answers stay its own."""
        for part in self.view():
            part.copy_(part.index_select(0, beam_idx.to(part.device)))


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend from the next token of each answer to its prompt and to the answer so far, or causally within prompts.

    query: (R, H, 1, D); key, value: what `PromptLayer.update` returned. Returns (R, 1, H, D).
    Raises NotShared for keys that the architecture has changed, and for terms that are added to the scores.
    """
    if not hasattr(key, "prompt") or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        raise NotShared
    layer = key.prompt
    if layer is None:  # prompts, read from their beginning
        return sdpa_attention_forward(module, query, key, value, None, dropout, scaling, **kwargs)
    if query.shape[2] != 1:
        raise NotShared
    prompts, key_heads, _, width = layer.prompt_keys.shape
    answers, heads = query.shape[:2]
    beams, groups = answers // prompts, heads // key_heads
    query = query.reshape(answers, key_heads, groups, -1) * (scaling or width**-0.5)
    own = query @ key.transpose(2, 3)  # (R, H/G, G, T)
    common = _by_prompt(query, beams) @ layer.prompt_keys.transpose(2, 3)  # (B, H/G, beams * G, S)
    if layer.padding is not None:
        common = common.masked_fill(layer.padding, -torch.inf)
    scores = torch.cat([common, _by_prompt(own, beams)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    common, own = weights.split([common.shape[-1], own.shape[-1]], dim=-1)
    output = _by_answer(common @ layer.prompt_values, beams) + _by_answer(own, beams) @ value  # (R, H/G, G, D)
    return output.reshape(answers, 1, heads, -1), None


def _by_prompt(tensor: Tensor, beams: int) -> Tensor:
    """Put the beams of a prompt together: (R, H/G, G, ...) to (B, H/G, beams * G, ...)."""
    return tensor.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


def _by_answer(tensor: Tensor, beams: int) -> Tensor:
    """Undo `_by_prompt`."""
    return tensor.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(SHARED, attend)
