"""`stllm chat`: answers questions from the command line or at an interactive prompt, as text, stream or JSON lines."""

import argparse
import io
import json
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stllm.commands.options import Command, Parser, add_beams, add_model, number, path, whole
from stllm.common.errors import UserError, sentence, unknown_name
from stllm.common.logging import working

if TYPE_CHECKING:
    from stllm.conversation.chat import Chat, Conversation
    from stllm.conversation.requests import Media, Request

PROMPT_COMMANDS = ("/video", "/image", "/new", "/help", "/quit")
HELP = (
    "Type a question about the video. /video PATH or /image PATH opens another file, /new starts a new conversation, "
    "/quit ends."
)


def add_options(parser: Parser) -> None:
    media = parser.add_mutually_exclusive_group()
    media.add_argument("--video", type=path, metavar="PATH", help="a video, a gif, or a folder of frames")
    media.add_argument("--image", type=path, metavar="PATH", help="an image")
    parser.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="a question; repeat the option for several questions in one conversation (default: interactive prompt)",
    )
    add_model(parser)
    decoders = "auto, pyav, decord, torchcodec or torchcodec_cuda (default: auto)"
    parser.add_argument("--reader", metavar="NAME", help=f"video decoder: {decoders}")
    parser.add_argument("--start", type=number(0), metavar="SECONDS", help="use the video only from this time on")
    parser.add_argument("--end", type=number(0), metavar="SECONDS", help="use the video only up to this time")
    add_beams(parser, " (default: 5)")
    longest = "maximum length of the answer in tokens (default: 300)"
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N", help=longest)
    sampling = "temperature of sampling; 0: no sampling (default: 0)"
    parser.add_argument("--temperature", type=number(0), metavar="T", help=sampling)
    parser.add_argument(
        "--evidence",
        type=path,
        metavar="PNG",
        help="write a chart that shows how much each part of the video mattered to the answer; the charts of a second "
        "and third question are NAME-2.png and NAME-3.png",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print the answer while it is generated, with 1 beam")
    output.add_argument("--json", action="store_true", help="print one line of JSON per answer")


def check(args: argparse.Namespace) -> str | None:
    if args.question and args.video is None and args.image is None:
        return "a --question needs a --video or an --image to look at"
    if args.evidence and (args.video is None or not args.question):
        return "--evidence needs a --video and a --question"
    if args.evidence and args.engine:
        return "--evidence needs the whole language model here: leave out --engine"
    if args.evidence and not args.evidence.lower().endswith(".png"):
        return f"--evidence {args.evidence}: the chart is a PNG file, name it so"
    if args.start is not None and args.end is not None and args.start >= args.end:
        return f"--start {args.start} must be before --end {args.end}"
    return None


def run(args: argparse.Namespace) -> int:
    """Answer the questions of the command line, or open the interactive prompt. Raises UserError.

    With the default model and no medium, the prompt starts with answers about the example clips.
    """
    from stllm.conversation.chat import FOLDER, chosen_checkpoint, load_chosen
    from stllm.conversation.decoding import Decoding

    checkpoint = chosen_checkpoint(args)
    given = args.video or args.image
    media = None if given is None else _media(given, args, start=args.start, end=args.end)
    Decoding().with_options(**_decoding_options(args))  # raises for contradictory options before the model is loaded
    with working("loading the model"):
        chat = load_chosen(args, checkpoint)
    conversation = _begin(chat, args, media)
    if not args.question:
        nothing_named = checkpoint == FOLDER and media is None and args.evidence is None
        return _interactive(conversation, args, examples=nothing_named)
    for question in args.question:
        _answer(conversation, question, args)
    return 0


def _media(path: str, args: argparse.Namespace, *, start: float | None = None, end: float | None = None) -> "Media":
    """Return the medium for a path after checking it. Raises UserError."""
    from stllm.conversation.requests import Media

    media = Media(path=path, num_frames=args.num_frames, start=start, end=end, reader=args.reader or "auto")
    with working("looking"):
        media.check()
    return media


def _decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("num_beams", "max_new_tokens", "temperature", "context", "stream")}


def _begin(chat: "Chat", args: argparse.Namespace, media: "Media | None") -> "Conversation":
    conversation = chat.conversation(**_decoding_options(args))
    conversation.reset(media)
    return conversation


def _answer(conversation: "Conversation", question: str, args: argparse.Namespace) -> None:
    request = conversation.request(question)
    if args.stream:
        pieces = conversation.stream(question)
        with working("looking and answering"):
            first = next(pieces, "")
        for piece in chain([first], pieces):
            print(piece, end="", flush=True)
        print()
        _evidence(conversation, request, args)
        return
    with working("looking and answering"):
        answer = conversation.ask(question)
    if answer.cut.total:
        print(f"note: {answer.cut}", file=sys.stderr)
    if not args.json:
        print(answer.text, flush=True)
    evidence = _evidence(conversation, request, args)
    if args.json:
        line = {
            "video": answer.video,
            "question": answer.question,
            "answer": answer.text,
            "frame_times": [round(seconds, 3) for seconds in answer.frame_times],
            "visual_tokens": answer.visual_tokens,
            "cut_tokens": asdict(answer.cut),
            "seconds": {stage: round(seconds, 3) for stage, seconds in answer.seconds.items()},
            **evidence,
        }
        ascii_only = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
        print(json.dumps(line, ensure_ascii=ascii_only), flush=True)


