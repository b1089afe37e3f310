"""configs/eval: each finds its data by the environment, stands on the shipped settings, and says what it needs."""

from pathlib import Path

import pytest

from stllm.common.config import load_evaluation
from stllm.models.settings import explicit_settings

FOLDER = Path(__file__).parents[2] / "configs" / "eval"
BENCHMARKS = ("activitynet", "mvbench", "msrvtt", "msvd", "tgif", "vcgbench")


def test_there_is_one_for_each_benchmark() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(BENCHMARKS)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_it_loads_and_changes_no_published_setting(benchmark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = "MVBENCH_ROOT" if benchmark == "mvbench" else "VCGBENCH_ROOT"
    variable = root if benchmark in ("mvbench", "vcgbench") else f"{benchmark.upper()}_ANNO"
    monkeypatch.setenv(variable, "/data/there")
    monkeypatch.setenv("CKPT", "/weights/mine")
    monkeypatch.setenv("OUTPUT_DIR", "/results")
    path = FOLDER / f"{benchmark}.yaml"
    settings, published = load_evaluation(benchmark, path), load_evaluation(benchmark)
    assert (settings.anno_path, settings.output_dir) == ("/data/there", "/results")
    assert explicit_settings(path) == {"ckpt": "/weights/mine"}
    for name in ("num_frames", "sampling", "system", "num_beams", "max_new_tokens", "repetition_penalty"):
        assert getattr(settings, name) == getattr(published, name)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_its_header_says_what_it_needs_and_how_it_is_started(benchmark: str) -> None:
    text = (FOLDER / f"{benchmark}.yaml").read_text()
    header = text.split("\nmodel:")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    for word in ("# Needs: ", f"# Launch: bash scripts/eval_{benchmark}.sh", "# Override: "):
        assert any(line.startswith(word) for line in header)
