"""The model in the package: it loads, answers its examples, and uses the order of frames."""

import io
import json
import sys
from typing import Any

import pytest

from stllm.cli import main
from stllm.conversation.chat import EXAMPLES, FOLDER, Chat, load_chat
from stllm.conversation.requests import Media, Request
from stllm.evaluation.benchmarks.mvbench import prompt_pieces
from stllm.media.views import FORWARD, REVERSED
from stllm.processors.templates import SYSTEM, Turn, question_block

LISTED = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))
TURNED = {"left": "right", "right": "left", "up": "down", "down": "up"}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat(FOLDER, device="cpu")


def test_the_embedded_model_is_small_and_of_the_published_family(chat: Chat) -> None:
    config = chat.model.config
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 12e6
    assert not config.qformer_text_input and config.template == "instructblip"
    assert (config.video_input, config.residual_size, chat.num_frames) == ("residual", 8, 8)  # so all of 8 frames enter


@pytest.mark.parametrize("example", LISTED, ids=lambda example: str(example["file"]))
def test_the_embedded_model_answers_the_examples(chat: Chat, example: dict[str, Any]) -> None:
    assert chat.ask(EXAMPLES / example["file"], example["question"]).text == example["answer"]


def test_chat_without_any_option_answers_the_examples(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["chat", "--device", "cpu"]) == 0
    said = [f"{EXAMPLES / entry['file']}\n  {entry['question']}\n  > {entry['answer']}\n" for entry in LISTED]
    assert capsys.readouterr().out == "".join(said)


def test_lines_from_a_pipe_are_answered_without_the_examples(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    first = LISTED[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/video {EXAMPLES / first['file']}\n{first['question']}\n"))
    assert main(["chat", "--device", "cpu"]) == 0
    assert capsys.readouterr().out == first["answer"] + "\n"


def test_the_examples_folder_contains_only_listed_files() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} == {"examples.json", *(example["file"] for example in LISTED)}


def test_reversed_clips_have_the_opposite_direction(chat: Chat) -> None:
    moving = [example for example in LISTED if example["answer"] in TURNED]
    assert moving
    for example in moving:
        path, question = EXAMPLES / example["file"], example["question"]
        forward, backwards = (chat.ask(path, question, view=view).text for view in (FORWARD, REVERSED))
        assert backwards == TURNED[forward]


def test_first_and_last_are_exchanged_on_reversed_clips(chat: Chat) -> None:
    acting = [example for example in LISTED if example["question"].endswith((" first?", " last?"))]
    assert acting
    for example in acting:
        said, other = ("first", "last") if "first" in example["question"] else ("last", "first")
        turned = example["question"].replace(said, other)
        assert chat.ask(EXAMPLES / example["file"], turned, view=REVERSED).text == example["answer"]


def test_answers_do_not_depend_on_the_options_letter(chat: Chat) -> None:
    """Ask with MVBench's prompt and with each rotation of the options."""
    for example in LISTED:
        options = example["candidates"]
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            block = question_block(example["question"], turned)
            pieces = prompt_pieces(block, SYSTEM, chat.processor.template)
            request = Request((Turn(block),), media=Media(str(EXAMPLES / example["file"])), pieces=pieces)
            letter = chr(ord("A") + turned.index(example["answer"]))
            assert chat.answer([request], chat.decoding)[0].text == f"{letter}) {example['answer']}"
