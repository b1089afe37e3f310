"""`stllm demo` on the command line: what `demo_gradio.py` is."""

from stllm.commands.command import EMBEDDED, Command, Parser, add_checkpoint, add_config
from stllm.common.arguments import number, whole


def _demo_options(parser: Parser) -> None:
    add_checkpoint(parser, EMBEDDED)
    add_config(parser, "what the checkpoint says")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=whole(1, 65535), default=7860, metavar="N", help="(default: 7860)")
    parser.add_argument(
        "--num-frames", type=whole(1), metavar="N", help="frames at first (default: 64 if residual, else 16)"
    )
    limits = parser.add_argument_group("limits of one user")
    limits.add_argument("--max-file-mb", type=whole(1), default=256, metavar="N", help="of an upload (default: 256)")
    limits.add_argument(
        "--max-seconds", type=number(1), default=1800.0, metavar="S", help="a video's length (default: 1800)"
    )
    limits.add_argument(
        "--queue-size", type=whole(1), default=32, metavar="N", help="requests that may wait (default: 32)"
    )


COMMANDS = {
    "demo": Command(
        help="serves a page in which to talk with videos",
        target="stllm.web.command:run",
        add_options=_demo_options,
        example="stllm demo --ckpt-path DIR --port 7860",
    ),
}
