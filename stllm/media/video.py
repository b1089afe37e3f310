"""Frame-accurate reading of container videos: index i is the i-th frame in the order of display, for every file.

`PyAvReader` first reads the timeline: the presentation times ("stamps") of all frames (timeline.py). It reaches a frame
by decoding further, or from the keyframe before it, and recognises it by its stamp. If a seek fails (a broken index, a
false keyframe), it decodes from an earlier keyframe, and finally from the start of the file. A decoder returns frames
in the order of display, so every pass of the decoder is compared with the timeline. If the stamps do not order the
frames, the video is decoded once to count its frames, and each frame is then found by decoding from the start.

Source: ISO/IEC 14496-12, the matrix of the track header: a picture point (x, y) is shown at (a x + c y, b x + d y).
"""

import multiprocessing
import os
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from stllm.common.registry import readers
from stllm.media import images
from stllm.media.info import (
    EXPECTED,
    Frame,
    MediaError,
    MediaInfo,
    Member,
    Place,
    Reader,
    decoder_options,
    explain_unreadable,
    kind_of,
    place_of,
    promised_bytes,
    read_head,
    warn_once,
)
from stllm.media.time_bound import keep_reading
from stllm.media.timeline import DECODING_TIMES, Timeline, average_fps, counted_timeline, demuxed_timeline, packets

if TYPE_CHECKING:
    from av import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_COUNTED = 4_000_000  # total number of frames in the stored counted timelines, 16 bytes each
SEEK_COST = 8  # a seek costs as much as decoding this many frames, since it empties threads and reorder buffer
NUM_CHECKED = 3  # frames decoded at opening, to check that the timeline matches the decoder
MAX_REORDERED = 16  # frames by which storage order and display order may differ: the buffer of H.264 and HEVC
MAX_THREADS = 4  # more threads hold more frames in memory and speed up little; a data loader opens many readers
COVER_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
# Formats that contain their video. Playlists (hls, dash, concat) are excluded: they open other files by name.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,flv,live_flv,asf,ogg,rm,mxf,dv,wtv,nut,gxf,yuv4mpegpipe,"
    "swf,wav,mp3,aac,flac,ac3"
)
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders ignore transparency
SKIPPABLE = ("h264", "hevc")  # decoders that can skip frames to which no other frame refers (a quarter faster)
Turn = tuple[bool, bool, bool]  # steps to show a picture: transpose, then flip left-right, then flip top-bottom
UPRIGHT: Turn = (False, False, False)
# number of quarter turns counterclockwise -> turn
BY_ROTATION: dict[int, Turn] = {1: (True, False, True), 2: (False, True, True), 3: (True, True, False)}
MIRRORING = frozenset(turn for turn in np.ndindex(2, 2, 2) if sum(turn) % 2)  # an odd number of reflections
_counted: dict[tuple[str, int, int, int], Timeline] = {}  # counted timelines, the oldest first; one dict per process


class _Disordered(Exception):
    """Raised if the frames are displayed in another order than that of their presentation times."""


