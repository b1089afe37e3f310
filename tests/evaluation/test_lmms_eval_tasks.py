"""lmms-eval's tasks for TVBench, TempCompass, Vinoground and TOMATO compared with ours. Skipped without lmms-eval.

Tests: equal prompts, our adapter's answers to their documents, and the differences described in docs/evaluation.md.
"""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stllm.common.registry import templates
from stllm.common.schema import EvaluationSettings
from stllm.evaluation.benchmarks.base import Item, load_benchmark
from stllm.evaluation.benchmarks.tempcompass import official_match
from stllm.evaluation.benchmarks.tomato import official_option
from tests.helpers.twins import twins

pytest.importorskip("lmms_eval", reason='lmms-eval is not installed: pip install ".[lmms-eval]"')
pytest.importorskip("cv2", reason="lmms-eval's tomato needs opencv")

from stllm.evaluation.lmms_eval_model import STLLMForHarness

CHECKPOINT = Path(__file__).parents[1] / "golden" / "minigpt4_plain_all"
NAMES = ("tvbench", "tempcompass", "vinoground", "tomato")
REPLIES = (
    *(
        "",
        "A",
        "B",
        "b",
        "B.",
        "B)",
        "(B)",
        "A. one",
        "B. two",
        "Option 2",
        "2.",
        "Sentence B: two",
        "yes",
        "No, it is",
    ),
    *("I think it is B", "Answer is (B)", "Answer is: B", "B: two", "two", "D", "nothing"),
)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Import the tasks' modules, which read environment variables at their import."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return {name: importlib.import_module(f"lmms_eval.tasks.{name}.utils") for name in NAMES}


def items(name: str) -> list[Item]:
    settings = EvaluationSettings(anno_path=str(twins() / name), num_frames=16)
    return [item for item in load_benchmark(name, settings).items if item.media]


def ours(name: str, item: Item) -> str:
    """Return our prompt's text."""
    benchmark = load_benchmark(name, EvaluationSettings(anno_path=str(twins() / name), num_frames=16)).benchmark
    return benchmark.ask(item, templates.get("minigpt4"), "")[0].turns[0].question


def theirs(name: str, tasks: dict[str, Any], item: Item) -> str:
    """Return lmms-eval's prompt text."""
    task, fields = tasks[name], dict(item.fields)
    if name == "tomato":
        return task.tomato_doc_to_text(fields)
    if name == "vinoground":
        task.textscore_dict = task.videoscore_dict = {fields["idx"]: fields}
        return task.vinoground_doc_to_text({"index": f"{fields['idx']}_{item.task}"})
    if name == "tvbench":
        return task.tvbench_doc_to_text(fields)
    part = item.task.replace("-", "_")
    suffixes = {"multi-choice": "\nPlease directly give the best option:", "yes_no": "\nPlease answer yes or no:"}
    suffixes |= {"caption_matching": suffixes["multi-choice"], "captioning": ""}
    return getattr(task, f"tempcompass_doc_to_text_{part}")(fields, {"post_prompt": suffixes})


@pytest.mark.parametrize("name", NAMES[1:])
def test_lmms_evals_prompts_equal_ours(name: str, tasks: dict[str, Any]) -> None:
    for item in items(name):
        asked = ours(name, item)
        if name == "tomato":  # which names no number of frames there, and lacks a space
            asked = asked.replace("with 16 separate frames", "with frames").replace(
                "content. \n\nYou", "content.\n\nYou"
            )
        assert theirs(name, tasks, item) == asked


def test_lmms_evals_prompt_for_tvbench_differs(tasks: dict[str, Any]) -> None:
    item = items("tvbench")[0]
    assert theirs("tvbench", tasks, item).endswith("\nAnswer with the option letter only.")
    assert "Options:\n(A) " in ours("tvbench", item)


@pytest.mark.parametrize("name", NAMES)
def test_our_adapter_answers_lmms_evals_tasks(name: str, tasks: dict[str, Any]) -> None:
    """Ask one document of each task as lmms-eval does; every request is answered."""
    model = STLLMForHarness(pretrained=str(CHECKPOINT), device="cpu", batch_size="2", num_frames="4")
    first = {item.task: item for item in items(name)}.values()
    messages = []
    for item in first:
        assert item.media is not None
        shown = {"type": "video", "url": item.media.path}
        text = {"type": "text", "text": theirs(name, tasks, item)}
        messages.append([{"role": "user", "content": [shown, text]}])
    model.task_dict = {name: {"test": messages}}
    settings = {"max_new_tokens": 3, "temperature": 0, "do_sample": False}
    requests = [
        SimpleNamespace(args=("", lambda found: found, settings, number, name, "test"))
        for number in range(len(messages))
    ]
    answers = model.generate_until(requests)
    assert len(answers) == len(first) and "zxqzxq" not in answers


def test_tempcompass_rules_equal_lmms_evals(tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks["tempcompass"]
    monkeypatch.setattr(task, "get_eval_result", lambda *args, **kwargs: ("judged", -1))

    def rating(item: Item, said: str) -> bool | None:
        doc = {"video_id": "1", "dim": "action", "question": item.questions[0], "answer": item.answer}
        found = getattr(task, f"tempcompass_process_results_{item.task.replace('-', '_')}")(doc, [said])["avg_accuracy"]
        return bool(found["rating"]) if found["match_success"] else None

    asked = {
        "multi-choice": ("Which?\nA. one\nB. two\nC. three", "B. two"),
        "yes_no": ("Is it?", "no"),
        "caption_matching": ("Which?\nOption 1: one\nOption 2: two", "Option 2: two"),
    }
    compared = 0
    for part, (question, answer) in asked.items():
        item = Item("x", part, "x.mp4", None, (question,), answer)
        for said in REPLIES:
            assert official_match(item, said) == rating(item, said), (part, said)
            compared += 1
    sentences = Item(
        "x", "caption_matching", "", None, ("Which?\nSentence A: one\nSentence B: two",), "Sentence B: two"
    )
    for said in REPLIES:
        assert official_match(sentences, said) == rating(sentences, said), said
    assert compared == 63


def test_lmms_eval_accepts_more_replies_for_tomato(tasks: dict[str, Any]) -> None:
    """lmms-eval first applies our official rule and then searches further; if the rule finds a letter, both agree."""
    task, options = tasks["tomato"], ("one", "two", "three")
    letters, by_letter = ["A", "B", "C"], dict(zip("ABC", options, strict=True))
    for said in REPLIES:
        before = task.pre_parser(said, letters, by_letter)
        number = official_option(said, options)
        if before in letters:
            assert number == letters.index(before), said
    assert official_option("B: two", options) == official_option("Answer is (B)", options) == 1  # theirs reads neither
    assert task.parse_multi_choice_response("", letters, by_letter) == "A"
    assert task.parse_multi_choice_response("I think it is B", letters, by_letter) == "B"


def test_an_empty_reply_raises_in_lmms_evals_vinoground(tasks: dict[str, Any]) -> None:
    task, (first, *_) = tasks["vinoground"], items("vinoground")
    result = {"index": first.fields["idx"], "categories": ["all"], "question_type": "text", "pred": ""}
    task.prep_data = lambda: ({first.fields["idx"]: dict(first.fields)}, {})
    with pytest.raises(IndexError):
        task.vinoground_aggregate_results([result])
