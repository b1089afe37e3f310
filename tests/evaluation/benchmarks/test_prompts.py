"""The prompts that benchmarks send, to the byte and to the token: snapshots, and MVBench's words as the protocol's.

After a change that is meant: STLLM_SNAPSHOTS=write pytest tests/evaluation/benchmarks/test_prompts.py
"""

import json
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stllm.common.registry import benchmarks, templates
from stllm.common.schema import EvaluationSettings
from stllm.conversation.requests import Media, Request
from stllm.evaluation.benchmarks.base import Item, Loaded, system_of
from stllm.processors.sequences import VISUAL_TOKEN_ID
from stllm.processors.templates import BOS, VISUAL
from tests.evaluation.benchmarks.test_presets import preset
from tests.processors.test_prompts import FOLDERS
from tests.processors.test_prompts import processor as load_processor

processor = cache(load_processor)
SNAPSHOTS = Path(__file__).parents[2] / "snapshots" / "benchmark_prompts.json"
MEDIA = Media("a.mp4")
QUESTION = "What direction is the red circle moving?"
CHOICE = Item("a/0", "A", "a.mp4", MEDIA, (QUESTION,), "upwards", candidates=("to the left", "upwards", "{it} jumps."))
OPEN = Item("0", "", "a.mp4", MEDIA, (QUESTION,), "upwards")
CHOICES = f"{QUESTION}\nA. to the left\nB. upwards"
CAPTIONS = "Which caption matches the video better?\nCaption A: It goes left.\nCaption B: It goes upwards."
GUESS = replace(CHOICE, media=Media("a.mp4", num_frames=16))
BOTH = Item("consistency/0", "consistency", "a.mp4", MEDIA, (QUESTION, "Which way does it go?"), "upwards")

TEMPCOMPASS = (
    ("multi-choice", CHOICES),
    ("yes_no", QUESTION),
    ("caption_matching", CAPTIONS),
    ("captioning", "Say it."),
)
ITEMS: dict[str, tuple[Item, ...]] = {
    "mvbench": (CHOICE,),
    "tvbench": (CHOICE,),
    "vcgbench": (BOTH,),
    "tomato": (GUESS,),
    "vinoground": (replace(OPEN, questions=(CHOICES,)),),
    "tempcompass": tuple(replace(OPEN, task=task, questions=(text,)) for task, text in TEMPCOMPASS),
}


def benchmark(name: str, **changed: Any) -> tuple[Loaded, Item]:
    """Return a benchmark with its published settings and without files, and an item of it."""
    settings = EvaluationSettings(**{**preset(name), **changed})
    items = ITEMS.get(name, (OPEN,))
    return Loaded(benchmarks.get(name), items, system=system_of(settings)), items[0]


@cache
def sent(name: str, family: str) -> list[dict[str, Any]]:
    """Return for each request the prompt's pieces, their ids, and the Q-Former's text."""
    reader = processor(family)
    asking, _ = benchmark(name)
    return [
        {
            "pieces": pieces(request, family),
            "ids": ids(request, family),
            "qformer": reader.template.text(request.turns[0]),
        }
        for item in asking.items
        for request in asking.requests(item, reader.template)
    ]


def pieces(request: Request, family: str) -> list[str]:
    if request.pieces is not None:
        return list(request.pieces)
    template = templates.get(family)
    system = template.system if request.system is None else request.system
    return template.render(request.turns[0], first=True, media="video", system=system)


def ids(request: Request, family: str) -> list[int]:
    reader = processor(family)
    if request.pieces is not None:
        return reader.piece_ids(request.pieces)
    return reader.prompt_ids(request.turns, media="video", system=request.system)


def test_prompts_equal_their_snapshots() -> None:
    now = {
        name: {
            family: [{**one, "ids": " ".join(map(str, one["ids"]))} for one in sent(name, family)] for family in FOLDERS
        }
        for name in benchmarks.names()
    }
    if os.environ.get("STLLM_SNAPSHOTS") == "write":
        SNAPSHOTS.write_text(json.dumps(now, indent=1, ensure_ascii=False) + "\n")
    assert now == json.loads(SNAPSHOTS.read_text())


def test_mvbench_prompts_have_the_published_wording() -> None:
    block = f"Question: {QUESTION}\nOptions:\n(A) to the left\n(B) upwards\n(C) {{it}} jumps."
    system = (
        "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
        "objects, and the action and pose of persons. Based on your observations, select the best option that "
        "accurately addresses the question.\n"
    )
    ending = f"{system}{block}\nOnly give the best option.\n###Assistant: Best option:("
    (published,) = sent("mvbench", "instructblip")
    assert published["pieces"] == [VISUAL, BOS, f"###Human: {ending}"]
    assert published["qformer"] == block
    (ours,) = sent("mvbench", "minigpt4")
    assert ours["pieces"] == [BOS, "###Human: <Video>", VISUAL, f"</Video> {ending}"]


@pytest.mark.parametrize("name", benchmarks.names())
def test_system_messages_are_the_published_ones(name: str) -> None:
    for family in FOLDERS:
        for prompt in sent(name, family):
            text = "".join(prompt["pieces"])
            assert (templates.get(family).system in text) == (name in ("vcgbench", "activitynet"))
            assert text.count("###Human: ") == text.count("###Assistant: ") == text.count(VISUAL) == 1
            assert prompt["ids"].count(VISUAL_TOKEN_ID) == 1


@pytest.mark.parametrize("name", benchmarks.names())
def test_a_custom_or_empty_system_message_is_used(name: str) -> None:
    for family in FOLDERS:
        for system, count in (("Look closely.", 1), ("", 0), (None, 0)):
            asking, item = benchmark(name, system=system)
            for request in asking.requests(item, templates.get(family)):
                text = "".join(pieces(request, family))
                assert text.count("Look closely.") == count and "attention" not in text and "VideoContent" not in text
                if system and name in ("mvbench", "tvbench"):
                    assert f"Look closely.\nQuestion: {QUESTION}" in text


def test_pieces_are_tokenized_separately() -> None:
    """Texts before and after the visual tokens are tokenized separately; BOS and the visual block become their ids."""
    for family in FOLDERS:
        reader = processor(family)
        (prompt,) = sent("mvbench", family)
        expected: list[int] = []
        for piece in prompt["pieces"]:
            special = {VISUAL: VISUAL_TOKEN_ID, BOS: reader.bos_token_id}.get(piece)
            expected += [special] if special is not None else reader.tokenizer.encode(piece, add_special_tokens=False)
        assert prompt["ids"] == expected


def test_a_custom_prompt_must_mark_the_video() -> None:
    turns = benchmark("mvbench")[0].requests(CHOICE, templates.get("minigpt4"))[0].turns
    with pytest.raises(AssertionError):
        Request(turns=turns, media=MEDIA, pieces=(BOS, "no video")).check()
    with pytest.raises(AssertionError):
        Request(turns=turns, pieces=(BOS, VISUAL)).check()
