"""The key tables of the foreign formats, ours on the right. Source: the published checkpoints' own key lists.

ours: vision_encoder.{backbone,adapter,ln_vision}, qformer.{query_tokens,bert}, projection, video_input, mvm_decoder,
language_model.
"""

from stllm.models.checkpoints.keys import KeyTable, Pairs

QFORMER_INNER: Pairs = (
    ("crossattention.self.", "crossattention.attention."),
    (".attention.self.", ".attention.attention."),
    ("embeddings.LayerNorm.", "embeddings.layernorm."),
)
QFORMER_IGNORED = (r".*Qformer\.cls\.", r".*\.position_ids$")


def _lavis_parts(prefix: str) -> Pairs:
    """The parts that every file of the LAVIS line names alike, under some prefix."""
    return (
        (f"{prefix}ln_vision.", "vision_encoder.ln_vision."),
        (f"{prefix}Qformer.bert.", "qformer.bert."),
        (f"{prefix}query_tokens", "qformer.query_tokens"),
    )


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
        r".*rotary_emb\.inv_freq$",  # saved by old libraries
    ),
)
