"""Causal language models in transformers' own folders: streamed when the names on disk are the model's.

Else transformers reads them: many architectures rename or merge weights while they load (GPT-2's missing prefix, the
experts of mixtures), and what transformers knows about them is not repeated here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from stllm.common.errors import UserError
from stllm.models.checkpoints import tables
from stllm.models.checkpoints.keys import KeyTable
from stllm.models.checkpoints.shards import MemoryWeights, Spec, Weights


def causal_lm_weights(folder: Path, weights: Weights) -> tuple[KeyTable, Weights]:
    """The table and the tensors of a causal language model's folder."""
    model = _meta_model(read_config(folder))
    wanted = {key: Spec(tuple(tensor.shape), tensor.dtype) for key, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    if all(key in weights.specs or key in tied for key in wanted):
        return tables.CAUSAL_LM, weights
    return tables.CAUSAL_LM, TransformersWeights(folder, wanted)


def read_config(folder: Path) -> PretrainedConfig:
    """The language model's configuration. Raises UserError when transformers does not know it as a causal LM."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder} is no language model that transformers can read ({reason}): name another folder"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{folder} holds a {config.model_type} model, expected a causal language model or ST-LLM weights: "
            "name another folder"
        )
    return config


class TransformersWeights(Weights):
    """Weights that transformers itself has to read; held in memory from the first use on, until they were copied."""

    def __init__(self, folder: Path, specs: dict[str, Spec]) -> None:
        self._folder = folder
        self._loaded: MemoryWeights | None = None
        self.specs = specs

    def copy_to(self, key: str, destination: Tensor) -> None:
        if self._loaded is None:
            self._loaded = MemoryWeights(_load(self._folder).state_dict())
        self._loaded.copy_to(key, destination)


def _load(folder: Path) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model: PreTrainedModel = loaded[0]
    info = loaded[1]
    if info["missing_keys"]:
        named = ", ".join(sorted(info["missing_keys"])[:6])
        raise UserError(f"{folder}: the language model's weights are not complete, missing are {named}")
    return model


def _meta_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
