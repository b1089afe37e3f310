"""Which checkpoint answers: the one that was named, else the tiny model that comes with the package."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from stllm.common.errors import UserError
from stllm.common.jsonl import loads
from stllm.models.settings import explicit_settings

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[1] / "assets" / "stllm-tiny"
EXAMPLES = FOLDER.with_name("examples")  # clips that it answers well
KNOWS = "it knows only the toy world: a few coloured shapes that move, blink and change, in short clips"


def chosen_checkpoint(args: argparse.Namespace) -> str | Path:
    """Of a command with --ckpt-path, --cfg-path and --options. Raises UserError."""
    return args.ckpt_path or explicit_settings(args.cfg_path, args.options).get("ckpt") or default_checkpoint()


def default_checkpoint() -> Path:
    """The embedded model's folder. Raises UserError where this installation has none."""
    if not (FOLDER / "config.json").is_file():
        raise UserError("no checkpoint was named: give one with --ckpt-path DIR, or as model.ckpt of --cfg-path")
    log.info("no checkpoint was named: %s answers; %s, as in %s", FOLDER.name, KNOWS, EXAMPLES)
    return FOLDER


def find_examples() -> Sequence[tuple[Path, str]]:
    """(file, question) of the clips that come with the package, as its examples.json lists them; none without it."""
    listing = EXAMPLES / "examples.json"
    if not listing.is_file():
        return []
    return [(EXAMPLES / entry["file"], entry["question"]) for entry in loads(listing.read_text(encoding="utf-8"))]
