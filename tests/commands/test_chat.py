"""`stllm chat` on the command line: complete runs with a golden checkpoint, and the interactive prompt."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stllm.cli import main
from stllm.conversation import chat as engine
from stllm.conversation.chat import Chat, Conversation, load_chat
from tests.helpers.training import write_recipe
from tests.helpers.videos import write_video

CHECKPOINT = Path(__file__).parents[1] / "golden" / "minigpt4_plain_all"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("a folder") / "clip.mp4", num_frames=20)


@pytest.fixture(scope="module")
def loaded() -> Chat:
    return load_chat(CHECKPOINT, device="cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, loaded: Chat) -> None:
    """Load the model once for all tests."""
    monkeypatch.setattr(engine, "load_chat", lambda *_, **__: loaded)


def chat(*argv: str | Path) -> int:
    return main(["chat", "--ckpt-path", str(CHECKPOINT), "--max-new-tokens", "4", *map(str, argv)])


class Typed(io.StringIO):
    """A stdin that looks like a terminal."""

    def isatty(self) -> bool:
        return True


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str, person: bool = True) -> None:
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", Typed(text) if person else io.StringIO(text))


def test_each_answer_is_one_line(clip: Path, capsys) -> None:
    assert chat("--video", clip, "--question", "What happens?", "--question", "And then?", "--json") == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["question"] for line in lines] == ["What happens?", "And then?"]
    assert set(lines[0]) == {"video", "question", "answer", "frame_times", "visual_tokens", "cut_tokens", "seconds"}
    assert lines[0]["cut_tokens"] == {"visual": 0, "text": 0}
    assert lines[1]["seconds"]["read"] == 0
    assert captured.err == ""


def test_a_streamed_answer_equals_that_of_one_beam(quick, clip: Path, capsys) -> None:
    assert chat("--video", clip, "--question", "What happens?", "--stream") == 0
    streamed = capsys.readouterr().out
    assert chat("--video", clip, "--question", "What happens?", "--num-beams", "1") == 0
    assert capsys.readouterr().out == streamed


def test_a_named_qformer_tokenizer_replaces_the_checkpoints_own(
    toy: Path, clip: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    """Also if it is the published one, which the checkpoint would have without a tokenizer of its own."""
    assert main(["train", "--cfg-path", str(write_recipe(tmp_path / "recipe.yaml", toy, max_steps=1))]) == 0
    folder = tmp_path / "run"
    from_pretrained = AutoTokenizer.from_pretrained
    asked = []

    def offline(source: str | Path, **options: Any) -> Any:
        asked.append(str(source))
        if source == "bert-base-uncased":
            raise OSError("the hub cannot be reached")
        return from_pretrained(source, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    argv = ["chat", "--ckpt-path", str(folder), "--video", str(clip), "--question", "What?", "--num-beams", "1"]
    assert main([*argv, "--max-new-tokens", "4"]) == 0
    assert str(folder / "qformer_tokenizer") in asked and "bert-base-uncased" not in asked
    capsys.readouterr()
    assert main([*argv, "--options", "model.qformer_tokenizer=bert-base-uncased"]) == 1
    assert "its tokenizer was not found as 'bert-base-uncased' (" in capsys.readouterr().err


def test_too_many_beams_are_refused(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat("--video", clip, "--question", "What?", "--num-beams", "100000") == 2
    assert "--num-beams: found '100000', expected a whole number from 1 to 64" in capsys.readouterr().err


def test_the_configuration_may_name_the_checkpoint(clip: Path, capsys, monkeypatch) -> None:
    argv = ["chat", "--video", str(clip), "--question", "What?", "--max-new-tokens", "2"]
    assert main([*argv, "--options", f"model.ckpt={CHECKPOINT}"]) == 0
    named = capsys.readouterr().out
    monkeypatch.setattr(engine, "FOLDER", CHECKPOINT)  # as if it came with the package
    assert main(argv) == 0
    assert capsys.readouterr().out == named
    monkeypatch.setattr(engine, "FOLDER", Path("/no/such"))
    assert main(argv) == 1
    assert "no checkpoint was named: give one with --ckpt-path DIR, or as model.ckpt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--video", "nosuch.mp4"], "nosuch.mp4: there is no such file"),
        (["--start", "9"], "the bound [9, end] s lies outside the video, which lasts 0.80 s"),
        (["--reader", "nosuch"], "unknown reader 'nosuch'"),
        (["--stream", "--num-beams", "2"], "streaming follows one beam, but 2 were asked for"),
    ],
)
def test_wrong_options_are_reported_before_the_model_is_loaded(monkeypatch, clip: Path, capsys, argv, words) -> None:
    monkeypatch.setattr(engine, "load_chat", lambda *_, **__: pytest.fail("loaded"))
    media = () if "--video" in argv else ("--video", str(clip))
    assert chat(*media, *argv, "--question", "What?") == 1
    assert words in capsys.readouterr().err


def test_a_question_that_is_not_valid_text_is_refused(quick, clip: Path, capsys) -> None:
    assert chat("--video", clip, "--question", "\udcff what") == 1
    assert capsys.readouterr().err == "error: the question '\\udcff what' is no valid text: write it in UTF-8\n"


def test_evidence_is_drawn_for_each_question(quick, clip: Path, tmp_path: Path, capsys) -> None:
    drawn = tmp_path / "out.png"
    assert chat("--video", clip, "--question", "What?", "--question", "And?", "--evidence", drawn, "--json") == 0
    captured = capsys.readouterr()
    found = [json.loads(line)["evidence"] for line in captured.out.splitlines()]
    assert [entry["figure"] for entry in found] == [str(drawn), str(tmp_path / "out-2.png")]
    assert all(Path(entry["figure"]).read_bytes().startswith(b"\x89PNG") for entry in found)
    assert len(found[0]["scores"]) == len(found[0]["segments"]) == 16
    supported = sum(max(entry["scores"]) > entry["bound"] for entry in found)
    assert captured.err.count("most evidence at") == supported > 0
    assert captured.err.count("no part of the video makes this answer more likely") == len(found) - supported
    assert chat("--video", clip, "--question", "What?", "--evidence", drawn, "--stream") == 0
    assert chat("--video", clip, "--evidence", drawn) == 2
    assert chat("--video", clip, "--question", "What?", "--evidence", "out.pdf") == 2


def test_output_in_a_narrow_encoding_is_escaped(quick, clip: Path, monkeypatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert chat("--video", clip, "--question", "Was läuft?", "--json") == 0
    assert chat("--video", clip, "--question", "Was läuft?") == 0
    out.seek(0)
    assert json.loads(out.readline())["question"] == "Was läuft?"


def test_the_interactive_prompt_continues_after_errors(quick, clip: Path, capsys, monkeypatch) -> None:
    escaped = str(clip).replace(" ", "\\ ")
    lines = [
        "What?",
        f"/video {escaped}",
        "/video",
        "/vidoe x",
        f'/image "{clip}"',
        "What?",
        "/help",
        "",
        "/quit",
        "no",
    ]
    type_in(monkeypatch, *lines)
    assert chat() == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1  # and no prompt among the answers
    errors = [line.removeprefix("> ") for line in captured.err.replace("> ", "").splitlines() if "error" in line]
    assert [error.split(":")[1].strip() for error in errors] == [
        "there is no video yet",
        "the path of the video is empty",
        "unknown command '/vidoe'",
    ]
    assert captured.err.count("/new starts a new conversation") == 2  # at the start, and for /help


def test_an_unreadable_video_does_not_replace_the_old_one(
    quick, clip: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "empty.mp4").touch()
    type_in(monkeypatch, f"/video {tmp_path / 'empty.mp4'}", "What?")
    assert chat("--video", clip, "--json") == 0
    captured = capsys.readouterr()
    assert "the file is empty" in captured.err
    assert json.loads(captured.out)["video"] == str(clip)


def test_new_forgets_earlier_turns(quick, clip: Path, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "What?", "And?", "/new", "What?")
    assert chat("--video", clip) == 0
    first, _, again = capsys.readouterr().out.splitlines()
    assert first == again


def test_all_lines_from_a_pipe_are_tried_and_a_failure_sets_the_exit_code(quick, clip, monkeypatch, capsys) -> None:
    type_in(monkeypatch, "What?", "/video nosuch.mp4", "And?", person=False)
    assert chat("--video", clip) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err.startswith("error: nosuch.mp4")  # no help, no prompt: nobody reads them
    type_in(monkeypatch, "What?", person=False)
    assert chat("--video", clip) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_interrupting_an_answer_keeps_the_session(quick, clip: Path, monkeypatch, capsys, stream: bool) -> None:
    def interrupted(self: Conversation, question: str) -> Iterator[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "stream" if stream else "ask", interrupted)
    type_in(monkeypatch, "What?", "/new", "/quit")
    assert chat("--video", clip, *(["--stream"] if stream else [])) == 0
    assert "interrupted" in capsys.readouterr().err
    type_in(monkeypatch, "What?", person=False)
    assert chat("--video", clip, *(["--stream"] if stream else [])) == 130


def test_an_unexpected_error_ends_only_the_answer(quick, clip: Path, monkeypatch, capsys) -> None:
    def fails(self: Conversation, question: str) -> None:
        raise MemoryError if question == "big" else ZeroDivisionError("none")

    monkeypatch.setattr(Conversation, "ask", fails)
    type_in(monkeypatch, "big", "other")
    assert chat("--video", clip) == 0
    errors = capsys.readouterr().err
    assert "error: not enough memory on this machine" in errors
    assert "error: unexpected ZeroDivisionError: none" in errors
