"""Escape sequences and markup in names, answers and files do not reach the terminal or the log."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from stllm.cli import main
from stllm.common import logging as terminal
from stllm.common.errors import UserError
from tests.attacks.test_no_code import CLIP, ROOT, TINY

EVIL = "x\x1b[31m\x9b2J\x07\r\x7f\u202e\u2066[red]"
ESCAPED = r"x\u001b[31m\u009b2J\u0007\u000d\u007f\u202e\u2066[red]"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_all_output_uses_the_escaping_streams() -> None:
    """Other rich consoles, or writing to sys.__stdout__, would print control characters unescaped."""
    for path in (ROOT / "stllm").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "logging.py":
            assert "rich.console" not in text and "rich import print" not in text, path
            assert not re.search(r"sys\.(__std|std(out|err)\.buffer)|os\.write\([12],", text), path


WORDS = {
    "argument": ["chat", "--" + EVIL],
    "choice": ["chat", "--dtype", EVIL],
    "command": [EVIL],
    "checkpoint": ["inspect", EVIL],
    "video": ["chat", "--ckpt-path", str(TINY), "--device", "cpu", "--video", EVIL, "--question", "q"],
    "option": ["train", "--cfg-path", str(ROOT / "configs/tiny/train.yaml"), "--options", f"model.{EVIL}=1"],
    "annotations": ["doctor", "--format", "vc2", "--anno-path", EVIL],
    "predictions": ["judge", "qa", "--pred-path", EVIL, "--model", EVIL],
    "results": ["table", EVIL],
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_names_on_the_command_line_are_escaped(words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) in (1, 2)
    captured = capsys.readouterr()
    assert not CONTROL.search(captured.out + captured.err)
    assert re.search(r"\\u001b|\\x1b", captured.out + captured.err)  # argparse and others show it by repr


def write_records(folder: Path) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps([{"video": f"{EVIL}.mp4", "QA": [{"q": EVIL, "a": EVIL}]}, {"video": EVIL, "QA": EVIL}]))
    return path


def test_the_doctor_escapes_names_in_text_and_json(tmp_path, capsys) -> None:
    words = ["doctor", "--format", "vc2", "--anno-path", str(write_records(tmp_path)), "--num-workers", "0"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert ESCAPED in captured.out and not CONTROL.search(captured.out + captured.err)
    assert main([*words, "--json"]) == 1
    out = capsys.readouterr().out
    assert not CONTROL.search(out)
    assert any(EVIL in fault["subject"] for fault in json.loads(out)["faults"])


def test_an_answer_is_escaped(monkeypatch, capsys) -> None:
    from stllm.processors.prompts import PromptProcessor

    monkeypatch.setattr(PromptProcessor, "clean", lambda self, text: EVIL)
    words = ["chat", "--ckpt-path", str(TINY), "--device", "cpu", "--video", str(CLIP), "--question", EVIL]
    for more in ([], ["--json"], ["--num-beams", "2"]):
        assert main([*words, *more]) == 0
        out = capsys.readouterr().out
        assert not CONTROL.search(out)
        assert json.loads(out)["answer"] == EVIL if more == ["--json"] else ESCAPED in out


def test_a_traceback_is_escaped(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(UserError) as caught:
        main(["inspect", EVIL, "--debug"])
    sys.excepthook(caught.type, caught.value, caught.tb)  # as the interpreter does
    err = capsys.readouterr().err
    assert "Traceback" in err and not CONTROL.search(err) and ESCAPED in err


def test_tables_keep_their_own_styles(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    folder = tmp_path / EVIL
    shutil.copytree(TINY, folder)
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "\x1b[1m" in output
    without = re.sub(r"\x1b\[[0-9;]*m", "", output.replace("\x1b[31m", "evil"))
    assert not CONTROL.search(without) and "evil" not in without
    assert r"\u2066[red]" in without  # it is no markup; rich leaves out some characters by itself


def test_progress_bars_may_move_the_cursor_but_not_their_texts(capsys) -> None:
    with terminal.escaped_output():
        for _ in tqdm(range(3), desc=EVIL, disable=False, mininterval=0):
            pass
    err = capsys.readouterr().err
    assert err.startswith("\r" + ESCAPED)
    assert not CONTROL.search(err.replace("\r" + ESCAPED, "")), ascii(err)


def test_json_is_parsed_only_by_jsonl_loads() -> None:
    """`json.loads` may raise RecursionError, which callers do not expect."""
    for path in (ROOT / "stllm").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        names = [ast.unparse(call.func) for call in calls]
        assert path.name == "jsonl.py" or not {"json.loads", "json.load"} & set(names), path
