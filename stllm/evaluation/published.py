"""Published figures, which tables show beside a run's own and label as published. None was measured with this code.

Sources: the tables for MVBench, VcgBench and zero-shot VideoQA in ST-LLM (arXiv 2404.00308); the papers of the other
benchmarks. None of these figures was published with a confidence interval.
"""

SOURCE = "arXiv 2404.00308"
LABEL = "ST-LLM, published"
NO_INTERVAL = "Published figures have no interval."

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
# TVBench (arXiv 2410.07752) reports ST-LLM by task; their mean is 35.3.
TVBENCH_TASKS = {
    "Action Count": 25.0,
    "Object Count": 35.1,
    "Action Sequence": 49.2,
    "Object Shuffle": 36.0,
    "Scene Transition": 54.4,
    "Action Localization": 31.0,
    "Action Antonym": 45.6,
    "Unexpected Action": 32.4,
    "Egocentric Sequence": 24.0,
    "Moving Direction": 20.3,
}
BY_TASK = {"mvbench": MVBENCH_TASKS, "tvbench": TVBENCH_TASKS}  # benchmark -> ST-LLM's published figures by task
SOURCES = {"mvbench": SOURCE, "tvbench": "arXiv 2410.07752", "tempcompass": "arXiv 2403.00476"}
SOURCES |= {"vinoground": "arXiv 2410.02763", "tomato": "arXiv 2410.23266"}

# benchmark -> method -> score -> percent, from the benchmark's paper or web page
BY_METHOD: dict[str, dict[str, dict[str, float]]] = {
    "tvbench": {
        "chance": {"average": 33.3},
        "VideoChat2": {"average": 33.0},
        "GPT-4o": {"average": 35.8},
        "Tarsier-34B": {"average": 53.8},
    },
    "tempcompass": {
        "VideoChat2": {"average": 48.81},
        "Video-LLaVA": {"average": 49.77},
        "Qwen2-VL-7B": {"average": 67.85},
        "GPT-4o": {"average": 73.75},
    },
    "vinoground": {
        "chance": {"text": 25.0, "video": 25.0, "group": 16.7},
        "GPT-4o, about": {"text": 54.0, "video": 38.0},
        "people, about": {"text": 90.0, "video": 90.0},
    },
    "tomato": {
        "chance": {"average": 19.9},
        "Qwen2-VL-7B": {"average": 31.5},
        "GPT-4o": {"average": 37.7},
        "people": {"average": 95.2},
    },
}

# Figures of ST-LLM measured by others than its authors: (benchmark, percent or score, source).
BY_OTHERS = (
    ("MVBench", 54.85, "the released weights, run again by a user"),
    ("MVBench", 54.9, "PruneVid's run"),
    ("MVBench", 54.3, "PruneVid, with 15 % of the visual tokens"),
    ("MVBench", 51.2, "trained again by a user"),
    ("Video-MME without subtitles", 37.9, "published by others"),
    ("Video-MME with subtitles", 42.3, "published by others"),
    ("EgoSchema, subset", 56.2, "PruneVid"),
    ("EgoSchema, full", 45.6, "PruneVid"),
    ("VcgBench avg", 2.86, "PruneVid's run, by another judge"),
)


def cell(method: str, column: str) -> float | None:
    """Return a method's published figure in one column of the paper's table; None if it was not reported."""
    return METHODS[method][COLUMNS.index(column)]
