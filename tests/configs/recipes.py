"""The recipes and their models at full size, built once for all tests."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stllm.models.checkpoints.infer_config import decide_config
from stllm.models.checkpoints.load import meta_model
from stllm.models.configuration import STLLMConfig
from stllm.models.settings import model_section
from stllm.models.st_llm import STLLM

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "train").glob("*.yaml"))


def full_size(cfg: Any) -> STLLM:
    """Return the model of a configuration on the meta device. Equal models are built once and shared."""
    return _built(decide_config([], model_section(cfg), default_llm=True).to_json_string())


@cache
def _built(config: str) -> STLLM:
    return meta_model(STLLMConfig(**json.loads(config)), torch.float32)
