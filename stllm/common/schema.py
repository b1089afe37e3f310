"""The keys of a configuration with their types, defaults and allowed values; a comment explains each key.

The names are those of the published ST-LLM recipes, so that an existing YAML loads unchanged. The defaults are the
published sizes (arXiv 2404.00308). `config.py` reads YAML files and merges them. Example of two sections:

datasets:                               # one entry per data set, and up to three folders that apply to all of them
  anno_root: /data/videochat2_it        # folder that relative paths of annotation files start from
  media_root: ${oc.env:MEDIA_ROOT}      # folder that relative paths of media folders start from
  caption_videochat: {num_frames: 64}   # overrides a default of a shipped data set (stllm/configs/datasets/)
  mine: {anno_path: mine.jsonl, media_dir: videos}
evaluation: {num_frames: 32}            # overrides the benchmark's published settings (stllm/configs/evaluation/)
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

MEDIA_SECONDS = 300.0  # our choice: ten times as long as reading a long film from slow storage takes
ROOTS = ("anno_root", "media_root", "features_root")  # keys of `datasets` that are not data sets but folders
PRESETS = Path(__file__).parent.parent / "configs" / "evaluation"
QUANTIZATIONS = ("4bit", "8bit")
MAX_BEAMS = 64  # our choice; 5 are published, and each beam needs memory for its keys and values
CONTEXTS = PUBLISHED, ALL = "published", "all"  # rules for long prompts, see conversation/requests.py


def _key(default: Any, **about: Any) -> Any:
    """Return a dataclass field with limits for its values, which `value_fault` checks.

    choices: the allowed names, or a registry with them, which imports its modules only if the value is not the default.
    low, high: inclusive limits of a number. filled: True for a text that must not be empty. texts: True for a text or a
    list of texts. path: True for a file or folder, which may be relative to its YAML.
    unused: the reason why a published key has no effect; the key is accepted with a note.
    """
    return field(default=default, metadata=about)


_PARTS = ("vision_encoder", "qformer", "projection", "language_model")
_PROMPTS = "prompts come from `template`"
_PROCESSORS = "images are prepared by model.image_size, texts by model.template"
_LAUNCHER = "the launcher (torchrun) and --device decide"


@dataclass
class VisionSettings:
    """Sizes of the image encoder and its temporal adapter.

    The comment on each size gives its default in brackets, that of EVA-ViT-g.
    """

    patch_size: int | None = None  # height and width of a patch in pixels (14)
    embed_dim: int | None = None  # width C (1408)
    depth: int | None = None  # blocks (39)
    num_heads: int | None = None  # attention heads (16)
    mlp_ratio: float | None = None  # MLP width / C (4.3637)
    adapter_depth: int | None = None  # layers of the temporal adapter, parallel to the encoder's last blocks (3)
    max_frames: int | None = None  # entries of the adapter's time embedding (64)
    ln_eps: float | None = None  # epsilon of ln_vision (1e-5; InstructBLIP's own checkpoints have 1e-6)


@dataclass
class QFormerSettings:
    """Sizes of the Q-Former. The comment on each size gives its default in brackets, that of BERT-base."""

    hidden_size: int | None = None  # width (768)
    num_hidden_layers: int | None = None  # layers (12)
    num_attention_heads: int | None = None  # attention heads (12)
    intermediate_size: int | None = None  # feed-forward width (3072)
    max_position_embeddings: int | None = None  # text positions (512)
    cross_attention_frequency: int | None = None  # one layer in this many has cross-attention to the image (2)
    vocab_size: int | None = None  # text tokens, including the added [DEC] (30523)
    dropout: float | None = None  # dropout in training if the Q-Former is trained (0.1)


@dataclass
class ModelSettings:
    """Keys of section `model`."""

    arch: str = _key("st_llm_hf", choices=registry.models)  # registered name of the model class
    model_type: str | None = None  # selects the shipped defaults: stllm/configs/models/<model_type>.yaml

    # Image encoder
    # height and width of the input in pixels; unset: the size of the weights, or 224. If the weights have another size,
    # their position embeddings are interpolated
    image_size: int | None = _key(None, low=1)
    # registered name of the encoder: eva_clip_g, or eva_btadapter_g with the temporal adapter
    vit_model: str = _key("eva_clip_g", choices=registry.vision_encoders)
    vit_ckpt: str | None = _key(None, path=True)  # eva_vit_g.pth, if the encoder's weights are in a separate file
    drop_path_rate: float = _key(0.0, low=0, high=1)  # stochastic depth of the encoder's blocks in training
    use_grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    vit_precision: str | None = _key(
        None, unused="the encoder runs in the model's own type (--dtype, or bf16/fp16 under `run`)"
    )
    freeze_vit: bool = True  # backbone and ln_vision are not trained (the temporal adapter still is)
    vit_chunk_size: int | None = _key(None, low=1)  # frames encoded at once; unset: 8 on a CPU, 16 elsewhere
    vision: VisionSettings = field(default_factory=VisionSettings)  # sizes that differ from EVA-ViT-g's

    # Q-Former
    has_qformer: bool = True  # False: instead, every 4 neighbouring patch tokens are concatenated and projected
    q_former_model: str | None = _key(None, path=True)  # Q-Former weights: a .pth in InstructBLIP's or BLIP-2's layout
    qformer_text_input: bool = False  # the Q-Former reads the question too (InstructBLIP family)
    # the Q-Former's tokenizer: a folder, a vocab.txt or a hub name; unset: the checkpoint's own (qformer_tokenizer/),
    # or else bert-base-uncased
    qformer_tokenizer: str | None = _key(None, path=True)
    num_query_token: int | None = _key(None, low=1)  # query tokens per frame, K; unset: as in the weights, or 32
    freeze_qformer: bool = True  # Q-Former and query tokens are not trained
    qformer: QFormerSettings = field(default_factory=QFormerSettings)  # sizes that differ from BERT-base's

    # Language model
    llama_model: str | None = _key(None, path=True)  # any causal language model: a folder or a hub name
    llm: dict[str, Any] = field(default_factory=dict)  # transformers config of the language model without llama_model
    freeze_LLM: bool = True  # the language model's own weights are not trained (LoRA's are)
    lora_r: int = _key(0, low=0)  # rank of LoRA; 0: no LoRA
    lora_alpha: int = 16  # LoRA's scale is alpha / r
    lora_dropout: float = _key(0.05, low=0, high=1)  # dropout on LoRA's input in training
    lora_target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])  # layers that LoRA adapts
    # attention kernels of the language model; auto: sdpa (torch's scaled_dot_product_attention), or eager if the
    # architecture does not support sdpa. flash_attention_2 and flex_attention need a CUDA GPU. Without sdpa, the prompt
    # is processed once per beam instead of once
    attn_implementation: str = _key("auto", choices=("auto", "sdpa", "eager", "flash_attention_2", "flex_attention"))
    # quantization of the language model's linear layers: 4bit or 8bit (bitsandbytes; CUDA or CPU); unset: none
    quantization: str | None = _key(None, choices=QUANTIZATIONS)
    low_resource: bool = False  # name in published configurations for `quantization: 8bit`
    device_8bit: int = 0  # index of the CUDA device for low_resource, if --device is auto and there is one process

    # Video tokens and masking
    # registered name of the module that turns the tokens of T frames into language model input: all, mean or residual
    video_input: str = _key("all", choices=registry.video_inputs)
    residual_size: int = _key(16, low=1)  # number of local frames of `residual`, R
    residual_bottleneck: int | None = None  # inner width of `residual`; unset: a quarter of the language model's width
    # default number of frames per video in chat, web page and server; unset: 64 for `residual`, else 16
    num_frames: int | None = _key(None, low=1)
    use_mask: bool = False  # drop a random part of the visual tokens in training
    use_mvm: bool | None = None  # False: no masked-video-modelling loss beside masking; unset: with this loss
    mvm_decode: bool = False  # True: a linear decoder before the masked-video-modelling loss; False: no decoder
    mask_rate_mean: float = _key(0.5, low=0, high=1)  # share of dropped tokens: Normal(mean, std) clipped to [min, max]
    mask_rate_std: float = _key(0.1, low=0)
    mask_rate_min: float = _key(0.1, low=0, high=1)
    mask_rate_max: float = _key(0.7, low=0, high=1)

    # Text
    # registered name of the prompt template: instructblip or minigpt4; unset: instructblip if qformer_text_input
    template: str | None = _key(None, choices=registry.templates)
    system: str | None = None  # system message before the question
    max_txt_len: int = _key(512, low=1)  # maximum tokens of an answer in training, and of the text for the Q-Former
    end_sym: str = _key("###", filled=True)  # text that marks the end of an answer

    # Weights
    # folder or file of weights to start from; they override those of the files named above
    ckpt: str | None = _key(None, path=True)
    # parts that training may initialise randomly if no file has their weights. For the projection this includes weights
    # whose output width does not fit the language model
    fresh: list[str] = field(default_factory=list, metadata={"choices": _PARTS})
    # True: every data set must have precomputed features (datasets.features_root, stllm extract), so no pixels are
    # read; False: data sets without precomputed features are read from pixels
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
    """stllm's own keys of section `run`; the other keys are transformers' TrainingArguments (run_section.py)."""

    task: str = "video_text_it"  # registered name of the training task (data, model and loss)
    runner: str | None = None  # registered name of the training loop; unset: the task's default
    max_tries: int = _key(10, low=1)  # other samples to try in place of an unreadable one before the run fails
    max_bad_fraction: float = _key(0.1, low=0, high=1)  # a larger share of unreadable samples stops the run
    media_seconds: float = _key(MEDIA_SECONDS, low=0)  # time limit in seconds for reading one medium; 0: no limit
    # QA pairs used per record and epoch: a random one, all as separate samples, or all together, sharing the medium
    qa_sampling: str = _key("one", choices=("one", "all", "together"))
    # masking rounds a clip's number of kept visual tokens to a multiple of this, so that compiled kernels see few
    # different lengths
    mask_bucket: int = _key(1, low=1)
    # folder in MVBench's layout; its questions are evaluated at each validation (run.eval_strategy)
    eval_benchmark: str | None = _key(None, path=True)
    packing: bool = False  # concatenate the samples of a batch into one row without padding for the language model
    # first and last step that torch's profiler records, such as [10, 12]; traces are written to the folder `profile`
    profile_steps: list[int] | None = None
    projection_lr: float | None = _key(None, low=0)  # learning rate of llama_proj; unset: learning_rate
    resume_only_model: bool = False  # resume weights and step only; the optimizer and the dropout generator start anew

    # LAVIS's keys without an effect here
    distributed: bool | None = _key(None, unused=_LAUNCHER)
    dist_url: str | None = _key(None, unused=_LAUNCHER)
    world_size: int | None = _key(None, unused=_LAUNCHER)
    device: str | None = _key(None, unused=_LAUNCHER)


@dataclass
class DatasetSettings:
    """The settings of one data set in section `datasets`.

    Unset keys (None) of a shipped data set take its own defaults.
    """

    type: str = "instruction"  # registered name of the data set class: instruction, image_text or video_text
    media: str | None = _key(None, choices=("video", "image", "text"))  # unset: the kind named in the annotation file
    sample_ratio: float | None = _key(None, low=0)  # weight in the mixture; unset: its share of all samples
    instruction: Any = field(
        default=None, metadata={"texts": True}
    )  # instruction for records that have none: a text, or a list to draw from
    max_samples: int | None = _key(None, low=1)  # use only this many samples from the beginning
    split: str = _key("train", choices=("train", "val"))  # val: used for validation (run.eval_strategy), not training
    val_fraction: float = _key(0.0, low=0, high=0.5)  # share of the data set's media held out for validation

    # Files; a relative path is relative to the roots above, unless it exists beside the YAML
    anno_path: str | None = None  # annotation file
    anno_root: str | None = None
    media_dir: str | None = None  # folder that the media names in the annotation file are relative to
    media_root: str | None = None
    features_dir: str | None = None  # precomputed features (stllm extract); they replace the media and fix the frames
    features_of: str | None = None  # another data set with the same media and frames, whose folder of features is used
    shards: Any = field(
        default=None, metadata={"texts": True}
    )  # tar files as paths or URLs with {braces} or globs; a text or a list. instruction: tars with the file's videos
    cache_dir: str | None = None  # folder for indexes and downloaded shards
    cache_gb: float | None = _key(None, low=0)  # size limit in GB for downloaded shards

    # Frames
    num_frames: int = _key(16, low=1)  # frames per clip; a shorter clip is padded with its last frame
    sampling: str = "rand"  # choice of frames: rand, middle, uniform or fps<x>
    crop: str = _key("random", choices=("random", "center"))  # crop of a training clip; center: as in evaluation
    fps: float | None = _key(None, low=1e-3)  # frames per second of frame folders and gifs
    reader: str = "auto"  # video decoder: auto, pyav, decord, torchcodec or torchcodec_cuda

    # Questions and answers
    qa_sampling: str | None = _key(None, choices=("one", "all", "together"))  # unset: run.qa_sampling
    multi_turn: bool = False  # True: a record's QA pairs form one conversation; False: see qa_sampling
    # multiple choice: also train the last token of each option to predict whether it is the answer ("yes" or "no")
    judge_options: bool = False

    # LAVIS's keys without an effect here
    vis_processor: Any = field(default=None, metadata={"unused": _PROCESSORS})
    text_processor: Any = field(default=None, metadata={"unused": _PROCESSORS})


@dataclass
class EvaluationSettings:
    """Keys of one evaluation (section `evaluation`). Unset keys (None) take the benchmark's or the model's defaults."""

    # Files
    anno_path: str | None = _key(None, path=True)  # ground truth: a file, or a folder for MVBench
    answers_path: str | None = _key(None, path=True)  # file of the answers, if anno_path has only the questions
    video_dir: str | None = _key(None, path=True)  # folder of the media
    output_dir: str = "output/eval"
    output_name: str | None = None  # name of the result files; unset: the benchmark's name

    # Questions
    tasks: list[str] = field(default_factory=list)  # only the questions of these tasks; empty: all tasks
    limit: int | None = _key(None, low=1)  # only this many questions of each task, from the beginning

    # Frames
    num_frames: int | None = _key(None, low=0)  # frames per video; 0: one per second, 4 to 16, as published for MVBench
    sampling: str = "uniform"  # choice of frames: uniform, segment, middle or fps<x>
    reader: str = "auto"  # video decoder: auto, pyav, decord, torchcodec or torchcodec_cuda

    # Prompt and decoding
    system: Any = "template"  # system message: "template" for the model family's, "" for none, or a text
    num_beams: int | None = _key(None, low=1, high=MAX_BEAMS)
    max_new_tokens: int | None = _key(None, low=1)
    repetition_penalty: float | None = None
    context: str = _key(PUBLISHED, choices=CONTEXTS)

    # Speed
    batch_size: int = _key(8, low=1)  # questions answered at once
    num_workers: int | None = _key(None, low=0)  # processes that read media; unset: one per core, at most 8
    media_seconds: float = _key(MEDIA_SECONDS, low=0)  # time limit in seconds for reading one medium; 0: no limit
    engine: str | None = None  # URL of a server that runs the language model, see conversation/remote.py


def benchmark_names() -> list[str]:
    """List the names of the benchmarks, which are those of the shipped settings files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def texts(value: Any) -> tuple[Any, ...]:
    """Convert the value of a key to a tuple of texts. The value is a text, a list of texts, or None (no texts)."""
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
JSON_FILES = ("run.deepspeed", "run.fsdp_config")  # keys whose value is a mapping, or the name of a JSON file of one


