"""Parts of the runner: training arguments, parameter groups, the meter, signals."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.runners.arguments import training_arguments
from stllm.runners.throughput import FlopCounter, StepMeter, padding_of
from stllm.runners.train import stopping_at_signals
from stllm.runners.trainer import STLLMTrainer, parameter_groups
from tests.helpers.reads import DeviceReads
from tests.helpers.tiny import tiny_batch, tiny_model
from tests.helpers.training import write_recipe

RUN = {"output_dir": "out", "task": "video_text_it", "max_tries": 3, "use_cpu": True}


def test_training_arguments_leave_out_our_own_keys() -> None:
    args = training_arguments({**RUN, "learning_rate": 2e-5, "dataloader_num_workers": 2}, dtype="bf16", seed=7)
    assert (args.learning_rate, args.seed, args.bf16, args.fp16) == (2e-5, 7, True, False)
    assert args.dataloader_persistent_workers
    assert not args.logging_nan_inf_filter
    assert args.report_to == []


def test_fsdp_and_bf16_need_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    args = training_arguments({"output_dir": "out", "bf16": True})
    assert args.use_cpu and args.bf16


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({"output_dir": None}, r"run\.output_dir is not set"),
        ({"report_to": "wandb"}, r"names wandb, which is not installed: `pip install wandb`"),
        ({"deepspeed": "zero2.json"}, r"DeepSpeed is not installed: `pip install 'stllm\[deepspeed\]'`"),
        ({"lr_scheduler_type": "cosin"}, r"the run section can't be used: .*cosin"),
    ],
)
def test_invalid_training_arguments_are_refused(run, words, monkeypatch) -> None:
    monkeypatch.setattr("stllm.runners.arguments.find_spec", lambda name: None)
    with pytest.raises(UserError, match=words):
        training_arguments({**RUN, **run})


def test_the_projection_has_its_own_learning_rate() -> None:
    model = nn.ModuleDict({"projection": nn.Linear(2, 2), "rest": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    decayed = {"projection.weight", "rest.weight", "frozen.weight"}
    groups = parameter_groups(model, decayed=decayed, weight_decay=0.1, learning_rate=1e-3, projection_lr=1e-4)
    found = {(group["lr"], group["weight_decay"]): [tuple(p.shape) for p in group["params"]] for group in groups}
    assert found == {(1e-3, 0.0): [(2,)], (1e-3, 0.1): [(2, 2)], (1e-4, 0.0): [(2,)], (1e-4, 0.1): [(2, 2)]}
    plain = parameter_groups(model, decayed=decayed, weight_decay=0.1, learning_rate=1e-3, projection_lr=None)
    assert [group["lr"] for group in plain] == [1e-3, 1e-3]


def test_the_meter_averages_over_steps_and_over_batches_with_a_value() -> None:
    meter = StepMeter(torch.device("cpu"))
    for number in (1, 2, 3):
        loss = torch.tensor(float(number), requires_grad=True)
        mvm = torch.tensor(0.5) if number % 2 else None
        meter.add({"loss": loss + 0.5, "loss_lm": loss, "loss_mvm": mvm, "kept_visual_tokens": 10 * number})
    found = meter.read(3)
    assert (found["loss"], found["loss_lm"], found["kept_visual_tokens"]) == (2.5, 2.0, 20.0)
    assert found["loss_mvm"] == pytest.approx(1 / 3) and found["accuracy"] is None
    meter.add({"loss": torch.tensor(3.0), "loss_lm": None})
    found = meter.read(5)  # two steps
    assert (found["loss"], found["loss_lm"], found["loss_mvm"], found["kept_visual_tokens"]) == (1.5, None, None, None)


def test_the_meter_counts_samples_and_tokens_a_second() -> None:
    meter = StepMeter(torch.device("cpu"), peak=1e6)
    meter.count(samples=4, clips=2, tokens=torch.tensor(50), flops=10**6, waited=0.0)
    meter.count(samples=4, clips=0, tokens=torch.tensor(30), waited=1.5)
    meter.started -= 3.0
    found = meter.read(1)
    assert found["samples_per_second"] is not None
    seconds = 8 / found["samples_per_second"]
    assert seconds == pytest.approx(3, rel=0.3)
    rates = (found["clips_per_second"], found["tokens_per_second"], found["data_wait"], found["mfu"])
    assert rates == pytest.approx((2 / seconds, 80 / seconds, 1.5 / seconds, 1 / seconds))
    assert StepMeter(torch.device("cpu")).read(1)["mfu"] is None


@pytest.mark.parametrize("packing", [False, True])
def test_padding_is_counted_in_padded_and_packed_batches(packing: bool) -> None:
    batch = tiny_batch(mask=0, num_clips=4, shorter=5, packing=packing)  # of 23 positions each, the last has 18
    assert padding_of(batch) == (3 * 23 + 18, 5) and padding_of(batch["teacher"]) == (4 * 26, 0)
    meter = StepMeter(torch.device("cpu"))
    meter.count(positions=92, padding=torch.tensor(5))
    meter.count(positions=8, padding=0)
    assert meter.read(1)["padding"] == pytest.approx(0.05) and meter.read(2)["padding"] is None


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": "eva_clip_g"},
        {"encoder": "eva_btadapter_g"},
        {
            "encoder": "eva_clip_g",
            "lora": {"r": 4, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]},
        },
    ],
)
def test_flops_equal_those_that_torch_counts(changes: dict[str, Any]) -> None:
    model = tiny_model(freeze_vit=True, freeze_qformer=True, **changes).train()
    batch = tiny_batch(model, mask=0)
    count = FlopCounter(model)
    with FlopCounterMode(display=False) as expected:
        model(**batch).loss.backward()
    assert count(batch) == pytest.approx(expected.get_total_flops(), rel=0.1)


def test_packing_saves_the_flops_of_padding() -> None:
    model = tiny_model(freeze_vit=True, freeze_qformer=True).train()
    counted, expected = [], []
    for packing in (False, True):
        batch = tiny_batch(model, mask=0, shorter=9, packing=packing)
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        counted.append(FlopCounter(model)(batch))
        expected.append(counter.get_total_flops())
    assert expected[0] > expected[1]  # torch counts no attention on a CPU
    assert counted[0] - counted[1] == pytest.approx(expected[0] - expected[1], rel=0.2)


def test_steps_are_profiled(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=3, profile_steps=[2, 3], save_steps=9)
    assert main(["train", "--cfg-path", str(recipe)]) == 0
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "trace-steps-2-3-rank-0.json"
    assert any("linear" in event["name"] for event in json.loads(trace.read_text())["traceEvents"])
    assert main(["train", "--cfg-path", str(recipe), "--options", "run.profile_steps=[3,2]"]) == 1
    assert (
        "run.profile_steps must be the first and the last step, such as [10, 12], found [3, 2]"
        in capsys.readouterr().err
    )


def test_the_first_signal_stops_after_the_step_and_the_second_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping_at_signals() as stop:
        assert stop == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("packing", [False, True])
def test_only_the_end_of_a_step_waits_for_the_device(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    found: dict[str, list[list[str]]] = {"training_step": [], "_get_grad_norm": []}

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(STLLMTrainer, name)

        def call(self: STLLMTrainer, *args: Any, **kwargs: Any) -> Any:
            with DeviceReads() as reads:
                result = original(self, *args, **kwargs)
            found[name].append(reads.found)
            return result

        return call

    for name in found:
        monkeypatch.setattr(STLLMTrainer, name, counted(name))
    recipe = write_recipe(tmp_path / "recipe.yaml", toy, max_steps=2, gradient_accumulation_steps=2, save_steps=9)
    assert main(["train", "--cfg-path", str(recipe), "--options", f"run.packing={packing}"]) == 0
    assert len(found["training_step"]) > 2 and not any(found["training_step"])
    assert found["_get_grad_norm"] == [["tolist"]] * 2
