"""The keys of a configuration, one comment each, and the values that they take.

The names are those of the published ST-LLM recipes, so that an existing YAML loads as it is; the defaults are the
published sizes (arXiv 2404.00308). `config.py` reads and merges them.

datasets:                               # one entry a data set, and three roots set once for all
  anno_root: /data/videochat2_it        # what annotation files are relative to
  media_root: ${oc.env:MEDIA_ROOT}      # what media folders are relative to
  caption_videochat: {num_frames: 64}   # a known data set (configs/datasets/), its defaults overridden
  mine: {anno_path: mine.jsonl, media_dir: videos}
evaluation: {num_frames: 32}            # over the benchmark's published settings (stllm/configs/evaluation/)
"""

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stllm.common import registry
from stllm.common.errors import UserError, unknown_name
from stllm.common.jsonl import loads
from stllm.common.registry import Registry

MEDIA_SECONDS = 300.0  # chosen here: ten times what a long film on slow storage takes
ROOTS = ("anno_root", "media_root", "features_root")  # texts directly under `datasets`
PRESETS = Path(__file__).parent.parent / "configs" / "evaluation"
QUANTIZATIONS = ("4bit", "8bit")
CONTEXTS = PUBLISHED, ALL = "published", "all"  # rules for long prompts, see conversation/requests.py


def _key(default: Any, **about: Any) -> Any:
    """A field, and what is known of its values; `value_fault` checks them.

    choices: the names allowed; a registry imports its modules only for a value other than the default.
    low, high: bounds of a number, both allowed. filled: a text that must not be empty. texts: a text or a list of them.
    path: a file or folder; a relative one is relative to its YAML.
    unused: the reason why a published key has no effect; it is accepted with a note.
    """
    return field(default=default, metadata=about)


_PARTS = ("vision_encoder", "qformer", "projection", "language_model")
_PROMPTS = "prompts come from `template`"
_PROCESSORS = "images are prepared by model.image_size, texts by model.template"
_LAUNCHER = "the launcher (torchrun) and --device decide"


@dataclass
class VisionSettings:
    """Sizes of the image encoder and its adapter; unset ones are EVA-ViT-g's."""

    patch_size: int | None = None  # pixels a side of a patch (14)
    embed_dim: int | None = None  # width C (1408)
    depth: int | None = None  # blocks (39)
    num_heads: int | None = None  # attention heads (16)
    mlp_ratio: float | None = None  # MLP width / C (4.3637)
    adapter_depth: int | None = None  # temporal + spatial layers beside the last blocks (3)
    max_frames: int | None = None  # entries of the adapter's time embedding (64)
    ln_eps: float | None = None  # epsilon of ln_vision (1e-5; InstructBLIP's own checkpoints keep 1e-6)


@dataclass
class QFormerSettings:
    """Sizes of the Q-Former; unset ones are BERT-base's."""

    hidden_size: int | None = None  # width (768)
    num_hidden_layers: int | None = None  # layers (12)
    num_attention_heads: int | None = None  # attention heads (12)
    intermediate_size: int | None = None  # feed-forward width (3072)
    max_position_embeddings: int | None = None  # text positions (512)
    cross_attention_frequency: int | None = None  # every so many layers look at the image (2)
    vocab_size: int | None = None  # text tokens, the added [DEC] included (30523)
    dropout: float | None = None  # in training, where it is not frozen (0.1)


