"""Videos: frames are correct for every codec, container and order of access. Each frame carries its number."""

import gc
import io
import os
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from stllm.media.sampling import uniform
from stllm.media.video import BY_ROTATION, UPRIGHT, PyAvReader, num_threads, turn_of
from tests.helpers.videos import Work, copy_packets, frame_code, read_code, write_video

OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0"}
X265_ALONE = "frame-threads=1:pools=none:log-level=none"  # its output depends on the number of threads
X265 = {"x265-params": f"keyint=12:min-keyint=12:{X265_ALONE}"}
VARIABLE = [index * 40 + index * index % 7 * 5 for index in range(60)]

VIDEOS: dict[str, dict[str, Any]] = {
    "h264_b_frames.mp4": {"b_frames": 3},
    "h264_no_b_frames.mov": {"b_frames": 0},
    "h264_open_gop.mp4": {"options": OPEN_GOP},
    "h264_open_gop.mkv": {"options": OPEN_GOP},
    "h264_variable_rate.mp4": {"times": VARIABLE, "b_frames": 3},
    "h264_variable_rate.mkv": {"times": VARIABLE, "b_frames": 3},
    "h264_late_start.mp4": {"start": 50},
    "h264_late_start.mkv": {"start": 50},
    "h264_one_gop.mp4": {"gop": 1000},
    "h264_all_keyframes.mp4": {"gop": 1},
    "h264_fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc_open_gop.mp4": {"codec": "libx265", "options": X265},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "b_frames": 2},
    "msmpeg4.avi": {"codec": "msmpeg4"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
}


