"""The launchers: they parse, tell their usage, and start what they say (a stand-in for Python keeps its arguments)."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = ("train.sh", "train_multinode.sh", "train_slurm.sh", "evaluate.sh")
NODES = {"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "first:29500"}


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which PYTHON prints its arguments, one a line, and its place among the processes."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho "timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT rank $RANK"\n')
    python.chmod(0o755)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHON": str(python), "CUDA_VISIBLE_DEVICES": ""}


def launch(script: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPTS / script), *arguments], capture_output=True, text=True, env=env)


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh")))
def test_a_script_parses_and_its_header_says_how(script: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / script)], check=True)
    text = (SCRIPTS / script).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "set -euo pipefail" in text
    assert all(f"\n# {word}: " in text.replace("Launch:  ", "Launch:") for word in ("Needs", "Launch", "Override"))
    assert os.access(SCRIPTS / script, os.X_OK)


@pytest.mark.parametrize("script", LAUNCHERS)
def test_usage(script: str, stand_in: dict[str, str]) -> None:
    asked = launch(script, "--help", env=stand_in)
    assert asked.returncode == 0 and asked.stdout.startswith("usage: ") and f"scripts/{script} CONFIG" in asked.stdout
    for arguments in ([], ["--options", "run.max_steps=1"]):  # no recipe
        wrong = launch(script, *arguments, env=stand_in)
        assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr == asked.stdout


def test_one_process_needs_no_torchrun(stand_in: dict[str, str]) -> None:
    result = launch("train.sh", "my recipe.yaml", "--options", "run.max_steps=1", "model.system=a b", env=stand_in)
    arguments = ["-m", "stllm", "train", "--cfg-path", "my recipe.yaml", "--options", "run.max_steps=1"]
    assert result.stdout.splitlines()[:-1] == [*arguments, "model.system=a b"]


@pytest.mark.parametrize(
    ("environment", "processes"), [({"CUDA_VISIBLE_DEVICES": "0,3"}, 2), ({"NPROC": "4"}, 4), ({"NPROC": ""}, None)]
)
def test_several_processes_on_one_machine(
    environment: dict[str, str], processes: int | None, stand_in: dict[str, str]
) -> None:
    lines = launch("train.sh", "a.yaml", env={**stand_in, **environment}).stdout.splitlines()
    torchrun = [] if processes is None else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    assert lines[: len(torchrun)] == torchrun and ("--standalone" in lines) == bool(torchrun)
    assert lines[-1] == "timeout 900 rank "  # a checkpoint has time after a signal


def test_gpus_are_counted_by_nvidia_smi(stand_in: dict[str, str], tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor n in 0 1 2; do echo "GPU $n: some (UUID: x)"; done\n')
    smi.chmod(0o755)
    env = {name: value for name, value in stand_in.items() if name != "CUDA_VISIBLE_DEVICES"}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    assert "--nproc_per_node=3" in launch("train.sh", "a.yaml", env=env).stdout
    smi.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert "--nproc_per_node" not in launch("train.sh", "a.yaml", env=env).stdout


def test_several_machines(stand_in: dict[str, str]) -> None:
    lines = launch("train_multinode.sh", "a.yaml", env={**stand_in, **NODES, "NPROC": "8"}).stdout.splitlines()
    assert lines[: lines.index("stllm")] == [
        *("-m", "torch.distributed.run", "--nproc_per_node=8", "--nnodes=2", "--node_rank=1", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=first:29500", "--rdzv_id=stllm", "--rdzv_conf=is_host=0", "-m"),
    ]
    first = {**stand_in, **NODES, "NODE_RANK": "0", "RDZV_ID": "mine"}
    assert {"--rdzv_conf=is_host=1", "--rdzv_id=mine"} <= set(
        launch("train_multinode.sh", "a.yaml", env=first).stdout.splitlines()
    )


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"RDZV_ENDPOINT": ""}, "error: RDZV_ENDPOINT is not set"),
        ({"NODE_RANK": "2"}, "error: NODE_RANK=2 of NNODES=2, expected 0 to NNODES-1"),
        ({"NNODES": "two"}, "error: NODE_RANK=1 of NNODES=two, expected 0 to NNODES-1"),
        ({"RDZV_ENDPOINT": "first"}, "error: RDZV_ENDPOINT=first, expected HOST:PORT"),
    ],
)
def test_a_mistake_about_the_machines(changed: dict[str, str], sentence: str, stand_in: dict[str, str]) -> None:
    result = launch("train_multinode.sh", "a.yaml", env={**stand_in, **NODES, **changed})
    assert result.returncode == 2 and result.stderr.startswith(sentence) and result.stdout == ""


def test_slurm_outside_of_a_job(stand_in: dict[str, str]) -> None:
    result = launch("train_slurm.sh", "a.yaml", env=stand_in)
    assert result.returncode == 2 and result.stderr.startswith("error: this is no Slurm job: submit it with sbatch")


@pytest.mark.parametrize(("stopped", "requeue", "queued"), [(143, "1", True), (143, "0", False), (0, "1", False)])
def test_a_slurm_job(stopped: int, requeue: str, queued: bool, stand_in: dict[str, str], tmp_path: Path) -> None:
    """srun and scontrol are stand-ins: one starts a task, the other names the nodes and puts the job back."""
    (tmp_path / "srun").write_text(f'#!/bin/sh\nshift\nSLURM_PROCID=5 SLURM_LOCALID=1 "$@"\nexit {stopped}\n')
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = show ] && echo node7 || echo "scontrol $@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "16", "REQUEUE": requeue}
    env = {**stand_in, **job, "PATH": f"{tmp_path}:{stand_in['PATH']}"}
    result = launch("train_slurm.sh", "a.yaml", "--options", "run.max_steps=1", env=env)
    lines = result.stdout.splitlines()
    assert lines[:7] == ["-m", "stllm", "train", "--cfg-path", "a.yaml", "--options", "run.max_steps=1"]
    assert lines[7].endswith("rank 5")
    assert lines[8:] == (["scontrol requeue 20007"] if queued else [])
    assert result.returncode == stopped


@pytest.mark.parametrize("benchmark", ["mvbench", "vcgbench", "msvd", "msrvtt", "activitynet", "tgif"])
def test_each_benchmark_has_a_launcher_with_its_configuration(benchmark: str, stand_in: dict[str, str]) -> None:
    config = SCRIPTS.parent / "configs" / "eval" / f"{benchmark}.yaml"
    command = ["-m", "stllm", "evaluate", benchmark, "--cfg-path", str(config), "--limit", "3"]
    alone = launch(f"eval_{benchmark}.sh", "--limit", "3", env=stand_in)
    assert alone.stdout.splitlines()[:-1] == command
    several = launch(f"eval_{benchmark}.sh", "--limit", "3", env={**stand_in, "CUDA_VISIBLE_DEVICES": "0,1"})
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    assert several.stdout.splitlines()[:-1] == torchrun + command


def tiny_commands(env: dict[str, str], *arguments: str) -> list[list[str]]:
    """What scripts/train_tiny.sh starts by `-m stllm`, each command's arguments after it."""
    text = launch("train_tiny.sh", *arguments, env=env).stdout
    return [command.split("\ntimeout")[0].splitlines() for command in text.split("-m\nstllm\n")[1:]]


