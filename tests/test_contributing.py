"""CONTRIBUTING.md: run every example, by the tests that it names and through the command line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from stllm import cli
from stllm.cli import main
from stllm.commands import doctor
from stllm.common import config, registry, schema
from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.evaluation.benchmarks.base import Item
from stllm.models import st_llm, video_inputs, vision
from stllm.models.build import build_model
from stllm.processors import templates
from tests.evaluation.benchmarks import test_presets
from tests.helpers.evaluation import CHECKPOINT, QUICK, lines, write_set
from tests.helpers.tiny import tiny_batch
from tests.helpers.training import read_log, write_recipe
from tests.models import test_language_model, test_st_llm, test_video_inputs
from tests.models.checkpoints.conftest import FOREIGN, HEADS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
KITCHEN = "stllm.evaluation.benchmarks.kitchen"
REGISTRIES = [value for value in vars(registry).values() if isinstance(value, registry.Registry)]


# the file that a code block goes into -> what goes there
BLOCKS: dict[str, str] = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", TEXT, re.M | re.S))
EXTENDED = (
    *("stllm/models/video_inputs.py", "stllm/models/vision.py", "stllm/models/st_llm.py"),
    *("stllm/processors/templates.py", "tests/models/test_language_model.py"),
)
# the key of `model` that takes an example's name -> that name, the file, its module, the visual tokens of 16 frames
NAMED: dict[str, tuple[str, str, ModuleType, int]] = {
    "video_input": ("stride", "stllm/models/video_inputs.py", video_inputs, 16),
    "vit_model": ("eva_smoothed", "stllm/models/vision.py", vision, 32),
    "arch": ("st_llm_light_mvm", "stllm/models/st_llm.py", st_llm, 32),
    "template": ("vicuna", "stllm/processors/templates.py", templates, 32),
}


@pytest.fixture(autouse=True)
def forgetful_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What an example registers is gone after its test."""
    for kind in REGISTRIES:
        kind.names()  # its modules are imported
        monkeypatch.setattr(kind, "_entries", dict(kind._entries))
    yield