@dataclass
class ModelSettings:
    """Section `model`."""

    arch: str = _key("st_llm_hf", choices=registry.models)  # the model class, by its registered name
    model_type: str | None = None  # picks the shipped defaults: stllm/configs/models/<model_type>.yaml

    # Image encoder
    # pixels a side; unset: the weights', or 224. Where they differ, position embeddings are interpolated
    image_size: int | None = _key(None, low=1)
    # the encoder, by its registered name: eva_clip_g, or eva_btadapter_g with the temporal adapter
    vit_model: str = _key("eva_clip_g", choices=registry.vision_encoders)
    vit_ckpt: str | None = _key(None, path=True)  # eva_vit_g.pth, when the encoder's weights are in their own file
    drop_path_rate: float = _key(0.0, low=0, high=1)  # stochastic depth of the encoder's blocks in training
    use_grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    vit_precision: str | None = _key(
        None, unused="the encoder runs in the model's own type (--dtype, or bf16/fp16 under `run`)"
    )
    freeze_vit: bool = True  # backbone and ln_vision are not trained (the temporal adapter still is)
    vit_chunk_size: int | None = _key(None, low=1)  # frames encoded at once; unset: 8 on a CPU, 16 elsewhere
    vision: VisionSettings = field(default_factory=VisionSettings)  # sizes that differ from EVA-ViT-g's

    # Q-Former
    has_qformer: bool = True  # False: every 4 neighbouring patch tokens are concatenated and projected instead
    q_former_model: str | None = _key(None, path=True)  # Q-Former weights: a .pth in InstructBLIP's or BLIP-2's layout
    qformer_text_input: bool = False  # the Q-Former reads the question too (InstructBLIP family)
    qformer_tokenizer: str = _key("bert-base-uncased", path=True)  # its tokenizer: a folder or a hub name
    num_query_token: int | None = _key(None, low=1)  # query tokens a frame, K; unset: the weights', or 32
    freeze_qformer: bool = True  # Q-Former and queries are not trained
    qformer: QFormerSettings = field(default_factory=QFormerSettings)  # sizes that differ from BERT-base's

    # Language model
    llama_model: str | None = _key(None, path=True)  # any causal LM: a folder or a hub name
    llm: dict[str, Any] = field(default_factory=dict)  # its transformers config, used when no llama_model is named
    freeze_LLM: bool = True  # the language model is not trained (LoRA, when on, is)
    lora_r: int = _key(0, low=0)  # rank of LoRA; 0: no LoRA
    lora_alpha: int = 16  # LoRA's scale is alpha / r
    lora_dropout: float = _key(0.05, low=0, high=1)  # dropout on LoRA's input in training
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])  # layers that LoRA adapts
    # how it attends; auto: sdpa (torch's own, which takes the device's kernels), eager where an architecture lacks it.
    # flash_attention_2 and flex_attention need a CUDA GPU; without sdpa, each beam reads the prompt
    attn_implementation: str = _key("auto", choices=("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"))
    # bits of the language model's linear layers: 4bit or 8bit (bitsandbytes, on CUDA and on CPUs); unset: all of them
    quantization: str | None = _key(None, choices=QUANTIZATIONS)
    low_resource: bool = False  # the published name of quantization: 8bit
    device_8bit: int = 0  # the CUDA device that holds it where --device is auto and one process runs

    # Video tokens and masking
    # how T frames of tokens enter the language model, by its registered name: all, mean or residual
    video_input: str = _key("all", choices=registry.video_inputs)
    residual_size: int = _key(16, low=1)  # local frames of `residual`, R
    residual_bottleneck: int | None = None  # inner width of `residual`; unset: a quarter of the language model's
    # frames of a video in chat, page and server where none are asked for; unset: 64 for `residual`, else 16
    num_frames: int | None = _key(None, low=1)
    use_mask: bool = False  # drop a random part of the visual tokens in training
    use_mvm: bool | None = None  # False: masking without its second loss, masked video modelling; unset: with it
    mvm_decode: bool = False  # a linear decoder before the masked-video-modelling loss, not the identity
    mask_rate_mean: float = _key(0.5, low=0, high=1)  # the share dropped: Normal(mean, std), clipped to [min, max]
    mask_rate_std: float = _key(0.1, low=0)
    mask_rate_min: float = _key(0.1, low=0, high=1)
    mask_rate_max: float = _key(0.7, low=0, high=1)

    # Text
    # prompt strings, by their registered name: instructblip or minigpt4; unset: by qformer_text_input
    template: str | None = _key(None, choices=registry.templates)
    system: str | None = None  # a system sentence before the question
    max_txt_len: int = _key(512, low=1)  # tokens of an answer in training, and of the Q-Former's text
    end_sym: str = _key("###", filled=True)  # what ends an answer

    # Weights
    ckpt: str | None = _key(None, path=True)  # weights to start from: a folder or file, over the parts named above
    # parts that training starts from random weights when no file gives them (a projection: or only one into a language
    # model of another width)
    fresh: list[str] = field(default_factory=list, metadata={"choices": _PARTS})
    # True: every data set must have precomputed features (datasets.features_root, stllm extract), none is read from
    # pixels; False: those that have some are read from them all the same
    pre_encoding: bool = False

    # Published keys without an effect here
    prompt_template: str | None = _key(None, unused=_PROMPTS)
    prompt_path: str | None = _key(None, unused=_PROMPTS)
    prompt: str | None = _key(None, unused=_PROMPTS)
    pretrained: str | None = _key(
        None, unused="weights come from `ckpt`, `q_former_model`, `vit_ckpt` and `llama_model`"
    )


