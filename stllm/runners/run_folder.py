"""A run's output folder: its configuration, its checkpoints and its log, so that a run continues or refuses.

Checkpoints are written beside their place and renamed when they are complete; nothing that bears a checkpoint's name
is ever half there.
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

from stllm.common.config import flat, save_config, told_changes
from stllm.common.distributed import gathered, is_main, wait_for_all
from stllm.common.errors import UserError, sentence
from stllm.common.files import locked, write_text
from stllm.common.jsonl import loads
from stllm.common.run_section import UNUSED
from stllm.models.checkpoints.weights import WeightFiles

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LOCK = ".train.lock"
LOCK_SECONDS = 6  # data workers of a killed training hold it, too, until they end
STATES = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")  # transformers' names
STATE = "trainer_state.json"  # transformers writes it last
# what may differ when a run is continued: none of it changes what is learned
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
        """Within, no other training may use this folder. A collective call; the main process holds the lock.

        Raises UserError, on every process, when another training holds it.
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
        """Make the folder and write `config.yaml`, or check that the run in it is this one.

        Raises UserError, naming the first setting that differs, when the folder holds another run.
        """
        if self.last_checkpoint() is None and not self.is_finished():
            if is_main():
                save_config(cfg, self.config_path)
        elif self.config_path.is_file():
            both = [flat(OmegaConf.to_container(one)) for one in (OmegaConf.load(self.config_path), cfg)]
            free = {key for key in {**both[0], **both[1]} if FREE.fullmatch(key) or key.removeprefix("run.") in UNUSED}
            if changes := told_changes(*({key: one[key] for key in one.keys() - free} for one in both)):
                raise UserError(
                    f"{self.path} holds a run with another configuration: {changes}; set it back to continue, or name "
                    "another run.output_dir to begin anew"
                )
        else:
            made = f"{self.path} holds a model that no run made there"
            raise UserError(f"{made}: name another folder with run.output_dir")

    def last_checkpoint(self) -> Path | None:
        """Return the complete checkpoint of the most steps, None when there is none."""
        return next(reversed(self.checkpoints()), None)

    def checkpoints(self) -> list[Path]:
        """List the complete checkpoints, by their steps."""
        if not self.path.is_dir():
            return []
        found = [(int(match[1]), entry) for entry in self.path.iterdir() if (match := CHECKPOINT.fullmatch(entry.name))]
        return [entry for _, entry in sorted(found) if (entry / STATE).is_file()]

    def refusal(self, checkpoint: Path, fault: str) -> str:
        """Word that `checkpoint` cannot be continued from, and from which other one the run can."""
        whole = [one for one in self.checkpoints() if one.resolve() != checkpoint.resolve() and damage(one) is None]
        if whole:
            advice = f"the last whole checkpoint is {whole[-1]}: remove {checkpoint.name} to continue from it"
        else:
            advice = f"there is no other whole checkpoint in {self.path}: name another run.output_dir to begin anew"
        return f"{checkpoint} cannot be continued from: {fault}; {advice}"

    def is_finished(self) -> bool:
        """Check whether the trained model is here: its config.json is moved in last."""
        return (self.path / "config.json").is_file()

    def rewind_log(self, step: int) -> None:
        """Drop the log's lines of steps after `step`: they are about to be made again."""
        if not self.log_path.is_file():
            return
        lines = self.log_path.read_text(encoding="utf-8").splitlines(keepends=True)
        # a process that was killed while it wrote leaves half a line
        kept = [line for line in lines if line.endswith("}\n") and loads(line)["step"] <= step]
        write_text(self.log_path, "".join(kept))

    def append_log(self, line: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`."""
        with self.log_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    # ---- writing ------------------------------------------------------------------------------------------------

    @contextmanager
    def new_checkpoint(self, step: int, *, limit: int | None, keep: int | None = None) -> Iterator[Path]:
        """A folder in which the block writes `checkpoint-<step>`; it is moved into place when all processes are done.

        limit: checkpoints to keep; older ones go once the new one is there, but for that of the step `keep`.
        A collective call.
        Raises UserError, on every process, when one of them could not write; the checkpoints before stay whole.
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
        """Move a complete model's files from `folder` into the run's own, config.json last. On the main process."""
        _flush(folder)
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name == "config.json"):
            _remove(self.path / entry.name)
            os.replace(entry, self.path / entry.name)
        folder.rmdir()


def damage(checkpoint: Path, *, only_model: bool = False) -> str | None:
    """Name the first file of a checkpoint that is not what it should be; None when there is none.

    Files of tensors are mapped, not read. only_model: without the files in `STATES`.
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
        except Exception as error:  # of json, torch and the file system: many kinds
            return f"{path.name} is damaged or cut off ({type(error).__name__})"
        if not isinstance(content, dict):
            return f"{path.name} is damaged (found {type(content).__name__}, expected named values)"
    return None


def _flush(folder: Path) -> None:
    """Have the system write the files to the disk: a power cut afterwards loses none."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a folder if it is one, hidden first, so that one half deleted is never taken for whole."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name}.removed")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
