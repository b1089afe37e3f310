"""The command line: exit codes, error sentences, aliases, and no heavy imports before a command runs."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stllm.cli import COMMANDS, command_of, main
from stllm.common.errors import UserError

HEAVY = ("torch", "transformers", "timm", "omegaconf", "numpy", "PIL", "av", "decord", "rich")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace every command by one that stores its arguments, and raises `ran.error` if it is set."""
    record = SimpleNamespace(args=None, error=None, code=0)

    def run(args) -> int:
        record.args = args
        if record.error is not None:
            raise record.error
        return record.code

    record.run = run
    for name in COMMANDS:
        quick = replace(command_of(name), run=lambda args: record.run(args), needs="json")
        monkeypatch.setattr(f"stllm.commands.{name}.COMMAND", quick)
    return record


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(argv) -> None:
    code = (
        "import sys; from stllm.cli import main; code = main(sys.argv[1:]);"
        f"print('heavy:', sorted(set({HEAVY}) & set(sys.modules))); sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_importing_the_package_is_fast_and_exports_are_listed() -> None:
    code = f"import sys, stllm; print(sorted(set({HEAVY}) & set(sys.modules)), dir(stllm))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("[] ")
    assert all(f"'{name}'" in result.stdout for name in ("build_model", "load_chat", "load_model", "__version__"))


def test_an_unknown_export_is_an_attribute_error() -> None:
    import stllm

    with pytest.raises(AttributeError, match="no attribute 'load_chatt'"):
        _ = stllm.load_chatt


@pytest.mark.parametrize("launch", [["-m", "stllm"], ["demo.py"]])
def test_other_launchers_of_the_command_line(launch, request) -> None:
    command = [sys.executable, *launch, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=request.config.rootpath)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: stllm chat" if launch == ["demo.py"] else "usage: stllm")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["chatt"],
        ["chat", "--vidoe", "x.mp4"],
        ["chat", "--video", "x.mp4", "--image", "y.png"],
        ["chat", "--question", "What?"],
        ["chat", "--video", "x.mp4", "--num-frames", "0"],
        ["chat", "--video", "x.mp4", "--num-frames", "²"],
        ["chat", "--video", "x.mp4", "--temperature", "nan"],
        ["chat", "--video", "x.mp4", "--start", "5", "--end", "5"],
        ["chat", "--video", "x.mp4", "--device", "fridge"],
        ["chat", "--video", "x.mp4", "--dtype", "float64"],
        ["chat", "--video", "x.mp4", "--device", "cpu", "--gpu-id", "0"],
        ["chat", "--video", "x.mp4", "--stream", "--json"],
        ["convert", "weights.pth"],
        ["inspect"],
        ["inspect", ""],
        ["verify"],
        ["verify", "d", "--options", "model.video_input=mean"],
        ["verify", "d", "--dtype", "bf16"],
        ["chat", "--video", ""],
        ["chat", "--video", "x.mp4", "--ckpt-path", ""],
        ["chat", "--video", "x.mp4", "--max-new-tokens", "99999999999999999999"],
        ["convert", "weights.pth", "--to", ""],
        ["toy"],
        ["toy", "--output", ""],
        ["toy", "--output", "d", "--num-train", "0"],
        ["toy", "--output", "d", "--options", "model.video_input=mean"],
        ["toy", "--output", "d", "--device", "cuda"],
    ],
)
def test_wrong_usage_exits_with_2(ran, capsys, argv) -> None:
    assert main(argv) == 2
    assert ran.args is None
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "chat --num-frame 8",
            "found --num-frame 8, which stllm chat --help does not list; did you mean '--num-frames'?\n",
        ),
        ("evaluate mvbench --low_resource", "found --low-resource, which stllm evaluate --help does not list\n"),
        ("judge --axis qa", "found --axis, which stllm judge takes without a name, as in: stllm judge qa --pred-path"),
    ],
)
def test_the_error_for_an_unknown_option_suggests_the_nearest(ran, capsys, words, told) -> None:
    assert main(words.split()) == 2 and ran.args is None
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--local_rank=1 train --cfg-path c", "train --cfg-path c --local-rank 1"])
@pytest.mark.parametrize(
    ("environment", "local_rank"),
    [({}, None), ({"WORLD_SIZE": "2"}, "1"), ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "0")],
)
def test_local_rank_is_used_unless_the_environment_sets_it(
    ran, monkeypatch: pytest.MonkeyPatch, words: str, environment: dict[str, str], local_rank: str | None
) -> None:
    with monkeypatch.context() as patch:
        for name in ("WORLD_SIZE", "LOCAL_RANK"):
            patch.setenv(name, "")  # so that it is put back afterwards
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        assert main(words.split()) == 0
        assert os.environ.get("LOCAL_RANK") == local_rank
    assert ran.args.cfg_path == "c"


