"""The commands of `stllm` by name: their options and where they live. Standard library only: --help is quick."""

from stllm.commands import benchmarking, chat, checkpoints, data, demo, judging, serving, training
from stllm.commands.command import Command

COMMANDS: dict[str, Command] = {
    **chat.COMMANDS,
    **demo.COMMANDS,
    **serving.COMMANDS,
    **training.COMMANDS,
    **checkpoints.COMMANDS,
    **data.COMMANDS,
    **benchmarking.COMMANDS,
    **judging.COMMANDS,
}
