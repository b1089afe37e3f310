"""Generation from prompts that are read once: every beam of an answer attends to one copy of its prompt.

transformers' `generate` reads a prompt once for each beam, and moves all keys and values at every token: they grow by
concatenation, and beam search reorders them. Here the prompts are read first, without padding, and their keys and
values stay in place; only the answers' own part, which is short, grows and follows the beams. Attention to the parts is
computed apart and normalised together ("Bifurcated Attention", arXiv 2403.08845). Beam search, sampling and stopping
remain `generate`'s, and the ids are the same.

Prompts that begin alike share the keys and values of their common beginning, in one copy: those of one batch, and those
of later calls, for which they are kept as `Prefix`. Prompts are compared by their embeddings, so whatever makes another
prompt of a question (template, system sentence, frames, context rule, Q-Former) makes other embeddings, too.

B prompts, R answers (B times the beams), S positions of a prompt, P of a prefix, T of an answer, H heads, G of them to
each of the H/G key heads, D width of a head or of an embedding.
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
# Positions of several prompts in one pass. On a CPU each operation on more than a few prompts gets its memory anew
# from the system: 25 prompts of 560 tokens in one pass had 4.9 million page faults, a quarter of its CPU time.
PREFILL_POSITIONS = {"cpu": 512}
PREFILL_POSITIONS_ELSEWHERE = 16_384  # what bounds the memory
ANSWER_ROOM = 32  # positions, at first
# Of a prompt: a smaller common beginning is not worth sharing, a smaller rest not worth keeping. Chosen here.
LEAST_SHARE = 0.25
CHANGING_POSITIONS = ("dynamic", "longrope")  # rotary positions that depend on the length of the whole prompt


class NotShared(Exception):
    """This architecture does not attend in the way that two parts of keys and values need."""


@dataclass(eq=False)
class Prefix:
    """The beginning of a prompt, (P, D), and each layer's keys and values of it, (H/G, P, D)."""

    embeds: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    @cached_property
    def nbytes(self) -> int:
        """The size of all tensors, once they are there."""
        return sum(tensor.nbytes for tensor in (self.embeds, *self.keys, *self.values))

    def common(self, prompt: Tensor) -> int:
        """Return the number of positions in which a prompt (S, D) begins like this one."""
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
    """Return new token ids, (B, up to max_new_tokens), as `model.generate` does. model: a causal LM of transformers.

    inputs_embeds: (B, S, D) of prompts padded on the left; attention_mask: (B, S). generation: other arguments of
    transformers' `generate`. Architectures with sliding windows, recurrent layers, or an attention that is not torch's
    SDPA take the way of `model.generate`. Those without `has_reusable_keys` share and keep no prefixes.
    prefixes: for each prompt the list (several prompts may have the same one) of those kept by earlier calls with
    these weights; those of this call are added, the last used at its end. None: nothing is kept.
    """
    if inputs_embeds.shape[1] > 1 and shares_prompts(model):
        # `generate` begins with the last token
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
    """Return a value that changes with the weights in use, LoRA's included; prefixes of another one must not be used.

    Changes through `Tensor.data`, which torch does not count, are not noticed.
    """
    adapters = [
        (part.disable_adapters, *part.active_adapters, *part.merged_adapters)
        for part in model.modules()
        if hasattr(part, "merged_adapters")
    ]
    weights = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in model.parameters()]
    return tuple(adapters), tuple(weights)


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


def new_cache(model: PreTrainedModel, parts: "_Parts") -> Cache:
    """Return an empty cache for these prompts."""
    return Cache(layers=[PromptLayer(number, parts) for number in range(len(DynamicCache(config=model.config).layers))])


def has_reusable_keys(model: PreTrainedModel) -> bool:
    """Check whether a token's keys depend on it, its position and the tokens before it alone.

    They also depend on the length of the prompt with some rotary positions, and on the other tokens of a pass with
    LLM.int8(), which treats a column by its largest value.
    """
    if "position_ids" not in signature(model.get_decoder().forward).parameters:
        return False
    if any(type(part).__name__ == "Linear8bitLt" for part in model.modules()):
        return False
    return not any(kind in str(getattr(model.config, "rope_parameters", None)) for kind in CHANGING_POSITIONS)


@dataclass
class _Parts:
    """The parts of B prompts: `common[row]` positions at the beginning of a prefix, and a rest of the prompt's own.

    lengths: of the prompts. users: the prompts of each prefix.
    """

    lengths: list[int]
    common: list[int]
    users: dict[Prefix, list[int]]

    @property
    def rests(self) -> list[int]:
        """Return the number of positions of each prompt's rest."""
        return [length - common for length, common in zip(self.lengths, self.common, strict=True)]


