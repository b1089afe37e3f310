"""Finding the checkpoint that a run continues from, and checking that it is complete before weights are loaded."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from stllm.common.errors import UserError, out_of_memory, reason
from stllm.common.files import check_regular
from stllm.common.jsonl import loads
from stllm.runners.run_folder import STATE, RunFolder, damage

RUN_STATE = "run_state.json"  # our own state, beside transformers' trainer_state.json
# method of dividing the model -> files that only its checkpoints have, and the setting that enables it
SHARDED = {
    "FSDP": ("pytorch_model_fsdp*", "run.fsdp=True under torchrun (--nproc_per_node=1 is enough)"),
    "DeepSpeed": ("global_step*", "run.deepspeed"),
}


def continues(args: TrainingArguments) -> bool:
    """Check whether the run may continue from a checkpoint: run.resume_from_checkpoint is not False."""
    return str(args.resume_from_checkpoint).lower() != "false"


def find_checkpoint(args: TrainingArguments, folder: RunFolder) -> Path | None:
    """Return the checkpoint to continue from: the one in the settings, or the run's last one. None: start a new run.

    Raises UserError if the named folder is not a checkpoint, and if a new run would overwrite an earlier one.
    """
    named = str(args.resume_from_checkpoint or "").lower()
    if not continues(args):
        last = folder.last_checkpoint()
        if last is not None or folder.is_finished():
            raise UserError(
                f"run.resume_from_checkpoint is False, but {folder.path} holds {last.name if last else 'a model'} of "
                "an earlier run, which would be lost: name another run.output_dir to start anew, or leave "
                "out run.resume_from_checkpoint to continue"
            )
        return None
    if named in ("", "true"):
        return folder.last_checkpoint()
    path = Path(str(args.resume_from_checkpoint))
    if not (path / STATE).is_file():
        raise UserError(f"run.resume_from_checkpoint: {path} is no checkpoint of a run (it has no {STATE})")
    return path


def read_state(
    checkpoint: Path, args: TrainingArguments, folder: RunFolder, *, only_model: bool
) -> tuple[dict[str, Any], int]:
    """Read our own state (RUN_STATE) of a checkpoint, and its step.

    only_model: continue only with the weights and the step, so the other files are not needed.
    Raises UserError if the global batch size differs, if the checkpoint is damaged or lacks a file, and if its run
    divided the model among processes in another way.
    """
    check_regular(checkpoint, "a checkpoint")
    fault = damage(checkpoint, only_model=only_model)
    if fault is None and not (checkpoint / RUN_STATE).is_file():
        fault = f"{RUN_STATE} is missing"
    if fault is not None:
        raise UserError(folder.refusal(checkpoint, fault))
    with reading(folder, checkpoint, RUN_STATE):
        state: dict[str, Any] = loads((checkpoint / RUN_STATE).read_text(encoding="utf-8"))
        _check_sharding(checkpoint, args, state, only_model=only_model)
        if not only_model:
            _check_whole(checkpoint, args, folder, state)
        found, expected = args.per_device_train_batch_size * args.world_size, state["global_batch"]
        if found != expected:
            raise UserError(
                f"{checkpoint} was made with batches of {expected} over all processes, now they are of {found}, so "
                f"the run would see others: set run.per_device_train_batch_size to {expected} over the processes' "
                "number"
            )
    with reading(folder, checkpoint, STATE):
        TrainerState.load_from_json(str(checkpoint / STATE))
        return state, int(loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"])


def _sharding(args: TrainingArguments) -> str | None:
    """Return how this run divides its model: a key of SHARDED, or None.

    The method is set in the arguments, or by `accelerate launch` in environment variables.
    """
    for name, asked in {"FSDP": args.fsdp, "DeepSpeed": args.deepspeed}.items():
        if asked or os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            return name
    return None


def _check_sharding(checkpoint: Path, args: TrainingArguments, state: Mapping[str, Any], *, only_model: bool) -> None:
    """Raise UserError if the checkpoint is of a run that divided its model in another way."""
    now = _sharding(args)
    made = next((name for name, (files, _) in SHARDED.items() if any(checkpoint.glob(files))), None)
    if made == now:
        made_by = state.get("num_processes")
        if now == "DeepSpeed" and made_by not in (None, args.world_size):
            raise UserError(
                f"{checkpoint} was made by {made_by} processes under DeepSpeed, now there are {args.world_size}, and "
                f"each continues with its own part: start {made_by}, or train under FSDP, whose runs any number "
                "continues"
            )
        return
    if state.get("model_only") and made is None:
        return  # `_check_whole` rejects it
    if only_model and now is None and (checkpoint / "model.safetensors").is_file():
        return
    was, now = (f"divided by {name}" if name else "whole in each process" for name in (made, now))
    again = f"continue with {SHARDED[made][1]}" if made else "continue without run.fsdp and run.deepspeed"
    weights = "name another run.output_dir, and the checkpoint as model.ckpt to start from its weights"
    raise UserError(f"{checkpoint} was made by a run whose model was {was}, but now it is {now}: {again}, or {weights}")


def _check_whole(checkpoint: Path, args: TrainingArguments, folder: RunFolder, state: Mapping[str, Any]) -> None:
    """Raise UserError if the checkpoint lacks a file of the optimizer, the schedule or the random state."""
    only_model = "run.resume_only_model=True continues with its weights, but with a new optimizer state"
    if state.get("model_only"):
        raise UserError(
            f"{checkpoint} holds the model alone (run.save_only_model), so a run cannot continue from it: name "
            f"another run.output_dir, and the checkpoint as model.ckpt to start from its weights; {only_model}"
        )
    sharding, processes = _sharding(args), args.world_size
    # FSDP and DeepSpeed have other optimizer files
    names = ["scheduler.pt"] if sharding else ["optimizer.pt", "scheduler.pt"]
    if args.fp16 and sharding != "DeepSpeed":
        names.append("scaler.pt")
    if state.get("num_processes", processes) == processes:  # with another number, random states are not restored
        names += ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    if lacking := [name for name in names if not (checkpoint / name).is_file()]:
        raise UserError(folder.refusal(checkpoint, f"{lacking[0]} is missing ({only_model})"))


@contextmanager
def reading(folder: RunFolder, checkpoint: str | Path, files: str) -> Iterator[None]:
    """Convert errors of the block, which reads `files`, to UserError; it names the last complete checkpoint."""
    try:
        yield
    except Exception as error:  # torch, json and transformers raise many types
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        fault = f"{files} cannot be used ({reason(error)})"
        raise UserError(folder.refusal(Path(checkpoint), fault)) from error