def run(path: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs a block among those names, and returns them with what it adds."""
    found = dict(names)
    exec(compile(BLOCKS[path], path, "exec"), found)
    return found


def test_every_block_is_run_here_and_its_neighbours_exist() -> None:
    assert len(BLOCKS) == TEXT.count("```") / 2 == 11
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(source.count(f'"{path}"') for path in BLOCKS)
    named = re.findall(r"(?<![\w/])(?:stllm|configs|scripts|benchmarks|tests)/[\w./-]*\w\.(?:py|yaml|sh|md)\b", TEXT)
    assert not [path for path in {*named} - {*BLOCKS} if not (ROOT / path).exists()]
    assert all((ROOT / path).exists() for path in EXTENDED)  # the others are written, by whoever follows an example


def test_a_video_input(tmp_path: Path) -> None:
    run("stllm/models/video_inputs.py", vars(video_inputs))
    assert "stride" in registry.video_inputs.names()
    test_video_inputs.test_frames_that_are_not_kept_are_absent("stride")
    test_video_inputs.test_an_image_enters_as_its_own_tokens("stride")
    for num_frames in (1, 3, 4, 9):
        test_video_inputs.test_number_of_tokens_is_what_is_announced("stride", num_frames)
    frames = torch.randn(1, 6, 5, 8)
    assert torch.equal(registry.video_inputs.get("stride")()(frames), frames[:, ::2].flatten(1, 2))
    test_st_llm.test_conformance({"video_input": "stride", **test_st_llm.TRAINING}, tmp_path)


def train(recipe: Path, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Train as a user does, and return the lines of the log."""
    assert main(["train", "--cfg-path", str(recipe), "--options", f"run.output_dir={folder}", *options]) == 0
    return read_log(folder)


@pytest.fixture(scope="module")
def baseline(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A recipe with masks and MVM, and the first line of its log."""
    folder = tmp_path_factory.mktemp("baseline")
    recipe = write_recipe(folder / "recipe.yaml", toy, max_steps=2)
    return recipe, train(recipe, folder / "run", "run.max_steps=1")[0]


@pytest.mark.parametrize("key", NAMED)
def test_a_new_name_trains_and_answers(
    key: str,
    baseline: tuple[Path, dict[str, Any]],
    toy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`--options model.<key>=<name>`: masks and MVM in training, and the name comes back from the checkpoint."""
    recipe, usual = baseline
    name, path, module, num_tokens = NAMED[key]
    options = ["--cfg-path", str(recipe), "--options", f"model.{key}={name}"]
    assert main(["train", *options]) == 1
    assert f"error: --options: unknown model.{key} '{name}': known are " in capsys.readouterr().err

    run(path, vars(module))
    first, second = train(recipe, tmp_path / "run", f"model.{key}={name}")
    assert second["loss_mvm"] > 0
    if key == "arch":
        assert (first["loss_lm"], first["loss_mvm"]) == (usual["loss_lm"], pytest.approx(usual["loss_mvm"] / 10))
    else:
        assert first["loss_lm"] != usual["loss_lm"]
    if key == "video_input":
        assert first["kept_visual_tokens"] == usual["kept_visual_tokens"] / 2
    clip = next((toy / "vc2" / "media").glob("*.mp4"))
    chat = ["chat", "--ckpt-path", str(tmp_path / "run"), "--video", str(clip), "--question", "what moves?", "--json"]
    capsys.readouterr()
    assert main([*chat, "--max-new-tokens", "3", "--num-beams", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == num_tokens

    for kind in REGISTRIES:  # a package without the example
        entries = {known: value for known, value in kind._entries.items() if known != name}
        monkeypatch.setattr(kind, "_entries", entries)
    assert main(chat) == 1
    assert f" '{name}': known are " in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_in_a_changed_clone(toy: Path, tmp_path: Path) -> None:
    """Every example, written into a copy of the package as a contributor does, at once and under torchrun."""
    shutil.copytree(ROOT / "stllm", tmp_path / "clone" / "stllm")
    blocks = {path: block for path, block in BLOCKS.items() if path.startswith("stllm/")}
    for path, block in blocks.items():
        with (tmp_path / "clone" / path).open("a", encoding="utf-8") as file:
            file.write(block)
    cli = tmp_path / "clone" / "stllm" / "cli.py"
    text = cli.read_text(encoding="utf-8")
    assert text.count('("chat", ') == 1
    cli.write_text(text.replace('("chat", ', '("chat", "frames", '), encoding="utf-8")

    def stllm(*words: str | Path, processes: int = 1) -> str:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        found = subprocess.run(
            [sys.executable, *(launch if processes > 1 else []), "-m", "stllm", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=tmp_path / "clone",
            env={**os.environ, "PYTHONPATH": str(tmp_path / "clone"), "OMP_NUM_THREADS": "1"},
        )
        assert found.returncode == 0, found.stderr[-3000:]
        return found.stdout

    names = {key: name for key, (name, *_) in NAMED.items()}
    entry = csv_entry(tmp_path, toy)
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model=names, datasets={"mine": entry}, max_steps=2)
    stllm("train", "--cfg-path", recipe, processes=2)
    assert stllm("frames", "--video", next(Path(entry["media_dir"]).glob("*.mp4"))).count("frame ") == 16
    assert [line["kept_visual_tokens"] < 4 for line in read_log(tmp_path / "run")] == [True, True]
    clip = next(Path(entry["media_dir"]).glob("*.mp4"))
    words: list[str | Path] = ["chat", "--ckpt-path", tmp_path / "run", "--video", clip, "--question", "what moves?"]
    words += ["--json", "--num-beams", "1", "--max-new-tokens", "3"]
    assert json.loads(stllm(*words))["visual_tokens"] == 16
    data = kitchen(tmp_path / "data")
    words = ["evaluate", "kitchen", "--ckpt-path", tmp_path / "run", "--anno-path", data / "test.json"]
    words += ["--video-dir", data / "videos", "--output-dir", tmp_path / "eval", *QUICK]
    stllm(*words, processes=2)
    assert len(lines(tmp_path / "eval", "kitchen")) == 2


def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe, with a tiny Qwen3, its tokenizer, and the other published files at their tiny size."""
    monkeypatch.setattr(test_language_model, "ARCHITECTURES", dict(test_language_model.ARCHITECTURES))
    run("tests/models/test_language_model.py", vars(test_language_model))
    test_language_model.test_loss_and_logits_equal_the_whole_model("qwen3")

    sizes = {**test_language_model.ARCHITECTURES["qwen3"], "vocab_size": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **sizes)).save_pretrained(tmp_path / "qwen3")
    for path in (FOREIGN / "vicuna_for_instructblip").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "qwen3")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    recipe = tmp_path / "configs" / "qwen3.yaml"
    recipe.write_text(BLOCKS["configs/qwen3.yaml"], encoding="utf-8")
    monkeypatch.setenv("QWEN3", str(tmp_path / "qwen3"))
    monkeypatch.setenv("VIT_CKPT", str(FOREIGN / "eva_vit_g.pth"))
    monkeypatch.setenv("QFORMER_CKPT", str(FOREIGN / "instruct_blip_vicuna7b_trimmed.pth"))
    tiny = [*HEADS, "model.image_size=28", "model.num_query_token=4"]
    with pytest.raises(UserError, match=r"size 32 by .* 48 by the projection .*model\.fresh=\[projection\]"):
        build_model(load_config(recipe, [*tiny, "model.fresh=[]"]), device="cpu")
    model = build_model(load_config(recipe, tiny), device="cpu", dtype="float32")
    assert model.config.text_config.model_type == "qwen3" and model.config.video_input == "mean"
    assert model.config.vision_config["encoder"] == "eva_btadapter_g"
    model.train()(**tiny_batch(model)).loss.backward()
    trained = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {"projection", "vision_encoder"}  # the adapter


def test_a_data_set(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("stllm.datasets.csv_clips")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(run("stllm/datasets/csv_clips.py", {"__name__": module.__name__}))
    tests = run("tests/datasets/test_csv_clips.py", {"__name__": "tests.datasets.test_csv_clips"})
    checks = [value for name, value in tests.items() if name.startswith("test_")]
    for number, check in enumerate(checks):
        (tmp_path / str(number)).mkdir()
        check(tmp_path / str(number))
    assert len(checks) == 2
    (first, _) = train(
        write_recipe(tmp_path / "recipe.yaml", toy, datasets={"mine": csv_entry(tmp_path, toy)}, max_steps=2),
        tmp_path / "run",
    )
    assert first["loss"] > 0 and first["skipped_samples"] == 0


def csv_entry(folder: Path, toy: Path) -> dict[str, Any]:
    """The entry of a CSV data set about the toy world's clips, written into the folder."""
    clips = sorted((toy / "vc2" / "media").glob("*.mp4"))[:4]
    rows = [f"{clip.name},what moves?,the ball" for clip in clips]
    (folder / "clips.csv").write_text("\n".join(["video,question,answer", *rows]))
    return {"type": "csv", "anno_path": str(folder / "clips.csv"), "media_dir": str(clips[0].parent), "num_frames": 4}


def test_a_command(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = ModuleType("stllm.commands.frames")
    vars(module).update(run("stllm/commands/frames.py", {"__name__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, "frames"))
    clip = next((toy / "vc2" / "media").glob("*.mp4"))
    assert main(["frames", "--video", str(clip), "--num-frames", "4"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and all(re.fullmatch(r"frame \d+: \d+\.\d\d s", line) for line in printed)
    assert main(["frames", "--video", "absent.mp4"]) == 1
    assert "error: absent.mp4: " in capsys.readouterr().err
    assert main(["--help"]) == 0 and "lists the times of the frames" in capsys.readouterr().out


def test_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked on a golden checkpoint as its YAML says, and read by the doctor."""
    module = ModuleType(KITCHEN)
    monkeypatch.setitem(sys.modules, KITCHEN, module)
    vars(module).update(run("stllm/evaluation/benchmarks/kitchen.py", {"__name__": KITCHEN}))
    shutil.copytree(config.PRESETS, tmp_path / "presets")
    preset = BLOCKS["stllm/configs/evaluation/kitchen.yaml"]
    (tmp_path / "presets" / "kitchen.yaml").write_text(preset, encoding="utf-8")
    for users in (config, schema):
        monkeypatch.setattr(users, "PRESETS", tmp_path / "presets")
    monkeypatch.setattr(doctor, "DOCTOR_FORMATS", (*doctor.DOCTOR_FORMATS, "kitchen"))
    monkeypatch.setattr(test_presets, "FOLDER", tmp_path / "presets")
    test_presets.test_a_preset_begins_with_its_purpose_and_command("kitchen")

    data = kitchen(tmp_path / "data")
    files = ["--anno-path", str(data / "test.json"), "--video-dir", str(data / "videos")]
    words = ["evaluate", "kitchen", "--ckpt-path", str(CHECKPOINT), *files, "--output-dir", str(tmp_path / "out")]
    assert main([*words, *QUICK, "--probe", "--permute"]) == 0
    assert (
        "kitchen, strict: 0.0 % of all items (95 % interval 0.0 to 65.8), 0.0 % of those answered"
        in capsys.readouterr().out
    )
    found = lines(tmp_path / "out", "kitchen")
    assert len(found) == 2 and all(line["prediction"] and not line["error"] for line in found)
    assert [line["correct"] for line in found] == [{"strict": False, "official": False}] * 2
    probes = [tmp_path / "out" / f"kitchen{ending}" for ending in (".probe.json", ".permute.md", ".png")]
    assert all(path.exists() for path in probes)
    assert "published" not in (tmp_path / "out/kitchen.md").read_text()
    for line, (reply, strict, official) in zip(found, (("It.", True, True), ("it is", False, True)), strict=True):
        item = Item(line["id"], "", line["video"], None, (line["question"],), line["answer"])
        answered = registry.benchmarks.get("kitchen").score(item, [reply])
        assert answered == {"correct": {"strict": strict, "official": official}}

    assert main(["doctor", "--format", "kitchen", *files]) == 0
    assert "nothing found in 2 records, 2 media" in capsys.readouterr().out
    next((data / "videos").iterdir()).unlink()
    assert main(["doctor", "--format", "kitchen", *files]) == 1
    assert "1 missing" in capsys.readouterr().out


def kitchen(folder: Path) -> Path:
    """Two questions in the form of the new benchmark, and their videos."""
    data = write_set(folder, num_videos=2, num_questions=1)
    for path in (data / "videos").iterdir():
        path.rename(path.with_name(f"clip_{path.name}"))
    records = json.loads((data / "test_qa.json").read_text())
    rows = [
        {"clip": Path(one["video_name"]).stem, "question": one["question"], "answer": one["answer"]} for one in records
    ]
    (data / "test.json").write_text(json.dumps(rows))
    return data
