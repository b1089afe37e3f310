"""Published figures, printed beside ours and labelled as published; nothing here was measured by us.

Source: ST-LLM (arXiv 2404.00308), its tables of MVBench, of VcgBench and of zero-shot VideoQA.
"""

SOURCE = "arXiv 2404.00308"
LABEL = "ST-LLM, published"

VCGBENCH_COLUMNS = ("Correctness", "Detail", "Context", "Temporal", "Consistency")
COLUMNS = ("MVBench", "VcgBench avg", *VCGBENCH_COLUMNS, "MSVD", "MSRVTT", "ANet")

# In the order of COLUMNS; percent, and scores from 0 to 5. None: not reported.
METHODS: dict[str, tuple[float | None, ...]] = {
    "VideoChatGPT": (32.7, 2.38, 2.40, 2.52, 2.62, 1.98, 2.37, 64.9, 49.3, 35.7),
    "LLaMA-VID": (None, 2.89, 2.96, 3.00, 3.53, 2.46, 2.51, 69.7, 57.7, 47.4),
    "Chat-UniVi": (None, 2.99, 2.89, 2.91, 3.46, 2.89, 2.81, 65.0, 54.6, 45.8),
    "VideoChat2": (51.1, 2.98, 3.02, 2.88, 3.51, 2.66, 2.81, 70.0, 54.1, 49.1),
    "ST-LLM": (54.9, 3.15, 3.23, 3.05, 3.74, 2.93, 2.81, 74.6, 63.2, 50.9),
}

# Accuracy of ST-LLM in each task, percent by the official matching; their mean is the 54.9 above.
MVBENCH_TASKS = {
    "Action Sequence": 66.0,
    "Action Prediction": 53.5,
    "Action Antonym": 84.0,
    "Fine-grained Action": 44.0,
    "Unexpected Action": 58.5,
    "Object Existence": 80.5,
    "Object Interaction": 73.5,
    "Object Shuffle": 38.5,
    "Moving Direction": 42.5,
    "Action Localization": 31.0,
    "Scene Transition": 86.5,
    "Action Count": 36.5,
    "Moving Count": 56.5,
    "Moving Attribute": 78.5,
    "State Change": 43.0,
    "Fine-grained Pose": 44.5,
    "Character Order": 46.5,
    "Egocentric Navigation": 34.5,
    "Episodic Reasoning": 41.5,
    "Counterfactual Inference": 58.5,
}
BY_TASK = {"mvbench": MVBENCH_TASKS}  # benchmark -> its published figures by task


def cell(method: str, column: str) -> float | None:
    """A method's published figure, None where it reports none."""
    return METHODS[method][COLUMNS.index(column)]