@dataclass
class RunSettings:
    """Our own keys of section `run`; the others are transformers' TrainingArguments (run_section.py)."""

    task: str = "video_text_it"  # what is learned, by its registered name
    runner: str | None = None  # how it is learned, by its registered name; unset: the task's own
    max_tries: int = _key(10, low=1)  # samples tried in place of an unreadable one before giving up
    max_bad_fraction: float = _key(0.1, low=0, high=1)  # a larger share of unreadable samples stops the run
    media_seconds: float = _key(MEDIA_SECONDS, low=0)  # the longest that one medium is read; 0: no limit
    qa_sampling: str = _key("one", choices=("one", "all"))  # of a record's QA pairs, one an epoch at random or each
    # visual tokens that masking keeps of a clip: rounded to a multiple of it, so that compiled kernels meet few lengths
    mask_bucket: int = _key(1, low=1)
    # a folder in MVBench's layout, asked whenever run.eval_strategy has the held-out samples scored
    eval_benchmark: str | None = _key(None, path=True)
    packing: bool = False  # the samples of a batch go through the language model as one row, without padding
    # first and last step that torch's profiler records, such as [10, 12]; the traces are in the folder profile
    profile_steps: list[int] | None = None
    projection_lr: float | None = _key(None, low=0)  # learning rate of llama_proj; unset: learning_rate
    resume_only_model: bool = False  # continue with the weights and the step alone: optimizer and dropout begin anew

    # Old LAVIS keys without an effect here
    distributed: bool | None = _key(None, unused=_LAUNCHER)
    dist_url: str | None = _key(None, unused=_LAUNCHER)
    world_size: int | None = _key(None, unused=_LAUNCHER)
    device: str | None = _key(None, unused=_LAUNCHER)


@dataclass
class DatasetSettings:
    """One data set's entry; unset keys (None) are the shipped ones of a known name."""

    type: str = "instruction"  # how it is read, by its registered name (instruction, image_text, video_text)
    media: str | None = _key(None, choices=("video", "image", "text"))  # unset: what the annotation file names
    sample_ratio: float | None = _key(None, low=0)  # its weight in the mixture; unset: its share of all samples
    instruction: Any = field(
        default=None, metadata={"texts": True}
    )  # a text, or a list to draw from, for records without one
    max_samples: int | None = _key(None, low=1)  # use the first ones only
    split: str = _key("train", choices=("train", "val"))  # val: not learned, but scored when run.eval_strategy says
    val_fraction: float = _key(0.0, low=0, high=0.5)  # the share of its media that is held out, as if it were val

    # Files; a relative path is relative to the roots (a path that exists beside the YAML comes first)
    anno_path: str | None = None  # annotation file
    anno_root: str | None = None
    media_dir: str | None = None  # folder of the media that the annotation file names
    media_root: str | None = None
    features_dir: str | None = None  # precomputed features in place of the media (stllm extract); frames as there
    shards: Any = field(
        default=None, metadata={"texts": True}
    )  # tar files, URLs, braces, globs; a text or a list. instruction: the tars that hold the annotation file's videos
    cache_dir: str | None = None  # where indexes and fetched shards are kept
    cache_gb: float | None = _key(None, low=0)  # the most that fetched shards may take

    # Frames
    num_frames: int = _key(16, low=1)  # frames of every clip; a shorter one is padded with its last frame
    sampling: str = "rand"  # which frames: rand, middle, uniform or fps<x>
    crop: str = _key("random", choices=("random", "center"))  # of a clip in training; center: as in evaluation
    fps: float | None = _key(None, low=1e-3)  # of raw-frame folders and gifs
    reader: str = "auto"  # what decodes videos: auto, pyav, decord, torchcodec or torchcodec_cuda

    # Questions and answers
    qa_sampling: str | None = _key(None, choices=("one", "all"))  # unset: run.qa_sampling
    multi_turn: bool = False  # a record's pairs as one conversation, not a sample each

    # Keys of LAVIS without an effect here
    vis_processor: Any = field(default=None, metadata={"unused": _PROCESSORS})
    text_processor: Any = field(default=None, metadata={"unused": _PROCESSORS})