def test_the_tiny_pipeline_goes_through_all_stages(stand_in: dict[str, str], tmp_path: Path) -> None:
    env = {**stand_in, "TOY_ROOT": str(tmp_path / "world"), "TINY_OUTPUT": str(tmp_path / "runs")}
    later = ["2_images", "3_videos", "4_choices"]  # from features
    for arguments, quick in ((), False), (("--quick",), True):
        commands = tiny_commands(env, *arguments)
        worlds = [command for command in commands if command[0] == "toy"]
        assert [world[2] for world in worlds] == [env["TOY_ROOT"], f"{env['TOY_ROOT']}-unseen"]
        assert worlds[0][worlds[0].index("--seed") + 1] != worlds[1][worlds[1].index("--seed") + 1]
        stages = [(command[0], Path(command[2]).stem) for command in commands if command[0] in ("extract", "train")]
        pairs = [(verb, stage) for stage in later for verb in ("extract", "train")]
        assert stages == [("train", "1_alignment"), *pairs]
        for command in commands:
            stage = Path(command[2]).stem
            if command[0] == "extract":  # once for all stages: their encoder and Q-Former are the same
                assert command[3:] == ["--stage", "qformer", "--output", f"{env['TINY_OUTPUT']}/features"]
            elif command[0] == "train":
                options = dict(option.split("=") for option in command[4:])
                assert options.pop("run.output_dir") == f"{env['TINY_OUTPUT']}/{stage}"
                features = f"{env['TINY_OUTPUT']}/features" if stage in later else None
                assert options.pop("datasets.features_root", None) == features
                assert bool(options) == quick and set(options) <= {"run.max_steps"}
        tested = [(Path(command[3]).name, command[9]) for command in commands if command[0] == "evaluate"]
        assert tested == [("4_choices", "8"), *([] if quick else [("4_choices", "64")])]
    for folder in ("world", "world-unseen"):  # what is there is taken
        (tmp_path / folder).mkdir(parents=True)
    assert tiny_commands(env)[0][0] == "train"


def test_the_experiment_starts_from_a_model_that_knows_pictures(stand_in: dict[str, str], tmp_path: Path) -> None:
    env = {**stand_in, "TOY_ROOT": str(tmp_path / "world"), "TINY_OUTPUT": str(tmp_path / "runs")}
    trained = [Path(command[2]).stem for command in tiny_commands(env, "--experiment") if command[0] == "train"]
    assert trained == ["1_alignment", "2_images", "temporal_base"]
    *_, started = launch("train_tiny.sh", "--experiment", env=env).stdout.split("-m\nexperiments.temporal\n")
    options = started.splitlines()[:-1]
    assert dict(zip(options[::2], options[1::2], strict=True)) == {
        "--world": env["TOY_ROOT"],
        "--test-world": f"{env['TOY_ROOT']}-unseen",
        "--ckpt": f"{env['TINY_OUTPUT']}/temporal_base",
        "--work": f"{env['TINY_OUTPUT']}/temporal",
    }


def test_a_mistake_about_the_tiny_pipeline(stand_in: dict[str, str]) -> None:
    asked = launch("train_tiny.sh", "--help", env=stand_in)
    assert asked.returncode == 0 and asked.stdout.startswith(
        "usage: bash scripts/train_tiny.sh [--quick | --experiment]"
    )
    for arguments in (["--fast"], ["--quick", "more"]):
        wrong = launch("train_tiny.sh", *arguments, env=stand_in)
        assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr == asked.stdout
