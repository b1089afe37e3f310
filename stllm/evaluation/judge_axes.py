"""The axes that a judge scores, and the part of a benchmark that each reads. Standard library only, for `--help`."""

CORRECTNESS, DETAIL, CONTEXT = "correctness", "detail", "context"
TEMPORAL, CONSISTENCY, QA = "temporal", "consistency", "qa"
AXES = (CORRECTNESS, DETAIL, CONTEXT, TEMPORAL, CONSISTENCY, QA)
VCGBENCH_AXES = AXES[:5]  # their mean is VcgBench's average
TASKS = {
    CORRECTNESS: "generic",
    DETAIL: "generic",
    CONTEXT: "generic",
    TEMPORAL: "temporal",
    CONSISTENCY: "consistency",
}  # of VcgBench; VideoQA is one task

LOWEST, HIGHEST = 0, 5  # scores
