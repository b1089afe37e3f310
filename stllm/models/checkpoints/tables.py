"""The key tables of the foreign formats, ours on the right. Source: the published checkpoints' own key lists.

ours: vision_encoder.{backbone,adapter,ln_vision}, qformer.{query_tokens,bert}, projection, video_input, mvm_decoder,
language_model.
"""

from stllm.models.checkpoints.keys import KeyTable, Pairs, Split

QFORMER_INNER: Pairs = (
    ("crossattention.self.", "crossattention.attention."),
    (".attention.self.", ".attention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
)
QFORMER_IGNORED = (r".*Qformer\.cls\.", r".*\.position_ids$")
OLD_BUFFERS = (r".*rotary_emb\.inv_freq$",)  # saved by old libraries


def _lavis_parts(prefix: str) -> Pairs:
    """The parts that every file of the LAVIS line names alike, under some prefix."""
    return (
        (f"{prefix}ln_vision.", "vision_encoder.ln_vision."),
        (f"{prefix}Qformer.bert.", "qformer.bert."),
        (f"{prefix}query_tokens", "qformer.query_tokens"),
    )


OURS = KeyTable(name="stllm", prefixes=(("", ""),))

RELEASED = KeyTable(
    name="released ST-LLM",
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
    inner=QFORMER_INNER,
    inner_prefixes=("model.stllm_model.Qformer.bert.",),
    ignored=(
        *QFORMER_IGNORED,
        r"model\.stllm_model\.embed_tokens\.weight$",  # repeats model.embed_tokens.weight
        r"model\.stllm_model\.residual_index$",  # cached from the first clip; ours is computed from T
        *OLD_BUFFERS,
    ),
)

_EVA = KeyTable(
    name="EVA-ViT-g",
    prefixes=tuple(
        (key, f"vision_encoder.backbone.{key}") for key in ("cls_token", "pos_embed", "patch_embed.", "blocks.")
    ),
    ignored=(r"(?:norm|fc_norm|head)\.", r"mask_token$", r"rel_pos_bias\."),  # of its pre-training; ln_vision follows
)


def eva_table(depth: int) -> KeyTable:
    """`eva_vit_g.pth` read into `depth` blocks: the file has one more, whose output BLIP-2 does not use."""
    return _EVA.ignoring(rf"blocks\.{depth}\.")


INSTRUCTBLIP_LAVIS = KeyTable(
    name="InstructBLIP (LAVIS)",
    prefixes=(*_lavis_parts(""), ("llm_proj.", "projection."), ("visual_encoder.", "vision_encoder.backbone.")),
    inner=QFORMER_INNER,
    inner_prefixes=("Qformer.bert.",),
    ignored=QFORMER_IGNORED,
)

BLIP2_LAVIS = KeyTable(
    name="BLIP-2 (LAVIS)",
    prefixes=(*_lavis_parts(""), ("visual_encoder.", "vision_encoder.backbone.")),
    inner=QFORMER_INNER,
    inner_prefixes=("Qformer.bert.",),
    # projections into other language models, and the heads of BLIP-2's first stage
    ignored=(*QFORMER_IGNORED, r"(?:t5|opt)_proj\.", r"(?:vision_proj|text_proj|itm_head)\.", r"temp$"),
)

MINIGPT4 = KeyTable(name="MiniGPT-4", prefixes=(("llama_proj.", "projection."),))

TRANSFORMERS_BLIP = KeyTable(
    name="InstructBLIP or BLIP-2 (transformers)",
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
    inner=(
        (".self_attn.qkv.", ".attn.qkv."),
        (".self_attn.projection.", ".attn.proj."),
        (".layer_norm1.", ".norm1."),
        (".layer_norm2.", ".norm2."),
    ),
    inner_prefixes=("vision_model.encoder.layers.",),
    splits=(Split(".attn.qkv.bias", (".attn.q_bias", None, ".attn.v_bias")),),
    ignored=(r".*\.position_ids$", *OLD_BUFFERS),
)

# an encoder-decoder reads the projected tokens in its encoder: neither it nor the projection into it is ours
FOREIGN_LANGUAGE_MODEL = (r"language_model\.", r"language_projection\.")

CAUSAL_LM = KeyTable(name="causal language model", prefixes=(("", "language_model."),), ignored=OLD_BUFFERS)
