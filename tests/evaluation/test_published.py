"""Published figures: consistency checks among the figures of the paper's tables."""

import pytest

from stllm.evaluation.benchmarks.mvbench import TASKS
from stllm.evaluation.published import COLUMNS, METHODS, MVBENCH_TASKS, cell


def test_published_task_figures_average_to_the_published_total() -> None:
    assert sum(MVBENCH_TASKS.values()) / 20 == pytest.approx(54.925)
    assert round(sum(MVBENCH_TASKS.values()) / 20, 1) == cell("ST-LLM", "MVBench") == 54.9


def test_published_tasks_equal_the_benchmarks_tasks() -> None:
    assert list(MVBENCH_TASKS) == [task.name for task in TASKS]


@pytest.mark.parametrize("method", METHODS)
def test_the_average_of_vcgbench_is_that_of_its_axes(method: str) -> None:
    figures = dict(zip(COLUMNS, METHODS[method], strict=True))
    axes = [figures[name] or 0 for name in ("Correctness", "Detail", "Context", "Temporal", "Consistency")]
    assert sum(axes) / 5 == pytest.approx(figures["VcgBench avg"], abs=0.011)  # the papers round


def test_unreported_figures_are_none() -> None:
    assert cell("LLaMA-VID", "MVBench") is None and cell("Chat-UniVi", "MVBench") is None