def keys_of(schema: type) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Return two dictionaries for a dataclass: field -> type, and field -> limits of its value (see `_key`)."""
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
    """Convert values to the types of their keys, and check them. Raises UserError for the first invalid value.

    kinds: types by key. about: limits by key, see `_key`. prefix: dotted name of the section, used in error messages.
    structured: apply OmegaConf's rules for dataclasses: null only where the type allows it; an int becomes a float if
    the type is float. finite: reject infinite numbers and NaN.
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
    """Convert a value to the type of its key. `false` becomes None if the type has no booleans (`deepspeed: false`).

    Text that spells a number or a boolean is converted, since `${oc.env:NAME}` gives text. Raises UserError, naming the
    key, for any other value.
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
            # an int stays an int where the type is float: 100 warm-up steps are not 100.0
            return value if kinds == [float] and isinstance(value, int) else converted
    elif not set(kinds) <= {dict, list, str, bool}:
        return value  # enumerations were checked above, and Any accepts every value
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
    """Describe the accepted types in words, such as "a whole number"."""
    return " or ".join(WORDS[kind] for kind in kinds)


def kinds_of(annotation: Any) -> list[Any]:
    """List the types in a union except None, or the single type. `list[str]` is listed as `list`."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = typing.get_args(annotation) if union else (annotation,)
    return [typing.get_origin(kind) or kind for kind in kinds if kind is not type(None)]