@readers.register("pyav")
class PyAvReader(Reader):
    """A reader of container videos (mp4, webm, avi, mov, mkv) with PyAV.

    Raises MediaError if the file has no decodable video.
    """

    def __init__(self, path: str | Path | Member) -> None:
        self.path = place_of(path)
        self.source = VideoSource(self.path)
        self._warned = self._is_ordered = False
        self._pass: Iterator[tuple[int, VideoFrame]] = iter(())
        self._wanted: Collection[int] | None = None  # stamps that the current pass does not skip; None: all
        self._last: int | None = None  # stamp of the last frame of the current pass; None: there is no pass
        self._next: int | None = 0  # index of the frame that the pass should return next; None: any keyframe
        try:
            self.timeline, start = self._read_timeline()
            first = start[0]
            self.turn = turn_of(first)  # the same for the whole stream
            self.transparent = is_transparent(first)
            height, width = to_rgb(first, self.turn).shape[:2]
            fps = average_fps(self.timeline, self.source.stream)
            self.info = MediaInfo("video", self.timeline.num_promised, fps, width, height)
            missing = self.info.num_frames - self.timeline.num_readable  # more than 0 if the file is cut short
            later = self.timeline.seconds[-1] + np.arange(1, missing + 1) / fps
            self.seconds = np.concatenate([self.timeline.seconds, later])
        except BaseException:
            self.close()
            raise
        self._seekable = not self.timeline.counted and len(self.timeline.keys) > 1
        if not self.timeline.counted:  # continue the pass that returned the first frames
            given = chain(start, (frame for _, frame in self._pass))
            self._pass = ((frame.pts, frame) for frame in given if frame.pts is not None)
            self._last = int(self.timeline.stamps[0]) - 1

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        self.check(indices)
        wanted = frozenset(int(self.timeline.stamps[index]) for index in indices)
        for index, repeats in groupby(indices):
            picture = to_rgb(self._frame_at(index, wanted), self.turn)
            for _ in range(len(list(repeats)) - 1):
                yield picture.copy()  # callers may change their array
            yield picture

    def close(self) -> None:
        self._stop()
        self.source.close()

    def _stop(self) -> None:
        """End the current pass of the decoder and release its frames."""
        self._pass = iter(())
        self._last = None

    def check(self, indices: Sequence[int]) -> None:
        """Raise MediaError for indices outside the video, or after the end of a file that is cut short."""
        super().check(indices)
        for index in indices:
            if index >= self.timeline.num_readable:
                raise MediaError(
                    f"{self.path}: the file is cut short: frame {index} was asked for, but of the "
                    f"{self.info.num_frames} frames it should hold {self.timeline.num_readable} could be read; "
                    "copy or download it again"
                )

    def _read_timeline(self) -> "tuple[Timeline, list[VideoFrame]]":
        """Read the timeline and the first frames, and check that they agree."""
        source = self.source
        timeline = _counted.get(_identity(self.path))
        counted = timeline is not None
        if timeline is None:
            timeline = demuxed_timeline(source.container, source.stream, cut=source.is_cut)
            source.strict = timeline is not None and not timeline.open_gops
        start = self._first_frames()
        if source.strict and (timeline is None or not timeline.begins_with([frame.pts for frame in start])):
            source.strict = False
            start = self._first_frames()
        if not start:
            codec = source.stream.codec_context.name
            raise MediaError(
                f"{self.path}: 0 frames of its {codec} video could be read (damaged data); expected at least one: "
                "copy or download it again"
            )
        stamps = [frame.pts for frame in start]
        if timeline is not None and not counted and stamps[0] is not None:
            timeline = timeline.starting_at(stamps[0])
        if timeline is None or not (counted or timeline.begins_with(stamps)):
            timeline = self._count(self._decoded_stamps())
        if source.is_cut and timeline.num_promised == timeline.num_readable:
            warn_once(str(self.path), f"the file ends early; the {timeline.num_readable} frames in it are used")
        return timeline, start

    def _first_frames(self) -> "list[VideoFrame]":
        self._pass = self.source.decode(None, counted=True)
        return [frame for _, frame in islice(self._pass, NUM_CHECKED)]

    def _decoded_stamps(self) -> list[int | None]:
        """Decode the whole video, and return the presentation time (pts) of each frame in the order of the decoder."""
        self.source.wanted = None
        return [frame.pts for _, frame in self.source.decode(None, counted=True)]

    def _count(self, stamps: list[int | None]) -> Timeline:
        """Make a timeline from presentation times in decoding order, and store it: frames are counted only once."""
        timeline = counted_timeline(self.source.stream, stamps)
        if timeline.num_readable <= MAX_COUNTED:
            _counted[_identity(self.path)] = timeline
        while sum(known.num_readable for known in list(_counted.values())) > MAX_COUNTED:
            _counted.pop(next(iter(_counted)), None)
        return timeline

    def _frame_at(self, index: int, wanted: Collection[int]) -> "VideoFrame":
        """Decode frame `index`; if the file is damaged, the decoder may repair it.

        wanted: stamps of frames not to skip.
        """
        stamp, disordered, frame = int(self.timeline.stamps[index]), False, None
        if self._wanted is not wanted:
            if self._wanted is not None:  # the current pass may have skipped a frame that is wanted now
                self._last = None
            self._wanted = wanted
            self.source.wanted = None if self.timeline.counted else wanted
        try:
            frame = self._find(stamp)
            if frame is None and self.source.strict:
                self.source.strict = False
                self.source.reopen()
                frame = self._find(stamp)
        except _Disordered:
            disordered = True
        if frame is None and not self.timeline.counted:
            stamps = self._decoded_stamps()
            is_whole = len(stamps) == self.timeline.num_readable
            if (is_whole or disordered) and stamps != self.timeline.stamps.tolist():
                self.timeline, self._seekable, self._last = self._count(stamps), False, None
                self.check([index])
                return self._frame_at(index, ())
        if frame is None:
            most = decoder_options().get("max_pixels")
            larger = f", or a picture of more than {most} pixels" if most else ""
            raise MediaError(
                f"{self.path}: frame {index} of {self.info.num_frames} could not be decoded (damaged data{larger}), "
                f"the {index} frames before it could be read; copy or download the file again"
            )
        if self.source.is_damaged and not self._warned:
            self._warned = True
            warn_once(str(self.path), f"damaged data up to frame {index}; the decoder repaired what it could")
        return frame

    def _find(self, stamp: int) -> "VideoFrame | None":
        """Find the frame with a stamp in the cheapest way that works; return None if none works."""
        keys, counted = self.timeline.keys, self.timeline.counted
        nearest = max(0, int(np.searchsorted(keys, stamp, side="right")) - 1)  # the last keyframe not after the frame
        if self._last is not None and self._last < stamp:
            distance = self.timeline.index_at(int(keys[nearest])) - self.timeline.index_at(self._last)
            if (not self._seekable or distance <= SEEK_COST) and (frame := self._reach(stamp)) is not None:
                return frame
        starts: list[int | None] = [None]  # where to decode from, in order: the nearest keyframes, the file's start
        if self._seekable:
            starts = [*(int(keys[at]) for at in (nearest, nearest - 1) if at > 0), None]
        for key in starts:
            self._pass = self.source.decode(key, counted=counted)
            self._next = 0 if key is None else None  # a seek may land on an earlier keyframe
            frame = self._reach(stamp)
            if frame is not None:
                # If only decoding from the start finds the frame, the file's index is wrong: do not seek again.
                self._seekable = self._seekable and (key is not None or nearest == 0)
                return frame
        return None

    def _reach(self, stamp: int) -> "VideoFrame | None":
        """Decode up to the frame with a stamp; return None if the frame is missing or damaged."""
        self._last = None
        while (item := next(self._pass, None)) is not None:
            found, frame = item
            self._check_order(found)
            if found > stamp:
                return None
            if found == stamp:
                if frame.is_corrupt:
                    return None
                self._last = found
                return frame
        return None

    def _check_order(self, found: int) -> None:
        """Check that the decoder returned the frame that follows its last one in the timeline.

        found: the stamp of the returned frame. If frames between the two were not skipped on purpose, they are late or
        lost: the check looks for them in the next frames. Raises _Disordered if the stamps do not order the frames.
        """
        timeline, expected = self.timeline, self._next
        if self._is_ordered or timeline.counted:
            return
        if expected is not None and expected < timeline.num_readable and timeline.stamps[expected] == found:
            self._next = expected + 1
            return
        at = timeline.index_at(found)
        if at == timeline.num_readable or timeline.stamps[at] != found:
            return
        self._next = at + 1
        if expected is None:
            return
        late = [stamp for stamp in timeline.stamps[expected:at].tolist() if stamp not in self.source.skipped]
        if at > expected and not late:
            return
        ahead = list(islice(self._pass, MAX_REORDERED))
        if at < expected or any(later in late for later, _ in ahead):
            raise _Disordered
        self._is_ordered = True  # some frames are lost; the file is not examined again
        self._pass = chain(ahead, self._pass)


