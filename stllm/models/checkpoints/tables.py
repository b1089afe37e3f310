"""The names of weights in each format. A table is declared once and read in both directions; ours are on the right.

ours: vision_encoder.{backbone,adapter,ln_vision}, qformer.{query_tokens,bert}, projection, video_input, mvm_decoder,
language_model. A key that no table entry covers raises an error; nothing is dropped silently. Source: the key lists of
the published checkpoints.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

Pairs = tuple[tuple[str, str], ...]


class UnknownKeyError(KeyError):
    """A key that the table neither renames nor ignores."""


@dataclass(frozen=True)
class Target:
    """The place of one of their tensors: our key (None for a part that must be zero), and which part of how many."""

    key: str | None
    part: int = 0
    num_parts: int = 1

    def take(self, tensor: Tensor) -> Tensor:
        """This target's rows of their tensor."""
        return tensor.tensor_split(self.num_parts)[self.part]


@dataclass(frozen=True)
class KeyTable:
    """One format's names.

    prefixes: (theirs, ours); the first that fits is replaced, so a prefix comes before any shorter one that it begins
    with.
    inner: their prefix -> (theirs, ours), replaced anywhere after it.
    splits: the end of a renamed key -> the ends of our keys for equal parts of that fused tensor's first dimension;
        None for a part that must be zero.
    ignored: regular expressions of keys that are known and not ours, matched from the start.
    """

    prefixes: Pairs
    inner: Mapping[str, Pairs] = field(default_factory=dict)
    splits: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @cached_property
    def _ignored(self) -> re.Pattern[str]:
        return re.compile("|".join(f"(?:{pattern})" for pattern in self.ignored) or r"(?!)")

    def ignores(self, key: str) -> bool:
        """Tell whether their key is known and not ours."""
        return self._ignored.match(key) is not None

    def ignoring(self, *patterns: str) -> "KeyTable":
        """Return the same table with more keys that are known and not ours."""
        return replace(self, ignored=(*patterns, *self.ignored))

    def to_ours(self, key: str) -> str | None:
        """Return our name for their key; None when it is ignored. Raises UnknownKeyError."""
        if self.ignores(key):
            return None
        for theirs, ours in self.prefixes:
            if key.startswith(theirs):
                rest = key[len(theirs) :]
                for their_part, our_part in self.inner.get(theirs, ()):
                    rest = rest.replace(their_part, our_part)
                return ours + rest
        raise UnknownKeyError(key)

    def targets(self, key: str) -> list[Target]:
        """Return where their tensor goes; nothing when it is ignored. Raises UnknownKeyError."""
        renamed = self.to_ours(key)
        if renamed is None:
            return []
        for fused, parts in self.splits.items():
            if renamed.endswith(fused):
                keys = [None if end is None else renamed.removesuffix(fused) + end for end in parts]
                return [Target(ours, part, len(keys)) for part, ours in enumerate(keys)]
        return [Target(renamed)]

    def to_theirs(self, key: str) -> str:
        """Return their name for our key. Raises UnknownKeyError when the format has no place for it."""
        for theirs, ours in sorted(self.prefixes, key=lambda pair: -len(pair[1])):
            if key.startswith(ours):
                rest = key[len(ours) :]
                for their_part, our_part in self.inner.get(theirs, ()):
                    rest = rest.replace(our_part, their_part)
                return theirs + rest
        raise UnknownKeyError(key)


