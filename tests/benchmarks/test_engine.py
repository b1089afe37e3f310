"""`python -m benchmarks.engine`: fails if the engine gives other ids or serves another language model."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import engine as check
from benchmarks.page import write_page
from stllm.cli import main
from stllm.common.errors import UserError
from stllm.conversation.chat import FOLDER
from tests.helpers.engine_server import FakeEngine, engine_server


def test_the_ids_of_an_engine_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(tmp_path / "lm")
    assert main(["convert", str(FOLDER), "--to", folder, "--format", "language-model"]) == 0
    engine = FakeEngine(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
    monkeypatch.setattr(check, "TOGETHER", (1, 8))
    with engine_server(engine) as url:
        words = ["--engine", url, "--quick", "--device", "cpu", "--max-new-tokens", "5", "--output-dir", str(tmp_path)]
        check.main(words)
        result = json.loads((tmp_path / "engine.json").read_text())
        assert [row["equal ids"] for row in result["rows"]] == ["7/7"] * 4 and engine.most_inside > 1
        assert result["also"]["engine"] == {"vLLM": "0.test", "torch": str(torch.__version__)}
        write_page(tmp_path, {}, quick=True)
        assert "Also: engine (vLLM 0.test, torch " in (tmp_path / "README.md").read_text()
        decode = engine.generate

        def shorten(embeds, body):
            ids, scores = decode(embeds, body)
            return ids[: max(1, len(ids) - 1)], scores

        monkeypatch.setattr(engine, "generate", shorten)
        with pytest.raises(UserError, match="other ids"):
            check.main(words)