def _evidence(conversation: "Conversation", request: "Request", args: argparse.Namespace) -> dict[str, Any]:
    """Draw the evidence for the last answer if --evidence is given. Return its entry for the JSON line, or {}."""
    if args.evidence is None or request.media is None:
        return {}
    from stllm.conversation.evidence import draw_evidence, filmstrip, measure_evidence

    figure, chat = Path(args.evidence), conversation.chat
    if (turns := len(conversation.turns)) > 1:
        figure = figure.with_stem(f"{figure.stem}-{turns}")
    with working("looking for evidence"):
        answer = conversation.turns[-1].answer
        evidence = measure_evidence(chat, request, answer, decoding=conversation.decoding)
        draw_evidence(figure, evidence, filmstrip(request.media, chat.num_frames))
    if evidence.supports:
        seconds = evidence.times[evidence.segments[evidence.peak][0]]
        words = f"most evidence at {seconds:.1f} s, {max(evidence.scores):+.3g} nats"
    elif evidence.matters:
        words = "no part of the video makes this answer more likely: leaving out any part does not make it less likely"
    else:
        words = f"no part of the video matters to this answer: no difference exceeds {evidence.bound:.2g} nats"
    if evidence.cut:
        words += f" ({len(evidence.cut)} of {len(evidence.segments)} parts were cut from the prompt)"
    print(f"{figure}: {words}", file=sys.stderr)
    return {
        "evidence": {
            "figure": str(figure),
            "log_probability": round(evidence.log_probability, 4),
            "scores": [round(score, 4) for score in evidence.scores],
            "segments": evidence.segments,
            "matters": evidence.matters,
            "bound": round(evidence.bound, 4),
            "cut": evidence.cut,
        }
    }


def _interactive(conversation: "Conversation", args: argparse.Namespace, *, examples: bool) -> int:
    """Answer lines from stdin until /quit or the end of input, and return the exit code.

    A failed or interrupted line leaves the conversation unchanged, and the next line is read. At a terminal the exit
    code is 0; otherwise it is 1 if a line failed.
    examples: also answer the example questions: at a terminal before the first line, otherwise only if stdin is empty.
    """
    person = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # text that is not UTF-8 is refused later, with a sentence
    if person:
        if examples:
            _show_examples(conversation.chat, args)
        print(HELP, file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` line editing and a history
    # if answers are redirected, the prompt is printed on stderr
    prompt, to_stdout = "> " if person else "", sys.stdout.isatty()
    failed, asked = False, person
    while True:
        if not to_stdout:
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt if to_stdout else "").strip()
        except EOFError:
            if person:
                print(file=sys.stderr)
            break
        if line == "/quit":
            break
        asked = True
        try:
            _obey(conversation, line, args)
        except Exception as error:
            if args.debug or isinstance(error, BrokenPipeError):
                raise
            print(f"error: {sentence(error)}", file=sys.stderr)
            failed = True
    if examples and not asked:
        _show_examples(conversation.chat, args)
    return int(failed and not person)


def _show_examples(chat: "Chat", args: argparse.Namespace) -> None:
    """Answer a question about each example clip in the package."""
    from stllm.conversation.chat import find_examples

    for clip, question in find_examples():
        if not args.json:
            print(f"{clip}\n  {question}", end="\n  > ", flush=True)
        _answer(_begin(chat, args, _media(str(clip), args)), question, args)


def _obey(conversation: "Conversation", line: str, args: argparse.Namespace) -> None:
    """Run a line of the interactive prompt: a command or a question. Ctrl-C ends the answer, not the session."""
    command, _, rest = line.partition(" ")
    if command == "/new":
        conversation.reset(conversation.media)
    elif command in ("/video", "/image"):
        named = rest.strip()
        if named and not Path(named).exists():  # terminals quote or escape the path of a file dropped on them
            with suppress(ValueError):
                words = shlex.split(named)
                named = words[0] if len(words) == 1 else named
        conversation.reset(_media(named, args))
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif command.startswith("/"):
        raise UserError(unknown_name("command", command, PROMPT_COMMANDS))
    elif line and conversation.media is None:
        raise UserError("there is no video yet: name one with /video PATH")
    elif line:
        try:
            _answer(conversation, line, args)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\ninterrupted; /quit ends the session", file=sys.stderr)


COMMAND = Command(
    help="answers questions about a video or an image",
    example='stllm chat --ckpt-path DIR --video clip.mp4 --question "What happens?"',
    add_options=add_options,
    run=run,
    needs="stllm.conversation.chat",
    check=check,
)
