"""The browser demo, `stllm demo` under its published name: python demo_gradio.py --ckpt-path DIR."""

import sys

from stllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
