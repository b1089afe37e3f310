"""Files that a request can reach: its data URL, files in the media folder, and no others."""

import base64
import os
from pathlib import Path

import pytest
from PIL import Image

from stllm.media.info import MediaError
from stllm.serving.limits import ApiError, Limits, fetch_medium
from tests.helpers.videos import write_video


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a media folder that has a secret file beside it."""
    folder = tmp_path / "media"
    (folder / "in side").mkdir(parents=True)
    (folder / "clip.mp4").write_bytes(b"clip")
    (folder / "in side" / "a b.mp4").write_bytes(b"spaces")
    (folder / "100%25.mp4").write_bytes(b"percent")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "secret.mp4").write_bytes(b"secret")
    (folder / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "out").symlink_to(tmp_path)
    (folder / "in.mp4").symlink_to(folder / "clip.mp4")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return folder


def fetch(url: str, root: Path | None, folder: Path, **limits: float) -> Path:
    return fetch_medium(url, None, folder=folder, root=root, limits=Limits(**limits))  # type: ignore[arg-type]


def test_files_under_the_folder_are_found(root: Path, tmp_path: Path) -> None:
    names = {
        "clip.mp4": b"clip",
        "./in side/../clip.mp4": b"clip",
        "in side/a b.mp4": b"spaces",
        f"file://{root}/in%20side/a%20b.mp4": b"spaces",
        f"file://localhost{root}/clip.mp4": b"clip",
        "file:clip.mp4": b"clip",
        str(root / "clip.mp4"): b"clip",
        "100%25.mp4": b"percent",
        "file:100%2525.mp4": b"percent",
        "in.mp4": b"clip",
    }
    for name, content in names.items():
        assert fetch(name, root, tmp_path).read_bytes() == content, name


def test_files_outside_the_folder_are_not_found(root: Path, tmp_path: Path) -> None:
    """The error is always the same, whether the file exists or not."""
    outside = tmp_path / "secret.mp4"
    names = [
        "../secret.mp4",
        "in side/../../secret.mp4",
        "../media2/secret.mp4",
        "..\\secret.mp4",
        "%2e%2e/secret.mp4",
        "file:../secret.mp4",
        "file:%2e%2e/secret.mp4",
        "file:..%2fsecret.mp4",
        "file:%252e%252e/secret.mp4",
        str(outside),
        f"file://{outside}",
        f"FILE://{outside}",
        f"file://{root}/../secret.mp4",
        f"file://elsewhere{root}/clip.mp4",
        "file://[",
        "file://",
        "file:",
        "",
        ".",
        "..",
        "/",
        "~/secret.mp4",
        "~root/.bashrc",
        "/etc/passwd",
        "file:///etc/passwd",
        "/proc/self/environ",
        "/dev/stdin",
        "out.mp4",
        "out/secret.mp4",
        "loop.mp4",
        "pipe.mp4",
        "in side",
        "clip.mp4\0.png",
        "../secret.mp4\0",
        "clip.mp4/x",
        "x" * 5000,
        "/".join(["x"] * 5000),
        "nosuch.mp4",
        "concat:clip.mp4|../secret.mp4",
        "gopher://clip.mp4",
        "subfile,,start,0,end,0,,:../secret.mp4",
    ]
    for name in names:
        with pytest.raises(ApiError, match=r"^there is no such file under this server's media folder$") as caught:
            pytest.fail(f"{name} gave {fetch(name, root, tmp_path)}")
        assert (caught.value.status, caught.value.code) == (404, "file_not_found"), name


def test_without_a_folder_no_file_is_opened(root: Path, tmp_path: Path) -> None:
    for name in ("clip.mp4", str(root / "clip.mp4"), f"file://{root}/clip.mp4", "/etc/passwd"):
        with pytest.raises(ApiError, match="opens no files of its own") as caught:
            fetch(name, None, tmp_path)
        assert caught.value.status == 403


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.mp4", "HTTPS://example.org/x.mp4", "ftp://example.org/x"])
def test_network_urls_are_refused(root: Path, tmp_path: Path, url: str) -> None:
    with pytest.raises(ApiError, match="fetches nothing from the network"):
        fetch(url, root, tmp_path)


def test_a_data_url_is_written_once(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5
    url = f"DATA:video/mp4;codecs=avc1;base64,{base64.b64encode(content).decode()}"
    path = fetch(url, None, tmp_path, media_bytes=len(content))
    assert path.parent == tmp_path
    assert path.read_bytes() == content
    with pytest.raises(MediaError, match=r"has 0\.0 MiB, at most"):
        fetch(url, None, tmp_path, media_bytes=len(content) - 1)


@pytest.mark.parametrize(
    "url", ["data:", "data:video/mp4,abc", "data:;base64", "data:;base64,a*b=", "data:;base64,abc"]
)
def test_a_damaged_data_url_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ApiError, match="base64") as caught:
        fetch(url, None, tmp_path)
    assert (caught.value.status, caught.value.code) == (400, "invalid_data_url")


def test_long_and_large_media_are_refused(tmp_path: Path) -> None:
    video = write_video(tmp_path / "clip.mp4", num_frames=25)
    Limits(media_seconds=1.1).check_file(video)
    with pytest.raises(MediaError, match=r"the video lasts 1.0 s, at most 0.5 s are taken: cut the part"):
        Limits(media_seconds=0.5).check_file(video)
    with pytest.raises(MediaError, match="the picture has 64 x 64 pixels, at most 4095"):
        Limits(media_pixels=4095).check_file(video)
    with pytest.raises(MediaError, match=r"at most 0\.0 are taken: cut or compress"):
        Limits(media_bytes=100).check_file(video)
    picture = tmp_path / "picture.png"
    Image.new("1", (7000, 7000)).save(picture)  # a few kilobytes that become 147 MB
    with pytest.raises(MediaError, match="the picture has 7000 x 7000 pixels"):
        Limits(media_seconds=0.5).check_file(picture)
    Image.new("1", (20, 20)).save(picture)
    Limits(media_seconds=0.5).check_file(picture)  # an image lasts a second, and does not count
