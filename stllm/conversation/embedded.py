"""The model that comes with the package: what answers when no checkpoint was named."""

from pathlib import Path

from stllm.common.errors import UserError

FOLDER = Path(__file__).parents[1] / "assets" / "stllm-tiny"


def default_checkpoint() -> Path:
    """The embedded model's folder. Raises UserError where this installation has none."""
    if not (FOLDER / "config.json").is_file():
        raise UserError("no checkpoint was named: give one with --ckpt-path")
    return FOLDER
