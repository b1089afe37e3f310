"""configs/eval: paths come from the environment, settings are the shipped ones, headers say what is needed."""

from pathlib import Path

import pytest

from stllm.common.config import load_evaluation, suite_of
from stllm.common.schema import benchmark_names
from stllm.models.settings import explicit_settings

FOLDER = Path(__file__).parents[2] / "configs" / "eval"
BENCHMARKS = ("activitynet", "mvbench", "msrvtt", "msvd", "tgif", "vcgbench")
SUITES = {
    "temporal_suite": ["tvbench", "tempcompass", "vinoground", "tomato"],
    "paper": ["mvbench", "vcgbench", "msvd", "msrvtt", "activitynet"],
}


def test_there_is_one_for_each_benchmark() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*BENCHMARKS, *SUITES}


def test_every_benchmark_is_in_a_configuration() -> None:
    assert {name for names in SUITES.values() for name in names} | set(BENCHMARKS) == set(benchmark_names())


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_changes_no_published_setting(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVBENCH_ROOT", "/data/tv")
    monkeypatch.setenv("MVBENCH_ROOT", "/data/mv")
    path = FOLDER / f"{suite}.yaml"
    assert suite_of(path) == SUITES[suite]
    for benchmark in SUITES[suite]:
        settings, published = load_evaluation(benchmark, path), load_evaluation(benchmark)
        assert settings.anno_path is not None and settings.output_dir == "output/eval"
        for name in ("num_frames", "sampling", "system", "num_beams", "max_new_tokens", "repetition_penalty"):
            assert getattr(settings, name) == getattr(published, name)
    first = load_evaluation(SUITES[suite][0], path, ["suite.tvbench.limit=3", "evaluation.limit=4"])
    assert first.anno_path in ("/data/tv", "/data/mv") and first.limit == (3 if suite == "temporal_suite" else 4)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_an_evaluation_configuration_changes_no_published_setting(
    benchmark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
def test_the_header_has_needs_launch_and_override_lines(benchmark: str) -> None:
    text = (FOLDER / f"{benchmark}.yaml").read_text()
    header = text.split("\nmodel:")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    for word in ("# Needs: ", f"# Launch: bash scripts/eval_{benchmark}.sh", "# Override: "):
        assert any(line.startswith(word) for line in header)
