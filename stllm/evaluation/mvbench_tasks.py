"""MVBench's twenty tasks as data: their annotation files, media folders and kinds of media.

Source: the benchmark's own table of tasks (arXiv 2311.17005) and its release. Folders are relative to the media root.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class MVBenchTask:
    """One task.

    name: as the tables print it. folder: of its media; fallbacks: where videos that were added later lie.
    media: "video", or "frames" for a folder of numbered pictures, taken at `fps`. bounded: items have start and end.
    """

    name: str
    folder: str
    fallbacks: tuple[str, ...] = ()
    media: str = "video"
    bounded: bool = False
    fps: float | None = None

    @property
    def file(self) -> str:
        """Its annotation file in the folder `json`."""
        return self.name.lower().replace(" ", "_").replace("-", "_") + ".json"

    @property
    def folders(self) -> tuple[str, ...]:
        """Where its media are looked for, the first one first."""
        return (self.folder, *self.fallbacks)


_STAR = ("star/Charades_v1_480", ("data0613/star/Charades_v1_480", "data0613/star"))
_CLEVRER = ("clevrer/video_validation", ("data0613/clevrer/video_validation", "data0613/clevrer"))
_PERCEPTION = "perception/videos"

TASKS = (
    MVBenchTask("Action Sequence", *_STAR, bounded=True),
    MVBenchTask("Action Prediction", *_STAR, bounded=True),
    MVBenchTask("Action Antonym", "ssv2_video"),
    MVBenchTask("Fine-grained Action", "Moments_in_Time_Raw/videos"),
    MVBenchTask("Unexpected Action", "FunQA_test/test"),
    MVBenchTask("Object Existence", *_CLEVRER),
    MVBenchTask("Object Interaction", *_STAR, bounded=True),
    MVBenchTask("Object Shuffle", _PERCEPTION),
    MVBenchTask("Moving Direction", *_CLEVRER),
    MVBenchTask("Action Localization", "sta/sta_video", bounded=True),
    MVBenchTask("Scene Transition", "scene_qa/video"),
    MVBenchTask("Action Count", _PERCEPTION),
    MVBenchTask("Moving Count", *_CLEVRER),
    MVBenchTask("Moving Attribute", *_CLEVRER),
    MVBenchTask("State Change", _PERCEPTION),
    MVBenchTask("Fine-grained Pose", "nturgbd"),
    MVBenchTask("Character Order", _PERCEPTION),
    MVBenchTask("Egocentric Navigation", "vlnqa"),
    MVBenchTask("Episodic Reasoning", "tvqa/frames_fps3_hq", media="frames", bounded=True, fps=3.0),
    MVBenchTask("Counterfactual Inference", *_CLEVRER),
)
