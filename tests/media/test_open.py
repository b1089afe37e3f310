"""Opening media: they are recognised by content, and each bad file gives one sentence."""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stllm.common.errors import UserError
from stllm.common.registry import readers
from stllm.media.images import FrameFolderReader, GifReader, ImageReader
from stllm.media.info import MediaError, Reader
from stllm.media.open import open_media
from stllm.media.video import PyAvReader
from tests.helpers.videos import copy_packets, frame_code, read_code, write_audio, write_video

FASTSTART = {"movflags": "faststart"}  # the index first, so that a cut file still opens


def test_files_are_recognised_by_content_and_not_by_extension(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4")
    image = Image.fromarray(frame_code(5))
    image.save(tmp_path / "image.png")
    image.save(tmp_path / "gif.gif")
    (tmp_path / "frames").mkdir()
    image.save(tmp_path / "frames" / "00001.jpg")
    for name, expected in {"video.mp4": PyAvReader, "image.png": ImageReader, "gif.gif": GifReader}.items():
        for disguise in (name, "thing.dat", "thing", "thing.mp4", "thing.jpg"):
            path = tmp_path / "disguised" / disguise
            path.parent.mkdir(exist_ok=True)
            path.write_bytes((tmp_path / name).read_bytes())
            with open_media(path) as reader:
                assert type(reader) is expected
    with open_media(str(tmp_path / "frames"), fps=5) as reader:
        assert type(reader) is FrameFolderReader and reader.info.fps == 5
    with open_media(tmp_path / "gif.gif", fps=10, reader="pyav") as reader:
        assert reader.info.fps == 10
    with open_media(video, fps=3) as reader:
        assert reader.info.fps == 25  # a video knows its own


def test_readers_are_found_by_name(tmp_path: Path) -> None:
    assert readers.names() == ["decord", "pyav", "torchcodec", "torchcodec_cuda"]
    assert readers.get("pyav") is PyAvReader
    with pytest.raises(
        UserError,
        match="unknown reader 'pyaw': known are decord, pyav, torchcodec, torchcodec_cuda; did you mean 'pyav'",
    ):
        open_media(write_video(tmp_path / "video.mp4"), reader="pyaw")
    with pytest.raises(MediaError, match="fps is 0; expected a positive number"):
        open_media(tmp_path / "video.mp4", fps=0)


def test_indices_outside_the_medium_are_refused(tmp_path: Path) -> None:
    with open_media(write_video(tmp_path / "video.mp4", num_frames=10)) as reader:
        for outside in (-1, 10):
            with pytest.raises(MediaError, match=f"frame {outside} was asked for, but the video has frames 0 to 9"):
                list(reader.frames([0, outside]))


def text(path: Path) -> None:
    path.write_text("<!DOCTYPE html><title>404 Not Found</title>\n" * 9)


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\nhttp://example.org/stream.ts\n")


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def no_index(path: Path) -> None:
    write_video(path, num_frames=60)  # its moov box comes last
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def nothing_decodable(path: Path) -> None:
    data = bytearray(write_video(path, num_frames=30, gop=1000).read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "there is no such file; expected a video .*the folder .* exists, so check the file's name"),
        (lambda path: path.write_bytes(b""), r"the file is empty \(0 bytes\); expected .*download it again"),
        (text, "found text .'<!DOCTYPE html><title>404 Not Found</tit'., expected a video"),
        (playlist, "found text .'#EXTM3U http://example.org/stream.ts'., expected a video"),
        (os.mkfifo, "found a pipe, expected .*: write it to a file first"),
        (noise, "found neither video nor image .it begins with the bytes"),
        (no_index, r"found an mp4 without its index \(no moov box\): the recording or download ended early"),
        (write_audio, "found no video in it, only audio; expected a video"),
        (nothing_decodable, "0 frames of its h264 video could be read"),
    ],
)
def test_each_kind_of_bad_file_gives_its_own_sentence(
    tmp_path: Path, make: Callable[[Path], object], words: str
) -> None:
    path = tmp_path / "bad.mp4"
    make(path)
    for reader in ("auto", "decord"):
        with pytest.raises(MediaError, match=f"^{re.escape(str(path))}: .*{words}") as caught:
            open_media(path, reader=reader)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    ["#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n"],
    ids=["hls", "concat"],
)
@pytest.mark.parametrize("extension", [".m3u8", ".mp4", ""])
def test_a_file_that_names_another_file_does_not_show_it(tmp_path: Path, lines: str, extension: str) -> None:
    """An uploaded file must not give access to other files. The bytes at the end make the list a binary file."""
    other = write_video(tmp_path / "other.mp4")
    path = tmp_path / f"upload{extension}"
    for name in (other.name, str(other), f"file://{other}"):
        path.write_bytes(lines.format(name).encode() + bytes(8))
        with pytest.raises(MediaError, match="found neither video nor image"):
            open_media(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=f"the path is right up to {re.escape(str(tmp_path))}, so check"):
        open_media(tmp_path / "no" / "such" / "film.mp4")
    (tmp_path / "link.mp4").symlink_to(tmp_path / "gone.mp4")
    with pytest.raises(MediaError, match=r"it is a link to .*gone.mp4, which is missing"):
        open_media(tmp_path / "link.mp4")


