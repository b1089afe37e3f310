"""The axes that a judge scores (such as correctness), the benchmark task of each axis, and VcgBench's average.

This file imports nothing heavy, because `stllm judge --help` needs the names.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stllm.common.errors import UserError

CORRECTNESS, DETAIL, CONTEXT = "correctness", "detail", "context"
TEMPORAL, CONSISTENCY, QA = "temporal", "consistency", "qa"
TEMPCOMPASS = "tempcompass"
AXES = (CORRECTNESS, DETAIL, CONTEXT, TEMPORAL, CONSISTENCY, QA, TEMPCOMPASS)
VCGBENCH_AXES = AXES[:5]
DECIDED = (QA, TEMPCOMPASS)  # for these the judge also decides whether the prediction is correct
TASKS = {  # axis -> task of VcgBench; the other two axes do not select a task
    CORRECTNESS: "generic",
    DETAIL: "generic",
    CONTEXT: "generic",
    TEMPORAL: "temporal",
    CONSISTENCY: "consistency",
}
LOWEST, HIGHEST = 0, 5  # range of scores
SAME = {"judge": "judge", "prompt_digest": "instructions"}  # fields that averaged results must share -> their names


def vcgbench_average(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the results of VcgBench's five axes. results: contents of the judge's results files, one per axis.

    Raises UserError if an axis is missing, or if judge or instructions differ between the axes.
    """
    by_axis = {result["axis"]: result for result in results}
    for axis in VCGBENCH_AXES:
        if axis not in by_axis or by_axis[axis]["mean"] is None:
            raise UserError(f"no average of VcgBench: the axis {axis} has no score yet")
    for name, words in SAME.items():
        found = {axis: by_axis[axis][name] for axis in VCGBENCH_AXES}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{axis} {value}" for axis, value in found.items())
            raise UserError(f"no average of VcgBench: the axes have another {words} each ({listed})")
    means = {
        name: math.fsum(by_axis[axis][name] for axis in VCGBENCH_AXES) / len(VCGBENCH_AXES)
        for name in ("mean", "mean_truncated")
    }
    return {
        "benchmark": "vcgbench",
        **means,
        "axes": {axis: by_axis[axis]["mean"] for axis in VCGBENCH_AXES},
        **{name: by_axis[CORRECTNESS][name] for name in SAME},
    }
