"""Option permutations: their items, and their verdicts on models that use the options or always choose a letter."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from stllm.common.registry import templates
from stllm.evaluation.benchmarks.base import Item, Loaded
from stllm.evaluation.probes.permutation import bars, probe_scores, report, variants
from stllm.evaluation.reports.tables import bars_figure
from stllm.processors.templates import PromptTemplate
from tests.helpers.benchmarks import choice_benchmark, choice_item, letter_of, lines_of

OTHER = "Object Existence"
MIXED = choice_benchmark([choice_item(0), choice_item(1), choice_item(0, "Object Existence", ("yes", "no"))])
YES_NO = choice_benchmark(
    [*map(choice_item, range(40)), *(choice_item(number, OTHER, ("yes", "no")) for number in range(20))]
)


def permuted(answer: Callable[[Item], str | None], benchmark: Loaded = YES_NO) -> Mapping[str, Any]:
    return probe_scores({name: lines_of(variant, answer) for name, variant in variants(benchmark).items()})


def test_always_answering_a_is_reported_as_favouring_a() -> None:
    scores = permuted(lambda item: "A")
    assert scores["items"] == {"0": 60, "1": 60, "2": 40, "3": 40}
    assert scores["accuracy"] == {
        "0": pytest.approx(100 * 20 / 60),
        "1": pytest.approx(100 * 20 / 60),
        "2": 25.0,
        "3": 25.0,
    }
    share_of_a = 100 * (40 + 20) / 200  # each answer is A once
    assert scores["mean"] == share_of_a == scores["letters"]["gold"]["A"] == scores["letters"]["even"]["A"]
    assert scores["letters"]["chosen"] == {"A": 100.0, "B": 0.0, "C": 0.0, "D": 0.0, "none": 0.0}
    assert scores["right under all"] == 0.0 and scores["right under any"] == 100.0
    assert scores["same text under all"] == 0.0
    assert scores["letters"]["chi-square"] == pytest.approx(60 * ((1 - 0.3) ** 2 / 0.3 + 0.3 + 2 * 0.2))  # 60 draws
    assert scores["verdict"].startswith(
        "The model favours A: 100.0% of the 200 predictions that name one, 30.0% if even"
    )


def test_a_model_that_reads_the_options_favours_no_letter() -> None:
    scores = permuted(lambda item: letter_of(item, item.answer))
    assert scores["mean"] == scores["right under all"] == scores["same text under all"] == 100.0
    assert scores["letters"]["chi-square"] == 0.0 and scores["letters"]["p"] == 1.0
    assert scores["verdict"].startswith("No sign that the model favours a letter")


def test_consistency_compares_texts_not_correctness() -> None:
    scores = permuted(lambda item: letter_of(item, "down" if "down" in item.candidates else "no"))
    assert scores["same text under all"] == 100.0
    assert scores["right under all"] == scores["right under any"] == pytest.approx(100 * 20 / 60)


def test_an_empty_answer_names_no_letter() -> None:
    scores = permuted(lambda item: "")
    assert scores["mean"] == 0.0 and scores["official"]["0"] == 100.0  # how far the official rule is inflated
    assert scores["letters"]["chosen"]["none"] == 100.0 and scores["same text under all"] == 0.0
    assert scores["verdict"] == "Nothing can be said about letters: no prediction names an option."


def test_items_with_a_failed_rotation_are_left_out_of_consistency() -> None:
    failing = lambda item: None if item.id.endswith("/1") and item.candidates[0] in ("up", "yes") else "A"  # noqa: E731
    scores = permuted(failing)
    assert scores["failed"] == 2 and scores["complete"] == 58
    assert "nan" not in report("toy", permuted(lambda item: None)).lower()
    json.dumps(permuted(lambda item: None), allow_nan=False)


def test_no_items_at_all_give_no_nan() -> None:
    empty = choice_benchmark([])
    assert list(variants(empty)) == ["rotated0"]
    scores = permuted(lambda item: "A", empty)
    assert scores["mean"] is None
    json.dumps(scores, allow_nan=False)
    assert bars_figure(bars(scores)).axes


def test_the_report_shows_letters() -> None:
    text = report("toy", permuted(lambda item: "A"))
    assert (
        "| letter | predictions % | answers % | even share % |\n"
        "| ------ | ------------: | --------: | -----------: |\n"
        "| A      |         100.0 |      30.0 |         30.0 |\n"
        "| B      |           0.0 |      30.0 |         30.0 |\n"
        "| C      |           0.0 |      20.0 |         20.0 |\n"
        "| D      |           0.0 |      20.0 |         20.0 |\n"
        "| none   |           0.0 |         – |            – |\n"
    ) in text
    drawn = bars_figure(bars(permuted(lambda item: "A"))).axes[0].containers[0]
    assert [bar.get_width() for bar in drawn] == [100.0, 0.0, 0.0, 0.0, 0.0]


def test_every_option_has_every_letter_once() -> None:
    found = variants(MIXED)
    assert [len(variant.items) for variant in found.values()] == [3, 3, 2, 2]
    places = Counter(
        (item.id, option, letter)
        for variant in found.values()
        for item in variant.items
        for letter, option in enumerate(item.candidates)
    )
    assert set(places.values()) == {1} and len(places) == 4 * 4 + 4 * 4 + 2 * 2
    assert found["rotated1"].items[0].candidates == ("down", "left", "right", "up")


def test_prompts_and_scores_use_the_rotated_options() -> None:
    template: PromptTemplate = templates.get("instructblip")
    variant = variants(MIXED)["rotated1"]
    prompt = "".join(variant.requests(variant.items[0], template)[0].pieces or ())
    assert "(A) down\n(B) left\n(C) right\n(D) up\n" in prompt
    lines = lines_of(variant, lambda item: letter_of(item, item.answer))
    assert lines[0]["prediction"] == "(D) up" and lines[0]["gold"] == "(D) up"
    assert variant.benchmark.summary(lines)["strict"]["average"] == 100.0
    assert variant.benchmark.official(variant.items, lines)[""]["acc_dict"]["Moving Direction"] == [2, 2]
