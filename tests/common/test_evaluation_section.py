"""Section `evaluation`: shipped presets are overridden by the user's YAML, and that by options of the command."""

from pathlib import Path

import pytest

from stllm.common.config import load_config, load_evaluation
from stllm.common.errors import UserError


def test_yaml_options_and_command_line_override_the_preset(tmp_path: Path) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("evaluation: {num_frames: 32, num_beams: 3, batch_size: 2}\n")
    options = ["evaluation.num_beams=4", "evaluation.batch_size=5"]
    settings = load_evaluation("msvd", yaml, options, {"batch_size": 6})
    assert (settings.num_frames, settings.num_beams, settings.batch_size) == (32, 4, 6)
    assert (settings.sampling, settings.system, settings.max_new_tokens) == ("uniform", "", 300)  # of the preset


@pytest.mark.parametrize(
    ("benchmark", "published"),
    [
        ("mvbench", (0, "segment", "template", 1, 100, 1.0)),
        ("vcgbench", (64, "uniform", "template", 5, 300, None)),
        ("msvd", (64, "uniform", "", 5, 300, None)),
        ("msrvtt", (64, "uniform", "", 5, 300, None)),
        ("activitynet", (16, "uniform", "template", 5, 300, None)),
        ("tgif", (16, "uniform", "", 5, 300, None)),
    ],
)
def test_published_settings(benchmark: str, published: tuple[object, ...]) -> None:
    found = load_evaluation(benchmark)
    names = ("num_frames", "sampling", "system", "num_beams", "max_new_tokens", "repetition_penalty")
    assert tuple(getattr(found, name) for name in names) == published


def test_training_ignores_the_evaluation_section(tmp_path: Path) -> None:
    yaml = tmp_path / "train.yaml"
    yaml.write_text("model: {model_type: instructblip_vicuna0}\nevaluation: {limit: 3}\nrun: {output_dir: out}\n")
    assert "evaluation" not in load_config(yaml)
    assert load_evaluation("tgif", yaml).limit == 3
    yaml.write_text("model: {model_type: instructblip_vicuna0}\nrun: {output_dir: out}\n")
    assert load_evaluation("tgif", yaml).num_frames == 16


def test_paths_are_relative_to_the_yaml_but_output_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "qa.json").write_text("[]")
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("evaluation: {anno_path: qa.json, video_dir: ./videos, output_dir: out}\n")
    settings = load_evaluation("msvd", yaml)
    assert (settings.anno_path, settings.video_dir) == (str(tmp_path / "qa.json"), str(tmp_path / "videos"))
    assert settings.output_dir == "out"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluation: {num_beam: 3}", "unknown key 'evaluation.num_beam'; did you mean 'num_beams'?"),
        ("evaluation: {num_beams: many}", "'evaluation.num_beams' must be a whole number, found 'many'"),
        ("evaluation: {num_beams: 65}", "'evaluation.num_beams' must be from 1 to 64, found 65"),
        ("evaluation: {batch_size: 0}", "'evaluation.batch_size' must be at least 1, found 0"),
        ("evaluation: {tasks: state_change}", "'evaluation.tasks' must be a list, found 'state_change'"),
        ("evaluation: 3", "'evaluation' must be a mapping of keys, found 3"),
    ],
)
def test_an_error_names_its_file(tmp_path: Path, line: str, message: str) -> None:
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(line + "\n")
    with pytest.raises(UserError) as error:
        load_evaluation("msvd", yaml)
    assert str(yaml) in str(error.value) and message in str(error.value)
