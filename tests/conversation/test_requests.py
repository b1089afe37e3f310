"""What may be asked about what: a medium's part and its stamp, a question that is text."""

from pathlib import Path

import pytest

from stllm.common.errors import UserError
from stllm.conversation.requests import Media, Request
from stllm.media.clip import MediaError
from stllm.processors.templates import Turn
from tests.helpers.videos import write_video


@pytest.mark.parametrize("path", ["", " "])
def test_no_path_is_not_this_folder(path: str) -> None:
    with pytest.raises(UserError, match="path of the video is empty"):
        Media(path)


def test_an_open_bound_is_the_rest() -> None:
    assert Media("x").bounds is None
    assert Media("x", start=2.0).bounds == (2.0, float("inf"))
    assert Media("x", end=2.0).bounds == (0.0, 2.0)


def test_a_medium_can_be_checked_before_it_is_read(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=25)
    Media(str(video), start=0.5).check()
    Media(str(video), num_frames=0, sampling="segment").check()
    with pytest.raises(MediaError, match=r"the bound \[1, end\] s lies outside the video, which lasts 1.00 s"):
        Media(str(video), start=1.0).check()
    with pytest.raises(MediaError, match="num_frames is 0"):
        Media(str(video), num_frames=0).check()


def test_the_stamp_follows_the_content_and_minds_no_dead_link(tmp_path: Path) -> None:
    (tmp_path / "00001.jpg").write_bytes(b"one")
    (tmp_path / "notes").symlink_to(tmp_path / "nowhere")
    media = Media(str(tmp_path))
    before = media.stamp()
    assert media.stamp() == before
    (tmp_path / "00001.jpg").write_bytes(b"three")
    assert media.stamp() != before
    assert Media(str(tmp_path / "gone")).stamp() == (Media(str(tmp_path / "gone")), ())


@pytest.mark.parametrize(("question", "words"), [("", "is empty"), (" \n", "is empty"), ("a\udcff", "no valid text")])
def test_a_question_is_text(question: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Request(turns=(Turn(question),)).check()
