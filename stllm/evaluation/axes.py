"""The axes that a judge scores, the part of a benchmark that each reads, and their average.

Only the standard library is imported: `stllm judge --help` reads the names.
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
DECIDED = (QA, TEMPCOMPASS)  # a judge says whether the prediction is right, too
TASKS = {  # VcgBench's part for each axis; VideoQA is one task, TempCompass decides by rules
    CORRECTNESS: "generic",
    DETAIL: "generic",
    CONTEXT: "generic",
    TEMPORAL: "temporal",
    CONSISTENCY: "consistency",
}
LOWEST, HIGHEST = 0, 5  # scores
SAME = {"judge": "judge", "prompt_digest": "instructions"}  # what averaged scores must share, in words


def vcgbench_average(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the results files of VcgBench's five axes.

    Raises UserError when an axis is missing, or when judge or instructions differ between the axes.
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
