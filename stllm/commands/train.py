"""Command line of `stllm train`."""

import argparse
from importlib import import_module
from typing import Any

from stllm.commands.options import Command, Parser, add_allow_pipe, add_quantization, path
from stllm.common.errors import UserError, out_of_memory


def add_options(parser: Parser) -> None:
    words = "configuration of the training run"
    parser.add_argument("--cfg-path", type=path, metavar="YAML", required=True, help=words)
    add_quantization(parser)
    add_allow_pipe(parser)


def run(args: argparse.Namespace) -> int:
    """Train the model. The exit code is 0 at the end of the training, 130 or 143 if a signal stopped it."""
    from omegaconf import OmegaConf
    from torch import distributed as dist

    from stllm.common.config import load_config
    from stllm.common.device import seed_everything
    from stllm.common.distributed import end_process_group
    from stllm.common.registry import runners, tasks
    from stllm.datasets.shards.sources import allow_pipes
    from stllm.runners.arguments import training_arguments
    from stllm.runners.train import stopping_at_signals

    if dist.is_available():  # before the process group exists: the default arguments in this module would keep it alive
        import_module("torch.distributed.nn")
    allow_pipes(args.allow_pipe)
    cfg = load_config(args.cfg_path, args.options)
    if not cfg.run:
        raise UserError(f"{args.cfg_path or 'the options'}: there is no run section: set at least run.output_dir")
    settings: Any = OmegaConf.to_container(cfg.run, resolve=True)
    arguments = training_arguments(settings, device=args.device, dtype=args.dtype, seed=args.seed)
    cfg.run.seed = arguments.seed
    task = tasks.get(cfg.run.task)
    runner = runners.get(cfg.run.runner or task.runner)
    try:
        with stopping_at_signals() as stop:
            seed_everything(arguments.seed)
            data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
            return int(runner(task.from_config(cfg, seed=data_seed), arguments, cfg, stop))
    except Exception as error:
        if not out_of_memory(error) or isinstance(error, UserError):
            raise
        size = arguments.per_device_train_batch_size
        where = "on the GPU" if arguments.device.type == "cuda" else "on this machine"
        raise UserError(
            f"not enough memory {where} for batches of {size}: lower run.per_device_train_batch_size (and raise "
            "run.gradient_accumulation_steps), use fewer frames, model.use_grad_checkpoint=True, run.bf16=True, LoRA "
            "(model.lora_r), FSDP or DeepSpeed; the checkpoints written so far are whole"
        ) from error
    finally:
        end_process_group()


COMMAND = Command(
    help="trains the model that a YAML describes, in one or several processes (torchrun); "
    "the same command resumes an interrupted run",
    example="torchrun --nproc_per_node=8 -m stllm train --cfg-path configs/train/instructblip_qa.yaml",
    add_options=add_options,
    run=run,
    needs="stllm.runners.train",
)
