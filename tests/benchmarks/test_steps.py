"""`benchmarks.steps` at a small size: compared procedures give equal results, and a difference would be noticed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import masking, packing, published_size, training_step
from benchmarks.common import exit_code
from benchmarks.steps import PUBLISHED_CASE, Case, assert_same, new_batch, new_model, proportional_vocabulary
from stllm.models.configuration import STLLMConfig

CPU = torch.device("cpu")
TINY = Case(width=256, depth=2, vocabulary=300, batch=2, frames=2, text_tokens=24, answer_tokens=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_and_plain_give_the_same_gradients_and_masking_without_mvm_others(dtype: str) -> None:
    case = replace(TINY, dtype=dtype)
    model, batch = new_model(case, CPU), new_batch(case, CPU)
    assert {p.dtype for p in model.parameters()} == {batch["whole"]["query_features"].dtype} == {getattr(torch, dtype)}
    assert_same(model, batch, "plain", "ours", "packed")
    assert_same(model, batch, "unmasked", "unmasked_packed")
    with pytest.raises(AssertionError):
        assert_same(model, batch, "masked", "ours")
    with pytest.raises(AssertionError):
        assert_same(model, batch, "unmasked", "masked")


def test_a_case_of_the_published_size_has_the_published_language_model() -> None:
    assert proportional_vocabulary(PUBLISHED_CASE) == PUBLISHED_CASE.vocabulary == 32001
    assert PUBLISHED_CASE.dtype == "bfloat16"


@pytest.mark.parametrize(
    "module", [masking, training_step, packing, published_size], ids=lambda module: module.__name__
)
def test_the_published_size_needs_a_gpu(
    module: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published = [] if module is published_size else ["--published"]
    monkeypatch.setattr("sys.argv", ["benchmark", *published, "--device", "cpu", "--output-dir", str(tmp_path)])
    assert exit_code(module.main) == 1  # type: ignore[attr-defined]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "the device is cpu" in told and "--device cuda" in told
    assert list(tmp_path.iterdir()) == []


def test_results_of_the_published_size_have_another_name_and_other_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Case(width=128, depth=1, vocabulary=31, frames=1, text_tokens=12, answer_tokens=4, dtype="bfloat16")
    for module in (masking, training_step):
        monkeypatch.setattr(module, "cuda_device", lambda name: CPU)
        monkeypatch.setattr(module, "step_bytes", lambda *_: 1)  # off CUDA, a process for each
        monkeypatch.setattr(module, "PUBLISHED_CASE", small)
    monkeypatch.setattr(masking, "FRAMES", (1, 2))
    monkeypatch.setattr("sys.argv", ["benchmark", "--published", "--output-dir", str(tmp_path)])
    masking.main()
    training_step.main()
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(found) == {"masking_published", "training_step_published"}
    assert [row["frames"] for row in found["masking_published"]["rows"]] == [1, 2]
    assert [row["checkpointing"] for row in found["training_step_published"]["rows"]] == ["no", "yes"]
    for result in found.values():
        assert result["sizes"]["dtype"] == "bfloat16" and result["sizes"]["width"] == 128
        assert all(value > 0 for row in result["rows"] for value in row.values() if isinstance(value, float))


def test_texts_of_one_corpus_have_less_padding_than_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "step_bytes", lambda *_: 1)  # a process for each
    case = Case(width=128, depth=1, vocabulary=31, batch=4)
    one, all_kinds = (
        packing.measured(name, case, 1, CPU) for name in ("avp (32 visual tokens)", "all kinds in one data set (32)")
    )
    assert 0 < one["padding"] < all_kinds["padding"] < 1
    assert packing.padding([10, 40, 20], visual=32) == (50, 3 * 72)
    assert all(value > 0 for value in one.values() if isinstance(value, float))


@pytest.mark.parametrize(("frames", "video_input", "tokens"), [(2, "all", 64), (5, "residual", 96)])
def test_the_whole_model_is_measured(frames: int, video_input: str, tokens: int) -> None:
    config = STLLMConfig(
        vision_config={"image_size": 28, "embed_dim": 32, "depth": 1, "num_heads": 4},
        qformer_config={
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 8,
        },
        text_config={"vocab_size": 300, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": 2},
        video_input=video_input,
        residual_size=3,
        mvm_decode=True,
    )
    row = published_size.measured(config, frames, CPU, torch.bfloat16)
    assert (row["frames"], row["video input"], row["visual tokens"]) == (frames, video_input, tokens)
    assert len(row) == 11
    figures = {name: value for name, value in row.items() if isinstance(value, float)}
    assert len(figures) == 8 and all(value > 0 for value in figures.values()), row


def test_the_whole_models_published_sizes() -> None:
    config = published_size.published_config("residual")
    text = config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.intermediate_size) == (4096, 32, 11008)
    assert (text.vocab_size, config.residual_size, config.qformer_config.hidden_size) == (32001, 16, 768)
    assert config.freeze_vit and config.freeze_qformer and not config.freeze_llm and config.use_mvm
