"""What a model's weights tell about its configuration: every size that shows in a shape, every part that has a key.

All keys are ours. What shapes don't tell (head counts, mean or all frames) comes from elsewhere, see deciding.py.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from stllm.common.errors import UserError
from stllm.models.configuration import QFORMER_DEFAULTS, VISION_DEFAULTS

Shapes = Mapping[str, tuple[int, ...]]
Fields = dict[str, Any]

BACKBONE, ADAPTER, BERT = "vision_encoder.backbone.", "vision_encoder.adapter.", "qformer.bert."
TEXT_KEY = f"{BERT}embeddings.word_embeddings.weight"
EVA_HEAD_WIDTH, BERT_HEAD_WIDTH = 88, 64  # of EVA-ViT-g (1408 / 16) and of every BERT


def sizes_from_weights(shapes: Shapes) -> Fields:
    """The fields of `STLLMConfig` that these weights settle; a part without weights settles nothing."""
    fields: Fields = {}
    if f"{BACKBONE}patch_embed.proj.weight" in shapes:
        fields["vision_config"] = _vision(shapes)
    elif "vision_encoder.ln_vision.weight" in shapes:  # a Q-Former's file: it knows the encoder's width
        fields["vision_config"] = {"embed_dim": shapes["vision_encoder.ln_vision.weight"][0]}
    if f"{ADAPTER}class_token" in shapes:
        fields.setdefault("vision_config", {}).update(_adapter(shapes))
    if any(key.startswith(BERT) for key in shapes):
        fields |= {"has_qformer": True, "qformer_text_input": TEXT_KEY in shapes, "qformer_config": _qformer(shapes)}
    elif f"{BACKBONE}patch_embed.proj.weight" in shapes and _reads_patches(
        shapes, fields["vision_config"]["embed_dim"]
    ):
        fields |= {"has_qformer": False, "qformer_text_input": False}
    if "qformer.query_tokens" in shapes:
        fields["num_query_tokens"] = shapes["qformer.query_tokens"][1]
    if "video_input.down_proj.weight" in shapes:
        fields |= {"video_input": "residual", "residual_bottleneck": shapes["video_input.down_proj.weight"][0]}
    if "mvm_decoder.head.weight" in shapes:
        fields["mvm_decode"] = True
    return fields


def with_head_counts(fields: Fields, source: str) -> Fields:
    """Fills head counts that nothing named, for the published widths only. Raises UserError for any other width."""
    filled = dict(fields)
    vision = dict(fields.get("vision_config") or {})
    if "num_heads" not in vision:
        width = vision.get("embed_dim", VISION_DEFAULTS["embed_dim"])
        vision["num_heads"] = _heads(width, EVA_HEAD_WIDTH, "vision.num_heads", "vision encoder", source)
    filled["vision_config"] = vision
    qformer = dict(fields.get("qformer_config") or {})
    if fields.get("has_qformer", True) and "num_attention_heads" not in qformer:
        width = qformer.get("hidden_size", QFORMER_DEFAULTS["hidden_size"])
        key = "qformer.num_attention_heads"
        qformer["num_attention_heads"] = _heads(width, BERT_HEAD_WIDTH, key, "Q-Former", source)
    filled["qformer_config"] = qformer
    _check_heads(vision, "embed_dim", "num_heads", "vision")
    _check_heads(qformer, "hidden_size", "num_attention_heads", "qformer")
    return filled


def _check_heads(sizes: Fields, width: str, heads: str, group: str) -> None:
    if width in sizes and heads in sizes and sizes[width] % sizes[heads]:
        raise UserError(
            f"model.{group}.{heads} is {sizes[heads]}, which does not divide the width {sizes[width]}: name another "
            "number"
        )


def _heads(width: int, head_width: int, key: str, part: str, source: str) -> int:
    if width % head_width == 0:
        return width // head_width
    raise UserError(
        f"{source}: the weights don't tell how many attention heads the {part} has (its width {width} is not a "
        f"published one): name it in --cfg-path or with --options model.{key}=..."
    )


def _vision(shapes: Shapes) -> Fields:
    width, _, patch, _ = shapes[f"{BACKBONE}patch_embed.proj.weight"]
    fields: Fields = {"encoder": "eva_clip_g", "embed_dim": width, "patch_size": patch}
    if depth := _count(shapes, f"{BACKBONE}blocks."):
        fields["depth"] = depth
    if f"{BACKBONE}pos_embed" in shapes:
        fields["image_size"] = math.isqrt(shapes[f"{BACKBONE}pos_embed"][1] - 1) * patch
    if f"{BACKBONE}blocks.0.mlp.fc1.weight" in shapes:
        hidden = shapes[f"{BACKBONE}blocks.0.mlp.fc1.weight"][0]
        usual = float(VISION_DEFAULTS["mlp_ratio"])
        # the ratio only has to give this width again once it is multiplied and cut off
        fields["mlp_ratio"] = usual if int(width * usual) == hidden else (hidden + 0.5) / width
    return fields


def _adapter(shapes: Shapes) -> Fields:
    fields: Fields = {"encoder": "eva_btadapter_g"}
    if depth := _count(shapes, f"{ADAPTER}spatial."):
        fields["adapter_depth"] = depth
    if f"{ADAPTER}time_embed.weight" in shapes:
        fields["max_frames"] = shapes[f"{ADAPTER}time_embed.weight"][0]
    return fields


def _qformer(shapes: Shapes) -> Fields:
    layers = f"{BERT}encoder.layer."
    fields: Fields = {"num_hidden_layers": _count(shapes, layers)}
    for name, key, axis in (
        ("hidden_size", f"{layers}0.attention.attention.query.weight", 0),
        ("intermediate_size", f"{layers}0.intermediate_query.dense.weight", 0),
        ("encoder_hidden_size", f"{layers}0.crossattention.attention.key.weight", 1),
        ("vocab_size", TEXT_KEY, 0),
        ("max_position_embeddings", f"{BERT}embeddings.position_embeddings.weight", 0),
    ):
        if key in shapes:
            fields[name] = shapes[key][axis]
    crossing = sorted(
        {int(n) for key in shapes for n in re.findall(rf"^{re.escape(layers)}(\d+)\.crossattention", key)}
    )
    if crossing:
        fields["cross_attention_frequency"] = (
            crossing[1] - crossing[0] if len(crossing) > 1 else max(fields["num_hidden_layers"], 1)
        )
    return fields


def _reads_patches(shapes: Shapes, width: int) -> bool:
    """Whether the projection takes four neighbouring patches at once: the model without a Q-Former."""
    projection = shapes.get("projection.weight")
    return projection is not None and projection[1] == 4 * width


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix, 0 when there is none."""
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in shapes if key.startswith(prefix)}
    return max(numbers) + 1 if numbers else 0
