"""Faster generation: each prompt is read once, and all beams of its answer attend to one copy of its keys and values.

transformers' `generate` reads a prompt once for each beam. It also copies all keys and values at every new token,
because the cache grows by concatenation and beam search reorders it. Here the prompts are read first, without padding,
and their keys and values stay in place. Only those of the answers, which are short, grow and are reordered. Attention
is computed separately for both parts and normalised together ("Bifurcated Attention", arXiv 2403.08845). transformers
still does beam search, sampling and stopping, and the generated ids are the same.

Prompts with a common beginning share one copy of its keys and values: within a batch, and across calls, which pass it
on as a `Prefix`. Prompts are compared by their embeddings, so anything that changes a prompt (template, system
sentence, frames, context rule, Q-Former) prevents the reuse.

Letters in shapes: B prompts, R answers (B times the beams), S positions of a prompt, P positions of a prefix, T
positions of an answer, H heads, G query heads for each of the H/G key heads, D width of a head or of an embedding.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SHARED = "shared_prompt"
# The most positions, of several prompts together, that one forward pass reads. On a CPU a larger pass allocates new
# memory for each operation: 25 prompts of 560 tokens caused 4.9 million page faults, a quarter of the CPU time.
PREFILL_POSITIONS = {"cpu": 512}
PREFILL_POSITIONS_ELSEWHERE = 16_384  # limits the memory
ANSWER_ROOM = 32  # positions of an answer allocated at first
# The smallest share of a prompt that is worth sharing as a prefix, or worth keeping as part of a new one. Chosen here.
LEAST_SHARE = 0.25
CHANGING_POSITIONS = ("dynamic", "longrope")  # rotary positions that depend on the length of the whole prompt


class NotShared(Exception):
    """Raised if an architecture's attention cannot be split into prompt and answer. `model.generate` is used then."""


@dataclass(eq=False)
class Prefix:
    """The beginning of a prompt that other prompts can reuse.

    embeds: (P, D). keys, values: (H/G, P, D) for each layer.
    """

    embeds: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @cached_property
    def nbytes(self) -> int:
        """The size of all tensors in bytes. To be read only after the prefix is complete, because it is cached."""
        return sum(tensor.nbytes for tensor in (self.embeds, *self.keys, *self.values))

    def common(self, prompt: Tensor) -> int:
        """Return the number of positions at the beginning of a prompt (S, D) that are equal to those of this prefix."""
        length = min(len(self.embeds), len(prompt))
        if not length or not torch.equal(self.embeds[0], prompt[0]):
            return 0
        same = (self.embeds[:length] == prompt[:length]).all(dim=1)
        return int(same.int().cumprod(dim=0).sum())


def generate(
    model: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    *,
    prefixes: Sequence[list[Prefix]] | None = None,
    **generation: Any,
) -> Tensor:
    """Generate token ids, (B, up to max_new_tokens), the same as `model.generate` does, but faster.

    model: a causal LM of transformers. inputs_embeds: (B, S, D), prompts padded on the left. attention_mask: (B, S).
    prefixes: a list for each prompt, with the prefixes kept by earlier calls with the same weights. Several prompts may
        have the same list. Prefixes of this call are added to it, the most recently used last. None: nothing is kept.
    generation: other arguments of transformers' `generate`.
    Architectures with sliding windows, with recurrent layers, or without torch's SDPA use `model.generate` instead.
    Models without `has_reusable_keys` neither share nor keep prefixes.
    """
    if inputs_embeds.shape[1] > 1 and shares_prompts(model):
        # all tokens but the last are read here; `generate` then reads the last one
        lengths = (attention_mask.sum(dim=1) - 1).tolist()
        longest = max(lengths) + 1
        inputs_embeds, attention_mask = inputs_embeds[:, -longest:], attention_mask[:, -longest:]
        prompts = [row[len(row) - 1 - length : -1] for row, length in zip(inputs_embeds, lengths, strict=True)]
        parts = _share(prompts, prefixes, share=has_reusable_keys(model))
        cache = new_cache(model, parts)
        try:
            with shared_attention(model):
                _prefill(model, prompts, parts, cache)
                generation[_cache_name(model)] = cache
                ids = model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generation)
            if prefixes is not None:
                _keep(prompts, parts, cache, prefixes)
            return ids
        except NotShared:
            generation.pop(_cache_name(model), None)
    return model.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **generation)


