"""`stllm chat`: questions on the command line, at an interactive prompt, as a stream, or as JSON lines."""

import argparse
import io
import json
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stllm.common.errors import UserError, sentence, unknown_name
from stllm.common.logging import working
from stllm.conversation.chat import Chat, Conversation, load_chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.embedded import FOLDER, chosen_checkpoint, find_examples
from stllm.conversation.evidence import measure_evidence
from stllm.conversation.filmstrip import draw_evidence, filmstrip
from stllm.conversation.requests import Answer, Media, Request

COMMANDS = ("/video", "/image", "/new", "/help", "/quit")
HELP = "Ask about the video. /video PATH or /image PATH takes another, /new begins anew, /quit leaves."


def run(args: argparse.Namespace) -> int:
    """Answers the questions named, or opens the interactive prompt; where nothing is named, examples first.

    Raises UserError.
    """
    checkpoint = chosen_checkpoint(args)
    path = args.video or args.image
    media = None if path is None else _media(path, args, start=args.start, end=args.end)
    Decoding().with_options(**_decoding_options(args))  # a contradiction shows before the model is loaded
    with working("loading the model"):
        chat = load_chat(checkpoint, cfg_path=args.cfg_path, options=args.options, device=args.device, dtype=args.dtype)
    conversation = _begin(chat, args, media)
    if not args.question:
        nothing_named = checkpoint == FOLDER and media is None and args.evidence is None
        return _interactive(conversation, args, examples=nothing_named)
    for question in args.question:
        _answer(conversation, question, args)
    return 0


def _media(path: str, args: argparse.Namespace, *, start: float | None = None, end: float | None = None) -> Media:
    """The medium of that path, looked into. Raises UserError."""
    media = Media(path=path, num_frames=args.num_frames, start=start, end=end, reader=args.reader or "auto")
    with working("looking"):
        media.check()
    return media


def _decoding_options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_beams": args.num_beams,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "context": args.context,
        "stream": args.stream,
    }


def _begin(chat: Chat, args: argparse.Namespace, media: Media | None) -> Conversation:
    conversation = chat.conversation(**_decoding_options(args))
    conversation.reset(media)
    return conversation


def _answer(conversation: Conversation, question: str, args: argparse.Namespace) -> None:
    request = conversation.request(question)
    if args.stream:
        pieces = conversation.stream(question)
        with working("looking and answering"):
            piece = next(pieces, "")
        print(piece, end="", flush=True)
        for piece in pieces:
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
        print(_json_line(answer, evidence), flush=True)


def _evidence(conversation: Conversation, request: Request, args: argparse.Namespace) -> dict[str, Any]:
    """Draws what the last answer rests on, where that was asked for; what there is to say about it."""
    if args.evidence is None or request.media is None:
        return {}
    path, chat = Path(args.evidence), conversation.chat
    if (number := len(conversation.turns)) > 1:
        path = path.with_stem(f"{path.stem}-{number}")
    with working("looking for evidence"):
        answer = conversation.turns[-1].answer
        evidence = measure_evidence(chat, request, answer, decoding=conversation.decoding)
        draw_evidence(path, evidence, filmstrip(request.media, chat.num_frames))
    if evidence.supports:
        seconds = evidence.times[evidence.segments[evidence.peak][0]]
        words = f"most evidence at {seconds:.1f} s, {max(evidence.scores):+.3g} nats"
    elif evidence.matters:
        words = "no part of the video speaks for this answer: leaving any out makes it no less likely"
    else:
        words = f"no part of the video matters to this answer: no difference exceeds {evidence.bound:.2g} nats"
    if evidence.cut:
        words += f" ({len(evidence.cut)} of {len(evidence.segments)} parts were cut from the prompt)"
    print(f"{path}: {words}", file=sys.stderr)
    return {
        "evidence": {
            "figure": str(path),
            "log_probability": round(evidence.log_probability, 4),
            "scores": [round(score, 4) for score in evidence.scores],
            "segments": evidence.segments,
            "matters": evidence.matters,
            "bound": round(evidence.bound, 4),
            "cut": evidence.cut,
        }
    }


def _json_line(answer: Answer, more: Mapping[str, Any]) -> str:
    return json.dumps(
        {
            "video": answer.video,
            "question": answer.question,
            "answer": answer.text,
            "frame_times": [round(seconds, 3) for seconds in answer.frame_times],
            "visual_tokens": answer.visual_tokens,
            "cut_tokens": asdict(answer.cut),
            "seconds": {stage: round(seconds, 3) for stage, seconds in answer.seconds.items()},
            **more,
        },
        ensure_ascii=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"),
    )


def _interactive(conversation: Conversation, args: argparse.Namespace, *, examples: bool) -> int:
    """Reads lines until /quit or the end of input; what fails or is interrupted leaves the conversation as it was.

    A person goes on after an error and leaves with 0; lines from a pipe are all tried, and the code is 1 if one failed.
    examples: shown to a person before the first line, and where no line comes.
    """
    person = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are the engine's to refuse
    if person:
        if examples:
            _show_examples(conversation.chat, args)
        print(HELP, file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401  # `input` gets line editing and a history by it
    failed, asked = False, person
    while (line := _next_line(person)) not in (None, "/quit"):
        failed, asked = failed | (not _succeeds(conversation, line, args)), True
    if examples and not asked:
        _show_examples(conversation.chat, args)
    return int(failed and not person)


def _show_examples(chat: Chat, args: argparse.Namespace) -> None:
    """Answers a question about each clip that comes with the package."""
    for path, question in find_examples():
        if not args.json:
            print(f"{path}\n  {question}", end="\n  > ", flush=True)
        _answer(_begin(chat, args, _media(str(path), args)), question, args)


def _succeeds(conversation: Conversation, line: str, args: argparse.Namespace) -> bool:
    try:
        _obey(conversation, line, args)
    except Exception as error:
        if args.debug or isinstance(error, BrokenPipeError):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return False
    return True


def _next_line(person: bool) -> str | None:
    """The next line, None at the end of input. The prompt goes to the terminal and never among the answers."""
    prompt = "> " if person else ""
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    try:
        return input(prompt).strip()
    except EOFError:
        if person:
            print(file=sys.stderr)
        return None


def _obey(conversation: Conversation, line: str, args: argparse.Namespace) -> None:
    """One line of the interactive prompt: a command or a question. Ctrl-C ends the answer, not the session."""
    command, _, rest = line.partition(" ")
    if command == "/new":
        conversation.reset(conversation.media)
    elif command in ("/video", "/image"):
        conversation.reset(_media(_path(rest.strip()), args))
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif command.startswith("/"):
        raise UserError(unknown_name("command", command, COMMANDS))
    elif line and conversation.media is None:
        raise UserError("there is no video yet: name one with /video PATH")
    elif line:
        try:
            _answer(conversation, line, args)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            print("\ninterrupted; /quit leaves", file=sys.stderr)


def _path(text: str) -> str:
    """A path as typed, or quoted or escaped as a shell would have it (terminals do so with dropped files)."""
    if text and not Path(text).exists():
        with suppress(ValueError):
            words = shlex.split(text)
            if len(words) == 1:
                return words[0]
    return text
