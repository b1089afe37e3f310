"""The temporal experiment: its recipes, resumed and failed runs, and figures and claims computed by hand."""

import asyncio
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.temporal.__main__ import main
from experiments.temporal.plan import ALL, VARIANTS, Plan, recipe
from experiments.temporal.report import chart, claims, markdown, summary
from experiments.temporal.runs import Result, RunError, command, training_figures
from stllm.common.config import load_config
from tests.configs.recipes import CONFIGS
from tests.helpers.training import train

BASE = CONFIGS / "tiny" / "temporal.yaml"
STEPS = 80
SLUGS = ("object_existence", "moving_direction", "unexpected_action")
NOT_TRAINED = "action_count"
NAMES = {"object_existence": "Object Existence", "moving_direction": "Moving Direction"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write those files of a toy world that the experiment reads, and a checkpoint beside it."""
    root = tmp_path / "world"
    files: dict[str, Any] = {"toy_world.json": {"seed": 5}, "vc2/video/reasoning/toy_rare/choices.json": []}
    for slug in (*SLUGS, NOT_TRAINED):
        options = ["yes", "no"] if slug == "object_existence" else ["a", "b", "c", "d"]
        files[f"mvbench/json/{slug}.json"] = [{"candidates": options}] * 3
    files["../checkpoint/config.json"] = {"num_query_tokens": 6}
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    monkeypatch.setenv("TOY_ROOT", str(root))
    return root


def plan_of(world: Path, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "world": world,
        "test_world": world,
        "checkpoint": world.parent / "checkpoint",
        "base": BASE,
        "work": world.parent / "work",
        "steps": STEPS,
        "mask_after": 0.5,
        "residual_size": 4,
        "long_frames": 16,
        "limit": None,
        "device": "cpu",
    }
    return Plan(**{**values, **changes})


class Stub:
    """Replaces the commands and writes their files. failing: variants whose training fails. calls: all arguments."""

    def __init__(self) -> None:
        self.failing: tuple[str, ...] = ()
        self.calls: list[list[str]] = []

    async def __call__(self, words: Sequence[str], log: Path) -> None:
        self.calls.append(list(words))
        folder = log.parent
        if words[0] == "train":
            if any(folder.name.startswith(f"{name}-") for name in self.failing):
                raise RunError("stllm train ended with 1: error: no space left")
            recipe_path = Path(words[words.index("--cfg-path") + 1])
            (folder / "model").mkdir(exist_ok=True)
            (folder / "model" / "config.yaml").write_text("run: {per_device_train_batch_size: 8}")
            lines = [{"step": n, "samples_per_second": 16.0, "kept_visual_tokens": 48.0} for n in range(1, STEPS + 1)]
            (folder / "model" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            assert load_config(recipe_path).run.max_steps == STEPS
            (folder / "model" / "config.json").write_text("{}")
        else:
            tasks = words[words.index("--tasks") + 1].split(",")
            scores = {NAMES.get(task, "Unexpected Action"): 75.0 for task in tasks}
            path = folder / "evaluation" / f"{words[words.index('--output-name') + 1]}.results.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"scores": {"strict": {"tasks": scores}}}))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setattr("experiments.temporal.runs.command", stub)
    return stub


def start(world: Path, *more: str) -> int:
    words = ["--world", str(world), "--ckpt", str(world.parent / "checkpoint"), "--work", str(world.parent / "work")]
    words += ["--output-dir", str(world.parent / "results"), "--steps", str(STEPS), "--seeds", "2", "--jobs", "1"]
    return main([*words, *more])


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_recipes_differ_in_the_variant_alone(world: Path) -> None:
    plan = plan_of(world)
    recipes = {variant.name: recipe(plan, variant, seed=1) for variant in VARIANTS}
    runs = [
        {k: v for k, v in r["run"].items() if k not in ("output_dir", "save_total_limit")} for r in recipes.values()
    ]
    assert all(run == runs[0] for run in runs) and runs[0]["seed"] == 1 and runs[0]["max_steps"] == STEPS
    frames = {name: {key: entry["num_frames"] for key, entry in r["datasets"].items()} for name, r in recipes.items()}
    assert set(frames["local frames only"].values()) == {4}
    assert all(frames[name] == frames["all"] for name in frames if name != "local frames only")
    base = {name: entry["num_frames"] for name, entry in load_config(BASE).datasets.items() if "num_frames" in entry}
    assert frames["all"] == base | {"toy_rare": 16} and len(base) > 5
    masking = {name: (r["model"]["use_mask"], r["model"].get("use_mvm")) for name, r in recipes.items()}
    assert masking["all"] == masking["mean"] == (False, None)
    assert masking["all+mask"] == (True, False) and masking["all+mask+mvm"] == (True, True)


def test_tasks_that_the_recipe_does_not_train_are_not_tested(world: Path) -> None:
    assert plan_of(world).slugs == sorted(SLUGS)
    whole = plan_of(world, base=CONFIGS / "tiny" / "stages" / "4_choices.yaml")
    assert whole.slugs == sorted((*SLUGS, NOT_TRAINED))


def test_number_of_visual_tokens_of_each_variant(world: Path) -> None:
    plan = plan_of(world)
    tokens = {variant.name: (plan.tokens(variant, 8), plan.tokens(variant, 16)) for variant in VARIANTS}
    assert tokens["mean"] == (6, 6) and tokens["all"] == tokens["all+mask"] == (48, 96)
    assert tokens["residual"] == tokens["local frames only"] == (24, 24)


@pytest.mark.parametrize(("steps", "share"), [(6, 0.5), (300, 0.5), (901, 0.3), (6000, 0.75)])
def test_masking_begins_at_a_checkpoint(world: Path, steps: int, share: float) -> None:
    plan = plan_of(world, steps=steps, mask_after=share)
    assert plan.switch % plan.every == 0 and abs(plan.switch - share * steps) <= 2
    assert plan_of(world, mask_after=0.0).switch == 0


def test_a_world_without_long_clips_has_no_long_set(world: Path) -> None:
    (world / "vc2/video/reasoning/toy_rare/choices.json").unlink()
    plan = plan_of(world)
    assert not plan.has_long and "toy_rare" not in recipe(plan, ALL, 0)["datasets"]


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_all_is_run_once_and_masked_runs_continue_it(
    world: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(world) == 0
    assert len(stub.calls) == 2 * len(VARIANTS) * 3  # training, two evaluations
    begun = [word for call in stub.calls for word in call if word.startswith("run.resume_from_checkpoint")]
    assert len(begun) == 4 and all(re.search(r"/all-[01]/model/checkpoint-40$", word) for word in begun)
    local = [call for call in stub.calls if call[0] == "evaluate" and "/local_frames_only-" in " ".join(call)]
    assert {call[call.index("--num-frames") + 1] for call in local} == {"4"}
    report = json.loads((world.parent / "results" / "temporal.json").read_text())
    assert report["runs"]["done"] == 12 and report["variants"]["all"]["seconds a step"]["mean"] == 0.5
    assert "| Moving Direction  |     3 |   25.0 | 75.0 |" in capsys.readouterr().out
    stub.calls.clear()
    assert start(world) == 0 and stub.calls == []


def test_a_failed_run_is_listed_and_tried_again(world: Path, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.failing = ("all",)
    assert start(world) == 1
    page = (world.parent / "results" / "temporal.md").read_text()
    assert "6 runs, 6 failed" in page and "- all, seed 1: stllm train ended with 1: error: no space left" in page
    assert "- all+mask, seed 0: `all`, which this run continues, failed: stllm train ended with 1" in page
    stub.failing = ()
    stub.calls.clear()
    assert start(world) == 0
    assert len([call for call in stub.calls if call[0] == "train"]) == 6
    assert "12 runs, 0 failed" in (world.parent / "results" / "temporal.md").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", "81"), "holds runs of another experiment: steps was 80 and is now 81; name another --work"),
        (("--options", "run.learning_rate=0.5"), "base.run.learning_rate was "),
        (("--mask-after", "1"), "--mask-after is 1.0; expected a share"),
        (("--world", "nowhere"), "nowhere is no toy world"),
        (("--ckpt", "nowhere"), "nowhere holds no trained model"),
    ],
)
def test_runs_with_other_settings_are_refused(
    world: Path, stub: Stub, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], said: str
) -> None:
    assert start(world, "--seeds", "1") == 0
    assert start(world, *more) == 1
    assert said in capsys.readouterr().err


def test_the_last_line_of_a_failed_command_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"stllm train ended with 1: error: .*missing\.yaml: no such file"):
        asyncio.run(command(["train", "--cfg-path", "missing.yaml"], tmp_path / "log.txt"))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_experiment_ends_its_commands_and_starts_no_others(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: signal.Signals
) -> None:
    """Two commands run and end shortly after SIGTERM, as training does after writing a checkpoint."""
    script = world.parent / "python"
    script.write_text(
        "#!/bin/sh\n"
        f"trap 'sleep 0.2; echo x >> {world.parent}/stopped; exit 1' TERM\n"
        f"echo x >> {world.parent}/begun\n"
        "while :; do sleep 0.05; done\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))

    def interrupt() -> None:
        while not (world.parent / "begun").is_file() or len((world.parent / "begun").read_text().split()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), name)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    try:
        thread.start()
        assert start(world, "--jobs", "2") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert "interrupted: what was trained is kept" in capsys.readouterr().err
    assert [len((world.parent / file).read_text().split()) for file in ("begun", "stopped")] == [2, 2]


def test_seconds_a_step_count_only_steps_after_the_switch(world: Path, tmp_path: Path) -> None:
    plan = plan_of(world)  # the switch is at 40, lines are of 2 steps
    lines = [
        {"step": n, "samples_per_second": 8.0 if n <= 42 else 16.0, "kept_visual_tokens": n} for n in range(2, 81, 2)
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("run: {per_device_train_batch_size: 4, gradient_accumulation_steps: 2}")
    assert training_figures(plan, tmp_path) == {"seconds_per_step": 0.5, "training_tokens": 62}


# ---- figures --------------------------------------------------------------------------------------------------------


def result(variant: str, seed: int, direction: float, rare: float, seconds: float = 1.0) -> Result:
    tasks = {"Object Existence": 100.0, "Moving Direction": direction, "Unexpected Action": rare}
    return {
        "variant": variant,
        "seed": seed,
        "commit": "abc",
        "tasks": tasks,
        "seconds_per_step": seconds,
        "training_tokens": 48.0,
    }


RESULTS = [
    result("all", 0, 90, 80, 2.0),
    result("all", 1, 100, 90, 4.0),
    result("mean", 0, 30, 40),
    result("mean", 1, 40, 30),
    result("residual", 0, 80, 84),
    result("all+mask+mvm", 0, 90, 80, 1.0),
    result("all+mask+mvm", 1, 94, 90, 3.0),
]


def test_means_and_spread_are_over_seeds(world: Path) -> None:
    figures = summary(plan_of(world), RESULTS, jobs=2)["variants"]
    assert figures["all"]["accuracy"]["Moving Direction"] == {"mean": 95, "low": 90, "high": 100}
    assert figures["all"]["temporal tasks"] == {"mean": 90, "low": 85, "high": 95}  # without existence
    assert figures["all"]["all tasks"]["mean"] == pytest.approx((270 / 3 + 290 / 3) / 2)
    assert figures["all+mask+mvm"]["relative"] == {"mean": 0.625, "low": 0.5, "high": 0.75}  # 1/2 and 3/4
    assert figures["local frames only"]["all tasks"] is None and figures["local frames only"]["runs"] == 0


def test_claims_are_judged_by_the_means(world: Path) -> None:
    found = summary(plan_of(world), RESULTS, jobs=2)["claims"]
    holds = {claim["claim"]: claim["holds"] for claim in found}
    assert holds == {
        "`mean`: at most 60 % on temporal tasks": True,
        "`all`: above `mean` on temporal tasks": True,
        "`all+mask+mvm`: at most 2 points below `all`, all tasks": True,
        "`all+mask+mvm`: at most 0.7 × the seconds a step": True,
        "`residual`: at most 3 points below `all` on clips of 64 frames": True,
        "`residual`: above local frames only on rare events": None,
    }
    worse = [*RESULTS, result("local frames only", 0, 50, 90), result("mean", 2, 100, 100)]
    report = summary(plan_of(world), worse, jobs=2)
    by_claim = {claim["claim"]: claim for claim in report["claims"]}
    assert by_claim["`residual`: above local frames only on rare events"]["holds"] is False
    assert by_claim["`residual`: above local frames only on rare events"]["figures"] == "84.0 and 90.0 %"
    assert len(claims(report["variants"], has_long=False)) == 4


def test_the_page_shows_spread_chance_and_setting(world: Path) -> None:
    report = summary(plan_of(world), RESULTS, jobs=2)
    page = markdown(report)
    assert "Runs are missing: 7 of 12 are there." in page
    assert "95.0 (90.0–100.0)" in page and "0.62 (0.50–0.75)" in page
    assert re.search(r"\| chance +\| +\| +25\.0 \| +33\.3 \|", page)  # 25 and 25; 50, 25 and 25
    assert "continue `all` of the same seed after 40 steps" in page and "mask from step 41 on" in page
    assert "train: seed 5" in page and str(world) not in page + json.dumps(report)
    unmasked = summary(plan_of(world, mask_after=0.0), RESULTS, jobs=2)
    assert "mask from their first step on" in markdown(unmasked)


def test_the_chart_has_a_bar_a_variant_and_the_spread(world: Path) -> None:
    axes = chart(summary(plan_of(world), RESULTS, jobs=2)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Unexpected Action",
        "Object Existence",
        "Moving Direction",
    ]
    bars = [container for container in axes.containers if container.get_label() in {v.name for v in VARIANTS}]
    assert [container.get_label() for container in bars] == [variant.name for variant in VARIANTS]
    assert [bar.get_width() for bar in bars[0]] == [85, 100, 95]


# ---- the whole ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_experiment_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run trains four steps on a few clips. A masked run continues `all`, so it has fewer steps to train."""
    from stllm.toy.world import write_world

    world, few = tmp_path / "world", ["run.per_device_train_batch_size=2", "run.dataloader_num_workers=0"]
    write_world(world, num_train=22, num_test=8, seed=3, long=True)
    monkeypatch.setenv("TOY_ROOT", str(world))
    monkeypatch.setenv("TINY_OUTPUT", str(tmp_path))
    for stage in ("1_alignment", "2_images", "temporal_base"):
        options = [*few, "run.max_steps=1", f"run.output_dir={tmp_path / stage}"]
        train(CONFIGS / "tiny" / "stages" / f"{stage}.yaml", *options)
    words = ["--world", str(world), "--ckpt", str(tmp_path / "temporal_base"), "--steps", "4", "--seeds", "1"]
    words += ["--work", str(tmp_path / "work"), "--output-dir", str(tmp_path / "results"), "--device", "cpu"]
    assert main([*words, "--options", *few]) == 0
    report = json.loads((tmp_path / "results" / "temporal.json").read_text())
    assert report["runs"]["done"] == len(VARIANTS) and report["setting"]["steps before masking"] == 2
    assert all(len(figures["by seed"]["0"]) == 6 for figures in report["variants"].values())
    kept = {name: figures["training tokens"]["mean"] for name, figures in report["variants"].items()}
    assert kept["all+mask"] == kept["all+mask+mvm"] < kept["all"]
    log = tmp_path / "work" / "all_mask_mvm-0" / "model" / "log.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in steps] == [3, 4] and all(line["loss_mvm"] > 0 for line in steps)
    assert (tmp_path / "results" / "temporal.svg").read_text().startswith("<?xml")
    before = os.stat(log).st_mtime_ns
    assert main([*words, "--options", *few]) == 0 and os.stat(log).st_mtime_ns == before