@dataclass
class EvaluationSettings:
    """One evaluation; unset keys (None) are the model's or the benchmark's own."""

    # Files
    anno_path: str | None = _key(None, path=True)  # the ground truth: a file, or MVBench's folder
    answers_path: str | None = _key(None, path=True)  # the answers, where the questions have a file of their own
    video_dir: str | None = _key(None, path=True)  # the folder of the media
    output_dir: str = "output/eval"
    output_name: str | None = None  # of the files there; unset: the benchmark's name

    # What is asked
    tasks: list[str] = field(default_factory=list)  # of these alone
    limit: int | None = _key(None, low=1)  # the first so many items of each task

    # Frames
    num_frames: int | None = _key(None, low=0)  # 0: MVBench's one a second, 4 to 16
    sampling: str = "uniform"  # which frames: uniform, segment, middle or fps<x>
    reader: str = "auto"  # what decodes videos: auto, pyav, decord, torchcodec or torchcodec_cuda

    # Prompt and decoding
    system: Any = "template"  # the system sentence: "template" for the model family's own, "" for none, or a text
    num_beams: int | None = _key(None, low=1)
    max_new_tokens: int | None = _key(None, low=1)
    repetition_penalty: float | None = None
    context: str = _key(PUBLISHED, choices=CONTEXTS)

    # Speed
    batch_size: int = _key(8, low=1)  # questions answered at once
    num_workers: int | None = _key(None, low=0)  # processes that decode; unset: one a core, to 8
    media_seconds: float = _key(MEDIA_SECONDS, low=0)  # to read one medium; 0: no limit
    engine: str | None = None  # address of a server that decodes, see conversation/remote.py


def benchmark_names() -> list[str]:
    """The names of the benchmarks: each has its shipped settings."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def texts(value: Any) -> tuple[Any, ...]:
    """A key that takes a text or a list of them, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


# ---- the check of values --------------------------------------------------------------------------------------------

Where = Callable[[str], str]  # a dotted key -> the name of the layer that sets it
WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping of keys",
    list: "a list",
}
JSON_FILES = ("run.deepspeed", "run.fsdp_config")  # mappings, or the names of files that hold them


def keys_of(schema: type) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return the types of a dataclass's fields, and what is known of their values (`_key`)."""
    about: dict[str, Mapping[str, Any]] = {
        f.name: {**f.metadata, "default": f.default} for f in dataclasses.fields(schema)
    }
    return typing.get_type_hints(schema), about


def checked_values(
    values: Mapping[str, Any],
    kinds: Mapping[str, Any],
    about: Mapping[str, Mapping[str, Any]],
    prefix: str,
    where: Where,
    *,
    structured: bool = False,
    finite: bool = False,
) -> dict[str, Any]:
    """Convert the values to the types of their keys, and check them. Raises UserError for the first that is wrong.

    structured: as OmegaConf takes them for a dataclass: null only where the type allows it, no whole number for a
    fraction. finite: numbers must be.
    """
    result: dict[str, Any] = {}
    for name, found in values.items():
        key, annotation = f"{prefix}.{name}", kinds[name]
        if dataclasses.is_dataclass(annotation):
            schema = typing.cast(type, annotation)
            result[name] = checked_values(found, *keys_of(schema), key, where, structured=structured)
            continue
        value = typed(found, annotation, key, where)
        if structured and value is None and annotation is not Any and type(None) not in typing.get_args(annotation):
            raise UserError(f"{where(key)}: '{key}' must be {expected(kinds_of(annotation))}, found {found!r}")
        if structured and kinds_of(annotation) == [float] and value is not None:
            value = float(value)
        if fault := value_fault(key, value, about.get(name, {}), finite=finite):
            raise UserError(f"{where(key)}: {fault}")
        result[name] = value
    return result


