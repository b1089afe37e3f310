"""The commands of `stllm`, one file each: options, checks that argparse cannot do, and the function `run`."""
