"""The result files of a run: their exact content, and charts that agree with the tables."""

import json
import platform
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from stllm.evaluation import results
from stllm.evaluation.benchmarks.base import Item, Loaded, Record
from stllm.evaluation.published import MVBENCH_TASKS
from stllm.evaluation.reports.tables import bars_figure
from stllm.evaluation.results import Outcome, run_bars, versions
from tests.helpers.benchmarks import choice_benchmark, choice_item, judged_benchmark, letter_of, lines_of

ABOUT: dict[str, Any] = {
    "settings": {"num_frames": 0},
    "digests": {"config": "c0ffee", "prompts": "decade", "checkpoint": "facade"},
    "seconds": 1.23456,
}
VERSIONS = {"stllm": "0.1.0", "python": "3.11.0", "torch": "2.14.1"}
POSE = {"Fine-grained Pose": "its 3 videos are not in nturgbd"}
EXPECTED_MD = """\
# toy

| average                                   | strict % | 95% interval | right/items | official % |  95% interv\
al | right/items |
| ----------------------------------------- | -------: | -----------: | ----------: | ---------: | -----------\
-: | ----------: |
| ours, over answered                       |     60.0 |              |         3/5 |       80.0 |            \
   |         4/5 |
| ours, over all asked, failed ones wrong   |     50.0 | 0.0 to 100.0 |         3/6 |       66.7 | 32.2 to 100\
.0 |         4/6 |
| the rule could read, % of answered        |     80.0 |              |             |          – |            \
   |             |
| chance                                    |     25.0 |              |             |       25.0 |            \
   |             |
| ST-LLM, published (20 tasks)              |        – |              |             |       54.9 |            \
   |             |
| ST-LLM, published, the 2 tasks asked here |        – |              |             |       42.8 |            \
   |             |

Items: 9 in all; 5 answered, 1 failed, 3 excluded with their tasks. Intervals: over all asked; clustered by video \
where one has several questions, else Wilson's. Published figures: arXiv 2404.00308, by the official rule, on \
MVBench's own clips. Published figures have no interval.

## Tasks

| task              |    items | failed | strict | strict, all | 95% interval | official | official, all | 95%\
 interval | ST-LLM, published |
| ----------------- | -------: | -----: | -----: | ----------: | -----------: | -------: | ------------: | ---\
--------: | ----------------: |
| Moving Direction  |        4 |      1 |   66.7 |        50.0 | 15.0 to 85.0 |    100.0 |          75.0 | 30.\
1 to 95.4 |              42.5 |
| State Change      |        2 |      0 |   50.0 |        50.0 |  9.5 to 90.5 |     50.0 |          50.0 |  9.\
5 to 90.5 |              43.0 |
| Fine-grained Pose | excluded |      – |      – |           – |            – |        – |             – |    \
        – |              44.5 |

Percent over answered items, and over all items asked with failed ones wrong.

## Excluded tasks

| task              | why                             |
| ----------------- | ------------------------------- |
| Fine-grained Pose | its 3 videos are not in nturgbd |

## Failed items

| task             | cause                 | items              | failed |
| ---------------- | --------------------- | ------------------ | -----: |
| Moving Direction | the file is cut short | moving_direction/2 |      1 |

## Items that the two rules score differently: 1

The official rule compares the first words of the prediction and of the answer, and counts the prediction as right \
if one word is part of the other. So an empty prediction, or one that is only a bracket, is always right. \
The strict rule accepts the option's letter or its exact text; anything else is wrong.

| item               | task             | prediction | answer | right by |
| ------------------ | ---------------- | ---------- | ------ | -------- |
| moving_direction/1 | Moving Direction | (          | down   | official |

## Made by

| what       | digest or version |
| ---------- | ----------------- |
| config     | c0ffee            |
| prompts    | decade            |
| checkpoint | facade            |
| stllm      | 0.1.0             |
| python     | 3.11.0            |
| torch      | 2.14.1            |
"""


