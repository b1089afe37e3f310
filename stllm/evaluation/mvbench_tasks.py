"""MVBench's twenty tasks as data: their annotation files, media folders and kinds of media; where a copy has them.

Source: the benchmark's own table of tasks (arXiv 2311.17005) and its release. Folders are relative to the media root.
The release's branch `video` on the hub, which lmms-eval reads, has other folders: converted videos, and the bounded
tasks' videos cut into segments. They are searched after the official ones.
"""

from dataclasses import dataclass
from pathlib import Path

from stllm.common.errors import UserError
from stllm.common.files import user_path


@dataclass(frozen=True)
class MVBenchTask:
    """One task.

    name: as the tables print it. folder: of its media; fallbacks: folders of videos that were added later or converted;
    segments: folders of videos that are cut to an item's start and end.
    media: "video", or "frames" for a folder of numbered pictures, taken at `fps`. bounded: items have start and end.
    """

    name: str
    folder: str
    fallbacks: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()
    media: str = "video"
    bounded: bool = False
    fps: float | None = None

    @property
    def file(self) -> str:
        """Its annotation file in the folder `json`."""
        return self.name.lower().replace(" ", "_").replace("-", "_") + ".json"

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that its media are searched in, in order."""
        return (self.folder, *self.fallbacks, *self.segments)


_STAR = (
    "star/Charades_v1_480",
    ("data0613/star/Charades_v1_480", "data0613/star"),
    ("star/Charades_segment", "data0613/star/Charades_segment"),
)
_CLEVRER = ("clevrer/video_validation", ("data0613/clevrer/video_validation", "data0613/clevrer"))
_PERCEPTION = "perception/videos"

TASKS = (
    MVBenchTask("Action Sequence", *_STAR, bounded=True),
    MVBenchTask("Action Prediction", *_STAR, bounded=True),
    MVBenchTask("Action Antonym", "ssv2_video", ("ssv2_video_mp4",)),
    MVBenchTask("Fine-grained Action", "Moments_in_Time_Raw/videos"),
    MVBenchTask("Unexpected Action", "FunQA_test/test"),
    MVBenchTask("Object Existence", *_CLEVRER),
    MVBenchTask("Object Interaction", *_STAR, bounded=True),
    MVBenchTask("Object Shuffle", _PERCEPTION),
    MVBenchTask("Moving Direction", *_CLEVRER),
    MVBenchTask("Action Localization", "sta/sta_video", segments=("sta/sta_video_segment",), bounded=True),
    MVBenchTask("Scene Transition", "scene_qa/video"),
    MVBenchTask("Action Count", _PERCEPTION),
    MVBenchTask("Moving Count", *_CLEVRER),
    MVBenchTask("Moving Attribute", *_CLEVRER),
    MVBenchTask("State Change", _PERCEPTION),
    MVBenchTask("Fine-grained Pose", "nturgbd", ("nturgbd_convert",)),
    MVBenchTask("Character Order", _PERCEPTION),
    MVBenchTask("Egocentric Navigation", "vlnqa"),
    MVBenchTask(
        "Episodic Reasoning",
        "tvqa/frames_fps3_hq",
        segments=("tvqa/video_fps3_hq_segment",),
        media="frames",
        bounded=True,
        fps=3.0,
    ),
    MVBenchTask("Counterfactual Inference", *_CLEVRER),
)
MEDIA_FOLDERS = {folder for task in TASKS for folder in task.folders}


@dataclass(frozen=True)
class MVBenchLayout:
    """The annotation files of a copy of the benchmark, in order of their names, and the folder of all its media."""

    files: tuple[Path, ...]
    media: Path

    @classmethod
    def of(cls, path: str | Path, video_dir: str | Path | None = None) -> "MVBenchLayout":
        """path: the folder that holds `json` and `video`, the folder `json`, any folder of JSON files, or one file.
        video_dir: where the media are instead of in `video`, or, as in the hub's branch `video`, beside `json`.
        Raises UserError for a folder above one of those."""
        root = user_path(path)
        folder = root / "json" if (root / "json").is_dir() else root
        found = sorted([*folder.glob("*.json"), *folder.glob("*.jsonl")])
        # hidden files are not annotations: archives packed on a Mac hold a ._NAME.json for every file
        files = tuple(file for file in found if not file.name.startswith(".")) if folder.is_dir() else (root,)
        holder = folder if folder.is_dir() else folder.parent
        above = holder.parent if holder.name == "json" else holder
        beside = not (above / "video").is_dir() and any((above / folder).is_dir() for folder in MEDIA_FOLDERS)
        media = above if beside else above / "video"
        if video_dir is None and not media.is_dir():
            _check_not_above(root)
        return cls(files, user_path(video_dir) if video_dir else media)


def task_of(file: Path) -> MVBenchTask | None:
    """The task whose annotation file has this name, as JSON or JSONL; None when there is none."""
    return next((task for task in TASKS if task.file == file.with_suffix(".json").name), None)


def _check_not_above(root: Path) -> None:
    """Raises UserError where MVBench's folder lies in the one that was named: its JSON files are of something else."""
    below = sorted(path.parent for path in root.glob("*/json") if path.is_dir())
    if below:
        folders = " or ".join(map(str, below))
        raise UserError(f"{root}: found no folder json in it, expected MVBench's own folder: name {folders}")
