"""The shipped presets: they have the published settings and are part of the package."""

from importlib.resources import files
from typing import Any

import pytest
import yaml

from stllm.common.registry import benchmarks
from stllm.common.schema import EvaluationSettings

FOLDER = files("stllm") / "configs" / "evaluation"
# frames, sampling, system sentence, beams, new tokens, repetition penalty (None: of the family of weights). Of the last
# four, only the frames of TVBench and TOMATO, their prompts and greedy decoding are published; the rest is chosen here.
PUBLISHED = {
    "mvbench": (0, "segment", "template", 1, 100, 1.0),
    "vcgbench": (64, "uniform", "template", 5, 300, None),
    "msvd": (64, "uniform", "", 5, 300, None),
    "msrvtt": (64, "uniform", "", 5, 300, None),
    "activitynet": (16, "uniform", "template", 5, 300, None),
    "tgif": (16, "uniform", "", 5, 300, None),
    "tvbench": (16, "segment", "template", 1, 100, 1.0),
    "tempcompass": (16, "uniform", "", 1, 200, 1.0),
    "vinoground": (16, "uniform", "", 1, 16, 1.0),
    "tomato": (16, "uniform", "", 1, 100, 1.0),
}


def preset(name: str) -> dict[str, Any]:
    """Return the keys under `evaluation` in a shipped preset."""
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert list(content) == ["evaluation"]
    return dict(content["evaluation"])


def test_every_benchmark_has_a_preset() -> None:
    assert benchmarks.names() == sorted(PUBLISHED)
    assert sorted(file.name.removesuffix(".yaml") for file in FOLDER.iterdir()) == sorted(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_settings(name: str) -> None:
    settings = EvaluationSettings(**preset(name))
    asked = (settings.num_frames, settings.sampling, settings.system)
    decoding = (settings.num_beams, settings.max_new_tokens, settings.repetition_penalty)
    assert (*asked, *decoding) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_begins_with_its_purpose_and_command(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    for word in ("# Needs: ", f"# Launch: stllm evaluate {name} ", "# Override: "):
        assert any(line.startswith(word) for line in header), word
    assert max(map(len, lines)) <= 120