def value_fault(key: str, value: Any, about: Mapping[str, Any], *, finite: bool = False) -> str | None:
    """Describe what is wrong with a value of the right type; None when nothing is. about: see `_key`."""
    choices, low, high = (about.get(name) for name in ("choices", "low", "high"))
    if value is None or (isinstance(choices, Registry) and value == about["default"]):
        return None
    if choices:
        wrong = [name for name in texts(value) if name not in choices]
        return unknown_name(key, str(wrong[0]), choices) if wrong else None
    if about.get("texts") and not all(isinstance(text, str) for text in texts(value)):
        return f"'{key}' must be a text or a list of texts, found {value!r}"
    if about.get("filled") and not value:
        return f"'{key}' must not be empty, found {value!r}"
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    range_ = None
    if key == "run.max_steps":
        range_ = None if value == -1 or value >= 1 else "at least 1, or -1 to train for run.num_train_epochs"
    elif finite and not math.isfinite(value):
        range_ = "a finite number"
    elif (low is not None and not value >= low) or (high is not None and not value <= high):  # nan is neither
        range_ = f"at least {low}" if high is None else f"from {low} to {high}"
    elif "above" in about and value <= about["above"]:
        range_ = f"above {about['above']}"
    elif about.get("steps") and value > 1 and value != int(value):
        range_ = "a whole number of steps, or below 1 a share of all steps"
    return f"'{key}' must be {range_}, found {value}" if range_ else None


def typed(value: Any, annotation: Any, key: str, where: Where) -> Any:
    """Convert a value to the type of its key; None for `false` where the type has no switch (`deepspeed: false`).

    Text that spells a number or a switch, as `${oc.env:NAME}` gives it, is converted. Raises UserError, naming the key,
    for any other value.
    """
    from omegaconf import BooleanNode, FloatNode, IntegerNode, StringNode, ValidationError

    kinds = kinds_of(annotation)
    choices = [member.value for kind in kinds if isinstance(kind, enum.EnumMeta) for member in typing.cast(Any, kind)]
    if value is None:
        return None
    if isinstance(value, int) and abs(value) >= 2**63 and str not in kinds:
        raise UserError(f"{where(key)}: '{key}' must be between -2**63 and 2**63, found a larger number")
    if choices and value not in choices:
        raise UserError(f"{where(key)}: {unknown_name(key, str(value), choices)}")
    nodes: dict[Any, Callable[[Any], Any]] = {bool: BooleanNode, int: IntegerNode, float: FloatNode, str: StringNode}
    if len(kinds) == 1 and kinds[0] in nodes:
        with suppress(ValidationError):
            converted = nodes[kinds[0]](value)._value()
            # a whole number stays one where a fraction is allowed: 100 warm-up steps are not 100.0
            return value if kinds == [float] and isinstance(value, int) else converted
    elif not set(kinds) <= {dict, list, str, bool}:
        return value  # enumerations are checked already, and Any takes anything
    elif value is False and bool not in kinds:
        return None
    else:
        found = value
        if isinstance(value, str) and dict in kinds and key not in JSON_FILES:
            kinds = [dict]  # text in place of a mapping is JSON, or names a file
            with suppress(ValueError):
                found = loads(value)
        if isinstance(found, tuple(kinds)) and (bool in kinds or not isinstance(found, bool)):
            return found
    raise UserError(f"{where(key)}: '{key}' must be {expected(kinds)}, found {value!r}")


def expected(kinds: Sequence[Any]) -> str:
    """Describe in words what the types take: "a whole number"."""
    return " or ".join(WORDS[kind] for kind in kinds)


def kinds_of(annotation: Any) -> list[Any]:
    """List the types of a union without None, or the one type; of `list[str]`, list."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    return [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