def weights_state(model: Any) -> Hashable:
    """Return a value that changes when the weights change, including LoRA's. Prefixes are valid for one value only.

    Changes made through `Tensor.data` are not noticed, because torch does not count them.
    """
    adapters = [
        (part.disable_adapters, *part.active_adapters, *part.merged_adapters)
        for part in model.modules()
        if hasattr(part, "merged_adapters")
    ]
    weights = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in model.parameters()]
    return tuple(adapters), tuple(weights)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Check whether every layer attends to all earlier positions with torch's SDPA."""
    config = model.config
    if config._attn_implementation != "sdpa" or not model.get_decoder()._supports_attention_backend:
        return False
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


@contextmanager
def shared_attention(model: PreTrainedModel) -> Iterator[None]:
    """Make the model compute attention with `attend` within this block. transformers then builds no masks."""
    config = model.config
    config._attn_implementation = SHARED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def positions_at_once(device: torch.device) -> int:
    """Return how many positions, of several prompts together, one forward pass may read."""
    return PREFILL_POSITIONS.get(device.type, PREFILL_POSITIONS_ELSEWHERE)


def new_cache(model: PreTrainedModel, parts: "_PromptParts") -> Cache:
    """Return an empty cache for these prompts."""
    return Cache(layers=[PromptLayer(number, parts) for number in range(len(DynamicCache(config=model.config).layers))])


def has_reusable_keys(model: PreTrainedModel) -> bool:
    """Check whether a token's keys depend only on the token, its position and the tokens before it.

    With some rotary embeddings they also depend on the length of the prompt. With LLM.int8() they also depend on the
    other tokens of the forward pass, because it treats a column by its largest value.
    """
    if "position_ids" not in signature(model.get_decoder().forward).parameters:
        return False
    if any(type(part).__name__ == "Linear8bitLt" for part in model.modules()):
        return False
    return not any(kind in str(getattr(model.config, "rope_parameters", None)) for kind in CHANGING_POSITIONS)


@dataclass
class _PromptParts:
    """B prompts, each split into a beginning that it shares with a prefix, and a rest.

    lengths: positions of each prompt. common: positions of each prompt that its prefix covers (0: it has no prefix).
    users: the numbers of the prompts that use each prefix.
    """

    lengths: list[int]
    common: list[int]
    users: dict[Prefix, list[int]]

    @property
    def rests(self) -> list[int]:
        """The number of positions of each prompt that no prefix covers."""
        return [length - common for length, common in zip(self.lengths, self.common, strict=True)]


def _share(prompts: Sequence[Tensor], kept: Sequence[Sequence[Prefix]] | None, *, share: bool) -> _PromptParts:
    """Find for each prompt (S, D) the prefix with which it has the longest common beginning.

    Candidates are the kept prefixes and the earlier prompts of this batch. If the common beginning is too short, the
    prompt becomes a new prefix itself. Its keys are computed later. It is dropped if no other prompt of the batch uses
    it and prefixes are not kept.
    """
    parts = _PromptParts([len(prompt) for prompt in prompts], [0] * len(prompts), {})
    for row, prompt in enumerate(prompts if share else ()):
        found = {prefix: prefix.common(prompt) for prefix in (*(kept[row] if kept else ()), *parts.users)}
        best = max(found, key=found.__getitem__, default=None)
        if best is None or found[best] < LEAST_SHARE * len(prompt):
            best = Prefix(prompt if kept is None else prompt.clone())  # a view would keep the whole batch in memory
        if len(prompt):
            parts.common[row] = found.get(best, len(prompt))
            parts.users.setdefault(best, []).append(row)
    for prefix, rows in list(parts.users.items()):
        if kept is None and len(rows) == 1:
            del parts.users[prefix]
            parts.common[rows[0]] = 0
    return parts


