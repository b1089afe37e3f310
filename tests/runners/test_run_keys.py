"""The keys of `run` as a user types them: each mistake gives one sentence, and each key works, is noted or is refused."""

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments

from stllm.cli import main
from stllm.common.run_section import HONOURED, REFUSED, UNUSED
from stllm.runners.trainer import STLLMTrainer
from tests.helpers.training import write_recipe


@pytest.fixture(scope="module")
def recipe(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("keys") / "recipe.yaml", toy)


def refusal(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str, command: tuple[str, ...] = ()) -> str:
    """The one sentence with which training refuses, before it writes anything."""
    capsys.readouterr()
    argv = ["train", "--cfg-path", str(recipe), *command, *(["--options", *options] if options else [])]
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not line.startswith("error: unexpected")
    assert not (recipe.parent / "run").exists()
    return line


def test_every_argument_of_transformers_is_in_one_table() -> None:
    """A field that a new transformers adds must be put into a table: it works, it is noted, or it is refused."""
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert names - HONOURED - UNUSED.keys() - REFUSED.keys() == set()
    assert not HONOURED & UNUSED.keys() and not HONOURED & REFUSED.keys() and not UNUSED.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("per_device_train_batch_size=0",), "'run.per_device_train_batch_size' must be at least 1, found 0"),
        (("gradient_accumulation_steps=0",), "'run.gradient_accumulation_steps' must be at least 1, found 0"),
        (("dataloader_num_workers=-1",), "'run.dataloader_num_workers' must be at least 0, found -1"),
        (("learning_rate=-1e-4",), "'run.learning_rate' must be at least 0, found -0.0001"),
        (("learning_rate=.nan",), "'run.learning_rate' must be a finite number, found nan"),
        (("projection_lr=-1",), "'run.projection_lr' must be at least 0, found -1"),
        (("learning_rate=true",), "'run.learning_rate' must be a number, found True"),
        (("max_steps=true",), "'run.max_steps' must be a whole number, found True"),
        (("max_steps=0",), "'run.max_steps' must be at least 1, or -1 to train for run.num_train_epochs, found 0"),
        (("max_steps=-5",), "'run.max_steps' must be at least 1, or -1 to train for run.num_train_epochs, found -5"),
        (("num_train_epochs=0",), "'run.num_train_epochs' must be above 0, found 0"),
        (("warmup_ratio=1.5",), "'run.warmup_ratio' must be at least 0 and below 1, found 1.5"),
        (("warmup_steps=1.5",), "'run.warmup_steps' must be a whole number of steps, or below 1 a share of all steps"),
        (("save_steps=0",), "'run.save_steps' must be above 0, found 0"),
        (("logging_steps=0",), "'run.logging_steps' must be above 0, found 0"),
        (("adam_beta1=2",), "'run.adam_beta1' must be from 0 to 1, found 2"),
        (("adam_beta2=1",), "the run section can't be used: Invalid beta parameter at index 1"),
        (("data_seed=-1",), "'run.data_seed' must be from 0 to 4294967295, found -1"),
        (("lr_scheduler_type=cosin",), "unknown run.lr_scheduler_type 'cosin': known are constant, "),
        (("lr_scheduler_type=cosine", "lr_scheduler_kwargs={x: 1}"), "unexpected keyword argument 'x'"),
        (("lr_scheduler_type=reduce_lr_on_plateau",), "requires an eval strategy"),
        (("optim=adam",), "unknown run.optim 'adam': known are "),
        (("optim=adamw_bnb_8bit",), "bitsandbytes"),
        (("optim=adamw_anyprecision",), "torchdistx"),
        (("optim=grokadamw",), "grokadamw"),
        (("optim=schedule_free_adamw",), "schedulefree"),
        (("optim=galore_adamw",), "run.optim 'galore_adamw' is not supported"),
        (("optim=lomo",), "run.optim 'lomo' is not supported"),
        (("report_to=wandbb",), "unknown run.report_to 'wandbb'"),
        (("report_to=[mlflow]",), "run.report_to names mlflow, which is not installed: `pip install mlflow`"),
        (("fp16=true", "bf16=true"), "At most one of fp16 and bf16 can be True"),
        (("fp16=true",), "run.fp16 needs a GPU, and this run is on the CPU"),
        (("tf32=true",), "--tf32 requires Ampere or a newer GPU"),
        (("fsdp=full_shad",), "Unknown `fsdp` option: full_shad"),
        (("fsdp=true",), "run.fsdp divides a model among processes: start several with torchrun"),
        (("fsdp=true", "fsdp_config=gone.json"), "run.fsdp_config: gone.json cannot be read (No such file"),
        (("deepspeed=gone.json",), "run.deepspeed: gone.json cannot be read (No such file or directory)"),
        (("deepspeed=/dev/null",), "run.deepspeed: /dev/null is not valid JSON"),
        (("dataloader_multiprocessing_context=thread",), "unknown run.dataloader_multiprocessing_context 'thread'"),
        (("save_strategy=best",), "run.save_strategy must be steps, epoch or no, found 'best'"),
        (("evaluation_strategy=steps",), "run.eval_strategy must be no, found 'steps': training does not evaluate"),
        (("group_by_length=true",), "run.train_sampling_strategy must be random, found 'group_by_length'"),
        (("label_smoothing_factor=0.1",), "run.label_smoothing_factor must be 0, found 0.1"),
        (("load_best_model_at_end=true",), "run.load_best_model_at_end must be False, found True"),
        (("average_tokens_across_devices=false",), "run.average_tokens_across_devices must be True, found False"),
        (("push_to_hub=true",), "run.push_to_hub must be False, found True: training uploads nothing"),
        (("neftune_noise_alpha=5",), "run.neftune_noise_alpha must be unset, found 5"),
        (("accelerator_config={split_batches: true}",), "run.accelerator_config must be unset, found "),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mistake_gives_one_sentence(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    if options[0].startswith("deepspeed="):
        monkeypatch.setattr("stllm.runners.arguments.find_spec", lambda name: object())  # as if it were installed
    assert words in refusal(capsys, recipe, *(f"run.{option}" for option in options))


@pytest.mark.parametrize("given", [("--device", "cuda"), ("--device", "cuda:7"), ("--gpu-id", "1"), ("--device", "mps")])
def test_an_absent_device_is_refused_by_every_command(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: tuple[str, str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = refusal(capsys, recipe, command=given)
    assert "is not there: this machine has cpu; use one, or auto" in found
    commands = [
        ["chat", "--video", "gone.mp4", "--question", "?"],
        ["evaluate", "mvbench", "--anno-path", "gone"],
        ["extract", "--cfg-path", str(recipe), "--output", str(recipe.parent / "features")],
        ["judge", "qa", "--pred-path", "gone.jsonl", "--model", "local:gone"],
        ["convert", "gone", "--to", "there"],
        ["inspect", "gone"],
        ["doctor", "--cfg-path", str(recipe)],
        ["serve"],
        ["demo"],
    ]
    for argv in commands:
        assert main([*argv, *given]) == 1
        assert capsys.readouterr().err.splitlines() == [found], argv
    for argv in (["verify", "gone"], ["toy", "--output", "gone"]):  # they never use a GPU
        assert main([*argv, *given]) == 2


@pytest.mark.parametrize("arguments", [("--device", "cuda:1"), ("--gpu-id", "1")])
def test_a_gpu_by_number_is_the_one_that_trains(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str]
) -> None:
    """CUDA_VISIBLE_DEVICES is obeyed: the number counts among the GPUs that it leaves visible."""
    chosen: list[Any] = []

    class Reached(Exception):
        pass

    def stop(*args: Any, **kwargs: Any) -> None:
        chosen.append(kwargs.get("device") or args)
        raise Reached

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr("stllm.tasks.video_text_it.VideoTextTask.build_model", stop)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    argv = ["train", "--cfg-path", str(recipe), *arguments, "--options", "run.output_dir=" + str(recipe.parent / "gpu")]
    assert main(argv) == 1
    assert torch.device("cuda:1") in chosen and chosen[-1] == torch.device("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "torchrun and DeepSpeed give each process its own GPU" in refusal(capsys, recipe, command=arguments)
