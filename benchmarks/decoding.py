"""Sampling and decoding only: 16 frames of a video, by our readers and by the plain libraries, on the same files.

Plain: as a script would do it with PyAV (decode on, keep the frames wanted), decord (get_batch) or torchcodec
(get_frames_at). Ours: what training does before the transform (open, check, sample, seek, decode). One decoding thread
each, as in a data worker, and the processor's seconds, so frames a second are those of one core. Libraries that are not
installed are left out. The videos are those of `data_pipeline`: H.264 with x264's defaults.

    python -m benchmarks.decoding [--quick]
"""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks.common import arguments, report, take_turns
from benchmarks.data_pipeline import NUM_FRAMES, pictures
from stllm.media import video
from stllm.media.open import open_media
from stllm.media.sampling import sample_indices
from tests.helpers.videos import importable, write_video

FILES = (  # size, frames (25 a second), frames from one keyframe to the next
    ((320, 240), 75, 250),
    ((640, 360), 300, 250),
    ((640, 360), 300, 30),
    ((640, 360), 1500, 250),
    ((1280, 720), 300, 250),
)


def chosen(total: int) -> list[int]:
    """Return the indices that the sampling rule `middle` of training chooses."""
    return sample_indices("middle", num_frames=NUM_FRAMES, total_frames=total, fps=25.0)


def ours(path: Path, reader: str) -> np.ndarray:
    """Decode the chosen frames with our reader: (T, H, W, 3) uint8."""
    with open_media(path, reader=reader) as medium:
        return np.stack(list(medium.frames(chosen(medium.info.num_frames))))


def plain_pyav(path: Path) -> np.ndarray:
    """Decode the chosen frames with PyAV's defaults: (T, H, W, 3) uint8."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        wanted = set(chosen(stream.frames))
        frames = enumerate(container.decode(stream))
        return np.stack([frame.to_ndarray(format="rgb24") for index, frame in frames if index in wanted])


def plain_decord(path: Path) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    frames: np.ndarray = reader.get_batch(chosen(len(reader))).asnumpy()
    return frames


def plain_torchcodec(path: Path) -> np.ndarray:
    """Decode the chosen frames with torchcodec's defaults (one thread, exact seeking): (T, H, W, 3) uint8."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), dimension_order="NHWC")
    frames: np.ndarray = decoder.get_frames_at(chosen(len(decoder))).data.numpy()
    return frames


PLAIN: dict[str, Callable[[Path], np.ndarray]] = {
    "av": plain_pyav,
    "decord": plain_decord,
    "torchcodec": plain_torchcodec,
}


def main() -> None:
    """Measures, prints and writes."""
    args = arguments(__doc__ or "")
    video.MAX_THREADS = 1
    libraries = [name for name in PLAIN if importable(name)]
    before, rows = os.getloadavg()[0], []
    for size, num_frames, gop in FILES[:2] if args.quick else FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = write_video(Path(folder) / "x.mp4", size=size, frames=pictures(num_frames, size, seed=1), gop=gop)
            readers = {name: "pyav" if name == "av" else name for name in libraries}
            works = {f"plain {name}": partial(PLAIN[name], path) for name in libraries}
            works |= {f"ours {name}": partial(ours, path, reader) for name, reader in readers.items()}
            repeats = 15 if num_frames < 100 else 3  # milliseconds of a short clip are easily disturbed
            times = take_turns(works, repeats=repeats, clock=time.process_time)
            for name in libraries:
                plain, own = PLAIN[name](path), ours(path, readers[name])
                equal = sum(np.array_equal(a, b) for a, b in zip(plain, own, strict=True))
                rows.append(
                    {
                        "video": f"{size[0]}x{size[1]}, {num_frames / 25:g} s, keyframe every {gop}",
                        "library": readers[name],
                        "plain, frames/s": NUM_FRAMES / times[f"plain {name}"],
                        "our reader of it, frames/s": NUM_FRAMES / times[f"ours {name}"],
                        "ours / plain": times[f"plain {name}"] / times[f"ours {name}"],
                        "our default / plain": times[f"plain {name}"] / times["ours av"],
                        "equal frames": f"{equal}/{NUM_FRAMES}",
                    }
                )
    also = {
        "load before and after": [f"{load:.1f}" for load in (before, os.getloadavg()[0])],
        "versions": {name: version(name) for name in libraries},
    }
    sizes = {"frames of a clip": NUM_FRAMES, "threads of a decoder": 1}
    report("decoding", "the same library without us, processor seconds", rows, sizes, args.output_dir, also)


if __name__ == "__main__":
    main()