QFORMER_INNER: Pairs = (
    ("crossattention.self.", "crossattention.attention."),
    (".attention.self.", ".attention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
)
QFORMER_IGNORED = (r".*Qformer\.cls\.", r".*\.position_ids$")
OLD_BUFFERS = (r".*rotary_emb\.inv_freq$",)  # saved by old libraries


def _lavis_parts(prefix: str) -> Pairs:
    """Name the parts that have the same names in every file of the LAVIS line, under some prefix."""
    return (
        (f"{prefix}ln_vision.", "vision_encoder.ln_vision."),
        (f"{prefix}Qformer.bert.", "qformer.bert."),
        (f"{prefix}query_tokens", "qformer.query_tokens"),
    )


OURS = KeyTable(prefixes=(("", ""),))

RELEASED = KeyTable(
    prefixes=(
        ("model.stllm_model.visual_encoder.BTAdapter_cls", "vision_encoder.adapter.class_token"),
        ("model.stllm_model.visual_encoder.BTAdapter_position.", "vision_encoder.adapter.time_embed."),
        ("model.stllm_model.visual_encoder.BTAdapter_T.", "vision_encoder.adapter.temporal."),
        ("model.stllm_model.visual_encoder.BTAdapter_S.", "vision_encoder.adapter.spatial."),
        ("model.stllm_model.visual_encoder.", "vision_encoder.backbone."),
        *_lavis_parts("model.stllm_model."),
        ("model.stllm_model.llama_proj.", "projection."),
        ("model.stllm_model.down_proj.", "video_input.down_proj."),
        ("model.stllm_model.up_proj.", "video_input.up_proj."),
        ("model.stllm_model.mvm_decoder.", "mvm_decoder."),
        ("model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
    inner={"model.stllm_model.Qformer.bert.": QFORMER_INNER},
    ignored=(
        *QFORMER_IGNORED,
        r"model\.stllm_model\.embed_tokens\.weight$",  # repeats model.embed_tokens.weight
        r"model\.stllm_model\.residual_index$",  # cached from the first clip; ours is computed from T
        *OLD_BUFFERS,
    ),
)

# `eva_vit_g.pth` has one block more than BLIP-2 uses, which `open_source` adds to what is ignored
EVA = KeyTable(
    prefixes=tuple(
        (key, f"vision_encoder.backbone.{key}") for key in ("cls_token", "pos_embed", "patch_embed.", "blocks.")
    ),
    ignored=(r"(?:norm|fc_norm|head)\.", r"mask_token$", r"rel_pos_bias\."),  # of its pre-training; ln_vision follows
)


INSTRUCTBLIP_LAVIS = KeyTable(
    prefixes=(*_lavis_parts(""), ("llm_proj.", "projection."), ("visual_encoder.", "vision_encoder.backbone.")),
    inner={"Qformer.bert.": QFORMER_INNER},
    ignored=QFORMER_IGNORED,
)

BLIP2_LAVIS = KeyTable(
    prefixes=(*_lavis_parts(""), ("visual_encoder.", "vision_encoder.backbone.")),
    inner={"Qformer.bert.": QFORMER_INNER},
    # projections into other language models, and the heads of BLIP-2's first stage
    ignored=(*QFORMER_IGNORED, r"(?:t5|opt)_proj\.", r"(?:vision_proj|text_proj|itm_head)\.", r"temp$"),
)

MINIGPT4 = KeyTable(prefixes=(("llama_proj.", "projection."),))

TRANSFORMERS_BLIP = KeyTable(
    prefixes=(
        ("vision_model.embeddings.class_embedding", "vision_encoder.backbone.cls_token"),
        ("vision_model.embeddings.position_embedding", "vision_encoder.backbone.pos_embed"),
        ("vision_model.embeddings.patch_embedding.", "vision_encoder.backbone.patch_embed.proj."),
        ("vision_model.encoder.layers.", "vision_encoder.backbone.blocks."),
        ("vision_model.post_layernorm.", "vision_encoder.ln_vision."),
        ("qformer.layernorm.", "qformer.bert.embeddings.layernorm."),  # BLIP-2's
        ("qformer.", "qformer.bert."),
        ("query_tokens", "qformer.query_tokens"),
        ("language_projection.", "projection."),
        ("language_model.", "language_model."),
    ),
    inner={
        "vision_model.encoder.layers.": (
            (".self_attn.qkv.", ".attn.qkv."),
            (".self_attn.projection.", ".attn.proj."),
            (".layer_norm1.", ".norm1."),
            (".layer_norm2.", ".norm2."),
        )
    },
    splits={".attn.qkv.bias": (".attn.q_bias", None, ".attn.v_bias")},
    ignored=(r".*\.position_ids$", *OLD_BUFFERS),
)

# an encoder-decoder reads the projected tokens in its encoder: neither it nor the projection into it is ours
FOREIGN_LANGUAGE_MODEL = (r"language_model\.", r"language_projection\.")

CAUSAL_LM = KeyTable(prefixes=(("", "language_model."),), ignored=OLD_BUFFERS)
