"""TVBench: ten multiple-choice tasks that a single frame, or the text alone, cannot answer. Source: arXiv 2410.07752.

Format, prompt and scoring are MVBench's. Each task has a folder of clips. The score is the mean over the tasks. The
clips of Action Antonym (NTU) may not be redistributed, so users must download them from their authors.
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