def six_items() -> tuple[Loaded, list[Record]]:
    """Return six items and records: an empty reply, an unreadable medium, a wrong reply; a third task is excluded."""
    items = [*map(choice_item, range(4)), *(choice_item(number, "State Change") for number in range(2))]
    answers: dict[str, str | None] = {item.id: letter_of(item, item.answer) for item in items}
    answers |= {"moving_direction/1": "", "moving_direction/2": None, "state_change/1": "D) right"}
    benchmark = choice_benchmark(items, POSE, num_excluded=3)
    return benchmark, lines_of(benchmark, lambda item: answers[item.id])


def test_recorded_versions_equal_the_modules_versions() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    for name in ("stllm", "transformers", "av", "numpy"):
        assert found[name] == import_module(name).__version__


@pytest.fixture(autouse=True)
def same_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "versions", lambda: VERSIONS)


def test_the_content_of_the_results_file(tmp_path: Path) -> None:
    benchmark, lines = six_items()
    returned = results.write(tmp_path, "toy", benchmark, Outcome(lines, **ABOUT))
    content = json.loads((tmp_path / "toy.results.json").read_text(encoding="utf-8"))
    assert content == returned
    assert list(content) == ["benchmark", "scores", "counts", "settings", "digests", "versions", "seconds"]
    assert content["counts"] == {"total": 9, "answered": 5, "failed": 1, "excluded": 3}
    assert content["scores"]["strict"]["average"] == 50.0 and content["scores"]["official"]["average"] == 100 * 4 / 6
    assert content["scores"]["official"]["tasks"] == {"Moving Direction": 75.0, "State Change": 50.0}
    assert {name: content[name] for name in ABOUT} == {**ABOUT, "seconds": 1.235}
    assert content["versions"] == VERSIONS


def test_the_report_equals_its_snapshot(tmp_path: Path) -> None:
    benchmark, lines = six_items()
    results.write(tmp_path, "toy", benchmark, Outcome(lines, **ABOUT))
    assert (tmp_path / "toy.md").read_text(encoding="utf-8") == EXPECTED_MD


def test_order_and_time_of_records_change_only_the_seconds(tmp_path: Path) -> None:
    benchmark, lines = six_items()
    first = results.write(tmp_path / "first", "toy", benchmark, Outcome(lines, **ABOUT))
    again = results.write(tmp_path / "again", "toy", benchmark, Outcome(lines[::-1], **{**ABOUT, "seconds": 9}))
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    for ending in ("md", "png"):
        assert (tmp_path / f"first/toy.{ending}").read_bytes() == (tmp_path / f"again/toy.{ending}").read_bytes()
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "toy.json",
        "toy.md",
        "toy.png",
        "toy.results.json",
    ]


def test_a_missing_record_raises(tmp_path: Path) -> None:
    benchmark, lines = six_items()
    with pytest.raises(AssertionError, match="5, 5, 6"):
        results.write(tmp_path, "toy", benchmark, Outcome(lines[1:], **ABOUT))
    assert not list(tmp_path.iterdir())


def test_the_charts_bars_equal_the_scores_over_all_items() -> None:
    benchmark, lines = six_items()
    axes = bars_figure(run_bars(benchmark, benchmark.benchmark.summary(lines))).axes[0]
    groups = [label.get_text() for label in axes.get_yticklabels()]
    assert groups == ["Average", "Moving Direction", "State Change", "Fine-grained Pose"]
    widths = {container.get_label(): [bar.get_width() for bar in container] for container in axes.containers}
    assert widths == {
        "ours, strict": [50.0, 50.0, 50.0],
        "ours, official": [pytest.approx(66.667, abs=1e-3), 75.0, 50.0],
        "ST-LLM, published": [pytest.approx(54.925), *(MVBENCH_TASKS[task] for task in groups[1:])],
    }
    assert "excluded" in [text.get_text() for text in axes.texts]
    assert axes.get_ylim() == (3.5, -0.5)  # the first group on top


def test_a_report_without_failures_has_no_empty_sections(tmp_path: Path) -> None:
    benchmark = choice_benchmark([choice_item(0)])
    results.write(
        tmp_path, "toy", benchmark, Outcome(lines_of(benchmark, lambda item: letter_of(item, item.answer)), **ABOUT)
    )
    text = (tmp_path / "toy.md").read_text(encoding="utf-8")
    assert "\n\n\n" not in text and "Excluded" not in text and "Failed items" not in text
    assert "score differently: 0\n" in text and "\n\nNone.\n" in text


