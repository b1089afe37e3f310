"""Prompt templates: each rendered conversation equals its snapshot, so a change is a visible diff."""

import json
from pathlib import Path

import pytest

from stllm.common.registry import templates
from stllm.processors.templates import BOS, VISUAL, Turn

SNAPSHOTS = Path(__file__).parents[1] / "snapshots" / "prompts.json"
CASES = {
    "question": ([Turn("What happens?")], "video", ""),
    "image": ([Turn("What is this?")], "image", ""),
    "instruction": ([Turn("What happens?", instruction="Answer briefly.")], "video", ""),
    "system": ([Turn("What happens?")], "video", None),
    "two turns": ([Turn("What happens?", "A dog runs."), Turn("And then?")], "video", None),
    "text alone": ([Turn("Who are you?")], None, ""),
    "braces": ([Turn("What does {text} say?")], "video", ""),
}


def rendered(name: str) -> dict[str, list[list[str]]]:
    template = templates.get(name)
    out = {}
    for case, (turns, media, system) in CASES.items():
        sentence = template.system if system is None else system
        out[case] = [
            template.render(turn, first=number == 0, media=media, system=sentence) for number, turn in enumerate(turns)
        ]
    return out


@pytest.mark.parametrize("name", templates.names())
def test_rendered_prompts_equal_their_snapshots(name: str) -> None:
    assert rendered(name) == json.loads(SNAPSHOTS.read_text())[name]


def test_templates_contain_the_published_strings() -> None:
    question = [Turn("which object appears after the green triangle")]
    blip = templates.get("instructblip").render(question[0], first=True, media="video")
    assert blip == [VISUAL, BOS, "###Human: which object appears after the green triangle ###Assistant: "]
    mini = templates.get("minigpt4").render(question[0], first=True, media="video")
    assert mini[:3] == [BOS, "###Human: <Video>", VISUAL]
    assert mini[3] == "</Video> which object appears after the green triangle ###Assistant: "


def test_the_qformer_reads_instruction_and_question() -> None:
    turn = Turn("What happens?", instruction="Answer briefly.")
    assert templates.get("instructblip").text(turn) == "Answer briefly. What happens?"
    assert templates.get("instructblip").text(Turn("What happens?")) == "What happens?"
