"""`stllm serve` on the command line."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.conversation import chat
from stllm.serving import listening
from tests.helpers.serving import client_of, data_url, user
from tests.helpers.videos import write_video

CHECKPOINT = Path(__file__).parents[1] / "golden" / "minigpt4_plain_all"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test fail if the model is loaded."""
    monkeypatch.setattr(listening, "load_chosen", lambda *_, **__: pytest.fail("loaded"))


@pytest.mark.parametrize("name", ["serve", "demo"])
def test_wrong_options_are_reported_before_the_model_is_loaded(
    unloaded, own_signals, tmp_path, capsys, monkeypatch, name
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main([name, "--ckpt-path", "d", "--port", port]) == 1
    assert capsys.readouterr().err == (
        f"error: 127.0.0.1:{port} cannot be taken (Address already in use): name another --port, or a --host of this "
        "machine\n"
    )
    assert not list(tmp_path.iterdir())  # the folder for uploads is gone
    monkeypatch.setattr(chat, "FOLDER", Path("/no/such"))
    assert main([name, "--port", "0"]) == 1
    assert "no checkpoint was named: give one with --ckpt-path" in capsys.readouterr().err


def test_a_media_root_must_be_a_folder(unloaded, capsys) -> None:
    assert main(["serve", "--ckpt-path", "d", "--media-root", "/no/such"]) == 1
    assert "--media-root /no/such is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["serve", "demo"])
@pytest.mark.parametrize("host", ["", " "])
def test_an_empty_host_is_refused(unloaded, capsys, name: str, host: str) -> None:
    assert main([name, "--ckpt-path", "d", "--host", host]) == 2
    assert "argument --host: found nothing, expected an address such as 127.0.0.1" in capsys.readouterr().err


def test_the_log_names_the_embedded_model(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(chat, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="no checkpoint was named"):
        chat.default_checkpoint()
    (tmp_path / "config.json").write_text("{}")
    assert chat.default_checkpoint() == tmp_path


@pytest.mark.slow
def test_serve_runs_and_ends(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.mp4", num_frames=20)
    argv = ["serve", "--ckpt-path", str(CHECKPOINT), "--port", "0", "--media-root", str(tmp_path), "--device", "cpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "stllm", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"{CHECKPOINT.name} answers at http://127.0.0.1:")
        with client_of(line.split()[3].removesuffix("/v1")) as client:
            texts = [
                client.chat.completions.create(model=CHECKPOINT.name, messages=[user("What?", url)], max_tokens=4)
                .choices[0]
                .message.content
                for url in (clip.name, data_url(clip))
            ]
        assert texts[0] == texts[1]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output, errors) == (130, "", "interrupted\n")
