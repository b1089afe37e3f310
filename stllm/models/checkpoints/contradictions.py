"""Weights and configurations that do not belong together, each with its own sentence: found, expected, what to do.

What is left over (a weight missing or of another shape) is the audit's.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllm.common.errors import UserError
from stllm.models.checkpoints.formats import Format, Source, read_json
from stllm.models.checkpoints.sizes import ADAPTER, BACKBONE, BERT, TEXT_KEY, Fields, Shapes

if TYPE_CHECKING:
    from stllm.models.configuration import STLLMConfig

# what shapes settle, and the published name of each; image_size is not among them: position embeddings are interpolated
SIZE_KEYS = {
    "vision_config": {
        key: f"vision.{key}" for key in ("patch_size", "embed_dim", "depth", "adapter_depth", "max_frames")
    },
    "qformer_config": {
        key: f"qformer.{key}"
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "intermediate_size",
            "max_position_embeddings",
            "cross_attention_frequency",
            "vocab_size",
        )
    },
    "": {
        "num_query_tokens": "num_query_token",
        "residual_bottleneck": "residual_bottleneck",
        "has_qformer": "has_qformer",
    },
}
LLM_KEYS = ("num_hidden_layers", "intermediate_size")  # beside the width, which is compared on its own
LLM_SIZES = {4096: " (7B)", 5120: " (13B)"}
FAMILIES = {True: "InstructBLIP", False: "MiniGPT-4"}  # by whether the Q-Former reads text


def check_sizes(name: str, told: Fields, said: Fields) -> None:
    """The user's sizes against those of the weights."""
    for group, keys in SIZE_KEYS.items():
        theirs, ours = (told.get(group) or {}, said.get(group) or {}) if group else (told, said)
        for key, published in keys.items():
            if key in theirs and key in ours and ours[key] is not None and theirs[key] != ours[key]:
                raise UserError(
                    f"{name}: model.{published} is {ours[key]} in the configuration, but {theirs[key]} in the weights: "
                    "leave the setting out, or use other weights"
                )
    if told.get("lora") and "lora" in said and not said["lora"]:
        raise UserError(
            f"{name} has LoRA weights (rank {told['lora']['r']}), but the configuration has none: set model.lora_r, or "
            "merge them first with `stllm convert --merge-lora`"
        )


def check_language_models(sources: Sequence[Source], settings: Mapping[str, Any], asked: Fields | None) -> None:
    """7B against 13B: all that weights, config.json, `llama_model` and `llm` say about the language model's width."""
    facts: list[tuple[str, Any]] = []
    for source in sources:
        text = source.config.get("text_config") or source.config
        facts.append((f"the weights in {source.path}", _hidden_size(source, text)))
        projection = None if "projection" in (settings.get("fresh") or ()) else source.entries.get("projection.weight")
        facts.append((f"the projection in {source.path}", projection and projection.shape[0]))
        if source.is_whole_model or source.format is Format.CAUSAL_LM:
            facts.append((f"{source.path}/config.json", text.get("hidden_size")))
    if (named := settings.get("llama_model")) and Path(named).is_dir():
        facts.append((f"model.llama_model ({named})", read_json(Path(named) / "config.json").get("hidden_size")))
    facts.append(("model.llm", (asked or {}).get("hidden_size")))
    known = [(words, size) for words, size in facts if size is not None]
    for words, size in known[1:]:
        reference, expected = known[0]
        if size != expected:
            either = (
                "; or train a new projection: model.fresh=[projection]" if "projection" in reference + words else ""
            )
            raise UserError(
                f"the language model has hidden size {expected}{LLM_SIZES.get(expected, '')} by {reference}, but "
                f"{size}{LLM_SIZES.get(size, '')} by {words}: use weights and configuration of the same size{either}"
            )
    _check_named(sources, settings.get("llama_model"))


