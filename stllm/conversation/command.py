"""`stllm chat`: questions on the command line, at an interactive prompt, as a stream, or as JSON lines."""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from stllm.common.errors import UserError
from stllm.conversation.chat import Answer, Chat, Conversation, Media, load_chat

HELP = "Ask about the video. /video PATH takes another, /new begins anew, /quit leaves."


def run(args: argparse.Namespace) -> int:
    """Answers the questions named, or opens the interactive prompt. Raises UserError."""
    if args.ckpt_path is None:
        raise UserError("no checkpoint was named: give one with --ckpt-path DIR")
    path = args.video or args.image
    if path is not None and not Path(path).exists():
        raise UserError(f"{path} was not found: check the path given to --video or --image")
    with _working("loading the model"):
        chat = load_chat(
            args.ckpt_path, cfg_path=args.cfg_path, options=args.options, device=args.device, dtype=args.dtype
        )
    conversation = _begin(chat, args, path)
    if not args.question:
        return _interactive(conversation, args)
    for question in args.question:
        _answer(conversation, question, args)
    return 0


def _begin(chat: Chat, args: argparse.Namespace, path: str | None) -> Conversation:
    return chat.conversation(
        path,
        num_frames=args.num_frames,
        start=args.start,
        end=args.end,
        reader=args.reader or "auto",
        num_beams=args.num_beams,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        stream=args.stream,
    )


def _answer(conversation: Conversation, question: str, args: argparse.Namespace) -> None:
    if args.stream:
        for piece in conversation.stream(question):
            print(piece, end="", flush=True)
        print()
        return
    with _working("looking and answering"):
        answer = conversation.ask(question)
    print(_json_line(answer) if args.json else answer.text, flush=True)


def _json_line(answer: Answer) -> str:
    return json.dumps(
        {
            "video": answer.video,
            "question": answer.question,
            "answer": answer.text,
            "frame_times": [round(seconds, 3) for seconds in answer.frame_times],
            "visual_tokens": answer.visual_tokens,
            "seconds": {stage: round(seconds, 3) for stage, seconds in answer.seconds.items()},
        },
        ensure_ascii=False,
    )


def _interactive(conversation: Conversation, args: argparse.Namespace) -> int:
    """Reads lines until /quit or the end of input; a question that fails leaves the conversation as it was."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        try:
            if line == "/quit":
                return 0
            _obey(conversation, line, args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


def _obey(conversation: Conversation, line: str, args: argparse.Namespace) -> None:
    """One line of the interactive prompt: a command or a question."""
    command, _, rest = line.partition(" ")
    if command == "/new":
        conversation.reset(conversation.media)
    elif command in ("/video", "/image"):
        if not Path(rest.strip()).exists():
            raise UserError(f"{rest.strip() or 'nothing'} was not found: write {command} and the path of a file")
        conversation.reset(Media(path=rest.strip(), num_frames=args.num_frames, reader=args.reader or "auto"))
    elif command.startswith("/"):
        raise UserError(f"{command} is not a command: {HELP}")
    elif line and conversation.media is None:
        raise UserError("there is no video yet: name one with /video PATH")
    elif line:
        _answer(conversation, line, args)


def _working(what: str) -> AbstractContextManager[object]:
    """A spinner on stderr while something takes long, where a person is looking."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(what)
