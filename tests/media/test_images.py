"""Images, animated pictures and frame folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stllm.media.images import FrameFolderReader, GifReader, ImageReader
from stllm.media.info import MediaError
from stllm.media.open import open_media
from tests.helpers.videos import frame_code, read_code


def write_gif(path: Path, num_frames: int, size: tuple[int, int] = (64, 64)) -> Path:
    first, *rest = (Image.fromarray(frame_code(index, size)) for index in range(num_frames))
    first.save(path, save_all=True, append_images=rest, duration=100)
    return path


def write_folder(path: Path, num_frames: int, name: str = "{:05d}.jpg", first: int = 1) -> Path:
    path.mkdir()
    for index in range(first, first + num_frames):
        Image.fromarray(frame_code(index)).save(path / name.format(index))
    return path


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_play_at_25_frames_a_second(tmp_path: Path, suffix: str) -> None:
    path = write_gif(tmp_path / f"a.{suffix}", 20)
    with GifReader(path) as reader:
        assert (reader.info.kind, reader.info.num_frames, reader.info.fps) == ("gif", 20, 25.0)
        assert (reader.info.width, reader.info.height, reader.info.first_index) == (64, 64, 0)
        assert [read_code(frame) for frame in reader.frames([0, 7, 7, 19, 3])] == [0, 7, 7, 19, 3]
        assert reader.times([0, 5]) == [0.0, 0.2]


def test_a_gif_of_one_picture_is_an_animation(tmp_path: Path) -> None:
    with GifReader(write_gif(tmp_path / "a.gif", 1)) as reader:
        assert reader.info.num_frames == 1
        assert [frame.shape for frame in reader.frames([0])] == [(64, 64, 3)]


def test_partial_gif_frames_are_composed_over_those_before(tmp_path: Path) -> None:
    red = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    dot = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    dot.paste((0, 0, 255, 255), (0, 0, 10, 10))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[dot], disposal=1, duration=40)
    with GifReader(tmp_path / "a.gif") as reader:
        frame = list(reader.frames([0, 1]))[1]
    assert frame[5, 5].tolist() == [0, 0, 255]
    assert frame[30, 30].tolist() == [255, 0, 0]


def test_folders_count_from_one(tmp_path: Path) -> None:
    with FrameFolderReader(write_folder(tmp_path / "clip", 9)) as reader:
        assert reader.info.kind == "frames"
        assert (reader.info.num_frames, reader.info.first_index, reader.info.fps) == (9, 1, 3.0)
        assert reader.info.duration == 3.0
        assert [read_code(frame) for frame in reader.frames([1, 9, 4, 4])] == [1, 9, 4, 4]
        assert reader.times([1, 4]) == [0.0, 1.0]
        for outside in (0, 10):
            with pytest.raises(MediaError, match=f"frame {outside} was asked for, but the frames has frames 1 to 9"):
                list(reader.frames([outside]))


def test_the_frame_rate_of_a_folder_depends_on_its_names(tmp_path: Path) -> None:
    raw = write_folder(tmp_path / "raw", 2, name="{:06d}.png")
    assert FrameFolderReader(raw).info.fps == 5.0
    assert FrameFolderReader(raw, fps=12).info.fps == 12


def test_folders_may_hold_other_files(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clip", 3, name="{:05d}.JPEG")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.txt").write_text("5 fps")
    assert FrameFolderReader(folder).info.num_frames == 3


def test_folders_with_gaps_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "gap", 5)
    (folder / "00003.jpg").unlink()
    with pytest.raises(MediaError, match=r"found frame 00004.jpg where number 3 was expected.*without gaps"):
        FrameFolderReader(folder)
    with pytest.raises(MediaError, match=r"found frame 00000.jpg where number 1 was expected"):
        FrameFolderReader(write_folder(tmp_path / "zero", 3, first=0))


def test_folders_without_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="found a folder with nothing in it"):
        FrameFolderReader(tmp_path)
    (tmp_path / "film.mp4").write_bytes(b"x")
    with pytest.raises(MediaError, match=r"found a folder with 1 entries such as 'film.mp4' in it.*name a video"):
        FrameFolderReader(tmp_path)


def test_a_bad_frame_names_its_file(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "clip", 3)
    (folder / "00002.jpg").write_bytes((folder / "00002.jpg").read_bytes()[:300])
    with FrameFolderReader(folder) as reader:
        assert len(list(reader.frames([1, 3]))) == 2
        with pytest.raises(MediaError, match=r"00002.jpg: found a damaged or cut image"):
            list(reader.frames([1, 2]))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_images_are_one_frame(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(frame_code(1234, (80, 48))).save(tmp_path / f"a.{suffix}")
    with ImageReader(tmp_path / f"a.{suffix}") as reader:
        assert (reader.info.kind, reader.info.num_frames) == ("image", 1)
        assert (reader.info.width, reader.info.height) == (80, 48)
        assert [read_code(frame) for frame in reader.frames([0])] == [1234]
        assert reader.times([0]) == [0.0]


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, :20] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with ImageReader(tmp_path / "a.jpg") as reader:
        frame = next(reader.frames([0]))
        assert frame.shape == (40, 20, 3) and (reader.info.width, reader.info.height) == (20, 40)
        assert frame[:15].min() > 200 and frame[25:].max() < 50


def test_transparency_is_white(tmp_path: Path) -> None:
    for name, image in {
        "rgba": Image.new("RGBA", (8, 8), (0, 0, 0, 0)),
        "half": Image.new("RGBA", (8, 8), (0, 0, 0, 128)),
        "grey": Image.new("LA", (8, 8), (0, 0)),
    }.items():
        image.save(tmp_path / f"{name}.png")
        frame = next(ImageReader(tmp_path / f"{name}.png").frames([0]))
        assert frame.max() == frame.min() == (127 if name == "half" else 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert next(ImageReader(tmp_path / "palette.png").frames([0])).min() == 255


def test_deep_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    frame = next(ImageReader(tmp_path / "a.png").frames([0]))
    np.testing.assert_allclose(frame[..., 1], ramp / 257, atol=1)


def test_incomplete_pictures_are_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(MediaError, match=f"a.{suffix}: found a damaged or cut image"):
            ImageReader(path)


def test_an_incomplete_gif_is_refused_or_gives_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = write_gif(tmp_path / "a.gif", 40).read_bytes()
    for percent in range(40, 80, 3):
        path = tmp_path / f"{percent}.gif"
        path.write_bytes(whole[: len(whole) * percent // 100])
        caplog.clear()
        try:
            with GifReader(path) as reader:
                assert f"{percent}.gif: the gif ends early" in caplog.text
                assert 10 < reader.info.num_frames < 40
                list(reader.frames(range(reader.info.num_frames)))
            GifReader(path).close()
            assert len(caplog.records) == 1  # however often it is read
        except MediaError as error:
            assert f"{percent}.gif: found a damaged or cut image" in str(error)


@pytest.mark.parametrize("text", ["P6 ", "P5\n12 ", "P1 1 1 ", "Pf ", "P7\nWIDTH "])
def test_text_that_begins_like_a_picture_is_not_shown_in_messages(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(f"{text}hunter2hunter2")
    with pytest.raises(MediaError, match=r"damaged or cut image \(.+\)") as caught:
        open_media(path)
    assert "hunter" not in str(caught.value).replace(str(path), "")