def _check_named(sources: Sequence[Source], named: str | None) -> None:
    """A whole checkpoint, whose language model is the one that counts, against a `llama_model` of another size."""
    whole = next((source for source in reversed(sources) if source.is_whole_model), None)
    if whole is None or not named or not Path(named).is_dir():
        return
    own, other = whole.config.get("text_config") or whole.config, read_json(Path(named) / "config.json")
    for key in LLM_KEYS:
        if own.get(key) is not None and other.get(key) is not None and own[key] != other[key]:
            raise UserError(
                f"model.llama_model ({named}) has {key} {other[key]}, but the whole checkpoint {whole.path} "
                f"{own[key]}, and its own language model is the one that is used: set model.llama_model=null, or name "
                "a checkpoint of that size"
            )


def check_family(name: str, shapes: Shapes, config: "STLLMConfig", whole: bool) -> None:
    """InstructBLIP against MiniGPT-4: whether the Q-Former that was saved reads text."""
    has_qformer = any(key.startswith(f"{BERT}encoder.") for key in shapes)
    reads = TEXT_KEY in shapes
    if not has_qformer or not config.has_qformer or reads == config.qformer_text_input:
        return
    if config.qformer_text_input or whole:
        has = "has" if reads else "has no"
        takes = "takes" if config.qformer_text_input else "takes no"
        raise UserError(
            f"{name} is of the {FAMILIES[reads]} family (its Q-Former {has} text embeddings), but the configuration "
            f"{takes} text (the {FAMILIES[config.qformer_text_input]} family): set model.qformer_text_input={reads}, "
            f"or use {FAMILIES[config.qformer_text_input]} weights"
        )


def check_adapter(name: str, shapes: Shapes, model: Iterable[str], *, fresh_allowed: bool) -> None:
    """QA weights (with the temporal adapter) against conversation ones. model: the keys of the model to be filled."""
    saved = any(key.startswith(ADAPTER) for key in shapes)
    wanted = any(key.startswith(ADAPTER) for key in model)
    if saved and not wanted:
        raise UserError(
            f"{name} is a QA checkpoint (it has the temporal adapter), but the configuration is for conversation "
            "(model.vit_model: eva_clip_g, without one): set model.vit_model=eva_btadapter_g, or use conversation "
            "weights"
        )
    if wanted and not saved and not fresh_allowed and any(key.startswith(BACKBONE) for key in shapes):
        raise UserError(
            f"{name} is a conversation checkpoint (it has no temporal adapter), but the configuration is for QA "
            "(model.vit_model: eva_btadapter_g): set model.vit_model=eva_clip_g, or use QA weights"
        )


def check_vocabulary(name: str, rows: int | None, config: "STLLMConfig", tokens: int | None) -> None:
    """Token embeddings against the family's vocabulary (32000, and 32001 with `[PAD]`).

    rows: of the embeddings in the weights. tokens: of the family, by the tokenizer beside the weights.
    """
    adds_pad = config.adds_pad
    expected = config.text_config.vocab_size
    found = expected if rows is None else rows
    # a vocabulary may be padded to a round number; one more than the MiniGPT-4 family has is the other family's
    if tokens is not None and (found < tokens or (not adds_pad and found == tokens + 1)):
        expected = tokens
    if found != expected:
        raise UserError(_vocabulary(name, found, expected, adds_pad))


def _vocabulary(name: str, found: int, expected: int, adds_pad: bool) -> str:
    pad = "with the added [PAD]" if adds_pad else "without an added [PAD]"
    guess = ""
    if found == expected - 1 and adds_pad:
        guess = " (as many as in the MiniGPT-4 family and in a plain language model)"
    elif found == expected + 1 and not adds_pad:
        guess = " (as many as in the InstructBLIP family)"
    return (
        f"{name} has a vocabulary of {found} tokens{guess}, but its configuration and tokenizer, of the "
        f"{FAMILIES[adds_pad]} family, expect {expected} ({pad}): use weights, tokenizer and configuration of one "
        "family"
    )


def _hidden_size(source: Source, config: Mapping[str, Any]) -> int | None:
    """The language model's width, as its token embeddings have it; None where they are not to be found."""
    if "word_embed_proj_dim" in config:  # OPT: embeddings may be narrower than the model
        return None
    widths = [
        entry.shape[1]
        for key, entry in source.entries.items()
        if key.startswith("language_model.") and key.endswith((".embed_tokens.weight", ".wte.weight"))
    ]
    return widths[0] if widths else None
