"""Load a recipe's model as `stllm train` does, and print its memory: `torchrun ... -m tests.helpers.loading RECIPE`.

Prints a line of JSON for each process: the peak growth of its memory, and the bytes of all weights.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import distributed as dist

from stllm.common.config import load_config
from stllm.common.device import seed_everything
from stllm.models.build import build_audited
from stllm.runners.arguments import training_arguments
from stllm.runners.sharding import division_of


def _memory(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main(recipe: str, how: str, *options: str) -> None:
    """Load the model of a recipe. how: `divided`, as its `run.fsdp` and `run.deepspeed` say, or `whole`."""
    cfg = load_config(recipe, list(options))
    settings: Any = OmegaConf.to_container(cfg.run, resolve=True)
    args = training_arguments(settings)
    assert args.world_size > 1
    dist.barrier()  # the communication's own memory is there before
    seed_everything(0)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    model, _ = build_audited(
        cfg,
        device=torch.device("cpu"),
        dtype=torch.float32 if args.deepspeed else torch.bfloat16,
        trained_dtype=torch.float32,
        division=division_of(args) if how == "divided" else None,
    )
    # a weight that DeepSpeed has divided is empty
    weights = sum(getattr(one, "ds_numel", one.numel()) * one.element_size() for one in model.parameters())
    print(
        json.dumps(
            {
                "rank": dist.get_rank(),
                "rss": _memory("VmRSS") - before,
                "anon": _memory("RssAnon"),
                "growth": _memory("VmHWM") - before,
                "weights": weights,
            }
        ),
        flush=True,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
