"""The same benchmark under other views and with rotated options."""

from collections import Counter

from stllm.common.registry import templates
from stllm.evaluation.benchmarks.base import Loaded
from stllm.evaluation.probes.permutation import num_rotations, rotated
from stllm.evaluation.probes.temporal import viewed
from stllm.media.views import VIEWS
from stllm.processors.templates import PromptTemplate
from tests.helpers.benchmarks import choice_benchmark, choice_item, letter_of, lines_of

MIXED = choice_benchmark([choice_item(0), choice_item(1), choice_item(0, "Object Existence", ("yes", "no"))])


def test_views_change_the_media_alone() -> None:
    for view in VIEWS:
        variant = viewed(MIXED, view)
        for item, original in zip(variant.items, MIXED.items, strict=True):
            assert item.media and item.media.view == view
            assert (item.id, item.candidates, item.media.path) == (
                original.id,
                original.candidates,
                original.media and original.media.path,
            )


def test_every_option_visits_every_letter_once() -> None:
    variants: list[Loaded] = [MIXED, *(rotated(MIXED, places) for places in range(1, num_rotations(MIXED)))]
    assert [len(variant.items) for variant in variants] == [3, 3, 2, 2]
    places = Counter(
        (item.id, option, letter)
        for variant in variants
        for item in variant.items
        for letter, option in enumerate(item.candidates)
    )
    assert set(places.values()) == {1} and len(places) == 4 * 4 + 4 * 4 + 2 * 2
    assert variants[1].items[0].candidates == ("down", "left", "right", "up")


def test_prompts_and_scores_are_of_the_rotated_options() -> None:
    template: PromptTemplate = templates.get("instructblip")
    variant = rotated(MIXED, 1)
    prompt = "".join(variant.requests(variant.items[0], template)[0].pieces or ())
    assert "(A) down\n(B) left\n(C) right\n(D) up\n" in prompt
    lines = lines_of(variant, lambda item: letter_of(item, item.answer))
    assert lines[0]["prediction"] == "(D) up" and lines[0]["gold"] == "(D) up"
    assert variant.benchmark.summary(lines)["strict"]["average"] == 100.0
    assert variant.benchmark.official(variant.items, lines)[""]["acc_dict"]["Moving Direction"] == [2, 2]
