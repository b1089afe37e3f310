"""Checkpoints with Python code: it never runs, and users are not asked to allow it."""

import ast
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stllm.cli import main
from tests.helpers.training import write_recipe
from tests.judge.test_local import judge, write_judge

ROOT = Path(__file__).parents[2]
TINY = ROOT / "stllm" / "assets" / "stllm-tiny"
CLIP = ROOT / "stllm" / "assets" / "examples" / "state_change.mp4"
REFUSAL = "stllm runs no code from checkpoints"
LOADERS = ("from_pretrained", "from_config")


def calls(path: Path) -> Iterator[ast.Call]:
    """Yield the calls of a file that load with a class of transformers or with our model class."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text if any(f".{name}(" in text for name in LOADERS) else "")
    classes = {"STLLM"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            classes |= {name.asname or name.name for name in node.names}
    classes.discard("AutoHfQuantizer")  # it knows transformers' own classes only
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            loader = node.func.value
            if isinstance(loader, ast.Name) and loader.id in classes:
                yield node


def test_every_loading_call_refuses_code() -> None:
    found = 0
    for path in [*(ROOT / "stllm").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for call in calls(path):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            value = given.get("trust_remote_code")
            assert isinstance(value, ast.Constant) and value.value is False, f"{path}:{call.lineno}"
            found += 1
    assert found >= 10


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Yield a function that adds a custom class to a folder's JSON file. The test fails if the class's module ran."""
    answers = io.StringIO("y\n" * 20)
    monkeypatch.setattr("sys.stdin", answers)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"

    def add(folder: Path, file: str, **values: object) -> None:
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil:\n    pass\n")
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    yield add
    assert not marker.exists(), "code from the checkpoint ran"
    assert answers.tell() == 0, "something asked on stdin"


TOKENIZER = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
MODEL = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}


@pytest.mark.parametrize("place", ["", "qformer_tokenizer"])
def test_code_of_a_custom_tokenizer_is_not_run(place: str, evil, toy, tmp_path, capsys) -> None:
    assert main(["train", "--cfg-path", str(write_recipe(tmp_path / "recipe.yaml", toy, max_steps=1))]) == 0
    folder = tmp_path / "run"
    evil(folder / place, "tokenizer_config.json", **TOKENIZER)
    words = ["--device", "cpu", "--ckpt-path", str(folder), "--video", str(CLIP), "--question", "Why?"]
    assert main(["chat", *words]) == 1
    assert REFUSAL in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_code_of_a_language_model_is_not_run(command: str, evil, toy, tmp_path, capsys) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(toy / "language_model", folder)
    evil(folder, "config.json", **MODEL)
    evil(folder, "tokenizer_config.json", **TOKENIZER)
    more = ["--to", str(tmp_path / "new")] if command == "convert" else []
    assert main([command, str(folder), *more]) == 1
    assert REFUSAL in capsys.readouterr().err


@pytest.mark.parametrize("part", ["config.json", "tokenizer_config.json"])
def test_code_of_a_judge_is_not_run(part: str, evil, tmp_path, capsys) -> None:
    model = write_judge(tmp_path / "judge", says="4")
    evil(model, part, **(MODEL if part == "config.json" else TOKENIZER))
    assert judge(tmp_path, model, "--max-tokens", "1") == 1
    assert REFUSAL in capsys.readouterr().err
