"""`stllm convert SOURCE... --to DIR`: weights of any known layout to ours, and to the released layout.

Everything is written into a temporary folder beside the target and renamed at the end: a target is whole or not there.
"""

import argparse
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder
from stllm.models.checkpoints.assembly import assemble
from stllm.models.checkpoints.audit import AuditReport
from stllm.models.checkpoints.deciding import decide_config, open_checkpoint, open_named, open_pieces
from stllm.models.checkpoints.formats import Source, locate
from stllm.models.checkpoints.loading import Opened, processor_of
from stllm.models.checkpoints.released import save_released
from stllm.models.factory import explicit_settings
from stllm.models.lora import load_adapter, merge_lora

log = logging.getLogger(__name__)

FORMATS = ("stllm", "released")


def run(args: argparse.Namespace) -> int:
    """The command: converts, prints the audit, says where the result is."""
    from rich.console import Console

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
    console = Console()
    console.print(report.table())
    for line in report.details():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
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
) -> AuditReport:
    """Puts the sources together (later ones over earlier ones) and writes them to the new folder `to`.

    dtype: auto keeps the type that most of the weights have. adapter: a LoRA adapter's folder, put on top of them.
    merge: adds LoRA to the weights that it adapts. Raises UserError for anything missing or contradictory, for a target
    that is not empty, for a full disk; the target is then as it was.
    """
    assert format in FORMATS
    target = Path(to).expanduser()
    check_new(target, "--to")
    opened = open_for_conversion(sources, cfg_path, options)
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


def _copy_sentencepiece(sources: Sequence[Source], folder: Path) -> None:
    """The sentencepiece file as well, for libraries that read no tokenizer.json."""
    for source in reversed(sources):
        file = source.path / "tokenizer.model"
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
            return
