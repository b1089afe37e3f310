"""`stllm chat` under its published name: python demo.py --ckpt-path DIR --video clip.mp4 --question "..."."""

import sys

from stllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
