"""The release: requirement.txt and pyproject.toml agree, and what `python -m build` makes works outside the clone."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import stllm
from stllm.common.errors import sentence

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has none; pip's dependencies and setuptools bring tomli
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TO_RUN = ("judge", "demo", "serve")  # extras that README's commands need


def parsed(lines: list[str]) -> set[str]:
    return {str(Requirement(line)) for line in lines}


def test_requirement_txt_is_the_model_and_the_extras_of_the_commands() -> None:
    text = (ROOT / "requirement.txt").read_text(encoding="utf-8")
    headings = [*re.findall(r"^# (the model|\w+): ", text, re.MULTILINE)]
    assert headings == ["the model", *TO_RUN]
    sections = re.split(r"^# (?:the model|\w+): .*\n", text, flags=re.MULTILINE)[1:]
    for name, section in zip(headings, sections, strict=True):
        lines = [line.partition(" #")[0] for line in section.splitlines() if line and not line.startswith("#")]
        expected = EXTRAS[name] if name in EXTRAS else PROJECT["dependencies"]
        assert parsed(lines) == parsed(expected), name


def test_every_bound_of_requirement_txt_has_its_reason() -> None:
    lines = (ROOT / "requirement.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.match(r"\w+>=", line) and " # " not in line]


def test_readme_lists_every_extra() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| extra |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == set(EXTRAS)


def test_container_and_workflow_follow_the_project() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"--build-arg (\w+)=", dockerfile + readme)
    assert set(named) == set(re.findall(r"^ARG (\w+)=", dockerfile, re.MULTILINE))
    copied = re.findall(r"^COPY (\S+) ", dockerfile, re.MULTILINE)
    assert copied and not [name for name in copied if not (ROOT / name).exists()]
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"stllm", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *copied} <= {".", *kept}
    assert not [name for name in kept if not (ROOT / name).exists()]
    (job,) = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    pythons = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert job["strategy"]["matrix"]["python"] == pythons
    assert PROJECT["requires-python"] == f">={pythons[0]}"


@pytest.mark.parametrize("name", ["openai", "gradio", "uvicorn", "deepspeed", "bitsandbytes", "imagehash"])
def test_a_missing_package_names_its_extra(name: str) -> None:
    said = sentence(ModuleNotFoundError(f"No module named '{name}'", name=f"{name}.part"))
    named = re.findall(r"`pip install 'stllm\[([\w-]+)\]'`", said)
    assert named and set(named) <= set(EXTRAS)
    brought = {requirement.partition(">")[0] for extra in named for requirement in EXTRAS[extra]}
    assert name in brought


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution of the files that git has, or would take."""
    pytest.importorskip("build", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("built")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "clone" / name)
    build = [sys.executable, "-m", "build", "--outdir", str(folder / "dist"), str(folder / "clone")]
    subprocess.run(build, check=True, capture_output=True, env=outside())
    return folder / "dist"


def outside() -> dict[str, str]:
    """The environment without the clone on the path."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.mark.slow
def test_the_distributions_are_whole(built: Path) -> None:
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert source.name == f"stllm-{stllm.__version__}.tar.gz"
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(source)], check=True)
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("stllm/")}
    present = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stllm").rglob("*") if path.is_file()}
    assert packed == {name for name in present if "__pycache__" not in name}
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert packed | {"README.md", "requirement.txt", "docs/chat.md", "configs/tiny/train.yaml", "LICENSE"} <= names


@pytest.mark.slow
def test_they_work_in_an_empty_environment_outside_the_clone(built: Path, tmp_path: Path) -> None:
    """Needs a package index, and 8 GB of disk for a torch with CUDA."""
    venv = tmp_path / "venv"
    python = str(venv / "bin" / "python")
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    recipe = next((tmp_path / "elsewhere").glob("stllm-*/configs/tiny/train.yaml"))

    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        env = {**outside(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path / "elsewhere", env=env)
        assert done.returncode == code, done.stderr[-3000:]
        return done

    try:
        run(sys.executable, "-m", "venv", str(venv))
        run(python, "-m", "pip", "install", "--quiet", str(wheel))
        entry = str(venv / "bin" / "stllm")
        assert run(entry, "--version").stdout == f"stllm {stllm.__version__}\n"
        assert str(venv) in run(python, "-c", "import stllm; print(stllm.__file__)").stdout
        run(entry, "toy", "--output", "toy_world", "--num-train", "12", "--num-test", "2")
        options = ["run.max_steps=2", "run.output_dir=trained", "run.dataloader_num_workers=0"]
        run(entry, "train", "--cfg-path", str(recipe), "--options", *options)
        clip = str(next((tmp_path / "elsewhere" / "toy_world" / "vc2" / "media").glob("*.mp4")))
        ask = ["--video", clip, "--question", "What happens in the video?"]
        for name in ("gradio", "openai", "uvicorn"):  # the model alone
            run(python, "-c", f"import {name}", code=1)
        engine = ["chat", *ask, "--engine", "http://127.0.0.1:9"]
        for words, extra in ((["demo"], "demo"), (["serve"], "serve"), (engine, "judge")):
            said = run(entry, *words, code=1).stderr.splitlines()[-1]
            assert said.startswith("error: ") and f"`pip install 'stllm[{extra}]'`" in said
        assert run(entry, "chat", *ask, "--evidence", "why.png").stdout.strip()
        run(entry, "chat", "--ckpt-path", "trained", *ask)
        assert (tmp_path / "elsewhere" / "why.png").stat().st_size > 0
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", str(source))
        assert run(entry, "chat", *ask).stdout.strip()
    finally:
        shutil.rmtree(venv, ignore_errors=True)