def test_chat_accepts_all_its_options(ran) -> None:
    argv = "chat --video a.mp4 --question one --question two --ckpt-path d --cfg-path c --reader pyav --start 1.5"
    argv += " --end 2 --num-frames 8 --num-beams 5 --max-new-tokens 300 --temperature 0 --json --dtype bf16 --seed 3"
    argv += " --evidence out.png --context all"
    assert main([*argv.split(), "--options", "model.video_input=mean", "model.residual_size=4", "--debug"]) == 0
    expected = {
        "video": "a.mp4",
        "image": None,
        "question": ["one", "two"],
        "ckpt_path": "d",
        "cfg_path": "c",
        "reader": "pyav",
        "start": 1.5,
        "end": 2.0,
        "num_frames": 8,
        "num_beams": 5,
        "max_new_tokens": 300,
        "temperature": 0.0,
        "context": "all",
        "engine": None,
        "evidence": "out.png",
        "quantization": None,
        "stream": False,
        "json": True,
        "device": "auto",
        "dtype": "bf16",
        "seed": 3,
        "options": ["model.video_input=mean", "model.residual_size=4"],
        "debug": True,
        "command": "chat",
    }
    assert vars(ran.args) == expected


def test_other_commands_accept_their_options(ran) -> None:
    assert main(["convert", "a.pth", "b", "--to", "out", "--format", "released"]) == 0
    assert (ran.args.source, ran.args.to, ran.args.format) == (["a.pth", "b"], "out", "released")
    assert main(["inspect", "--cfg-path", "c.yaml", "--json"]) == 0
    assert ran.args.path is None and ran.args.cfg_path == "c.yaml" and ran.args.json
    assert main(["verify", "a", "b", "--atol", "1e-3"]) == 0
    assert (ran.args.dir, ran.args.atol, ran.args.rtol) == (["a", "b"], 1e-3, 1e-3)
    assert main(["toy", "--output", "d", "--num_train", "30", "--num-test", "8", "--seed", "2", "--long"]) == 0
    assert (ran.args.output, ran.args.num_train, ran.args.num_test, ran.args.seed) == ("d", 30, 8, 2)
    assert ran.args.long
    assert main(["serve", "--ckpt-path", "d", "--port", "0", "--media-root", "m", "--queue-size", "0"]) == 0
    assert (ran.args.host, ran.args.port, ran.args.media_root, ran.args.queue_size) == ("127.0.0.1", 0, "m", 0)
    assert main(["demo", "--ckpt-path", "d", "--queue-size", "0"]) == 0
    assert ran.args.queue_size == 0


def test_published_spellings_of_options_are_accepted(ran, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    argv = "chat --video x_y.mp4 --ckpt_path=my_dir --cfg_path a_b --gpu_id 2 --cfg-options a.b_c=1"
    assert main(argv.split()) == 0
    args = ran.args
    assert (args.video, args.ckpt_path, args.cfg_path) == ("x_y.mp4", "my_dir", "a_b")
    assert (args.device, args.options) == ("cuda:2", ["a.b_c=1"])


def test_overrides_accumulate_within_one_call(ran) -> None:
    assert main(["inspect", "d", "--options", "a=1", "b=2", "--cfg-options", "c=3"]) == 0
    assert ran.args.options == ["a=1", "b=2", "c=3"]
    assert main(["inspect", "d"]) == 0
    assert ran.args.options == []


def test_the_command_decides_the_exit_code(ran) -> None:
    ran.code = 1
    assert main(["verify", "d"]) == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("no file x.mp4:\n  name another"), "error: no file x.mp4: name another"),
        (MemoryError(), "error: not enough memory on this machine: use fewer frames"),
        (
            ZeroDivisionError("division by zero"),
            "error: unexpected ZeroDivisionError: division by zero; run again",
        ),
    ],
)
def test_a_failure_is_reported_as_one_sentence(ran, capsys, error, sentence) -> None:
    ran.error = error
    assert main(["inspect", "d"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(ran) -> None:
    ran.error = UserError("no such thing")
    with pytest.raises(UserError):
        main(["inspect", "d", "--debug"])


def test_ctrl_c_exits_with_130(ran, capsys) -> None:
    ran.error = KeyboardInterrupt()
    assert main(["inspect", "d"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_prints_nothing() -> None:
    code = (
        "import dataclasses, sys; from stllm.cli import main; from stllm.commands import inspect\n"
        "def run(args):\n    print('x\\n' * 100_000)\n    return 0\n"
        "inspect.COMMAND = dataclasses.replace(inspect.COMMAND, run=run)\n"
        "sys.exit(main(['inspect', 'd']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_notes_go_to_stderr(ran, capsys) -> None:
    import logging

    from stllm.common.logging import ONCE

    def run(args) -> int:
        for _ in range(2):  # as when the file is read twice
            logging.getLogger("stllm.any").info("a.yaml: model.prompt has no effect", extra=ONCE)
            logging.getLogger("stllm.any").info("a clip is missing")
        print("result")
        return 0

    ran.run = run
    assert main(["inspect", "d"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    again = "note: a clip is missing\n"
    assert captured.err == f"note: a.yaml: model.prompt has no effect\n{again}{again}"
    assert main(["inspect", "d"]) == 0
    assert capsys.readouterr().err == captured.err  # another command's notes are its own


def test_notes_are_printed_while_a_spinner_runs(ran, capsys) -> None:
    import contextlib
    import io
    import logging

    taken = io.StringIO()

    def run(args) -> int:
        with contextlib.redirect_stderr(taken):
            logging.getLogger("stllm.datasets").warning("a.gif: it ends early")
        return 0

    ran.run = run
    assert main(["inspect", "d"]) == 0
    assert (taken.getvalue(), capsys.readouterr().err) == ("warning: a.gif: it ends early\n", "")