def test_a_forbidden_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "video.mp4")
    path.chmod(0)
    if os.access(path, os.R_OK):  # the administrator may read everything

        def forbid(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(MediaError, match=r"permission to read it is denied; expected a readable file: run chmod \+r"):
        open_media(path)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "avi", "webm"])
def test_an_incomplete_file_reports_how_much_could_be_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    codec = {"avi": "mpeg4", "webm": "libvpx-vp9"}.get(suffix, "libx264")
    options = FASTSTART if suffix in ("mp4", "mov") else None
    write_video(path, num_frames=200, codec=codec, container_options=options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with open_media(path) as reader:
        assert reader.info.num_frames == 200
        assert [read_code(frame) for frame in reader.frames([0, 40])] == [0, 40]
        with pytest.raises(MediaError, match=r"of the 200 frames it should hold [0-9]+ could be read") as caught:
            list(reader.frames([0, 199]))
        found = re.search(r"hold (\d+) could", str(caught.value))
        assert found and 40 < int(found[1]) < 180
        readable = list(range(int(found[1])))
        assert [read_code(frame) for frame in reader.frames(readable)] == readable


def test_a_damaged_frame_is_not_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=100, gop=1)
    data = bytearray(video.read_bytes())
    middle = (data.index(b"mdat") + data.index(b"moov")) // 2
    data[middle : middle + 60] = bytes(60)  # more than a frame
    video.write_bytes(data)

    def is_read(reader: Reader, index: int) -> bool:
        try:
            return read_code(next(reader.frames([index]))) == index
        except MediaError as error:
            assert f"frame {index} of 100 could not be decoded (damaged data)" in str(error)
            return False

    with open_media(video) as reader:
        assert 97 <= sum(is_read(reader, index) for index in range(100)) < 100
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "song.mp4"
    sound = write_audio(tmp_path / "sound.mp4")
    with av.open(str(sound)) as reading, av.open(str(path), "w") as writing:
        audio = writing.add_stream_from_template(reading.streams.audio[0])
        cover = writing.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = 0x400  # type: ignore[assignment]  # attached_pic
        for packet in reading.demux(audio=0):
            if packet.size:
                packet.stream = audio
                writing.mux(packet)
        writing.mux(cover.encode(av.VideoFrame.from_ndarray(frame_code(1), format="rgb24")))
        writing.mux(cover.encode(None))
    with pytest.raises(MediaError, match="found no video in it, only audio"):
        open_media(path)


def test_a_remuxed_video_keeps_its_frames(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=50, b_frames=3)
    for suffix in ("mkv", "mov"):
        with open_media(copy_packets(video, tmp_path / f"copy.{suffix}")) as reader:
            assert [read_code(frame) for frame in reader.frames([49, 20, 21])] == [49, 20, 21]
