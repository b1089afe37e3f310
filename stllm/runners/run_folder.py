"""The output folder of a training run: its configuration, checkpoints and log.

A checkpoint is written to a temporary folder and renamed when it is complete, so no `checkpoint-<step>` is incomplete.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from transformers.trainer_pt_utils import safe_globals

from stllm.common.config import describe_changes, flat, save_config
from stllm.common.distributed import gathered, is_main, wait_for_all
from stllm.common.errors import UserError, sentence
from stllm.common.files import locked, write_text
from stllm.common.jsonl import loads
from stllm.common.run_section import UNUSED
from stllm.models.checkpoints.weights import WeightFiles

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCK = ".train.lock"
LOCK_SECONDS = 6  # data workers of a killed training also hold the lock until they end
STATES = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")  # transformers' names
STATE = "trainer_state.json"  # transformers writes it last
# settings that may change when a run continues: they do not affect the trained weights
FREE = re.compile(
    r"run\.(output_dir|resume_from_checkpoint|resume_only_model|logging_\w+|save_\w+|report_to|run_name|project|dataloader_\w+|ddp_\w+|disable_tqdm"
    r"|max_bad_fraction|media_seconds|packing|profile_steps|eval_\w+|per_device_eval_batch_size|local_rank|use_cpu|per_device_train_batch_size|hub_\w+|push_to_hub)"
    r"|run\.(torch_compile\w*|use_liger_kernel|liger_kernel_config(\.\w+)?)"
    r"|model\.(vit_chunk_size|attn_implementation|use_grad_checkpoint|qformer_tokenizer)"
    r"|datasets\.(\w+\.)?(anno_root|media_root)|datasets\.\w+\.(anno_path|media_dir|cache_dir|reader)"
)


class RunFolder:
    """The output folder of one training run, the same on every process. path: `run.output_dir`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log_path = self.path / "log.jsonl"
        self.config_path = self.path / "config.yaml"
        self._partial = self.path / ".checkpoint.partial"

    # ---- beginning and continuing -------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against other trainings during the block. All processes must call this together.

        The main process holds the lock. Raises UserError on every process if another training holds it.
        """
        busy = f"{self.path}: another training uses this folder: wait until it ends, or name another run.output_dir"
        with ExitStack() as stack:
            error: Exception | None = None
            if is_main():
                try:
                    stack.enter_context(locked(self.path / LOCK, busy, seconds=LOCK_SECONDS))
                except Exception as caught:  # the other processes wait below
                    error = caught
            if any(gathered([error is not None])):
                raise error or UserError(busy)
            yield

    def begin(self, cfg: DictConfig) -> None:
        """Create the folder and write `config.yaml`, or check that the existing run has the same configuration.

        Raises UserError, with the settings that differ, if the folder holds another run.
        """
        if self.last_checkpoint() is None and not self.is_finished():
            if is_main():
                save_config(cfg, self.config_path)
        elif self.config_path.is_file():
            both = [flat(OmegaConf.to_container(one)) for one in (OmegaConf.load(self.config_path), cfg)]
            free = {key for key in {**both[0], **both[1]} if FREE.fullmatch(key) or key.removeprefix("run.") in UNUSED}
            if changes := describe_changes(*({key: one[key] for key in one.keys() - free} for one in both)):
                raise UserError(
                    f"{self.path} holds a run with another configuration: {changes}; set it back to continue, or name "
                    "another run.output_dir to begin anew"
                )
        else:
            made = f"{self.path} holds a model that no run made there"
            raise UserError(f"{made}: name another folder with run.output_dir")

    def last_checkpoint(self) -> Path | None:
        """Return the complete checkpoint with the most steps; None if there is none."""
        return next(reversed(self.checkpoints()), None)

    def checkpoints(self) -> list[Path]:
        """List the complete checkpoints, sorted by step."""
        if not self.path.is_dir():
            return []
        found = [(int(match[1]), entry) for entry in self.path.iterdir() if (match := CHECKPOINT.fullmatch(entry.name))]
        return [entry for _, entry in sorted(found) if (entry / STATE).is_file()]

    def refusal(self, checkpoint: Path, fault: str) -> str:
        """Write the message that a run cannot continue from `checkpoint`, with another checkpoint to use.

        fault: what is wrong with the checkpoint.
        """
        whole = [one for one in self.checkpoints() if one.resolve() != checkpoint.resolve() and damage(one) is None]
        if whole:
            advice = f"the last whole checkpoint is {whole[-1]}: remove {checkpoint.name} to continue from it"
        else:
            advice = f"there is no other whole checkpoint in {self.path}: name another run.output_dir to begin anew"
        return f"{checkpoint} cannot be continued from: {fault}; {advice}"

    def is_finished(self) -> bool:
        """Check whether the folder holds the trained model. Its config.json is the last file that is written."""
        return (self.path / "config.json").is_file()

    def rewind_log(self, step: int) -> None:
        """Remove the log lines after `step`, since the continued run will write them again."""
        if not self.log_path.is_file():
            return
        lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        # a killed process may leave an incomplete last line
        kept = [line for line in lines if line.endswith("}\n") and loads(line)["step"] <= step]
        write_text(self.log_path, "".join(kept))

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`."""
        with self.log_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    # ---- writing ------------------------------------------------------------------------------------------------

    @contextmanager
    def new_checkpoint(self, step: int, *, limit: int | None, keep: int | None = None) -> Iterator[Path]:
        """Yield a temporary folder, where the block writes `checkpoint-<step>`. It is moved into place afterwards.

        All processes must call this together; the move waits for all of them.
        limit: number of checkpoints to keep; older ones are then removed. keep: step of a checkpoint that always stays.
        Raises UserError on every process if one of them could not write; earlier checkpoints stay complete.
        """
        if is_main():
            self.path.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
        wait_for_all()
        error: Exception | None = None
        try:
            yield self._partial
        except Exception as caught:
            error = caught
        if any(gathered([error is not None])):
            if is_main():
                shutil.rmtree(self._partial, ignore_errors=True)
            last = self.last_checkpoint()
            kept = f"{last.name} before it is whole: run again to continue from it" if last else ""
            kept = kept or "run again to begin anew"
            cause = "another process could not write its part" if error is None else sentence(error)
            raise UserError(f"checkpoint-{step} could not be written to {self.path} ({cause}); {kept}") from error
        if is_main():
            target = self.path / f"checkpoint-{step}"
            _flush(self._partial / target.name)
            _remove(target)
            os.replace(self._partial / target.name, target)
            old = [path for path in self.checkpoints() if path.name not in (target.name, f"checkpoint-{keep}")]
            others = limit - 1 - (keep not in (None, step)) if limit else len(old)
            for path in old[: len(old) - max(others, 0)]:
                _remove(path)
            shutil.rmtree(self._partial, ignore_errors=True)
        wait_for_all()

    def place_final(self, folder: Path) -> None:
        """Move the files of the trained model from `folder` to this folder, config.json last. Main process only."""
        _flush(folder)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == "config.json"):
            _remove(self.path / entry.name)
            os.replace(entry, self.path / entry.name)
        folder.rmdir()


def damage(checkpoint: Path, *, only_model: bool = False) -> str | None:
    """Describe the fault of the first damaged file of a checkpoint; None if no file is damaged.

    Tensors are not read, only their headers. only_model: skip the files in `STATES`.
    """
    for path in sorted(checkpoint.iterdir()):
        is_state = STATES.fullmatch(path.name) is not None
        if only_model and is_state:
            continue
        try:
            content: Any = {}
            if path.suffix == ".json" or path.name == STATE:
                content = loads(path.read_text(encoding="utf-8"))
            elif is_state:
                with safe_globals():
                    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            elif path.suffix == ".safetensors":
                WeightFiles([path])
        except UserError as error:
            return str(error)
        except Exception as error:  # json, torch and the file system raise many types
            return f"{path.name} is damaged or cut off ({type(error).__name__})"
        if not isinstance(content, dict):
            return f"{path.name} is damaged (found {type(content).__name__}, expected named values)"
    return None


def _flush(folder: Path) -> None:
    """Flush the files to the disk, so that a power failure does not lose them."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder, if `path` is one. It is renamed first, so that no incomplete checkpoint remains."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
