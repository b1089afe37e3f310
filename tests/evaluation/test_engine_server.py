"""`stllm evaluate --engine`: equal records, failures of the engine, and resumed runs."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import Response
from transformers import AutoModelForCausalLM, AutoTokenizer

from stllm.cli import main
from stllm.conversation import remote
from stllm.evaluation import asking as engine_module
from tests.helpers.engine_server import FakeEngine, engine_server, refusal
from tests.helpers.evaluation import CHECKPOINT, evaluate, lines, write_set
from tests.helpers.serving import wait_until

GREEDY = ("--options", "evaluation.repetition_penalty=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("data"), num_videos=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "lm"
    assert main(["convert", str(CHECKPOINT), "--to", str(folder), "--format", "language-model"]) == 0
    return folder


@pytest.fixture
def engine(folder: Path) -> FakeEngine:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    return FakeEngine(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))


@pytest.fixture
def url(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote, "NUM_RETRIES", 0)
    with engine_server(engine) as url:
        yield url


def test_records_with_an_engine_equal_those_without(data: Path, engine: FakeEngine, url: str, tmp_path: Path) -> None:
    assert evaluate(data, tmp_path / "here", *GREEDY) == 0
    engine.seconds = 0.2
    address = url.replace("//", "//me:secret@")
    assert evaluate(data, tmp_path / "there", *GREEDY, "--engine", address) == 0
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "there").iterdir())
    assert lines(tmp_path / "there") == lines(tmp_path / "here")
    assert engine.most_inside > 1
    here, there = (
        json.loads((tmp_path / place / "msvd.results.json").read_text())["settings"]["model"]
        for place in ("here", "there")
    )
    assert "engine" not in here and there["engine"] == "test"


def test_a_run_resumes_after_a_failure_of_the_engine(
    data: Path, engine: FakeEngine, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_later() -> Iterator[Response | None]:
        yield from [None] * 5  # two comparing the models, three answers
        while True:
            yield refusal(503, "restarting")

    engine.replies = fail_later()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(remote, "MAX_IN_FLIGHT", 1)
    assert evaluate(data, tmp_path / "out", *GREEDY, "--engine", url) == 1
    monkey.undo()
    assert "failed with status 503: restarting; start it" in capsys.readouterr().err
    done = lines(tmp_path / "out")
    assert 0 < len(done) < 9 and all(line["error"] is None for line in done)
    engine.replies = iter(())
    asked = len(engine.bodies)
    assert evaluate(data, tmp_path / "out", *GREEDY, "--engine", url) == 0
    assert len(lines(tmp_path / "out")) == 9
    # a request that the first run sent and gave up may arrive late
    assert len(engine.bodies) - asked - (2 + 9 - len(done)) in (0, 1)


def test_answers_are_written_before_the_last_clip_is_read(
    engine: FakeEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    read = engine_module.read_clip

    def read_slowly(*arguments: Any) -> Any:
        asked = 2 + 3 * len(written)  # two comparing the models, three a clip
        wait_until(lambda: not written or (len(engine.bodies) == asked and not engine.inside))
        time.sleep(0.2)
        written.append(len(lines(tmp_path / "out")) if (tmp_path / "out" / "msvd.jsonl").exists() else 0)
        return read(*arguments)

    monkeypatch.setattr(engine_module, "read_clip", read_slowly)
    data = write_set(tmp_path / "data", num_videos=4)
    assert evaluate(data, tmp_path / "out", *GREEDY, "--num-workers", "0", "--engine", url) == 0
    assert written[0] == 0 and written[3] >= 6 and len(lines(tmp_path / "out")) == 12


def test_a_prompt_that_the_engine_refuses_is_a_failed_item(
    data: Path, engine: FakeEngine, url: str, tmp_path: Path
) -> None:
    engine.replies = iter([None, None, refusal(400, "too long for this server", "input_tokens")])
    assert evaluate(data, tmp_path / "out", *GREEDY, "--engine", url) == 0
    failed = [line["error"] for line in lines(tmp_path / "out") if line["error"]]
    assert len(failed) == 1 and "the engine refused the prompt: too long for this server" in failed[0]


def test_published_beams_are_refused_before_anything_is_loaded(
    data: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(data, tmp_path / "out", "--num-beams", "5", *GREEDY, "--engine", url) == 1
    assert "5 beams were asked for" in capsys.readouterr().err
    assert evaluate(data, tmp_path / "out", "--engine", url, "--options", "evaluation.repetition_penalty=1.5") == 1
    assert "repetition penalty of 1.5" in capsys.readouterr().err
