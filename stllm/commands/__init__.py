"""The commands of `stllm`, one a file: its options, what argparse cannot check, and its `run`."""