def test_tasks_come_in_the_order_of_the_paper_and_unknown_ones_last() -> None:
    items = [choice_item(0, task) for task in ("My task", "State Change", "Action Sequence")]
    benchmark = choice_benchmark(items)
    lines = lines_of(benchmark, lambda item: letter_of(item, item.answer))
    bars = run_bars(benchmark, benchmark.benchmark.summary(lines))
    assert bars.groups == ["Average", "Action Sequence", "State Change", "My task"]
    assert bars.series["ST-LLM, published"][-1] is None


@pytest.mark.parametrize("answer", [lambda item: None, lambda item: ""], ids=["all failed", "all empty"])
def test_nothing_answered_gives_no_nan(tmp_path: Path, answer: Any) -> None:
    benchmark = choice_benchmark([choice_item(0)])
    content = results.write(tmp_path, "toy", benchmark, Outcome(lines_of(benchmark, answer), **ABOUT))
    assert content["scores"]["strict"]["average"] == 0.0
    written = (tmp_path / "toy.md").read_text() + (tmp_path / "toy.results.json").read_text()
    assert "nan" not in written.lower()


def test_a_benchmark_without_items_gives_no_nan(tmp_path: Path) -> None:
    content = results.write(tmp_path, "toy", choice_benchmark([], POSE, num_excluded=3), Outcome([], **ABOUT))
    assert content["counts"] == {"total": 3, "answered": 0, "failed": 0, "excluded": 3}
    assert content["scores"]["strict"]["average"] is None
    assert "nan" not in (tmp_path / "toy.md").read_text().lower()
    assert (tmp_path / "toy.png").stat().st_size > 1000


def open_item(number: int, task: str, questions: int = 1) -> Item:
    return replace(choice_item(number, task), candidates=(), questions=("What?",) * questions)


def test_the_report_of_a_judged_benchmark_has_counts_and_commands(tmp_path: Path) -> None:
    benchmark = judged_benchmark(
        [open_item(0, "generic"), open_item(1, "generic"), open_item(2, "generic"), open_item(0, "consistency", 2)]
    )
    lines = lines_of(
        benchmark, lambda item: {"generic/0": "A man runs.", "generic/1": " ", "generic/2": None}.get(item.id, "x")
    )
    lines[3]["prediction"] = ["", "He runs."]
    content = results.write(tmp_path, "v c", benchmark, Outcome(lines, **ABOUT))
    assert content["scores"] == {} and content["counts"] == {"total": 4, "answered": 3, "failed": 1, "excluded": 0}
    text = (tmp_path / "v c.md").read_text(encoding="utf-8")
    assert (
        "| part        | items | answered | of them empty | failed |\n"
        "| ----------- | ----: | -------: | ------------: | -----: |\n"
        "| generic     |     3 |        2 |             1 |      1 |\n"
        "| consistency |     1 |        1 |             1 |      0 |\n"
        "| all         |     4 |        3 |             2 |      1 |\n"
    ) in text
    assert "| generic | the file is cut short | generic/2 |      1 |\n" in text
    where = "--pred-path 'v c.jsonl' --output-dir 'v c.judged' --model MODEL"
    axes = ("correctness", "detail", "context", "consistency")  # no temporal part was asked
    assert "".join(f"stllm judge {axis} {where}\n" for axis in axes) in text and "judge temporal" not in text
    assert "stllm table 'v c.judged'/*.results.json\n" in text
    assert not (tmp_path / "v c.png").exists()


def test_videoqa_is_judged_by_one_axis(tmp_path: Path) -> None:
    benchmark = judged_benchmark([open_item(0, "")], name="msvd")
    results.write(tmp_path, "msvd", benchmark, Outcome(lines_of(benchmark, lambda item: "a man"), **ABOUT))
    text = (tmp_path / "msvd.md").read_text(encoding="utf-8")
    assert text.count("stllm judge") == 1 and "stllm judge qa --pred-path" in text
    assert "| questions |     1 |        1 |             0 |      0 |\n" in text and "| all" not in text