def _identity(path: Place) -> tuple[str, int, int, int]:
    stat = path.stat()
    return str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns


class VideoSource:
    """A container file and its main video stream. Do not keep references to these: `decode` may reopen them.

    is_damaged: True after the decoder rejected a packet.
    wanted: stamps of frames that `decode` must return; others may be skipped. None: all.
    skipped: stamps of frames that the current pass may have skipped.
    strict: from the next pass on, the decoder rejects damaged data and does not repair it by guessing. The caller
        decides: open GOPs look damaged after a seek, and some encoders never write clean streams.
    Raises MediaError if the file cannot be opened or has no video.
    """

    def __init__(self, path: Place) -> None:
        self.path = path
        self.is_damaged = self.strict = False
        self.wanted: Collection[int] | None = None
        self.skipped: set[int] = set()
        self._head = read_head(path)
        self._open()

    @property
    def is_cut(self) -> bool:
        """True if the file is shorter than its headers require."""
        return promised_bytes(self.path, self._head) > self.path.stat().st_size

    def close(self) -> None:
        self.container.close()

    def reopen(self) -> None:
        """Open the file again, at its first packet. A changed `strict` takes effect."""
        self.close()
        self._open()

    def _open(self) -> None:
        """Open the container and its main video stream, which is not a cover picture. Raises MediaError."""
        import av
        from av.error import FFmpegError

        # Logging can deadlock: a decoding thread would wait for Python's lock to write its message, while this thread
        # holds the lock and waits for the decoding threads. torchvision 0.21 enables PyAV's logging; disable it.
        av.logging.set_level(None)
        path, limits = self.path, decoder_options()
        if kind_of(self._head) == "text":
            found = " ".join(self._head[:200].decode("utf-8", "replace").split())[:40]
            raise MediaError(f"{path}: found text ({found!r}), expected {EXPECTED}: download it again")
        try:
            # An absolute path contains no protocol. Only this file may be opened.
            options = {"protocol_whitelist": "file,crypto,data", "format_whitelist": FORMATS, **limits}
            file: Any = path.open() if isinstance(path, Member) else str(path.absolute())
            # From version 19 on, PyAV reads metadata that is not UTF-8 without this argument, which it no longer takes.
            metadata: Any = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}
            container = av.open(file, options=options, **metadata)
        except (FFmpegError, ValueError) as error:
            found = explain_unreadable(path, self._head)
            raise MediaError(f"{path}: found {found}; expected {EXPECTED}: copy or download it again") from error
        stream = cast("VideoStream | None", container.streams.best("video"))
        disposition: Any = stream and stream.disposition  # an enum or a number, depending on PyAV's version
        if stream is None or getattr(disposition, "value", disposition) & COVER_PICTURE:
            kinds = sorted({other.type for other in container.streams if other.type != "video"})
            container.close()
            found = ", ".join(kinds) or "no stream"
            raise MediaError(f"{path}: found no video in it, only {found}; expected {EXPECTED}: name another file")
        if cast(Any, stream).codec_context is None:
            container.close()
            raise MediaError(f"{path}: its video codec is unknown to PyAV {av.__version__}; convert it to H.264 mp4")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = num_threads()
        stream.codec_context.options = {**limits, **({"err_detect": "explode"} if self.strict else {})}
        self.container, self.stream = container, stream
        self.decoder: VideoCodecContext = stream.codec_context
        alpha = {key.lower(): value for key, value in stream.metadata.items()}.get("alpha_mode") == "1"
        if alpha and self.decoder.name in ALPHA_DECODERS:
            self.decoder = cast("VideoCodecContext", av.CodecContext.create(ALPHA_DECODERS[self.decoder.name], "r"))
            self.decoder.options = limits

    def decode(self, key: int | None, *, counted: bool = False) -> Iterator[tuple[int, "VideoFrame"]]:
        """Yield (stamp, frame) pairs, starting at the keyframe with the stamp `key`; None: at the start of the file.

        counted: number the frames 0, 1, ... in place of their stamps (only with key None).
        Nothing is yielded if the seek does not find a keyframe at or before `key`. Damaged data may end the iteration
        early, so the caller must check which frames it got.
        """
        from av.error import FFmpegError

        self.skipped = set()
        try:
            if key is None:  # reopen the file, because a seek does not always find the first packet
                self.reopen()
            else:
                self.container.seek(key, stream=self.stream, backward=True)
                self.decoder.flush_buffers()
            first_packet = key is not None  # True: check the packet that the seek found
            landing: int | None = None  # stamp of that packet until its frame is decoded
            latest, count = -(1 << 63), 0
            by_dts = self.container.format.name in DECODING_TIMES
            context = self.stream.codec_context
            can_skip = context.name in SKIPPABLE
            for packet in packets(self.container, self.stream):
                keep_reading()
                if by_dts:
                    packet.pts = packet.dts  # as in the timeline: FFmpeg guesses other times after a seek
                stamp = packet.pts
                if first_packet:
                    first_packet = False
                    if stamp is None or key is None or stamp > key or not packet.is_keyframe:
                        return
                    latest = landing = stamp
                if can_skip:
                    # Skip a frame only if a later one is stored before it. If stamps are decoding times, no frame is
                    # skipped, so `_check_order` can find that they do not order the frames.
                    context.skip_frame = "DEFAULT"
                    wanted = self.wanted
                    if wanted is not None and stamp is not None and stamp < latest and stamp not in wanted:
                        context.skip_frame = "NONREF"
                        self.skipped.add(stamp)
                latest = latest if stamp is None else max(latest, stamp)
                try:
                    frames = self.decoder.decode(packet)
                except FFmpegError:
                    self.is_damaged = True
                    continue
                for frame in frames:
                    shown = count if counted else frame.pts
                    count += 1
                    if shown is None or (landing is not None and shown < landing):
                        continue  # a leading picture of an open GOP: the frames that it refers to were not decoded
                    if landing is not None and (shown > landing or not frame.key_frame):
                        return  # a keyframe by the index, but not by the decoder
                    landing = None
                    yield shown, frame
        except FFmpegError:
            return


