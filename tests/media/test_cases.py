"""Media files like those in public bug reports (`cases/`): what `stllm chat` answers, and which frames it reads."""

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from stllm.cli import main
from stllm.conversation import chat as engine
from stllm.conversation.chat import FOLDER, Chat, load_chat
from stllm.media import video as pyav_reader
from stllm.media.images import ImageReader
from stllm.media.info import Reader
from stllm.media.open import open_media
from stllm.media.sampling import uniform
from stllm.media.video import PyAvReader
from tests.helpers.videos import Work

CASES = Path(__file__).parent / "cases"
NUM_FRAMES = 90


@pytest.fixture(scope="module")
def loaded() -> Chat:
    return load_chat(FOLDER, device="cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, loaded: Chat) -> None:
    """Load the model once for all tests."""
    monkeypatch.setattr(engine, "load_chat", lambda *_, **__: loaded)


def chat(path: str | Path, *argv: str) -> int:
    return main(["chat", "--device", "cpu", "--json", "--question", "What?", "--video", str(path), *argv])


def times_of(path: str | Path, *argv: str, capsys: pytest.CaptureFixture[str]) -> list[float]:
    assert chat(path, *argv) == 0
    times: list[float] = json.loads(capsys.readouterr().out)["frame_times"]
    return times


def number(frame: np.ndarray) -> int:
    """Return the number that a frame of a case shows: 12 bits in two rows of six fields, white for one."""
    height, width = frame.shape[:2]
    fields = frame[[height // 8, 3 * height // 8]][:, (2 * np.arange(6) + 1) * width // 12].mean(axis=2)
    return sum(1 << bit for bit, field in enumerate(fields.reshape(-1)) if field > 127)


def numbers(reader: Reader, indices: list[int]) -> list[int]:
    return [number(frame) for frame in reader.frames(indices)]


@pytest.mark.parametrize("name", ["numbered.avi", "pts_is_dts.mkv", "text_after_mp4.mp4"])
def test_every_numbered_frame_is_read_once_and_in_order(quick, name: str, capsys) -> None:
    with open_media(CASES / name) as reader:
        everything = list(range(NUM_FRAMES))
        assert reader.info.num_frames == NUM_FRAMES and numbers(reader, everything) == everything
        shuffled = np.random.default_rng(0).permutation(NUM_FRAMES)[:10].tolist()
        assert [numbers(reader, [index])[0] for index in shuffled] == shuffled
    expected = [index / 25 for index in uniform(8, total_frames=NUM_FRAMES)]
    assert times_of(CASES / name, capsys=capsys) == pytest.approx(expected, abs=1e-3)
    part = times_of(CASES / name, "--start", "1", "--end", "1.2", capsys=capsys)
    assert part == pytest.approx([1 + index / 25 for index in uniform(8, total_frames=5)], abs=1e-3)


def test_a_part_is_chosen_by_the_times_of_its_frames(quick, capsys) -> None:
    times = times_of(CASES / "gap.mp4", "--start", "9", "--end", "10", capsys=capsys)
    assert times == pytest.approx([9.7 + index / 30 for index in uniform(8, total_frames=9)], abs=1e-3)
    last = times_of(CASES / "gap.mp4", "--start", "9.95", capsys=capsys)
    assert last == pytest.approx([9.967], abs=1e-3)
    first = times_of(CASES / "gap.mp4", "--end", "0.06", capsys=capsys)
    assert first == pytest.approx([index / 30 for index in uniform(8, total_frames=2)], abs=1e-3)
    assert chat(CASES / "gap.mp4", "--start", "2", "--end", "8") == 1
    expected = "no frame is shown within [2, 8] s; the 14 frames of the video are at 0 to 0.133 s, 9.7 to 9.967 s"
    assert expected in capsys.readouterr().err
    assert chat(CASES / "numbered.avi", "--start", "1.01", "--end", "1.02") == 1
    assert "the 90 frames of the video are at 0 to 3.56 s" in capsys.readouterr().err


def test_a_stated_rate_that_the_frames_contradict_is_not_used(quick, capsys) -> None:
    with open_media(CASES / "copy.avi") as reader:
        assert (reader.info.num_frames, reader.info.fps, reader.info.duration) == (100, 25, 4)
        assert reader.times(range(100)) == pytest.approx([index / 25 for index in range(100)])
        assert np.ptp([next(reader.frames([50])), list(reader.frames(range(51)))[50]], axis=0).max() == 0
    assert min(times_of(CASES / "copy.avi", "--start", "3", capsys=capsys)) >= 3
    assert chat(CASES / "copy.avi", "--start", "5") == 1
    assert "outside the video, which lasts 4.00 s" in capsys.readouterr().err


def test_tiled_pictures_of_phones_are_whole_or_refused(quick, capsys) -> None:
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        assert chat(CASES / "grid.heic") == 1
        assert "found a picture in HEIC format, which needs the package pillow-heif" in capsys.readouterr().err
    else:
        with open_media(CASES / "grid.heic") as reader:
            assert (reader.info.kind, reader.info.width, reader.info.height) == ("image", 600, 400)


def test_an_animated_png_is_read_as_a_gif(quick, capsys) -> None:
    with open_media(CASES / "moving.png") as reader:
        assert (reader.info.kind, reader.info.num_frames, reader.info.fps) == ("gif", 8, 25)
        assert numbers(reader, [0, 7, 3, 3]) == [0, 7, 3, 3]
    assert len(times_of(CASES / "moving.png", capsys=capsys)) == 8


def test_dark_raw_frames_are_not_taken_for_text(quick, capsys) -> None:
    with open_media(CASES / "raw.y4m") as reader:
        assert (reader.info.num_frames, reader.info.fps, next(reader.frames([1])).max()) == (2, 10, 0)
    assert times_of(CASES / "raw.y4m", "--end", "0.1", capsys=capsys) == [0]


def test_transparent_videos_and_pictures_have_one_background(quick, capsys) -> None:
    with open_media(CASES / "transparent.mov") as video, open_media(CASES / "transparent.png") as image:
        picture = next(image.frames([0]))
        assert picture[0, 0].tolist() == [255, 255, 255]
        np.testing.assert_array_equal(next(video.frames([4])), picture)
    assert len(times_of(CASES / "transparent.mov", capsys=capsys)) == 8
    assert times_of(CASES / "transparent.png", capsys=capsys) == [0]


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_web_videos_may_be_transparent(codec: str, tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[:32] = 200, 0, 0, 255
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        options = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 64, "yuva420p", 5
        for _ in range(12):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            container.mux(stream.encode(frame.reformat(format="yuva420p")))
        container.mux(stream.encode(None))
    for reader in ("pyav", "decord"):
        with open_media(tmp_path / "a.webm", reader=reader) as medium:
            assert medium.info.num_frames == 12
            for shown in medium.frames([11, 2, 3, 7]):
                np.testing.assert_allclose(shown[[8, 56], 8], [[200, 0, 0], [255] * 3], atol=12)


def test_a_name_may_begin_with_a_tilde(quick, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for file in ("~tilde.mp4", "~", "home/film.mp4"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        if file != "~":
            (tmp_path / file).write_bytes((CASES / "gap.mp4").read_bytes())
    assert len(times_of("~tilde.mp4", capsys=capsys)) == len(times_of("~/film.mp4", capsys=capsys)) == 8
    assert chat("~gone.mp4") == 1
    assert "~gone.mp4: there is no such file" in capsys.readouterr().err
    Path("link.mp4").symlink_to("gone.mp4")
    assert chat("link.mp4") == 1
    assert "it is a link to gone.mp4, which is missing" in capsys.readouterr().err


def test_a_temperature_may_be_a_whole_number(loaded: Chat) -> None:
    assert loaded.ask(CASES / "gap.mp4", "What?", temperature=2, max_new_tokens=2).visual_tokens == 48


def test_frames_of_a_file_are_counted_only_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pyav_reader, "_counted", {})
    video = tmp_path / "numbered.avi"
    video.write_bytes((CASES / "numbered.avi").read_bytes())
    decoded, work = [], Work(monkeypatch)
    for _ in range(2):
        work.num_decoded = 0
        with PyAvReader(video) as reader:
            assert reader.timeline.counted
            decoded.append(work.num_decoded)
    assert decoded[0] >= NUM_FRAMES > 10 > decoded[1]
    work.num_decoded = 0
    video.write_bytes((CASES / "pts_is_dts.mkv").read_bytes())  # another file by the same name is counted anew
    with PyAvReader(video) as reader:
        assert numbers(reader, [80]) == [80]
        assert work.num_decoded >= NUM_FRAMES and reader.timeline.counted
    monkeypatch.setattr(pyav_reader, "MAX_COUNTED", NUM_FRAMES)
    PyAvReader(CASES / "numbered.avi").close()
    assert len(pyav_reader._counted) == 1  # the oldest went


@pytest.mark.parametrize("suffix", ["jp2", "ppm", "pgm", "ico", "tga", "avif", "qoi", "pcx", "sgi"])
def test_pictures_that_pillow_reads_are_images(suffix: str, tmp_path: Path) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32] = 200
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(picture)
    (image.convert("L") if suffix == "pgm" else image).save(path)
    with open_media(path) as reader:
        assert type(reader) is ImageReader and reader.info.kind == "image"
        frame = next(reader.frames([0]))
    assert frame.shape == (64, 64, 3)
    np.testing.assert_allclose(frame[[8, 56], 8], [[200] * 3, [0] * 3], atol=4)


def test_animated_pictures_start_with_their_first_frame(tmp_path: Path) -> None:
    """A png may begin with a picture for programs without animation, which is not part of the animation."""
    first, *rest = (Image.new("RGB", (16, 16), (value, 0, 0)) for value in (10, 60, 120, 240))
    kinds: dict[str, dict[str, Any]] = {
        "png": {"default_image": True},
        "avif": {"quality": 90},
        "webp": {"lossless": True},
    }
    for suffix, options in kinds.items():
        path = tmp_path / f"a.{suffix}"
        first.save(path, save_all=True, append_images=rest, duration=200, **options)
        with open_media(path) as reader:
            values = [frame[8, 8, 0] for frame in reader.frames(range(reader.info.num_frames))]
            assert reader.info.kind == "gif"
        np.testing.assert_allclose(values, [60, 120, 240] if suffix == "png" else [10, 60, 120, 240], atol=8)
