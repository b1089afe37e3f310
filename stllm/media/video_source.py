"""One open container video under PyAV: opening it, and passes of decoding from a keyframe or from the start.

A pass gives (stamp, frame) pairs in presentation order. Which frames to take is `pyav_reader.py`'s business.
"""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from stllm.media.info import MediaError, decoder_options
from stllm.media.sniff import EXPECTED, explain_unreadable, first_words, is_cut, kind_of, read_head
from stllm.media.time_bound import keep_reading
from stllm.media.timeline import DECODING_TIMES, packets

if TYPE_CHECKING:
    from av import Packet, VideoCodecContext
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

MAX_THREADS = 4  # more threads hold more frames in memory and speed up little; a data loader opens many readers
COVER_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
# Formats that hold their video themselves. Playlists (hls, dash, concat) would open other files by name.
FORMATS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,flv,live_flv,asf,ogg,rm,mxf,dv,wtv,nut,gxf,yuv4mpegpipe,"
    "swf,wav,mp3,aac,flac,ac3"
)
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave transparency out
SKIPPABLE = ("h264", "hevc")  # decoders that can leave out frames to which no other frame refers (a quarter faster)


class VideoSource:
    """A container file and its main video stream. Keep neither: `decode` may open them anew.

    num_decoded and num_seeks count the work done, num_damaged the packets that the decoder refused.
    strict: from the next pass on, the decoder refuses damaged data instead of mending it by guesses. Open GOPs look
        damaged after a seek, and some encoders write streams that are never clean: the caller decides.
    Raises MediaError when the file cannot be opened or holds no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_decoded = 0
        self.num_seeks = 0
        self.num_damaged = 0
        self.strict = False
        self._head = read_head(path)
        self._open()

    @property
    def is_cut(self) -> bool:
        return is_cut(self.path, self._head)

    def close(self) -> None:
        self.container.close()

    def reopen(self) -> None:
        """Back to the first packet; a changed `strict` takes effect."""
        self.close()
        self._open()

    def _open(self) -> None:
        from av import CodecContext

        self.container, self.stream = open_stream(self.path, self._head, strict=self.strict)
        self.decoder: VideoCodecContext = self.stream.codec_context
        alpha = {key.lower(): value for key, value in self.stream.metadata.items()}.get("alpha_mode") == "1"
        if alpha and self.decoder.name in ALPHA_DECODERS:
            self.decoder = cast("VideoCodecContext", CodecContext.create(ALPHA_DECODERS[self.decoder.name], "r"))
            self.decoder.options = decoder_options()

    def decode(
        self, key: int | None, *, wanted: Collection[int] | None = None, counted: bool = False
    ) -> Iterator[tuple[int, "VideoFrame"]]:
        """(stamp, frame) pairs from the keyframe with the stamp `key` on; None: from the start of the file.

        wanted: stamps that must come; others may be left out. None: all must.
        counted: stamps are 0, 1, ... instead of presentation times (with key None only).
        Gives nothing when the seek lands anywhere but on a keyframe at or before `key`, and ends early where the file
        does: whoever waits for a frame sees that it did not come.
        """
        from av.error import FFmpegError

        try:
            first_packet = self._start(key)
            landing: int | None = None
            count = 0
            by_dts = self.container.format.name in DECODING_TIMES
            for packet in packets(self.container, self.stream):
                keep_reading()
                if by_dts:
                    packet.pts = packet.dts  # as in the timeline: the guessed presentation times change after a seek
                if first_packet:
                    first_packet = False
                    if packet.pts is None or key is None or packet.pts > key or not packet.is_keyframe:
                        return
                    landing = packet.pts
                for frame in self._decode_packet(packet, wanted):
                    stamp = count if counted else frame.pts
                    count += 1
                    if stamp is None or (landing is not None and stamp < landing):
                        continue  # a leading picture of an open GOP: what it refers to was not decoded
                    if landing is not None and (stamp > landing or not frame.key_frame):
                        return  # the index says keyframe, the decoder does not
                    if landing is not None:
                        landing = None
                    yield stamp, frame
        except FFmpegError:
            return

    def _start(self, key: int | None) -> bool:
        """Goes to the keyframe, or to the very first packet; True when the landing has to be checked."""
        if key is None:  # no seek is sure to find the first packet; opening the file again is
            self.reopen()
            return False
        self.num_seeks += 1
        self.container.seek(key, stream=self.stream, backward=True)
        self.decoder.flush_buffers()
        return True

    def _decode_packet(self, packet: "Packet[VideoStream]", wanted: Collection[int] | None) -> "list[VideoFrame]":
        from av.error import FFmpegError

        context = self.stream.codec_context
        if context.name in SKIPPABLE:
            needed = wanted is None or packet.pts is None or packet.pts in wanted
            context.skip_frame = "DEFAULT" if needed else "NONREF"
        try:
            frames = self.decoder.decode(packet)
        except FFmpegError:
            self.num_damaged += 1
            return []
        self.num_decoded += len(frames)
        return frames


def open_stream(path: Path, head: bytes, *, strict: bool) -> "tuple[InputContainer, VideoStream]":
    """The container and its main video stream, cover pictures left aside. Raises MediaError."""
    import av
    from av.error import FFmpegError

    if kind_of(head) == "text":
        raise MediaError(f"{path}: found text ({first_words(head)!r}), expected {EXPECTED}: download it again")
    try:
        # An absolute path has no protocol; nothing but this file may be opened.
        options = {"protocol_whitelist": "file,crypto,data", "format_whitelist": FORMATS, **decoder_options()}
        container = av.open(str(path.absolute()), metadata_errors="replace", options=options)
    except (FFmpegError, ValueError) as error:
        found = explain_unreadable(path, head)
        raise MediaError(f"{path}: found {found}; expected {EXPECTED}: copy or download it again") from error
    stream = cast("VideoStream | None", container.streams.best("video"))
    if stream is None or _is_cover(stream):
        kinds = ", ".join(sorted({other.type for other in container.streams if other.type != "video"})) or "no stream"
        container.close()
        raise MediaError(f"{path}: found no video in it, only {kinds}; expected {EXPECTED}: name another file")
    if cast(Any, stream).codec_context is None:
        container.close()
        raise MediaError(f"{path}: its video codec is unknown to PyAV {av.__version__}; convert it to H.264 mp4")
    stream.thread_type = "AUTO"
    stream.codec_context.thread_count = min(MAX_THREADS, os.cpu_count() or 1)
    stream.codec_context.options = {**decoder_options(), **({"err_detect": "explode"} if strict else {})}
    return container, stream


def _is_cover(stream: "VideoStream") -> bool:
    disposition: Any = stream.disposition  # an enum or a number, as PyAV's versions have it
    return bool(getattr(disposition, "value", disposition) & COVER_PICTURE)
