"""`stllm convert SOURCE... --to DIR`: weights of any known layout to ours, and to the released layout.

Everything is written into a temporary folder beside the target and renamed at the end: a target is whole or not there.
A whole target holds a record of the command, by which the same command recognises that it was done.
"""

import argparse
import hashlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder, user_path
from stllm.common.json_text import loads
from stllm.common.terminal import console
from stllm.models.checkpoints.assembly import assemble
from stllm.models.checkpoints.audit import AuditReport
from stllm.models.checkpoints.deciding import decide_config, open_checkpoint, open_named, open_pieces
from stllm.models.checkpoints.formats import Source, locate
from stllm.models.checkpoints.loading import Opened, processor_of
from stllm.models.checkpoints.released import save_released
from stllm.models.factory import explicit_settings
from stllm.models.lora import load_adapter, merge_lora
from stllm.processors.prompts import QFORMER_FOLDER

log = logging.getLogger(__name__)

FORMATS = ("stllm", "released")
RECORD = ".conversion"  # in the target: a digest of the command, and the sizes of the files that it wrote


def run(args: argparse.Namespace) -> int:
    """The command: converts, prints the audit, says where the result is. A conversion that is done is not repeated."""
    report = convert(
        args.source,
        args.to,
        cfg_path=args.cfg_path,
        options=args.options,
        format=args.format,
        dtype=args.dtype,
        adapter=args.adapter,
        merge=args.merge_lora,
    )
    if report is None:
        print(f"{args.to} holds the result of this command already ({args.format}); nothing was written")
        return 0
    out = console()
    out.print(report.table())
    for line in report.details():
        out.print(line, soft_wrap=True)
    print(f"written to {args.to} ({args.format})")
    return 0


def convert(
    sources: Sequence[str | Path],
    to: str | Path,
    *,
    cfg_path: str | Path | None = None,
    options: Sequence[str] = (),
    format: str = "stllm",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    merge: bool = False,
) -> AuditReport | None:
    """Puts the sources together (later ones over earlier ones) and writes them to the new folder `to`.

    dtype: auto keeps the type that most of the weights have. adapter: a LoRA adapter's folder, put on top of them.
    merge: adds LoRA to the weights that it adapts. Returns None when `to` holds the result of the same conversion.
    Raises UserError for anything missing or contradictory, for a target
    that is not empty, for a full disk; the target is then as it was.
    """
    assert format in FORMATS
    target = user_path(to)
    record = _read_record(target)
    if record is None:
        check_new(target, "--to")
    opened = open_for_conversion(sources, cfg_path, options)
    files = [*(source.path for source in opened.sources), *([] if adapter is None else [Path(adapter)])]
    command = _digest([_sizes(path, times=True) for path in files], opened.settings, format, dtype, merge)
    if record is not None:
        if record["command"] == command and record["files"].items() <= _sizes(target).items():
            return None
        check_new(target, "--to")
    processor = processor_of(opened)
    kind: str | torch.dtype = stored_dtype(opened.sources) if dtype == "auto" else dtype
    model, report = assemble(opened.config, opened.sources, device="cpu", dtype=kind)
    if adapter is not None:
        load_adapter(model, adapter)
    if merge:
        if model.config.lora is None:
            raise UserError(f"{' + '.join(map(str, sources))} has no LoRA to merge: leave out --merge-lora")
        merge_lora(model)  # the released layout, which has no place for LoRA, always does
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with new_folder(target, needed) as folder:
        if format == "released":
            save_released(model, folder)
        else:
            model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _copy_sentencepiece(opened.sources, folder)
        (folder / RECORD).write_text(json.dumps({"command": command, "files": _sizes(folder)}), encoding="utf-8")
    return report


def open_for_conversion(paths: Sequence[str | Path], cfg_path: str | Path | None, options: Sequence[str]) -> Opened:
    """Opens the sources, and before them the pieces that the configuration names, unless one is a whole model."""
    settings = explicit_settings(cfg_path, options)
    places = [locate(path) for path in paths]
    if len(places) == 1:
        sources = open_checkpoint(places[0], settings)
    else:
        sources = open_pieces(places, settings)
        if not any(source.is_whole_model for source in sources):
            sources = open_named(settings, *places)
    return Opened(places[-1], sources, settings, decide_config(sources, settings))


def stored_dtype(sources: Sequence[Source]) -> torch.dtype:
    """The floating-point type of most of the weights."""
    sizes: Counter[torch.dtype] = Counter()
    for source in sources:
        for spec in source.weights.specs.values():
            if spec.dtype in (torch.float32, torch.float16, torch.bfloat16):
                sizes[spec.dtype] += torch.Size(spec.shape).numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def _read_record(folder: Path) -> dict[str, Any] | None:
    """The record in the folder; None where there is none that a conversion wrote."""
    try:
        record = loads((folder / RECORD).read_text(encoding="utf-8"))
        return {"command": str(record["command"]), "files": dict(record["files"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _sizes(place: Path, *, times: bool = False) -> dict[str, Any]:
    """The sizes of a file, or of a checkpoint folder's files, by their paths relative to it.

    times: by absolute paths, with the time when each file was last changed beside its size.
    """
    paths = [place, *place.glob("*"), *place.glob(f"{QFORMER_FOLDER}/*")]
    found = {path: path.stat() for path in paths if path.is_file()}
    if times:
        return {str(path.absolute()): [status.st_size, status.st_mtime_ns] for path, status in found.items()}
    return {str(path.relative_to(place)): status.st_size for path, status in found.items()}


def _copy_sentencepiece(sources: Sequence[Source], folder: Path) -> None:
    """The sentencepiece file as well, for libraries that read no tokenizer.json."""
    for source in reversed(sources):
        file = source.path / "tokenizer.model"
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
            return
