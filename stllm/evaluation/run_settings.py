"""The settings that made an evaluation's lines, kept beside them, so that a rerun goes on or refuses to mix."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from stllm.common.config import flat, told_changes
from stllm.common.errors import UserError
from stllm.common.files import write_text
from stllm.common.schema import EvaluationSettings
from stllm.conversation.decoding import Decoding
from stllm.evaluation.digests import item_prompts
from stllm.evaluation.items import Benchmark, Item
from stllm.models.checkpoints.infer_config import Opened
from stllm.processors.prompts import PromptProcessor

# What may differ when a run is gone on with: no answer depends on it, items are looked at line by line, and `decoding`
# has what is unset in `evaluation` as the model's family has it.
FREE = re.compile(
    r"evaluation\.(anno_path|answers_path|video_dir|output_dir|output_name|tasks|limit|batch_size|num_workers|media_seconds"
    r"|num_beams|max_new_tokens|repetition_penalty|context)"
)
# Asked of nobody: it shows the words around a question, which belong to the code and may change with it.
SAMPLE = Item(
    id="sample",
    task="",
    video="",
    media=None,
    questions=("QUESTION",),
    answer="FIRST",
    candidates=("FIRST", "SECOND"),
)


def run_settings(
    benchmark: Benchmark,
    settings: EvaluationSettings,
    decoding: Decoding,
    opened: Opened,
    processor: PromptProcessor,
    *,
    checkpoint: str,
    dtype: str,
    variant: str = "",
) -> dict[str, Any]:
    """All that answers depend on, as plain values. checkpoint: its digest. variant: of the items, "" for none."""
    config = opened.config
    return {
        "benchmark": benchmark.name,
        **({"variant": variant} if variant else {}),
        "evaluation": asdict(settings),
        "decoding": asdict(decoding),
        "prompt": item_prompts(benchmark, SAMPLE, processor)[0],
        "model": {
            "checkpoint": checkpoint,
            "dtype": dtype,
            "quantization": "8bit" if opened.settings.get("low_resource") else None,
            "num_frames": config.num_frames,
            "video_input": config.video_input,
            "residual_size": config.residual_size,
            "image_size": config.vision_config["image_size"],
            "template": processor.template.name,
            "system": processor.system,
            "max_txt_len": processor.max_txt_len,
            "end_sym": processor.end_sym,
        },
    }


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that answers depend on, by dotted key."""
    return {key: value for key, value in flat(settings).items() if not FREE.fullmatch(key)}


def check_same(path: Path, settings: Mapping[str, Any], records: Path) -> None:
    """Raises UserError, naming the first setting that differs, unless `records` were made with these settings.

    path: the file that keeps the settings of those lines.
    """
    another = "name another --output-name to begin anew"
    if not path.is_file():
        raise UserError(f"{records} holds lines, but not beside it {path.name}, which says what made them: {another}")
    if changes := told_changes(decisive(_load(path)), decisive(settings)):
        raise UserError(f"{records} was made with another setting: {changes}; set it back to go on, or {another}")


def save_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes the file, whole or not at all."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dict(settings))))


def _load(path: Path) -> Mapping[str, Any]:
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of yaml, OmegaConf and the file system
        raise UserError(f"{path} cannot be read ({error}): name another --output-name to begin anew") from error
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}
