"""ST-LLM in lmms-eval: runs of the real package on a local task with toy clips. Skipped if it is not installed.

pip install ".[lmms-eval]" && pytest tests/evaluation/test_lmms_eval_model.py
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stllm.common.errors import UserError
from stllm.conversation.chat import load_chat
from stllm.conversation.decoding import Decoding
from stllm.conversation.requests import Prepared
from stllm.toy.media import write_video
from stllm.toy.tasks import FPS, TASKS, World, state_change

pytest.importorskip("lmms_eval", reason='lmms-eval is not installed: pip install ".[lmms-eval]"')

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks.mvbench.utils import mcq_acc, mvbench_aggregate_results

from stllm.evaluation.lmms_eval_model import UNANSWERED, STLLMForHarness, cut, settings_of
from stllm.evaluation.scores import official_match, strict_match

CHECKPOINT = Path(__file__).parents[1] / "golden" / "minigpt4_plain_all"
USUAL = Decoding(num_beams=5, max_new_tokens=300, repetition_penalty=1.5)
SHORT: dict[str, Any] = {"max_new_tokens": 4}
TASK = """
task: toy_state
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 6, num_beams: 1, do_sample: false, until: ["\\n\\n"]}}
metric_list:
  - {{metric: says_it, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
def visual(doc):
    return [doc["path"]]

def text(doc):
    return doc["question"]

def results(doc, results):
    return {"says_it": float(doc["answer"] in results[0])}
"""


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return questions about two toy clips, with the clips' paths."""
    folder, task = tmp_path_factory.mktemp("clips"), next(task for task in TASKS if task.make is state_change)
    found = []
    for index in range(2):
        example, frames, _ = World(seed=5, num_frames=16).clip(task, "test", index)
        write_video(folder / f"{index}.mp4", frames, FPS)
        asked = example.turns[0]
        found.append({"path": str(folder / f"{index}.mp4"), "question": asked.question, "answer": asked.answer})
    return found


@pytest.fixture(scope="module")
def model() -> STLLMForHarness:
    return STLLMForHarness(pretrained=str(CHECKPOINT), device="cpu", batch_size="2", num_frames="4")


def ask(model: STLLMForHarness, conversations: Sequence[Any], *settings: dict[str, Any]) -> list[str]:
    """Return answers to messages, requested as lmms-eval does: requests refer to documents of a task."""
    model.task_dict = {"toy": {"test": conversations}}
    settings = settings or (SHORT,) * len(conversations)
    requests = [
        SimpleNamespace(args=("", lambda messages: messages, asked, number, "toy", "test"))
        for number, asked in enumerate(settings)
    ]
    return model.generate_until(requests)


def says(text: str, *visuals: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [*visuals, {"type": "text", "text": text}]}


def shows(url: Any, kind: str = "video", **part: float) -> dict[str, Any]:
    return {"type": kind, "url": url, **part}


@pytest.mark.slow
def test_a_whole_run_of_the_real_command(documents: list[dict[str, Any]], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    gone = {**documents[0], "path": str(tmp_path / "gone.mp4")}
    (tasks / "data.json").write_text(json.dumps([*documents, gone]))
    (tasks / "utils.py").write_text(UTILS)
    (tasks / "toy_state.yaml").write_text(TASK.format(data=tasks / "data.json"))
    command = [sys.executable, "-m", "lmms_eval", "--model", "st_llm"]
    command += ["--model_args", f"pretrained={CHECKPOINT},num_frames=4"]
    command += ["--tasks", "toy_state", "--include_path", str(tasks), "--batch_size", "2", "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [*command, "--output_path", str(tmp_path / "out"), "--log_samples"],
        capture_output=True,
        text=True,
        env={**os.environ, **offline},
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (results,) = (json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*_results.json"))
    (samples,) = (tmp_path / "out").rglob("*_samples_toy_state.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    chat = load_chat(CHECKPOINT, device="cpu", num_frames=4)
    alone = [chat.ask(one["path"], one["question"], num_beams=1, max_new_tokens=6).text for one in documents]
    expected = [*(text.split("\n\n")[0].strip() for text in alone), UNANSWERED]
    assert [line["filtered_resps"] for line in lines] == expected
    right = [document["answer"] in text for document, text in zip(documents, alone, strict=True)]
    assert results["results"]["toy_state"]["says_it,none"] == sum(right) / len(lines)
    assert f"toy_state, document 2: {gone['path']}: there is no such file" in run.stderr
    assert f"1 of 3 requests could not be answered (toy_state 1): their answer is {UNANSWERED!r}" in run.stderr


def test_lmms_eval_finds_the_model_by_its_entry_point() -> None:
    assert get_model("st_llm") is STLLMForHarness
    assert issubclass(STLLMForHarness, lmms)


def test_batched_answers_of_the_harness_equal_single_ones(
    model: STLLMForHarness, documents: list[dict[str, Any]]
) -> None:
    asked = [[says(one["question"], shows(one["path"]))] for one in documents] + [[says("Who are you?")]]
    alone = [model.chat.ask(one["path"], one["question"], num_beams=1, max_new_tokens=4).text for one in documents] + [
        model.chat.ask(None, "Who are you?", num_beams=1, max_new_tokens=4).text
    ]
    model.batch_size = 3
    assert ask(model, asked) == alone
    assert len(set(alone)) == 3  # they can be told apart


def test_each_request_keeps_its_own_settings(model: STLLMForHarness, documents: list[dict[str, Any]]) -> None:
    conversation = [says("What happens?", shows(documents[0]["path"]))]
    settings = [{"max_new_tokens": 8}, {"max_new_tokens": 2}, {"max_new_tokens": 8, "num_beams": 3}]
    expected = [
        model.chat.ask(documents[0]["path"], "What happens?", num_beams=1, **SHORT | one).text for one in settings[:2]
    ]
    expected.append(model.chat.ask(documents[0]["path"], "What happens?", max_new_tokens=8, num_beams=3).text)
    assert ask(model, [conversation] * 3, *settings) == expected
    word = expected[0].split()[1]
    (cut_short,) = ask(model, [conversation], {"max_new_tokens": 8, "until": [word]})
    assert cut_short == expected[0].split(word)[0]


def test_messages_become_a_conversation(model: STLLMForHarness, documents: list[dict[str, Any]]) -> None:
    path = documents[0]["path"]
    messages = [
        says("Watch it.", role="system"),
        says("First?", shows(path, start_time=1.0, end_time=3.0)),
        says("Red.", role="assistant"),
        says("Then?"),
    ]
    request = model._request(model_messages(messages), Path("unused"))
    assert [(turn.question, turn.answer) for turn in request.turns] == [("First?", "Red."), ("Then?", None)]
    assert request.system == "Watch it." and request.media is not None
    assert (request.media.path, request.media.bounds) == (path, (1.0, 3.0))
    spelled = [says("What?", shows({"path": path, "video_start": 1.0, "video_end": 3.0}))]
    again = model._request(model_messages(spelled), Path("unused"))
    assert (again.media, again.system) == (request.media, model.system)


def test_several_images_become_frames_of_one_video(model: STLLMForHarness, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (3, 28, 28, 3), np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    for number, picture in enumerate(pictures, start=1):
        picture.save(tmp_path / f"{number:05d}.png")
    one, several, file = ask(
        model,
        [
            [says("What?", shows(pictures[0], "image"))],
            [says("What?", *(shows(picture, "image") for picture in pictures))],
            [says("What?", shows(str(tmp_path / "00001.png"), "image"))],
        ],
    )
    wanted = {"num_beams": 1, "max_new_tokens": 4}
    assert one == file == model.chat.ask(tmp_path / "00001.png", "What?", **wanted).text
    assert several == model.chat.ask(tmp_path, "What?", **wanted).text != one


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"num_beams": 1, "max_new_tokens": 300, "temperature": 0.0, "repetition_penalty": 1.5}),
        ({"temperature": 0, "do_sample": False, "top_p": None, "num_beams": 3}, {"num_beams": 3, "temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"max_new_tokens": 16, "repetition_penalty": 1.0}, {"max_new_tokens": 16, "repetition_penalty": 1.0}),
    ],
)
def test_default_generation_settings_of_a_task(given: dict[str, Any], expected: dict[str, Any]) -> None:
    decoding = settings_of(given, USUAL).decoding
    assert {name: getattr(decoding, name) for name in expected} == expected


def test_unknown_generation_settings_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert settings_of({"image_aspect_ratio": "pad", "until": "."}, USUAL).until == (".",)
    assert "image_aspect_ratio" in caplog.text and "until" not in caplog.text


def test_an_answer_is_cut_at_the_first_end_text() -> None:
    assert cut("one. two\n\nthree", ("\n\n", ".", "")) == "one"
    assert cut("one", ("\n",)) == "one"


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([says("What?", shows("a.mp4"), shows("b.mp4"))], "shows video, video at once"),
        ([says("What?", shows("a.wav", "audio"))], "shows audio at once"),
        ([says("What?", shows(3))], "video is a int"),
        ([says("What?"), says("Red.", role="assistant")], "end with no question"),
    ],
)
def test_unsupported_messages_are_refused(model: STLLMForHarness, messages: list[Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ask(model, [messages])


def test_a_failed_request_does_not_stop_the_others(
    model: STLLMForHarness, documents: list[dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "text.mp4").write_text("404: not found")
    picture = Image.new("RGB", (28, 28))
    asked = [
        [says("What?", shows(str(tmp_path / "gone.mp4")))],
        [says("What happens?", shows(documents[0]["path"]))],
        [says("What?", shows(str(tmp_path / "text.mp4")))],
        [says("What?", shows(picture, "image"), shows(str(tmp_path / "gone.png"), "image"))],
        [says(" ", shows(documents[0]["path"]))],
    ]
    right = model.chat.ask(documents[0]["path"], "What happens?", num_beams=1, max_new_tokens=4).text
    with caplog.at_level(logging.WARNING):
        assert ask(model, asked) == [UNANSWERED, right, UNANSWERED, UNANSWERED, UNANSWERED]
    *each, count = [record.getMessage() for record in caplog.records]
    named = (
        ("document 0: ", "gone.mp4"),
        ("document 2: ", "text.mp4"),
        ("document 3: ", "gone.png"),
        ("document 4: ", ""),
    )
    assert len(each) == 4 and all(
        number in line and name in line for (number, name), line in zip(named, each, strict=True)
    )
    assert count.startswith("4 of 5 requests could not be answered (toy 4): ")


def test_a_task_with_missing_media_gives_a_failed_item(model: STLLMForHarness, tmp_path: Path) -> None:
    def messages(document: str) -> list[Any]:
        return [says(f"How many of {len(os.listdir(tmp_path / document))}?")]

    (tmp_path / "there").mkdir()
    model.task_dict = {"toy": {"test": ["there", "gone"]}}
    requests = [SimpleNamespace(args=("", messages, SHORT, number, "toy", "test")) for number in range(2)]
    first, second = model.generate_until(requests)
    assert first != second == UNANSWERED


def test_the_text_for_failed_requests_is_wrong_by_every_rule() -> None:
    options = ["no", "a dog", "zebra", "x", ""]
    for number, letter in enumerate("ABCDE"):
        assert mcq_acc(letter, UNANSWERED) == 0
        assert not official_match(UNANSWERED, f"({letter}) {options[number]}")
        assert not strict_match(UNANSWERED, options[:4], "zebra")
        assert letter not in UNANSWERED.upper()
    assert mvbench_aggregate_results([{"pred_answer": UNANSWERED, "score": 0}, {"pred_answer": "A", "score": 1}]) == 50


def test_the_context_rule_uses_the_tasks_max_new_tokens(
    model: STLLMForHarness,
    documents: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The chat's settings are not used. A cut prompt is reported, and `context=all` cuts nothing."""
    messages = [says("What happens?", shows(documents[0]["path"]))]
    prepared: list[Prepared] = []

    def complete(found: list[Prepared], decoding: Decoding) -> list[Any]:
        prepared.extend(found)
        return [SimpleNamespace(text="") for _ in found]

    monkeypatch.setattr(model.chat, "complete", complete)
    ask(model, [messages], SHORT)
    long = {**SHORT, "max_new_tokens": 2000 - prepared[0].length + 3}
    ask(model, [messages], long)
    assert [one.length for one in prepared] == [prepared[0].length, prepared[0].length - 3]
    assert "toy, document 0: The prompt is long: its first 3 tokens were cut" in caplog.text
    monkeypatch.setattr(model.chat, "decoding", replace(model.chat.decoding, context="all"))
    ask(model, [messages], long)
    assert prepared[2].cut.total == 0
    with pytest.raises(UserError, match="unknown context 'some'"):
        STLLMForHarness(pretrained=str(CHECKPOINT), device="cpu", context="some")


def test_log_likelihoods_are_refused(model: STLLMForHarness) -> None:
    with pytest.raises(UserError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(UserError, match="not for it"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_frame": "4"}, "did you mean 'num_frames'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; expected a whole number"),
        ({"num_frames": "0"}, "num_frames is '0'"),
        ({"pretrained": "nowhere"}, "nowhere"),
    ],
)
def test_wrong_model_arguments_are_refused(arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        STLLMForHarness(**{"pretrained": str(CHECKPOINT), "device": "cpu", **arguments})


def test_the_system_message_can_be_configured(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Look.\n")
    arguments = {"pretrained": str(CHECKPOINT), "device": "cpu"}
    usual = STLLMForHarness(**arguments)
    assert usual.system == usual.chat.processor.template.system != ""
    assert STLLMForHarness(**arguments, system="none").system == ""
    assert STLLMForHarness(**arguments, system=str(tmp_path / "system.txt")).system == "Look."
    usual.clean()
    assert not hasattr(usual, "chat")


def model_messages(messages: list[dict[str, Any]]) -> Any:
    """Return the messages as lmms-eval passes them."""
    return ChatMessages(messages=messages).messages
