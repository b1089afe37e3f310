"""Published figures are what the paper's tables say, as far as they can be checked against each other."""

import pytest

from stllm.evaluation.benchmarks.mvbench import TASKS
from stllm.evaluation.published import COLUMNS, METHODS, MVBENCH_TASKS, cell


def test_the_tasks_average_to_the_figure_of_the_table() -> None:
    assert sum(MVBENCH_TASKS.values()) / 20 == pytest.approx(54.925)
    assert round(sum(MVBENCH_TASKS.values()) / 20, 1) == cell("ST-LLM", "MVBench") == 54.9


def test_the_tasks_are_those_of_the_benchmark() -> None:
    assert list(MVBENCH_TASKS) == [task.name for task in TASKS]


@pytest.mark.parametrize("method", METHODS)
def test_the_average_of_vcgbench_is_that_of_its_axes(method: str) -> None:
    figures = dict(zip(COLUMNS, METHODS[method], strict=True))
    axes = [figures[name] or 0 for name in ("Correctness", "Detail", "Context", "Temporal", "Consistency")]
    assert sum(axes) / 5 == pytest.approx(figures["VcgBench avg"], abs=0.011)  # the papers round


def test_what_was_not_reported_is_none() -> None:
    assert cell("LLaMA-VID", "MVBench") is None and cell("Chat-UniVi", "MVBench") is None