@pytest.fixture(params=VIDEOS)
def video(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    options = VIDEOS[request.param]
    try:
        av.Codec(options.get("codec", "libx264"), "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {options['codec']}")
    return write_video(tmp_path / request.param, num_frames=60, **options)


def codes(reader: PyAvReader, indices: list[int]) -> list[int]:
    return [read_code(frame) for frame in reader.frames(indices)]


def test_frames_are_correct_in_every_order_of_access(video: Path) -> None:
    with PyAvReader(video) as reader:
        assert reader.info.num_frames == 60
        assert (reader.info.width, reader.info.height) == (64, 64)
        everything = list(range(60))
        assert codes(reader, everything) == everything
        shuffled = np.random.default_rng(0).permutation(60).tolist()
        assert codes(reader, shuffled) == shuffled
        assert codes(reader, [59]) == [59]
        assert codes(reader, [0, 0, 31, 31, 31, 5]) == [0, 0, 31, 31, 31, 5]
        assert codes(reader, uniform(7, total_frames=60)) == uniform(7, total_frames=60)


@settings(deadline=None, max_examples=40)
@given(indices=st.lists(st.integers(0, 59), max_size=12))
def test_any_indices_give_their_frames(tmp_path_factory: pytest.TempPathFactory, indices: list[int]) -> None:
    video = tmp_path_factory.getbasetemp() / "any_indices.mp4"
    if not video.exists():
        write_video(video, num_frames=60, options=OPEN_GOP)
    with PyAvReader(video) as reader:
        assert codes(reader, indices) == indices


def test_pixels_are_those_of_plain_decoding(video: Path) -> None:
    with av.open(str(video)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    wanted = [57, 3, 22, 41]
    with PyAvReader(video) as reader:
        for index, frame in zip(wanted, reader.frames(wanted), strict=True):
            assert frame.dtype == np.uint8 and frame.flags.c_contiguous
            np.testing.assert_array_equal(frame, decoded[index])


def test_times_start_at_zero_and_follow_the_file(video: Path) -> None:
    with PyAvReader(video) as reader:
        times = reader.times(range(60))
        if "variable" in video.name:
            assert times == pytest.approx([stamp / 1000 for stamp in VARIABLE], abs=1e-6)
            assert reader.info.fps == pytest.approx(59 / times[-1], rel=0.02)
        else:
            assert times == pytest.approx([index / 25 for index in range(60)], abs=1e-6)
            assert reader.info.fps == 25
            assert reader.info.duration == pytest.approx(2.4)


def test_seeking_decodes_a_part_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, work = write_video(tmp_path / "long.mp4", num_frames=500, gop=20), Work(monkeypatch)
    with PyAvReader(video) as reader:
        wanted = uniform(6, total_frames=500)
        assert codes(reader, wanted) == wanted
        assert work.num_seeks == 6
        assert work.num_decoded < 6 * 20
        assert codes(reader, [499, 250]) == [499, 250]
        assert work.num_decoded < 8 * 20


def test_near_frames_are_reached_without_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, work = write_video(tmp_path / "short.mp4", num_frames=60, gop=4), Work(monkeypatch)
    with PyAvReader(video) as reader:
        assert codes(reader, list(range(0, 60, 3))) == list(range(0, 60, 3))
        assert work.num_seeks == 0


def test_frames_are_decoded_as_they_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, work = write_video(tmp_path / "long.mp4", num_frames=300, gop=20), Work(monkeypatch)
    with PyAvReader(video) as reader:
        frames = reader.frames([5, 295])
        next(frames)
        assert work.num_decoded < 40
        assert read_code(next(frames)) == 295


def test_frames_are_freed_at_once(tmp_path: Path) -> None:
    """Frames that wait for the garbage collector would need memory in proportion to their number."""
    video = write_video(tmp_path / "turned.mp4", num_frames=200, gop=10, rotation=90)

    def num_alive() -> int:
        return sum(type(thing) is av.VideoFrame and thing.width > 16 for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = num_alive()  # of other tests
        with PyAvReader(video) as reader:
            for _ in reader.frames(uniform(20, total_frames=200)):
                assert num_alive() - before < 8
    finally:
        gc.enable()


def test_two_passes_may_be_interleaved(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=100, b_frames=3)
    with PyAvReader(video) as reader:
        ahead, behind = reader.frames([50, 51, 95]), reader.frames([10, 11, 12])
        found = [read_code(next(frames)) for frames in (ahead, behind, ahead, behind, ahead, behind)]
        assert found == [50, 10, 51, 11, 95, 12]


def test_writing_into_a_frame_does_not_reach_its_repeat(tmp_path: Path) -> None:
    with PyAvReader(write_video(tmp_path / "video.mp4")) as reader:
        found = []
        for frame in reader.frames([7, 7, 7]):
            found.append(read_code(frame))
            frame[:] = 0
        assert found == [7, 7, 7]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libx265"])
def test_frames_are_correct_if_every_frame_is_marked_as_keyframe(tmp_path: Path, codec: str) -> None:
    options = X265 if codec == "libx265" else None
    video = write_video(tmp_path / "video.mp4", num_frames=60, codec=codec, options=options)
    data = video.read_bytes()
    assert data.count(b"stss") == 1  # the table of keyframes; without it all frames are taken for keyframes
    video.write_bytes(data.replace(b"stss", b"free"))
    with PyAvReader(video) as reader:
        shuffled = np.random.default_rng(1).permutation(60)[:20].tolist()
        assert codes(reader, shuffled) == shuffled


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_a_video_shorter_than_its_headers_state_is_reported_as_incomplete(tmp_path: Path, suffix: str) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    video = write_video(tmp_path / f"video.{suffix}", num_frames=50, container_options=options)
    whole = video.read_bytes()
    until_end = whole.rfind(b"mdat") - 4  # a length of 0: the box goes on to the end of the file
    for data, is_cut in (
        (whole, False),
        (whole[:-200], True),
        *([(whole[:until_end] + bytes(4) + whole[until_end + 4 :], False)] if suffix == "mp4" else []),
    ):
        video.write_bytes(data)
        with PyAvReader(video) as reader:
            assert reader.source.is_cut == is_cut


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_film_cut_inside_an_open_gop_starts_at_its_first_whole_frame(tmp_path: Path, suffix: str) -> None:
    whole = write_video(tmp_path / "whole.mp4", num_frames=96, options=OPEN_GOP)
    part = copy_packets(whole, tmp_path / f"part.{suffix}", first_keyframe=3)
    with av.open(str(part)) as container:
        shown = [read_code(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    with PyAvReader(part) as reader:
        assert reader.info.num_frames == len(shown)
        assert codes(reader, list(range(len(shown)))) == shown
        assert codes(reader, [40, 2, 30]) == [shown[40], shown[2], shown[30]]


def test_an_edit_list_hides_the_frames_before_it(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=60, start=-5)
    with PyAvReader(video) as reader:
        assert reader.info.num_frames == 55
        assert codes(reader, [0, 30, 54, 12]) == [5, 35, 59, 17]
        assert reader.times([0, 25]) == [0.0, 1.0]


def test_a_stream_without_times_is_counted(tmp_path: Path) -> None:
    with PyAvReader(write_video(tmp_path / "bare.h264", num_frames=40)) as reader:
        assert reader.timeline.counted and reader.info.fps == 25
        assert codes(reader, [3, 30, 29, 0, 39]) == [3, 30, 29, 0, 39]


def test_frames_that_share_a_time_are_counted(tmp_path: Path) -> None:
    video = write_video(tmp_path / "fast.mkv", num_frames=60, fps=3000, b_frames=3)  # its clock counts milliseconds
    with PyAvReader(video) as reader:
        assert reader.timeline.counted and reader.info.num_frames == 60
        assert codes(reader, [59, 20, 21, 40]) == [59, 20, 21, 40]


REORDERING: dict[str, dict[str, Any]] = {
    "h264": {"b_frames": 3, "gop": 15},
    "hevc": {"codec": "libx265", "options": X265},
    "mpeg4": {"codec": "mpeg4", "b_frames": 2},
    "mpeg2": {"codec": "mpeg2video", "b_frames": 2},
}


def write_disordered(path: Path, source: Path, *, first: int = 0, delay: float = 0) -> Path:
    """Copy packets to another container. From packet `first` on, they are shown `delay` s after they are decoded."""
    with av.open(str(source)) as reading, av.open(str(path), "w") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        packets: list[Any] = [packet for packet in reading.demux(stream) if packet.size]
        for index, packet in enumerate(packets):
            if index >= first:
                packet.pts = packet.dts + round(delay / packet.time_base)
            packet.stream = copy
            writing.mux(packet)
    return path


@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        *((codec, suffix) for codec in ("h264", "hevc") for suffix in ("mkv", "mp4", "ts", "flv")),
        *((codec, suffix) for codec in ("mpeg4", "mpeg2") for suffix in ("mkv", "mp4", "avi")),
    ],
)
def test_frames_are_counted_if_their_times_are_decoding_times(
    tmp_path: Path, codec: str, suffix: str, first: int
) -> None:
    """This may start at any frame, so the whole index is checked."""
    source = write_video(tmp_path / "source.mp4", num_frames=60, **REORDERING[codec])
    path = write_disordered(tmp_path / f"video.{suffix}", source, first=first)
    with PyAvReader(path) as reader:
        shown = codes(reader, list(range(reader.info.num_frames)))
        assert shown == sorted(set(shown)) and len(shown) >= (58 if suffix == "mp4" else 60)  # its edit list hides two
        assert reader.timeline.counted
        assert np.diff(reader.times(range(len(shown)))) == pytest.approx([0.04] * (len(shown) - 1), abs=1e-3)
        for index in (47, 3, 31, 30, 5):
            assert codes(reader, [index]) == [shown[index]]


@pytest.mark.parametrize("codec", REORDERING)
def test_frames_are_counted_if_their_times_become_decoding_times(tmp_path: Path, codec: str) -> None:
    """This is the case in two joined files: no time occurs twice or is missing, and the first part is correct."""
    source = write_video(tmp_path / "source.mp4", num_frames=60, **REORDERING[codec])
    with av.open(str(source)) as container:
        packets: list[Any] = [packet for packet in container.demux(video=0) if packet.size]
        stored = [packet.pts * packet.time_base for packet in packets]
        delay = float(stored[0] - packets[0].dts * packets[0].time_base)
    # all frames stored up to here are shown before those that follow
    first = next(at for at in range(30, 60) if max(stored[:at]) < min(stored[at:]))
    for index in range(first - 2, 60, 2):  # a new file each time: a reader that has read more may have noticed more
        path = write_disordered(tmp_path / f"{index}.mkv", source, first=first, delay=delay)
        with PyAvReader(path) as reader:
            assert codes(reader, [index]) == [index]


HEVC_STREAMS = {
    "closed": "open-gop=0:keyint=12:min-keyint=12",
    "no_b_frames": "bframes=0:keyint=12",
    "long_pyramid": "bframes=8:keyint=250",  # the counter of the order overflows its field in the slice header
    "temporal_layers": "temporal-layers=3:keyint=30",
    "leading_pictures": "open-gop=0:radl=2:keyint=16:min-keyint=16",
}


@pytest.mark.parametrize("name", HEVC_STREAMS)
def test_true_times_of_hevc_are_trusted(tmp_path: Path, name: str) -> None:
    """Their frames are found by seeking, without decoding the whole file."""
    options = {"x265-params": f"{HEVC_STREAMS[name]}:{X265_ALONE}"}
    source = write_video(tmp_path / "video.mp4", num_frames=300, codec="libx265", options=options)
    for path in (source, copy_packets(source, tmp_path / "video.ts")):
        with PyAvReader(path) as reader:
            assert not reader.timeline.counted
            assert codes(reader, [280, 3, 150, 151]) == [280, 3, 150, 151]


def test_frames_keep_their_numbers_after_a_damaged_header(tmp_path: Path) -> None:
    source = write_video(tmp_path / "source.mp4", num_frames=60, codec="libx265", options=X265)
    with av.open(str(source)) as reading, av.open(str(tmp_path / "damaged.mkv"), "w") as writing:
        copy = writing.add_stream_from_template(reading.streams.video[0])
        for index, packet in enumerate(packet for packet in reading.demux(video=0) if packet.size):
            if index == 16:
                data = bytes(packet)
                packet.update(data[:6] + bytes(6) + data[12:])  # behind the unit's length and its header
            packet.stream = copy
            writing.mux(packet)
    with PyAvReader(tmp_path / "damaged.mkv") as reader:
        assert reader.info.num_frames == 60 and not reader.timeline.counted
        assert codes(reader, [50, 3, 40, 59]) == [50, 3, 40, 59]


def matrix() -> dict[str, dict[str, Any]]:
    """Return videos of all codecs and containers: plain, with variable rate, with an edit list, and rotated."""
    codecs: dict[str, dict[str, Any]] = {
        **REORDERING,
        "h264_plain": {"b_frames": 0},
        "h264_open": {"options": OPEN_GOP},
        "hevc_plain": {"codec": "libx265", "options": {"x265-params": f"keyint=12:bframes=0:{X265_ALONE}"}},
        "mpeg4_plain": {"codec": "mpeg4"},
        "vp8": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
        "vp9": {"codec": "libvpx-vp9", "options": {"deadline": "good", "cpu-used": "8", "lag-in-frames": "16"}},
        "wmv2": {"codec": "wmv2"},
        "ffv1": {"codec": "ffv1"},
    }
    containers = {
        "mp4": ("h264", "h264_plain", "h264_open", "hevc", "hevc_plain", "mpeg4", "mpeg2", "vp9"),
        "mov": ("h264", "hevc", "mpeg4"),
        "mkv": tuple(name for name in codecs if name != "wmv2"),
        "webm": ("vp8", "vp9"),
        "avi": ("h264", "h264_plain", "h264_open", "mpeg4", "mpeg4_plain", "mpeg2", "vp8", "wmv2", "ffv1"),
        "ts": ("h264", "h264_plain", "h264_open", "hevc", "mpeg2"),
        "flv": ("h264", "h264_plain", "h264_open", "hevc", "vp9"),
        "asf": ("h264", "mpeg4", "wmv2"),
        "mpg": ("mpeg2",),
    }
    kinds: dict[str, dict[str, Any]] = {"": {}, "_variable": {"times": VARIABLE[:40]}}
    edited = {**kinds, "_edited": {"start": -5}, "_rotated": {"rotation": 90}}
    return {
        f"{name}{kind}.{suffix}": {**codecs[name], **options}
        for suffix, names in containers.items()
        for name in names
        for kind, options in (edited if suffix in ("mp4", "mov") else kinds).items()
        if not (name == "mpeg2" and kind == "_variable")  # its encoder does not support this rate
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", matrix())
def test_random_access_equals_sequential_reading(tmp_path: Path, name: str) -> None:
    options = matrix()[name]
    try:
        av.Codec(options.get("codec", "libx264"), "w")
    except ValueError:
        pytest.skip(f"this PyAV has no encoder {options['codec']}")
    video = write_video(tmp_path / name, num_frames=40, **options)
    with av.open(str(video)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    shown = [read_code(np.rot90(picture) if "rotated" in name else picture) for picture in pictures]
    assert shown == list(range(40 - len(shown), 40)) or "rotated" in name
    with PyAvReader(video) as reader:
        assert reader.info.num_frames == len(shown) == (35 if "edited" in name else 40)
        assert codes(reader, list(range(len(shown)))) == shown
        shuffled = np.random.default_rng(0).permutation(len(shown)).tolist()
        assert codes(reader, shuffled) == [shown[index] for index in shuffled]
        if "variable" in name and not name.endswith(("avi", "asf")):  # these hold decoding times only
            expected = [VARIABLE[index] / 1000 for index in range(40)]
        else:
            expected = [index / 25 for index in range(len(shown))]
        assert reader.times(range(len(shown))) == pytest.approx(expected, abs=0.041 if "variable" in name else 1e-3)


def test_hidden_vp8_frames_are_not_counted(tmp_path: Path) -> None:
    """After each frame follows a hidden copy: bit 4 of a VP8 frame's tag is show_frame (RFC 6386, 9.1)."""
    options = VIDEOS["vp8.webm"]
    source = write_video(tmp_path / "source.webm", num_frames=20, gop=1, **options)
    with av.open(str(source)) as reading, av.open(str(tmp_path / "hidden.webm"), "w") as writing:
        copy = writing.add_stream_from_template(reading.streams.video[0])
        for packet in reading.demux(video=0):
            if packet.size:
                data = bytes(packet)
                hidden: Any = av.Packet(bytes([data[0] & ~0x10]) + data[1:])
                hidden.pts = hidden.dts = packet.pts + 20  # type: ignore[operator]  # milliseconds
                hidden.time_base = packet.time_base
                for each in (packet, hidden):
                    each.stream = copy
                    writing.mux(each)
    with PyAvReader(tmp_path / "hidden.webm") as reader:
        assert reader.info.num_frames == 20 and not reader.timeline.counted
        assert codes(reader, [3, 19, 0, 11]) == [3, 19, 0, 11]


def test_reading_switches_off_logging_that_can_block_the_decoding_threads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=8)
    av.logging.set_level(av.logging.ERROR)  # as torchvision 0.21 does when it is imported
    PyAvReader(path).close()
    assert av.logging.get_level() is None


def test_metadata_that_is_not_utf_8_is_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=8)
    written = path.read_bytes()
    assert written.count(b"Lavf") == 1  # the encoder's name
    path.write_bytes(written.replace(b"Lavf", b"L\xe9vf"))
    with PyAvReader(path) as reader:
        assert codes(reader, [5]) == [5]


def test_one_frame_is_a_video(tmp_path: Path) -> None:
    with PyAvReader(write_video(tmp_path / "one.mp4", num_frames=1)) as reader:
        assert reader.info.num_frames == 1
        assert codes(reader, [0, 0]) == [0, 0]
        assert reader.times([0]) == [0.0]


@pytest.mark.parametrize(
    ("rotation", "mirrored", "expected"),
    [
        (0, False, "WRGK"),
        (90, False, "RKWG"),  # a quarter turn counter-clockwise
        (180, False, "KGRW"),
        (-90, False, "GWKR"),
        (0, True, "RWKG"),
        (90, True, "KRGW"),
    ],
)
def test_phone_videos_are_shown_upright(tmp_path: Path, rotation: int, mirrored: bool, expected: str) -> None:
    corners = np.zeros((32, 64, 3), np.uint8)
    corners[:16, :32], corners[:16, 32:], corners[16:, :32] = 255, (255, 0, 0), (0, 255, 0)
    video = write_video(
        tmp_path / "phone.mp4", frames=[corners] * 3, size=(64, 32), rotation=rotation, mirrored=mirrored
    )
    with PyAvReader(video) as reader:
        frame = next(reader.frames([1]))
    height, width = frame.shape[:2]
    assert (reader.info.height, reader.info.width) == (height, width)
    assert (width, height) == ((32, 64) if abs(rotation) == 90 else (64, 32))
    quarters = [frame[y, x] > 128 for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    names = {(True, True, True): "W", (True, False, False): "R", (False, True, False): "G"}
    assert "".join(names.get(tuple(quarter.tolist()), "K") for quarter in quarters) == expected


ORIENTATION = 0x0112  # EXIF's tag; 1 upright, 3 upside down, 6 and 8 a quarter turn


def camera_video(path: Path, orientation: int) -> Path:
    """Write Motion JPEG as cameras do, with EXIF data in each picture."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for index in range(4):
            picture = io.BytesIO()
            Image.fromarray(frame_code(index + 1, (96, 64))).save(picture, "JPEG", exif=exif)
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, index, index, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_cameras_motion_jpeg_is_shown_upright(tmp_path: Path, orientation: int) -> None:
    with PyAvReader(camera_video(tmp_path / "camera.avi", orientation)) as reader:
        frames = list(reader.frames(range(4)))
    image = Image.fromarray(frame_code(3, (96, 64)))
    image.getexif()[ORIENTATION] = orientation
    expected = ImageOps.exif_transpose(image)
    assert (frames[2].shape[1], frames[2].shape[0]) == expected.size
    assert read_code(frames[2]) == read_code(np.array(expected))


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_and_display_matrix_agree(tmp_path: Path, rotation: int) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=3, rotation=rotation)
    with av.open(str(video)) as container:
        frame = next(container.decode(video=0))
    assert BY_ROTATION.get(round(frame.rotation / 90) % 4, UPRIGHT) == turn_of(frame)


def test_the_helper_s_codes_survive_encoding() -> None:
    for index in (0, 1, 255, 65535):
        assert read_code(frame_code(index, (64, 48))) == index


def test_a_data_worker_decodes_in_one_thread() -> None:
    """There is a worker a core; each further thread of a decoder decodes frames ahead that nobody wants."""
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(num_threads).result() == 1
    assert num_threads() == min(4, os.cpu_count() or 1)
