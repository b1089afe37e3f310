"""The tiny encoder's own stage: it learns, leaves its two parts, and says what it cannot do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stllm.datasets.toy_language import world_texts, write_language_model, write_qformer_tokenizer
from stllm.runners import toy_encoder
from tests.configs.recipes import CONFIGS

LANGUAGE = CONFIGS / "tiny" / "stages" / "0_language.yaml"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's configuration with the toy world's language, and no world."""
    root = tmp_path_factory.mktemp("language")
    texts = list(world_texts())
    write_language_model(root / "language_model", texts, seed=0)
    write_qformer_tokenizer(root / "qformer_tokenizer", texts)
    path = root / "stage.yaml"
    path.write_text(
        f"base: {LANGUAGE}\n"
        f"model: {{llama_model: {root}/language_model, qformer_tokenizer: {root}/qformer_tokenizer}}\n"
    )
    return path


def teach(recipe: Path, output: Path, *more: str) -> int:
    return toy_encoder.main(["--cfg-path", str(recipe), "--output", str(output), *more])


def test_it_leaves_its_two_parts_and_the_seed_decides(recipe: Path, tmp_path: Path, capsys) -> None:
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        assert teach(recipe, tmp_path / name, "--steps", "3", "--seed", seed) == 0
        assert f"written to {tmp_path / name}: of " in capsys.readouterr().out
    first, again, other = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "again", "other"))
    assert {key.split(".")[0] for key in first} == {"vision_encoder", "qformer"}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["qformer.query_tokens"], other["qformer.query_tokens"])
    assert (tmp_path / "first" / "config.json").is_file()


def test_the_loss_falls(recipe: Path, monkeypatch) -> None:
    losses: list[float] = []
    forward = toy_encoder.SeeingHeads.forward

    def noted(self, *args):
        loss, share = forward(self, *args)
        losses.append(loss.item())
        return loss, share

    monkeypatch.setattr(toy_encoder.SeeingHeads, "forward", noted)
    monkeypatch.setattr(toy_encoder, "BATCH", 8)
    model = toy_encoder.build_model(toy_encoder.load_config(recipe), device="cpu", dtype="float32")
    toy_encoder.teach(model, steps=60, seed=0)
    assert len(losses) == 60 and sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_mistakes(recipe: Path, tmp_path: Path, capsys) -> None:
    few = tmp_path / "few.yaml"
    few.write_text(f"base: {recipe}\nmodel: {{num_query_token: 4}}\n")
    assert teach(few, tmp_path / "new", "--steps", "1") == 1
    assert "expected a Q-Former of more than 4 queries" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    assert teach(recipe, tmp_path / "full") == 1
    assert "--output" in capsys.readouterr().err and (tmp_path / "full" / "mine").read_text() == "kept"
