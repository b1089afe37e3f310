"""The keys of `run`: each works, gives a note or is refused, and a mistake gives one sentence."""

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from stllm.cli import main
from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.common.run_section import REFUSED, RENAMED, SWITCHES, UNUSED, run_keys
from stllm.common.schema import DatasetSettings, RunSettings
from stllm.runners.trainer import STLLMTrainer
from tests.helpers.training import read_log, write_recipe

# arguments of TrainingArguments that our training follows
HONOURED = {
    *("output_dir", "seed", "data_seed", "full_determinism", "use_cpu", "resume_from_checkpoint", "ignore_data_skip"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("use_liger_kernel", "liger_kernel_config"),
    *("activation_checkpointing", "activation_checkpointing_kwargs"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps"),
    *("logging_strategy", "logging_steps", "logging_first_step", "disable_tqdm"),
    *("log_level", "log_level_replica", "log_on_each_node"),  # of transformers' own messages
    *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "fsdp", "fsdp_config", "deepspeed"),
}


@pytest.fixture(scope="module")
def recipe(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("keys") / "recipe.yaml", toy)


def refusal(capsys: pytest.CaptureFixture[str], recipe: Path, *options: str, command: tuple[str, ...] = ()) -> str:
    """Return the error of a training command, which must not have written anything."""
    capsys.readouterr()
    argv = ["train", "--cfg-path", str(recipe), *command, *(["--options", *options] if options else [])]
    assert main(argv) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and not line.startswith("error: unexpected")
    assert not (recipe.parent / "run").exists()
    return line


def test_every_argument_of_transformers_is_in_one_table() -> None:
    """A field that a new transformers adds must be put into a table: it works, gives a note or is refused."""
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
        (
            ("lr_scheduler_type=cosine", "lr_scheduler_kwargs={num_cycle: 1}"),
            "unknown key of run.lr_scheduler_kwargs 'num_cycle': known are num_cycles",
        ),
        (
            ("lr_scheduler_type=constant", "lr_scheduler_kwargs={num_cycles: 1}"),
            "run.lr_scheduler_type constant takes no lr_scheduler_kwargs",
        ),
        (("lr_scheduler_kwargs=abc",), "'run.lr_scheduler_kwargs' must be a mapping of keys, found 'abc'"),
        (("lr_scheduler_kwargs=[1]",), "'run.lr_scheduler_kwargs' must be a mapping of keys or text, found [1]"),
        (("gradient_checkpointing_kwargs=abc",), "must be a mapping of keys, found 'abc'"),
        (
            ("gradient_checkpointing_kwargs={use_reentrat: true}",),
            "unknown key of run.gradient_checkpointing_kwargs 'use_reentrat': known are ",
        ),
        (
            ("activation_checkpointing_kwargs={every_n_layers: 0}",),
            "'run.activation_checkpointing_kwargs.every_n_layers' must be at least 1, found 0",
        ),
        (("fsdp_config={fsdp_versio: 2}",), "unknown key of run.fsdp_config 'fsdp_versio': known are "),
        (("fsdp_config=1",), "'run.fsdp_config' must be a mapping of keys or text, found 1"),
        (("report_to=5",), "'run.report_to' must be text or a list, found 5"),
        (("torch_compile_mode=abc",), "unknown run.torch_compile_mode 'abc': known are default, "),
        (("torch_compile_backend=abc",), "unknown run.torch_compile_backend 'abc': known are "),
        (
            ("use_liger_kernel=true",),
            "run.use_liger_kernel is True, but Liger is not installed: `pip install 'stllm[liger]'",
        ),
        (
            ("liger_kernel_config={rop: true}",),
            "unknown key of run.liger_kernel_config 'rop': known are cross_entropy, ",
        ),
        (("log_level=abc",), "unknown run.log_level 'abc': known are critical, "),
        (("ddp_backend=abc",), "unknown run.ddp_backend 'abc': known are "),
        (("ddp_timeout=1000000000000000",), "'run.ddp_timeout' must be from 1 to 1000000000"),
        (("debug=underflow_overflow",), "run.debug must be unset, found 'underflow_overflow'"),
        (("adafactor=perhaps",), "'run.adafactor' must be true or false, found 'perhaps'"),
        (("warmup_ratio='1'",), "'run.warmup_ratio' must be at least 0 and below 1, found '1'"),
        *(
            ((f"{key}=1{'0' * 400}",), f"'run.{key}' must be between -2**63 and 2**63")
            for key in ("seed", "learning_rate", "max_steps", "logging_steps", "max_tries")
        ),
        (("lr_scheduler_type=reduce_lr_on_plateau",), "requires an eval strategy"),
        (("optim=adam",), "unknown run.optim 'adam': known are "),
        (("optim=adamw_bnb_8bit",), "bitsandbytes"),
        (("optim=adamw_anyprecision",), "torchdistx"),
        (("optim=grokadamw",), "grokadamw"),
        (("optim=schedule_free_adamw",), "schedulefree"),
        (("optim=galore_adamw",), "run.optim 'galore_adamw' is not supported"),
        (("optim=lomo",), "run.optim 'lomo' is not supported"),
        (
            ("optim=sgd", "optim_args=abc"),
            "run.optim_args must be key=value pairs with commas between them, found 'abc'",
        ),
        (
            ("optim=adamw_torch", "optim_args=beta1=0.5"),
            "run.optim_args 'beta1=0.5' has no effect on run.optim adamw_torch",
        ),
        (("report_to=wandbb",), "unknown run.report_to 'wandbb'"),
        (("report_to=[mlflow]",), "run.report_to names mlflow, which is not installed: `pip install mlflow`"),
        (("fp16=true", "bf16=true"), "At most one of fp16 and bf16 can be True"),
        (("fp16=true",), "run.fp16 needs a GPU, and this run is on the CPU"),
        (("tf32=true",), "--tf32 requires Ampere or a newer GPU"),
        (("fsdp=full_shad",), "Unknown `fsdp` option: full_shad"),
        (("fsdp=true",), "run.fsdp divides a model among processes: start several with torchrun"),
        (("fsdp=true", "fsdp_config=gone.json"), "run.fsdp_config: gone.json cannot be read (No such file"),
        (("deepspeed=gone.json",), "run.deepspeed: gone.json cannot be read (No such file or directory)"),
        (("deepspeed=/dev/null",), "/dev/null: found a device, expected a JSON file for run.deepspeed"),
        (("dataloader_multiprocessing_context=thread",), "unknown run.dataloader_multiprocessing_context 'thread'"),
        (("save_strategy=best",), "run.save_strategy must be steps, epoch or no, found 'best'"),
        (("evaluation_strategy=steps",), "run.eval_strategy is set, but there is nothing to score"),
        (("group_by_length=true",), "run.train_sampling_strategy must be random, found 'group_by_length'"),
        (("label_smoothing_factor=0.1",), "run.label_smoothing_factor must be 0, found 0.1"),
        (("load_best_model_at_end=true",), "requires the save and eval strategy to match"),
        (("average_tokens_across_devices=false",), "run.average_tokens_across_devices must be True, found False"),
        (("push_to_hub=true",), "run.push_to_hub must be False, found True: training uploads nothing"),
        (("neftune_noise_alpha=5",), "run.neftune_noise_alpha must be unset, found 5"),
        (("accelerator_config={split_batches: true}",), "run.accelerator_config must be unset, found "),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_invalid_key_gives_one_sentence(
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    words: str,
) -> None:
    if (key := options[0].partition("=")[0]) == "activation_checkpointing_kwargs" and not hasattr(
        TrainingArguments, key
    ):
        pytest.skip("this version of transformers has no such key")
    if options[0].startswith("deepspeed="):
        monkeypatch.setattr("stllm.runners.arguments.find_spec", lambda name: object())  # as if it were installed
    monkeypatch.setattr("stllm.runners.arguments.is_liger_kernel_available", lambda: False)
    if options[0].startswith("optim="):  # as if it were not
        monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    assert words in refusal(capsys, recipe, *(f"run.{option}" for option in options))


@pytest.mark.parametrize("given", ["--device=cuda", "--device=cuda:7", "--gpu-id=1", "--device=mps"])
def test_an_absent_device_is_refused_by_every_command(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = refusal(capsys, recipe, command=(given,))
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
        assert main([*argv, given]) == 1
        assert capsys.readouterr().err.splitlines() == [found], argv
    for argv in (["verify", "gone"], ["toy", "--output", "gone"]):  # they never use a GPU
        assert main([*argv, given]) == 2


@pytest.mark.parametrize("arguments", [("--device", "cuda:1"), ("--gpu-id", "1")])
def test_a_gpu_by_number_is_the_one_that_trains(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, str]
) -> None:
    """The number counts the GPUs that CUDA_VISIBLE_DEVICES leaves visible."""
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


@pytest.fixture
def trainer_of(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., STLLMTrainer]:
    """Return the trainer of `stllm train` with these options, in its state before the first epoch."""

    def build(*options: str) -> STLLMTrainer:
        built: list[STLLMTrainer] = []

        def loop(self: STLLMTrainer, **kwargs: Any) -> None:
            built.append(self)
            raise UserError("stopped before the first epoch")

        monkeypatch.setattr(STLLMTrainer, "_inner_training_loop", loop)
        given = [f"run.{option}" for option in (f"output_dir={tmp_path / 'run'}", *options)]
        assert main(["train", "--cfg-path", str(recipe), "--options", *given]) == 1
        assert len(built) == 1, capsys.readouterr().err
        built[0].create_optimizer_and_scheduler(num_training_steps=10)
        return built[0]

    return build


def test_liger_needs_a_gpu(recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("stllm.runners.arguments.is_liger_kernel_available", lambda: True)
    found = refusal(capsys, recipe, "run.use_liger_kernel=true")
    assert found == "error: run.use_liger_kernel needs a GPU, and this run is on the CPU: leave it out"


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_an_attention_that_needs_a_gpu_is_refused_on_the_cpu(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options = [f"run.output_dir={tmp_path / 'run'}", f"model.attn_implementation={name}"]
    assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    needs = "that needs a CUDA GPU, and the model is on cpu: take auto, which suits every device and architecture"
    assert line == f"error: model.attn_implementation is {name}, but {needs}"


def test_supported_keys_have_their_effect(
    trainer_of: Callable[..., STLLMTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    verbosity = transformers_logging.get_verbosity()
    compiled: dict[str, Any] = {}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.update({type(self).__name__: how}))
    try:
        trainer = trainer_of(
            *("seed=5", "data_seed=9", "full_determinism=true", "per_device_train_batch_size=2", "num_train_epochs=3"),
            *("optim=adamw_torch", "learning_rate=0.004", "mm_projector_lr=0.002", "weight_decay=0.25"),
            *("adam_beta1=0", "adam_beta2=0.625", "adam_epsilon=0.001", "max_grad_norm=0.5"),
            *("lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 0.001}", "warmup_ratio=0.2"),
            *("bf16=true", "torch_compile_mode=reduce-overhead", "gradient_checkpointing=true"),
            *("log_level=error", "max_steps=-1", "ddp_backend=gloo"),
            *("dataloader_num_workers=1", "dataloader_prefetch_factor=3", "dataloader_persistent_workers=false"),
            *("dataloader_multiprocessing_context=spawn", "ddp_find_unused_parameters=true", "ddp_bucket_cap_mb=7"),
            *("ddp_broadcast_buffers=false", "ddp_static_graph=true", "disable_tqdm=true"),
        )
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        transformers_logging.set_verbosity(verbosity)
    assert (trainer.args.seed, trainer.sampler.seed, trainer.sampler.batch_size) == (5, 9, 2)
    epoch = len(trainer.get_train_dataloader())
    assert trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1] == 3 * epoch
    assert trainer.optimizer is not None and trainer.lr_scheduler is not None and trainer.model is not None
    groups = trainer.optimizer.param_groups
    assert {group["initial_lr"] for group in groups} == {0.004, 0.002}
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.0, 0.625), 0.001)}
    rates = []
    for _ in range(10):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
    assert rates[1] == pytest.approx(0.004) and rates[-1] == pytest.approx(0.001)
    assert trainer.accelerator.mixed_precision == "bf16"
    how = {"backend": "inductor", "mode": "reduce-overhead"}
    assert compiled == {"EvaBlock": how, "LlamaDecoderLayer": how}
    assert trainer.accelerator.state.dynamo_plugin.backend == "NO"  # the model is not compiled as a whole
    assert trainer.model.is_gradient_checkpointing
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (1, 3, False)
    assert loader.multiprocessing_context.get_start_method() == "spawn"
    ddp = trainer.accelerator.ddp_handler
    assert (ddp.find_unused_parameters, ddp.bucket_cap_mb) == (True, 7)
    assert (ddp.broadcast_buffers, ddp.static_graph) == (False, True)
    assert trainer.args.disable_tqdm


