"""`stllm train`: the files that a run writes, resuming, several processes, and one sentence for each mistake."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stllm.cli import main
from stllm.models.checkpoints.load import load_model
from stllm.models.st_llm import STLLM
from tests.helpers.training import assert_same_losses, losses, read_log, train, write_recipe
from tests.models.test_language_model import ARCHITECTURES

FIELDS = {
    "step",
    "epoch",
    "loss",
    "loss_lm",
    "loss_mvm",
    "accuracy",
    "learning_rate",
    "grad_norm",
    "kept_visual_tokens",
    "samples_per_second",
    "clips_per_second",
    "tokens_per_second",
    "padding",
    "data_wait",
    "mfu",
    "peak_memory_mb",
    "skipped_samples",
}


def run(recipe: Path, *options: str, code: int = 0) -> None:
    assert main(["train", "--cfg-path", str(recipe), *(["--options", *options] if options else [])]) == code


def failure(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str) -> str:
    """Return the error of a training command."""
    capsys.readouterr()
    run(recipe, *options, code=1)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def trained(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run. Its recipe is beside it."""
    recipe = write_recipe(tmp_path_factory.mktemp("trained") / "recipe.yaml", toy, max_steps=8)
    run(recipe)
    return recipe.parent / "run"


def test_the_files_that_a_run_writes(trained: Path, toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = read_log(trained)
    assert [line["step"] for line in log] == list(range(1, 9))
    assert all(set(line) == FIELDS for line in log)
    assert all(math.isclose(line["loss"], line["loss_lm"] + line["loss_mvm"], rel_tol=1e-6) for line in log)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert {path.name for path in trained.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6", "checkpoint-8"}
    assert yaml.safe_load((trained / "config.yaml").read_text())["run"]["max_steps"] == 8
    clip = next((toy / "vc2" / "media").glob("*.mp4"))
    capsys.readouterr()
    chat = ["chat", "--ckpt-path", str(trained), "--video", str(clip), "--question", "what moves?", "--json"]
    assert main([*chat, "--max-new-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 32


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_gives_the_same_losses(
    trained: Path,
    toy: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Losses and names of weights are equal, compilations are few, and both can continue each other's checkpoints."""
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=8)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    shutil.copytree(trained, tmp_path / "run")
    for name in ("checkpoint-6", "checkpoint-8"):
        shutil.rmtree(tmp_path / "run" / name)
    (tmp_path / "run" / "config.json").unlink()
    run(recipe, f"run.torch_compile_backend={backend}")
    # encoder block: 1; decoder layer: with gradients and without, for one length and for all
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] - compilations <= 8
    assert "recompile_limit" not in caplog.text
    assert losses(tmp_path / "run") == [pytest.approx(line, rel=1e-3) for line in losses(trained)]
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", trained))
    assert found.keys() == expected.keys()
    shutil.rmtree(tmp_path / "run" / "checkpoint-8")
    (tmp_path / "run" / "config.json").unlink()
    run(recipe)
    assert losses(tmp_path / "run") == [pytest.approx(line, rel=1e-3) for line in losses(trained)]


def test_the_configuration_that_a_run_writes_can_be_loaded(trained: Path, tmp_path: Path) -> None:
    run(
        trained / "config.yaml",
        f"run.output_dir={tmp_path / 'again'}",
        "run.max_steps=2",
        "run.lr_scheduler_type=constant",
    )
    first = read_log(trained)[0]
    assert read_log(tmp_path / "again")[0]["loss"] == first["loss"]


def test_a_finished_run_is_not_changed(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "log.jsonl").read_bytes()
    run(trained.parent / "recipe.yaml")
    assert "this run is finished" in capsys.readouterr().err
    assert (trained / "log.jsonl").read_bytes() == before


def unfinished(trained: Path, folder: Path, step: int) -> Path:
    """Return a copy of a run in the state after this checkpoint, as if killed, and its recipe."""
    shutil.copytree(trained, folder / "run")
    for path in [folder / "run" / name for name in ("config.json", "model.safetensors")]:
        path.unlink()
    for checkpoint in (folder / "run").glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    recipe = folder / "recipe.yaml"
    content = yaml.safe_load((trained.parent / "recipe.yaml").read_text())
    content["run"]["output_dir"] = str(folder / "run")
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_killed_continues_exactly(trained: Path, tmp_path: Path, workers: int) -> None:
    recipe = unfinished(trained, tmp_path, 3)
    run(recipe, f"run.dataloader_num_workers={workers}")
    for found, expected in zip(losses(tmp_path / "run"), losses(trained), strict=True):
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("qwen3_moe", {}),
        ("gpt_neox", {"freeze_LLM": True, "lora_r": 2, "lora_target_modules": ["query_key_value"]}),
    ],
)
def test_language_models_with_other_weight_names_on_disk_train(
    name: str, settings: dict[str, Any], toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers renames these weights. The models train, answer and resume; a missing weight is refused."""
    tokenizer = AutoTokenizer.from_pretrained(toy / "language_model")
    base = tmp_path / "language_model"
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], "vocab_size": len(tokenizer)})
    config.max_position_embeddings = 256
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "whole").mkdir()
    recipe = tmp_path / "whole" / "recipe.yaml"
    model = {"llama_model": str(base), **settings}
    run(write_recipe(recipe, toy, model=model, max_steps=6, learning_rate=2e-2))
    whole = tmp_path / "whole" / "run"
    clip = next((toy / "vc2" / "media").glob("*.mp4"))
    capsys.readouterr()
    chat = ["chat", "--ckpt-path", str(whole), "--video", str(clip), "--question", "what moves?", "--json"]
    assert main([*chat, "--max-new-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["visual_tokens"] == 32

    learned = load_model(whole, device="cpu").state_dict()
    recipe = unfinished(whole, tmp_path / "cut", 3)
    path = tmp_path / "cut" / "run" / "checkpoint-3" / "model.safetensors"
    weights = load_file(path)
    renamed = next(key for key in weights if key.startswith("language_model.") and key not in learned)
    save_file({key: tensor for key, tensor in weights.items() if key != renamed}, path)
    assert "does not hold all of the model's weights: language_model." in failure(capsys, recipe)
    save_file(weights, path)
    run(recipe)
    assert losses(tmp_path / "cut" / "run") == losses(whole)

    if settings:
        wrapped: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole / "lora_adapter")
        adapter = {key: value for key, value in wrapped.base_model.model.state_dict().items() if "lora_" in key}
        assert adapter and all(torch.equal(value, learned[f"language_model.{key}"]) for key, value in adapter.items())
        assert wrapped.peft_config["default"].base_model_name_or_path == str(base)
        (tmp_path / "next").mkdir()
        run(
            write_recipe(
                tmp_path / "next" / "recipe.yaml",
                toy,
                model={**settings, "ckpt": str(whole), "llama_model": None, "fresh": []},
                max_steps=1,
            )
        )
        assert read_log(tmp_path / "next" / "run")[0]["loss_lm"] < read_log(whole)[0]["loss_lm"]


def test_a_run_continues_only_with_its_own_settings(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = unfinished(trained, tmp_path, 3)
    assert "run.learning_rate was 0.002 and is now 0.1; set it back" in failure(capsys, recipe, "run.learning_rate=0.1")
    found = failure(capsys, recipe, "run.per_device_train_batch_size=2")
    assert "was made with batches of 4 over all processes, now they are of 2" in found
    assert "is no checkpoint of a run" in failure(capsys, recipe, f"run.resume_from_checkpoint={tmp_path}")


def test_two_processes_give_the_losses_of_one(trained: Path, tmp_path: Path) -> None:
    """One process with batches of 4 and two with batches of 2 have the same batches, frames, masks and losses."""
    recipe = trained.parent / "recipe.yaml"
    options = [f"run.output_dir={tmp_path / 'two'}", "run.per_device_train_batch_size=2"]
    train(recipe, *options, processes=2)
    assert_same_losses(losses(tmp_path / "two"), losses(trained))
    kept = [[line["kept_visual_tokens"] for line in read_log(folder)] for folder in (tmp_path / "two", trained)]
    assert kept[0] == kept[1]


def test_packed_batches_give_the_losses_of_padded_ones(trained: Path, tmp_path: Path) -> None:
    """Tested from the start, in two processes, and in a run that was padded before it was killed."""
    assert yaml.safe_load((trained / "config.yaml").read_text())["run"]["packing"] is False
    (tmp_path / "killed").mkdir()
    killed = unfinished(trained, tmp_path / "killed", 3)
    recipe, whole, two = trained.parent / "recipe.yaml", tmp_path / "whole", tmp_path / "two"
    run(recipe, "run.packing=True", f"run.output_dir={whole}")
    run(killed, "run.packing=True")
    options = [f"run.output_dir={two}", "run.per_device_train_batch_size=2", "run.packing=True"]
    train(recipe, *options, processes=2)
    for folder in (whole, tmp_path / "killed" / "run", two):
        assert_same_losses(losses(folder), losses(trained))
    padded, packed = ([line["padding"] for line in read_log(folder)] for folder in (trained, whole))
    assert packed == padded and max(padded) > 0
    (tmp_path / "again").mkdir()
    shutil.copy(recipe, tmp_path / "recipe.yaml")
    run(unfinished(whole, tmp_path / "again", 3), "run.packing=True")
    assert losses(tmp_path / "again" / "run") == losses(whole)


@pytest.mark.parametrize(
    ("name", "option", "words"),
    [
        ("jamba", "run.max_steps=1", "jamba has other layers than attention"),
        ("llama", "model.attn_implementation=flash_attention_2", "model.attn_implementation is flash_attention_2"),
        ("llama", "model.attn_implementation=flex_attention", "model.attn_implementation is flex_attention"),
        ("llama", "run.torch_compile=True", "run.torch_compile is set"),
        ("llama", "run.torch_compile_backend=aot_eager", "run.torch_compile is set"),
    ],
)
def test_packing_is_refused_for_unsupported_models(
    name: str, option: str, words: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy / "language_model")
    config = AutoConfig.for_model(name, **{**ARCHITECTURES[name], "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "language_model")
    tokenizer.save_pretrained(tmp_path / "language_model")
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"llama_model": str(tmp_path / "language_model")})
    message = failure(capsys, recipe, "run.packing=True", option)
    assert f"run.packing is True, but {words}" in message and "leave out run.packing" in message
    assert not (tmp_path / "run").exists()


def test_pairs_that_are_trained_together_give_the_losses_of_separate_ones(toy: Path, tmp_path: Path) -> None:
    """A record with one pair gives the same loss either way; a second copy of the pair does not change it."""
    records = json.loads((toy / "vc2" / "video" / "vqa" / "toy_direction" / "train.json").read_text())
    found = []
    for name, copies in (("one", 1), ("together", 1), ("together", 2)):
        anno = tmp_path / f"{name}{copies}.json"
        anno.write_text(json.dumps([{**record, "QA": record["QA"][:1] * copies} for record in records]))
        data = {"one": {"anno_path": str(anno), "media_dir": "media", "num_frames": 4}}
        recipe = write_recipe(
            tmp_path / "recipe.yaml", toy, model={"qformer_text_input": False}, datasets=data, max_steps=4
        )
        run(recipe, f"run.qa_sampling={name}", f"run.output_dir={tmp_path / anno.stem}")
        found.append(losses(tmp_path / anno.stem))
    for other in found[1:]:
        assert other == [pytest.approx(line, abs=1e-5) for line in found[0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.qformer_text_input=True"], "the Q-Former reads the question"),
        (["run.packing=True"], "run.packing is True, which keeps whole samples apart"),
        (["model.attn_implementation=flex_attention"], "model.attn_implementation is flex_attention"),
    ],
)
def test_pairs_cannot_be_trained_together_with_some_settings(
    options: list[str], words: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, model={"qformer_text_input": False})
    message = failure(capsys, recipe, "run.qa_sampling=together", *options)
    assert f"has qa_sampling=together, but {words}" in message and "set it to all or one" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_fsdp_gives_the_losses_of_one_process(trained: Path, tmp_path: Path, packing: bool) -> None:
    recipe, one, two = trained.parent / "recipe.yaml", tmp_path / "one", tmp_path / "two"
    epsilon = "run.adam_epsilon=1e-3"  # with the default, rounding of a gradient near zero can become a whole step
    train(recipe, f"run.output_dir={one}", epsilon)
    options = [f"run.output_dir={two}", epsilon, "run.per_device_train_batch_size=2", "run.fsdp=true"]
    train(recipe, *options, f"run.packing={packing}", processes=2)
    assert (two / "checkpoint-8" / "pytorch_model_fsdp.bin").is_file()  # it is not DDP by another name
    assert_same_losses(losses(two), losses(one))
    again = STLLM.from_pretrained(two).state_dict()
    for name, tensor in STLLM.from_pretrained(one).state_dict().items():
        torch.testing.assert_close(again[name], tensor, atol=1e-4, rtol=0)


def test_accumulated_batches_give_the_loss_of_one_large_batch(toy: Path, tmp_path: Path) -> None:
    """The number of micro-batches does not change the loss of a step (with one data set and without masking)."""
    datasets = {"d": {"anno_path": "video/vqa/toy_direction/train.json", "media_dir": "media", "num_frames": 4}}
    first = {}
    for size, count in ((4, 1), (2, 2)):
        folder = tmp_path / str(size)
        folder.mkdir()
        recipe = write_recipe(
            folder / "recipe.yaml",
            toy,
            model={"use_mask": False, "mvm_decode": False},
            datasets=datasets,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
        )
        run(recipe)
        first[size] = read_log(folder / "run")[0]
    for name in ("loss", "grad_norm"):
        assert first[2][name] == pytest.approx(first[4][name], abs=1e-5)
    assert first[4]["loss_mvm"] is None


@pytest.mark.parametrize(
    ("model", "packing"),
    [
        ({"qformer_text_input": False, "model_type": "minigpt4_vicuna0"}, False),
        ({"lora_r": 2, "freeze_LLM": True}, True),
    ],
)
def test_images_and_videos_train_together(
    toy: Path, tmp_path: Path, model: dict[str, Any], packing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = {
        "videos": {"anno_path": "video/vqa/toy_direction/train.json", "media_dir": "media", "num_frames": 4},
        "images": {"anno_path": "image/vqa/toy_picture/train.json", "media_dir": "media", "media": "image"},
        "talk": {
            "anno_path": "video/conversation/toy_conversation/train.json",
            "media_dir": "media",
            "num_frames": 4,
            "multi_turn": True,
        },
        "shards": {"type": "image_text", "shards": str(toy / "images" / "00000.tar")},
    }
    model = {**model, "video_input": "residual", "residual_size": 2}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", toy, model=model, datasets=datasets, num_train_epochs=1, max_steps=-1
    )
    run(recipe, "run.bf16=True", "model.use_grad_checkpoint=True", f"run.packing={packing}")
    (fresh,) = [line for line in capsys.readouterr().err.splitlines() if "from random weights" in line]
    assert ("LoRA (24 weights)" in fresh) == ("lora_r" in model)
    log = read_log(tmp_path / "run")
    kinds = {(line["loss_mvm"] is None, line["kept_visual_tokens"]) for line in log}
    assert {(True, 2.0)} < kinds  # an image: its K tokens, unmasked
    assert any(not unmasked and kept < 4 for unmasked, kept in kinds)
    if model.get("lora_r"):
        assert (tmp_path / "run" / "lora_adapter" / "adapter_model.safetensors").is_file()
        merged = tmp_path / "merged"
        assert main(["convert", str(tmp_path / "run"), "--to", str(merged), "--merge-lora"]) == 0
        assert STLLM.from_pretrained(merged).config.lora is None


def test_a_stage_starts_from_the_weights_of_the_stage_before(trained: Path, toy: Path, tmp_path: Path) -> None:
    """As with AVP and QA, the second stage has the first one's weights, another video input and a new adapter.

    It does not name the Q-Former's tokenizer: the first stage's folder has it.
    """
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=2)
    content = yaml.safe_load(recipe.read_text())
    kept = {"use_mask", "mvm_decode", "freeze_vit", "freeze_qformer", "freeze_LLM"}
    content["model"] = {key: value for key, value in content["model"].items() if key in kept}
    content["model"] |= {
        "ckpt": str(trained),
        "model_type": "instructblip_vicuna0_btadapter",
        "video_input": "residual",
    }
    content["model"] |= {"image_size": 32, "vision": {"adapter_depth": 2}}
    recipe.write_text(yaml.safe_dump(content))
    run(recipe, "run.learning_rate=0.0001")
    assert read_log(tmp_path / "run")[0]["loss_lm"] < read_log(trained)[0]["loss_lm"] - 0.5


def test_a_loss_that_is_nan_stops_the_run_and_names_the_batch(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, save_steps=2)
    real, calls = STLLM.forward, []

    def broken(self: STLLM, **inputs: Any) -> Any:
        output: Any = real(self, **inputs)
        calls.append(1)
        return type(output)(**{**output, "loss_lm": output.loss_lm * float("nan")}) if len(calls) == 4 else output

    monkeypatch.setattr(STLLM, "forward", broken)
    found = failure(capsys, recipe)
    assert "step 4 can't be learned from: its loss is no number (NaN or infinite), with " in found
    assert ".mp4 (" in found
    assert "checkpoint-2 is kept" in found


def test_mistakes_are_reported_before_anything_is_written(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy)
    cases = {
        "run.learning_rat=1": "unknown key 'run.learning_rat'; did you mean 'learning_rate'?",
        "run.task=video_text_itt": "unknown task 'video_text_itt'",
        "datasets.toy_directions={}": "unknown data set 'toy_directions'",
        "datasets.toy_direction.anno_path=nowhere.json": "nowhere.json (toy_direction)",
        "model.llama_model=null": "is named: set model.llama_model",
        "run.output_dir=null": "run.output_dir is not set",
    }
    for option, words in cases.items():
        assert words in failure(capsys, recipe, option), option
    broken = tmp_path / "broken.json"
    broken.write_text('[{"video": "a.mp4", "QA": [}]')
    assert "broken.json" in failure(capsys, recipe, f"datasets.toy_direction.anno_path={broken}")
    assert not (tmp_path / "run").exists()


def test_running_out_of_memory_names_the_settings_to_lower(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: STLLM, **inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(STLLM, "forward", full)
    found = failure(capsys, write_recipe(tmp_path / "recipe.yaml", toy))
    assert "not enough memory on this machine for batches of 4: lower run.per_device_train_batch_size" in found


def test_bad_samples_are_replaced_counted_and_limited(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads((toy / "vc2/video/vqa/toy_direction/train.json").read_text())
    for record in records[:2]:
        record["video"] = "gone.mp4"
    annotation = tmp_path / "train.json"
    annotation.write_text(json.dumps(records))
    datasets = {"d": {"anno_path": str(annotation), "media_dir": "media", "num_frames": 4}}
    recipe = write_recipe(
        tmp_path / "recipe.yaml", toy, datasets=datasets, max_steps=-1, num_train_epochs=2, save_steps=1
    )
    run(recipe, "run.max_bad_fraction=0.9", f"run.output_dir={tmp_path / 'patient'}")
    assert read_log(tmp_path / "patient")[-1]["skipped_samples"] >= 4  # two records, two epochs
    found = failure(capsys, recipe, "run.max_bad_fraction=0.1")
    assert "could not be read" in found
    assert "more than run.max_bad_fraction (0.1) allows" in found
    assert "gone.mp4" in found


def test_a_record_too_long_for_the_model_is_skipped_and_counted(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests questions of 9,000 tokens, a conversation too long in total, and text only. A long answer is cut."""
    records = json.loads((toy / "vc2/video/vqa/toy_direction/train.json").read_text())[:1] * 4
    pair = {"i": "", "q": "what moves?", "a": "a square"}
    long = {"video": "never_looked_for.mp4", "QA": [{**pair, "q": "why " * 3000}]}
    talk = {"video": "never_looked_for.mp4", "QA": [{**pair, "q": "why " * 350}] * 2}  # 1,050 tokens each
    answered = {**records[0], "QA": [{**pair, "a": "why " * 3000}]}
    contents = {
        "single": [long, *records[:2], answered],
        "talk": [talk, *records[:3]],
        "alone": [{"QA": long["QA"]}, *({"QA": [pair]} for _ in range(3))],
    }
    datasets: dict[str, Any] = {}
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        datasets[name] = {"anno_path": str(tmp_path / f"{name}.json"), "media_dir": "media", "num_frames": 4}
    datasets["talk"]["multi_turn"] = True
    datasets["alone"]["media"] = "text"
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, datasets=datasets, max_steps=-1, num_train_epochs=1)
    run(recipe, "run.max_bad_fraction=0.9")
    shown = capsys.readouterr().err
    assert f"single, left out: {toy}/vc2/media/never_looked_for.mp4 ({tmp_path}/single.json, record 1): its" in shown
    assert "tokens (8 of them visual), but the language model has 2048 positions" in shown
    assert "data set talk, left out: " in shown and "data set alone, left out: " in shown
    log = read_log(tmp_path / "run")
    assert (len(log), log[-1]["skipped_samples"]) == (3, 3)
    options = (f"run.output_dir={tmp_path / 'strict'}", "run.max_bad_fraction=0.1")
    found = failure(capsys, recipe, *options)
    assert "2 of 10 samples could not be used (2 too long), more than run.max_bad_fraction (0.1) allows" in found
    hopeless = ("run.max_bad_fraction=0.9", "datasets.single.max_samples=1", "run.max_tries=2")
    found = failure(capsys, recipe, options[0], *hopeless)
    assert "data set single: 3 samples drawn one after another could not be used, the last one is " in found


def test_more_visual_tokens_than_positions_are_refused_before_weights_are_read(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy)
    assert failure(capsys, recipe, "datasets.toy_state.num_frames=1020") == (
        "error: data set toy_state: 1020 frames become 2040 visual tokens, which leaves no room for text in the "
        "language model's 2048 positions: lower its num_frames, or set model.video_input to residual or mean"
    )
    assert not (tmp_path / "run").exists()