def num_threads() -> int:
    """Return the number of threads of a decoder. It is 1 in data workers, of which there is one per core."""
    return 1 if multiprocessing.parent_process() is not None else min(MAX_THREADS, os.cpu_count() or 1)


def turn_of(frame: "VideoFrame") -> Turn:
    """Return how to turn a frame for display: the rotation and mirroring closest to its display matrix."""
    # Read the matrix from a thumbnail, which has it too: `side_data` makes a reference cycle, and the full frame would
    # stay in memory until the next garbage collection.
    thumbnail = frame.reformat(width=16, height=16)
    try:
        data = cast(Any, thumbnail.side_data.get("DISPLAYMATRIX"))
    except ValueError:  # PyAV rejects all side data if one kind is unknown to it, such as EXIF in a camera's MJPEG
        return BY_ROTATION.get(round(thumbnail.rotation / 90) % 4, UPRIGHT)
    if data is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(data, np.int32, count=5).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def is_transparent(frame: "VideoFrame") -> bool:
    """Check whether the frame's pixel format can have transparency; one with a palette can."""
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def to_rgb(frame: "VideoFrame", turn: Turn) -> Frame:
    """Convert a decoded frame to (H, W, 3) uint8 RGB, upright, with transparent parts over white.

    Non-square pixels are not rescaled, as in the published system.
    """
    if is_transparent(frame):
        from PIL import Image

        picture: np.ndarray[Any, Any] = images.to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        picture = frame.to_ndarray(format="rgb24")
    transpose, left_right, top_bottom = turn
    if transpose:
        picture = picture.swapaxes(0, 1)
    if left_right:
        picture = picture[:, ::-1]
    if top_bottom:
        picture = picture[::-1]
    return np.ascontiguousarray(picture)