def test_keys_of_saving_and_logging_have_their_effect(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run saves only the model, each epoch, and logs then. Resuming it gives an error."""
    folder = tmp_path / "run"
    options = [
        f"run.output_dir={folder}",
        *("run.max_steps=-1", "run.num_train_epochs=2", "run.save_strategy=epoch", "run.save_total_limit=1"),
        *("run.save_only_model=true", "run.logging_steps=100", "run.logging_first_step=true"),
    ]
    assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 0
    (checkpoint,) = folder.glob("checkpoint-*")
    assert not (checkpoint / "optimizer.pt").exists()
    last = int(checkpoint.name.split("-")[1])
    assert [line["step"] for line in read_log(folder)] == [1, last // 2, last]
    (folder / "config.json").unlink()
    capsys.readouterr()
    assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 1
    assert f"{checkpoint} holds the model alone (run.save_only_model)" in capsys.readouterr().err


def test_keys_without_an_effect_give_a_note(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    """None of them reaches transformers, whatever its value."""
    caplog.set_level(logging.INFO)
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} & UNUSED.keys()
    assert len(names) > 30
    run = load_config(recipe, [f"run.{name}=true" for name in names]).run
    for name in names:
        assert f"--options: run.{name} has no effect: {UNUSED[name]}" in caplog.messages
    assert not names & run.keys()


def test_a_null_key_gives_its_default(recipe: Path) -> None:
    keys = [*run_keys(), *RENAMED, *SWITCHES]
    cfg = load_config(recipe, [f"run.{key}=null" for key in keys if key not in UNUSED and RENAMED.get(key) not in keys])
    defaults = {f.name: f.default for f in dataclasses.fields(RunSettings) if "unused" not in f.metadata}
    assert cfg.run == defaults
    entry = "datasets.toy_state"
    cfg = load_config(recipe, [f"{entry}.{f.name}=null" for f in dataclasses.fields(DatasetSettings)])
    assert cfg.datasets.toy_state == {}


def test_the_words_for_off_turn_a_switch_off(recipe: Path) -> None:
    options = ["run.adafactor='off'", "run.deepspeed=false", "run.report_to=false", "run.warmup_ratio='0.25'"]
    run = load_config(recipe, options).run
    assert not {"optim", "deepspeed", "report_to"} & run.keys() and run.warmup_steps == 0.25


def test_settings_without_their_switch_give_a_note(recipe: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kwargs = "run.gradient_checkpointing_kwargs={use_reentrant: true}"
    note = "--options: run.gradient_checkpointing_kwargs has no effect without run.activation_checkpointing"
    load_config(recipe, [kwargs, "run.gradient_checkpointing=true"])
    assert note not in caplog.messages
    load_config(recipe, [kwargs, "run.fsdp_config={version: 2}"])
    assert note in caplog.messages
    assert "--options: run.fsdp_config has no effect without run.fsdp" in caplog.messages


def times(folder: Path) -> dict[Path, int]:
    """Return when each file was last written, without locks, which older versions of filelock write again."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if not path.name.endswith(".lock")}


def test_a_run_that_must_not_resume_needs_a_new_folder(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    options = [f"run.output_dir={folder}", "run.max_steps=1", "run.resume_from_checkpoint=false"]
    assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 0
    before = times(folder)
    for content in ("checkpoint-1", "a model"):
        capsys.readouterr()
        assert main(["train", "--cfg-path", str(recipe), "--options", *options]) == 1
        assert f"run.resume_from_checkpoint is False, but {folder} holds {content} of an" in capsys.readouterr().err
        assert times(folder) == before
        shutil.rmtree(folder / "checkpoint-1", ignore_errors=True)
        before = times(folder)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "socks://127.0.0.1:1", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    """httpx, which the clients of the hub and the judge use, raises when a client is created."""
    monkeypatch.setenv("ALL_PROXY", proxy)
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text('{"id": "1", "question": "?", "answer": "a", "prediction": "a"}\n')
    judge = ["judge", "qa", "--pred-path", str(predictions), "--output-dir", str(tmp_path / "judge")]
    assert main([*judge, "--base-url", "http://127.0.0.1:1/v1", "--model", "m"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: the proxy in the environment (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY) cannot be used")
