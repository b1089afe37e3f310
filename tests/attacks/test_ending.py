"""End of a serving process: one and two Ctrl-C with running requests, SIGKILL, and removal of its folder."""

import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from stllm.serving.listening import own_folder
from tests.attacks.conftest import Run
from tests.helpers.serving import data_url, user, wait_until
from tests.helpers.videos import write_video

SERVER = """
import sys
from stllm.serving import listening
from tests.conversation.test_chat import new_chat
from tests.helpers.serving import Endless

chat = new_chat("minigpt4")
chat.model.language_model.get_decoder().register_forward_pre_hook(lambda *_: print("answering", flush=True))
endless = Endless(chat, seconds=30)
listening.load_chosen = lambda *_, **__: chat
from stllm.cli import main
sys.exit(main(["serve", "--ckpt-path", "tiny", "--port", "0", "--queue-size", "2"]))
"""


OWNER = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also when the tests run under nohup
from stllm.serving.listening import own_folder
with own_folder("mine-") as folder:
    (folder / "upload").write_bytes(b"x")
    print(folder, flush=True)
    time.sleep(60)
"""

STAYS = """
    try:
        print(folder, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("stays", flush=True)
        while True:
            try:
                time.sleep(60)
            except OSError:
                pass
"""


def left_in(folder: Path) -> list[Path]:
    """Return a folder's content, except the folder that importing an older torch makes (2.6 does, 2.14 does not)."""
    return [path for path in folder.iterdir() if not (path / "_remote_module_non_scriptable.py").exists()]


def test_a_second_signal_ends_the_server_without_tracebacks(run: Run, tmp_path: Path) -> None:
    clip = data_url(write_video(tmp_path / "clip.mp4", num_frames=20))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = run(SERVER, temporary)
    assert process.stdout is not None
    found = re.search(r"http://\S+/v1", process.stdout.readline())
    assert found is not None, process.communicate()

    def ask() -> None:
        body = {"model": "tiny", "messages": [user("what", clip)], "max_tokens": 400}
        with suppress(httpx.HTTPError):
            httpx.post(f"{found[0]}/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(3) as clients:
        for _ in range(3):
            clients.submit(ask)
        wait_until(lambda: len(list(temporary.glob("stllm-serve-*/request-*/medium"))) == 3)
        assert process.stdout.readline() == "answering\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=5) == ("", "interrupted\n")
    assert process.returncode == 130
    assert not left_in(temporary)


def test_the_next_start_removes_folders_of_killed_processes(run: Run, tmp_path: Path, own_signals: None) -> None:
    process = run(OWNER, tmp_path)
    assert process.stdout is not None
    left = Path(process.stdout.readline().strip())
    with own_folder("mine-"):
        assert (left / "upload").exists()
    process.kill()
    process.communicate()
    with own_folder("mine-") as folder:
        assert left_in(tmp_path) == [folder]


def test_the_folder_of_a_running_owner_is_kept(tmp_path: Path, own_signals: None) -> None:
    (tmp_path / "mine-abandoned" / "inner").mkdir(parents=True)
    (tmp_path / "mine-linked").symlink_to(tmp_path.parent)
    with own_folder("mine-") as first:
        (first / "upload").write_bytes(b"x")
        with own_folder("mine-") as second:
            assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name, "mine-linked"}
            assert (first / "upload").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["mine-linked"]


def test_closing_the_terminal_ends_the_process_and_removes_its_folder(run: Run, tmp_path: Path) -> None:
    process = run(OWNER, tmp_path)
    assert process.stdout is not None and process.stderr is not None
    left = Path(process.stdout.readline().strip())
    assert left.is_dir()
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    assert process.wait(10) == 130
    assert not left_in(tmp_path)


def test_a_second_signal_ends_a_process_with_closed_stderr(run: Run, tmp_path: Path) -> None:
    process = run(OWNER.replace("    print(folder, flush=True)\n    time.sleep(60)\n", STAYS.lstrip("\n")), tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stays\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    assert not left_in(tmp_path)


@pytest.mark.slow
def test_a_signal_lost_during_loading_ends_the_server(run: Run, tmp_path: Path) -> None:
    code = """
import os
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), 15)
        for _ in range(10):
            pass
def load(*_, **__):
    Dropped()
    return chat
"""
    usual = "listening.load_chosen = lambda *_, **__: chat"
    assert usual in SERVER
    process = run(SERVER.replace(usual, f"{code}listening.load_chosen = load"), tmp_path)
    _, messages = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in messages  # Python's note that it was passed over
    assert process.returncode == 130
    assert not list(tmp_path.glob("stllm-*"))
