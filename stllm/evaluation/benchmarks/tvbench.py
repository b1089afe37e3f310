"""TVBench: ten tasks of multiple choice that one frame, or the text alone, does not answer. Source: arXiv 2410.07752.

It has MVBench's form, and it is asked and matched as MVBench is. Its clips are in a folder for each task, the score is
the mean over the tasks. The clips of Action Antonym (NTU) may not be redistributed: their users fetch them.
"""

from stllm.common.registry import benchmarks
from stllm.evaluation.benchmarks.mvbench import MVBench, MVBenchTask
from stllm.evaluation.scores import TASKS

NAMES = (
    *("Action Count", "Object Count", "Action Sequence", "Object Shuffle", "Scene Transition"),
    *("Action Localization", "Action Antonym", "Unexpected Action", "Egocentric Sequence", "Moving Direction"),
)
BOUNDED = ("Action Sequence", "Action Localization")

TVBENCH = MVBench(
    name="tvbench",
    title="TVBench",
    tasks=tuple(MVBenchTask(name, name.lower().replace(" ", "_"), bounded=name in BOUNDED) for name in NAMES),
    own_tasks=False,
    mean_over=TASKS,
)
benchmarks.register(TVBENCH.name)(TVBENCH)