def _prefill(model: PreTrainedModel, prompts: Sequence[Tensor], parts: _PromptParts, cache: Cache) -> None:
    """Fill the cache: first with the prompts that have no prefix or are a new one, then with the rests of the others.

    Whole prompts of similar length are read in one batch, padded on the right. Causal attention does not see this
    padding, so it needs no mask. The rests that follow one prefix are read as one row, and a mask separates them.
    """
    layers: list[PromptLayer] = cache.layers  # type: ignore[assignment]
    most = positions_at_once(prompts[0].device)

    def read(passing: "_Pass", embeds: Tensor, **positions: Tensor) -> None:
        for layer in layers:
            layer.passing = passing
        named: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": True, _cache_name(model): cache}
        model.get_decoder()(**named, **positions)

    new = {rows[0]: prefix for prefix, rows in parts.users.items() if not prefix.keys}
    whole = [row for row, length in enumerate(parts.lengths) if length and (not parts.common[row] or row in new)]
    whole.sort(key=parts.lengths.__getitem__, reverse=True)
    while whole:
        count = max(1, most // parts.lengths[whole[0]])
        rows, whole = whole[:count], whole[count:]
        spans = [(row, 0, parts.lengths[row]) for row in rows]
        read(_Pass(spans, new=new), pad_sequence([prompts[row] for row in rows], batch_first=True))
    for prefix, users in parts.users.items():
        waiting = [row for row in users if parts.rests[row]]
        while waiting:
            spans, end = [], 0
            while waiting and (not spans or end + parts.rests[waiting[0]] <= most):
                row = waiting.pop(0)
                spans.append((row, end, end := end + parts.rests[row]))
            rows = [row for row, _, _ in spans]
            position = torch.cat([torch.arange(parts.common[row], parts.lengths[row]) for row in rows])
            number = torch.cat([torch.full((parts.rests[row],), row) for row in rows])
            common = torch.tensor(parts.common)[number][:, None] > torch.arange(max(parts.common[row] for row in rows))
            own = (number[:, None] == number) & (position[:, None] >= position)
            mask = torch.cat([common, own], dim=1).to(prompts[0].device)[None, None]
            embeds = torch.cat([prompts[row][parts.common[row] :] for row in rows])[None]
            read(_Pass(spans, prefix=prefix, mask=mask), embeds, position_ids=position.to(embeds.device)[None])
    for layer in layers:
        layer.end_prefill()


def _keep(prompts: Sequence[Tensor], parts: _PromptParts, cache: Cache, prefixes: Sequence[list[Prefix]]) -> None:
    """Keep prefixes for later calls: move the one that a prompt used to the end of the prompt's list.

    If more than LEAST_SHARE of the prompt was not in it, a new prefix for the whole prompt is added instead.
    """
    layers: list[PromptLayer] = cache.layers  # type: ignore[assignment]
    for prefix, rows in parts.users.items():
        for row in rows:
            kept, end, rest = prefix, parts.common[row], parts.rests[row]
            if rest > LEAST_SHARE * parts.lengths[row]:
                kept = Prefix(prompts[row].clone())
                for number, layer in enumerate(layers):
                    assert layer.rest_keys is not None and layer.rest_values is not None
                    own = layer.rest_keys[row, :, :rest], layer.rest_values[row, :, :rest]
                    kept.keys.append(torch.cat([prefix.keys[number][:, :end], own[0]], dim=1))
                    kept.values.append(torch.cat([prefix.values[number][:, :end], own[1]], dim=1))
            is_part = kept is not prefix and end == len(prefix.embeds)
            prefixes[row][:] = [one for one in prefixes[row] if one is not kept and not (is_part and one is prefix)]
            prefixes[row].append(kept)


def _cache_name(model: PreTrainedModel) -> str:
    """Return the name of the model's argument for the cache, which differs between versions of transformers."""
    return "cache" if "cache" in signature(model.get_decoder().forward).parameters else "past_key_values"


@dataclass
class _Pass:
    """One forward pass over prompts: whole prompts, each in its own row, or the rests after one prefix, all in one row.

    spans: (prompt, first, end) for each prompt read, its positions in its row. new: prompt -> prefix to be filled.
    prefix: the one before the rests. mask: (1, 1, L, P + L) for L positions of rests, true where one of them attends to
    a position of the prefix or of the rests.
    """

    spans: list[tuple[int, int, int]]
    new: dict[int, Prefix] = field(default_factory=dict)
    prefix: Prefix | None = None
    mask: Tensor | None = None


class PromptLayer(DynamicLayer):
    """The cache of one layer: keys and values of the prompts, which never move, and of the answers, which grow.

    number: the layer's number. passing: the current pass over prompts; None once all prompts are read.
    """

    def __init__(self, number: int, parts: _PromptParts) -> None:
        super().__init__()
        self.number, self.parts = number, parts
        self.passing: _Pass | None = None
        # for each prefix: its keys and values (H/G, P, D), the numbers of the b prompts that use it, and (b, 1, 1, P),
        # true at the positions that a prompt does not share
        self.prefixes: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self.rest_keys: Tensor | None = None  # (B, H/G, S, D), padded on the right; None if no prompt has a rest
        self.rest_values: Tensor | None = None
        self.padding: Tensor | None = None  # (B, 1, 1, S), true at padding; None if there is none
        self.length = 0  # T, the length of the answers so far

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the keys and values of a pass. Returns those of the prompts being read, or of the answers so far."""
        if self.passing is not None:
            return self._update_prompts(self.passing, key_states, value_states)
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
        keys.attends_to = self  # type: ignore[attr-defined]
        return keys, values

    def _update_prompts(self, passing: _Pass, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.rest_keys is None and (longest := max(self.parts.rests)):
            self.rest_keys, self.rest_values = (
                new.new_zeros(len(self.parts.lengths), new.shape[1], longest, new.shape[3]) for new in (keys, values)
            )
        for place, (row, first, end) in enumerate(passing.spans):
            number = place if passing.prefix is None else 0
            own_keys, own_values = keys[number, :, first:end], values[number, :, first:end]
            if row in passing.new:
                passing.new[row].keys.append(own_keys.clone(memory_format=torch.contiguous_format))
                passing.new[row].values.append(own_values.clone(memory_format=torch.contiguous_format))
            else:
                assert self.rest_keys is not None and self.rest_values is not None
                self.rest_keys[row, :, : end - first], self.rest_values[row, :, : end - first] = own_keys, own_values
        if passing.prefix is not None and passing.mask is not None:
            end = passing.mask.shape[-1] - keys.shape[2]
            keys = torch.cat([passing.prefix.keys[self.number][None, :, :end], keys], dim=2)
            values = torch.cat([passing.prefix.values[self.number][None, :, :end], values], dim=2)
        keys.attends_to = passing.mask  # type: ignore[attr-defined]
        return keys, values

    def end_prefill(self) -> None:
        """Finish reading the prompts. Raises NotShared if the model stored no keys in this layer."""
        is_rest_missing = self.rest_keys is None and any(self.parts.rests)
        if is_rest_missing or any(len(prefix.keys) <= self.number for prefix in self.parts.users):
            raise NotShared
        self.passing = None
        for prefix, rows in self.parts.users.items():
            common = [self.parts.common[row] for row in rows]
            keys, values = (kept[self.number][:, : max(common)] for kept in (prefix.keys, prefix.values))
            self.prefixes.append((keys, values, torch.tensor(rows, device=keys.device), _beyond(common, keys.device)))
        if self.rest_keys is not None:
            self.padding = _beyond(self.parts.rests, self.rest_keys.device)

    def view(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the answers so far, (R, H/G, T, D)."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Return the number of positions before the next token; 0 while prompts are being read."""
        return 0 if self.passing is not None else max(self.parts.lengths) + self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the answers for beam search. beam_idx: (R,), the number of the answer that each one continues."""
        for part in self.view():
            part.copy_(part.index_select(0, beam_idx.to(part.device)))


def _beyond(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return (B, 1, 1, longest), true at positions beyond each length; None if all lengths are equal."""
    if min(lengths) == max(lengths):
        return None
    return (torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None])[:, None, None].to(device)


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
    """Compute attention: causally within prompts, or from each answer's next token to its prompt and the answer so far.

    query: (R, H, 1, D). key, value: the tensors that `PromptLayer.update` returned. Returns (R, 1, H, D) and None.
    Raises NotShared if the architecture has changed the keys or adds a term to the scores.
    """
    if not hasattr(key, "attends_to") or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        raise NotShared
    layer = key.attends_to
    if not isinstance(layer, PromptLayer):  # a pass over prompts; no mask: whole prompts
        mask = None if layer is None else layer.to(query.device)
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    if query.shape[2] != 1:
        raise NotShared
    answers, heads = query.shape[:2]
    prompts, key_heads = len(layer.parts.lengths), key.shape[1]
    beams, groups = answers // prompts, heads // key_heads
    query = query.reshape(answers, key_heads, groups, -1) * (scaling or key.shape[-1] ** -0.5)
    scores = [_by_prompt(query @ key.transpose(2, 3), beams)]  # (B, H/G, beams * G, T)
    query = _by_prompt(query, beams)
    if layer.rest_keys is not None:
        rest = query @ layer.rest_keys.transpose(2, 3)  # (B, H/G, beams * G, S)
        scores.append(rest if layer.padding is None else rest.masked_fill(layer.padding, -torch.inf))
    if layer.prefixes:
        longest = max(keys.shape[1] for keys, _, _, _ in layer.prefixes)
        common = query.new_full((*query.shape[:3], longest), -torch.inf)  # (B, H/G, beams * G, P)
        for keys, _, rows, beyond in layer.prefixes:
            seen = torch.einsum("bhgd,hpd->bhgp", query[rows], keys)
            common[rows, :, :, : keys.shape[1]] = seen if beyond is None else seen.masked_fill(beyond, -torch.inf)
        scores.append(common)
    joined = torch.cat(scores, dim=-1)
    weights = joined.softmax(dim=-1, dtype=torch.promote_types(joined.dtype, torch.float32)).to(query.dtype)
    own, *others = weights.split([part.shape[-1] for part in scores], dim=-1)
    output = _by_prompt(_by_answer(own, beams) @ value, beams)  # (B, H/G, beams * G, D)
    if layer.rest_values is not None:
        output += others.pop(0) @ layer.rest_values
    for keys, values, rows, _ in layer.prefixes:
        seen = others[0][rows, :, :, : keys.shape[1]]
        output.index_add_(0, rows, torch.einsum("bhgp,hpd->bhgd", seen, values))
    output = _by_answer(output, beams)
    return output.reshape(answers, 1, heads, -1), None


def _by_prompt(tensor: Tensor, beams: int) -> Tensor:
    """Group the beams of each prompt: (R, H/G, G, ...) to (B, H/G, beams * G, ...)."""
    return tensor.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


def _by_answer(tensor: Tensor, beams: int) -> Tensor:
    """Undo `_by_prompt`: (B, H/G, beams * G, ...) to (R, H/G, G, ...)."""
    return tensor.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(SHARED, attend)