def _share(prompts: Sequence[Tensor], kept: Sequence[Sequence[Prefix]] | None, *, share: bool) -> _Parts:
    """Find for each prompt (S, D) the prefix that shares most with it: a kept one, or an earlier prompt of this batch.

    A prompt without any becomes a new prefix, which has no keys yet, if it is to be kept or others share it.
    """
    parts = _Parts([len(prompt) for prompt in prompts], [0] * len(prompts), {})
    for row, prompt in enumerate(prompts if share else ()):
        found = {prefix: prefix.common(prompt) for prefix in (*(kept[row] if kept else ()), *parts.users)}
        best = max(found, key=found.__getitem__, default=None)
        if best is None or found[best] < LEAST_SHARE * len(prompt):
            best = Prefix(prompt if kept is None else prompt.clone())  # not a view of the whole batch
        if len(prompt):
            parts.common[row] = found.get(best, len(prompt))
            parts.users.setdefault(best, []).append(row)
    for prefix, rows in list(parts.users.items()):
        if kept is None and len(rows) == 1:
            del parts.users[prefix]
            parts.common[rows[0]] = 0
    return parts


def _prefill(model: PreTrainedModel, prompts: Sequence[Tensor], parts: _Parts, cache: Cache) -> None:
    """Read all prompts: first those that share nothing or are new prefixes, then the rests of the others.

    Whole prompts of about one length are read together, padded on the right: causal attention does not see the padding,
    so no mask is needed. The rests after one prefix are read as one row, each of them masked from the others.
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


def _keep(prompts: Sequence[Tensor], parts: _Parts, cache: Cache, prefixes: Sequence[list[Prefix]]) -> None:
    """Put the prefix of each prompt at the end of its list, or a longer one if much of the prompt is not in it."""
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
    """Return the name of the cache among the model's arguments, which transformers changed."""
    return "cache" if "cache" in signature(model.get_decoder().forward).parameters else "past_key_values"


@dataclass
class _Pass:
    """What the model reads: whole prompts, a row each, or rests after one prefix, all in one row.

    spans: (prompt, first, end) of the positions of a row. new: prefixes to be written, by prompt. mask: (1, 1, L, P +
    L), true where a position of the rests sees one of the prefix or of the rests.
    """

    spans: list[tuple[int, int, int]]
    new: dict[int, Prefix] = field(default_factory=dict)
    prefix: Prefix | None = None
    mask: Tensor | None = None


class PromptLayer(DynamicLayer):
    """One layer's keys and values: those of the prompts' parts, written once, and those of the answers.

    number: of the layer. passing: what is being read; None when all prompts have been.
    """

    def __init__(self, number: int, parts: _Parts) -> None:
        super().__init__()
        self.number, self.parts = number, parts
        self.passing: _Pass | None = None
        # Of each prefix: keys and values (H/G, P, D), numbers of its b prompts, (b, 1, 1, P) true beyond their share.
        self.prefixes: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = []
        self.rest_keys: Tensor | None = None  # (B, H/G, S, D), padded on the right; None where no prompt has a rest
        self.rest_values: Tensor | None = None
        self.padding: Tensor | None = None  # (B, 1, 1, S), true where a rest has ended; None where all end alike
        self.length = 0  # T

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return those that the new positions attend to, or the answers'."""
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
        """Make ready for the answers. Raises NotShared if the model kept no keys here."""
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
        """Return the answers' keys and values, (R, H/G, T, D)."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        """Return the number of positions before the next token: while prompts are read, each begins at 0."""
        return 0 if self.passing is not None else max(self.parts.lengths) + self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Have each answer continue the one of that number; a prompt's answers stay its own."""
        for part in self.view():
            part.copy_(part.index_select(0, beam_idx.to(part.device)))


def _beyond(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """Return (B, 1, 1, longest), true from each length on; None where all are equal."""
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
    """Attend from the next token of each answer to its prompt and to the answer so far, or causally within prompts.

    query: (R, H, 1, D); key, value: what `PromptLayer.update` returned. Returns (R, 1, H, D).
    Raises NotShared for keys that the architecture has changed, and for terms that are added to the scores.
    """
    if not hasattr(key, "attends_to") or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        raise NotShared
    layer = key.attends_to
    if not isinstance(layer, PromptLayer):  # prompts; without a mask from their beginning
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
    """Put the beams of a prompt together: (R, H/G, G, ...) to (B, H/G, beams * G, ...)."""
    return tensor.unflatten(0, (-1, beams)).transpose(1, 2).flatten(2, 3)


def _by_answer(tensor: Tensor, beams: int) -> Tensor:
    """Undo `_by_prompt`."""
    return tensor.unflatten(2, (beams, -1)).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(SHARED, attend)
