"""Untrusted lists of shards and tars: no command is run, memory is limited, and nothing waits long."""

import json
import os
import resource
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from stllm.cli import main
from stllm.datasets.shards import sources
from tests.datasets.test_image_text import picture, write_tar
from tests.helpers.training import write_recipe


def doctor(folder: Path, shards: Any, *words: str, **entry: Any) -> int:
    """Run the doctor on a YAML that lists the shards, and return its exit code."""
    path = folder / "data.yaml"
    entry = {"type": "image_text", "shards": shards, "cache_dir": str(folder / "cache"), **entry}
    path.write_text(yaml.safe_dump({"datasets": {"pairs": entry}}))
    return main(["doctor", "--cfg-path", str(path), "--num-workers", "0", *words])


@pytest.mark.parametrize(
    "spelled",
    ["pipe:{}", " pipe:{}", "PIPE:{}", "{{pipe,x}}:{}", "a.tar::pipe:{}", ["a.tar", "pipe:{}"]],
)
@pytest.mark.parametrize("command", ["doctor", "train", "extract", "anno-path"])
def test_commands_in_a_list_of_shards_are_not_run(spelled, command, tmp_path, toy, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run = f"touch {tmp_path}/ran; exit 1"
    shards = [one.format(run) for one in ([spelled] if isinstance(spelled, str) else spelled)]
    if command == "doctor":
        assert doctor(tmp_path, shards) == 1
    elif command == "anno-path":
        monkeypatch.setenv("WDS_HIDDEN", "pipe")
        for shard in (shards[-1], f"${{HIDDEN}}:{run}"):
            assert main(["doctor", "--anno-path", shard, "--format", "shards", "--num-workers", "0"]) == 1
    else:
        data = {"pairs": {"type": "image_text", "shards": shards}}
        recipe = write_recipe(tmp_path / "t.yaml", toy, model={"freeze_vit": True}, datasets=data)
        content = yaml.safe_load(recipe.read_text())
        del content["datasets"]["media_root"]
        recipe.write_text(yaml.safe_dump(content))
        more = ["--output", str(tmp_path / "out")] if command == "extract" else []
        assert main([command, "--cfg-path", str(recipe), *more]) == 1
    assert not (tmp_path / "ran").exists()
    assert "found no --allow-pipe on the command line" in capsys.readouterr().err


def test_pipes_are_allowed_only_on_the_command_line(tmp_path, capsys) -> None:
    ran = tmp_path / "ran"
    shard = write_tar(tmp_path / "x.tar", [("a.png", picture(1)), ("a.txt", b"a")])
    command = f"pipe:touch {ran}; cat {shard}"
    assert doctor(tmp_path, command, allow_pipe=True) == 1
    assert "unknown key 'datasets.pairs.allow_pipe'" in capsys.readouterr().err
    assert not ran.exists()
    assert doctor(tmp_path, command, "--allow-pipe") == 0
    assert ran.exists()
    ran.unlink()
    (tmp_path / "cache").rename(tmp_path / "old")
    assert doctor(tmp_path, command) == 1  # the permission ends with its command
    assert not ran.exists()


def test_a_file_named_like_a_command_is_read_as_a_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("pipe:touch ran;.tar"), [("a.png", picture(1)), ("a.txt", b"a")])
    assert doctor(tmp_path, "*.tar") == 0
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("shards", "number"),
    [
        ("{0..9999999999}.tar", "10,000,000,000"),
        ("{0..99999}{0..99999}.tar", "10,000,000,000"),
        ("{{0..99999},{0..99999}}.tar", "200,000"),
        ("{a,{0..99999}{0..99999}}.tar", "10,000,000,001"),
        ("{a,b}" * 100, "more than 10^15"),
        ("{0..%s}.tar" % ("9" * 5000), "more than 10^15"),
        (["{0..59999}.tar", "{60000..119999}.tar"], "120,000"),
        ("{" * 3000 + "a,b" + "}" * 3000, None),
    ],
)
def test_braces_are_counted_before_they_are_expanded(shards, number, tmp_path, capsys) -> None:
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert doctor(tmp_path, shards) == 1
    told = capsys.readouterr().err
    if number is None:
        assert "cannot be expanded" in told
    else:
        assert f"stands for {number} shards, expected at most 100,000" in told
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("scheme", ["gs", "s3", "hf", "http", "ais", "scp"])
def test_a_silent_server_of_shards_times_out(scheme, tmp_path, monkeypatch, capsys) -> None:
    program = {"gs": "gsutil", "s3": "aws", "ais": "ais"}.get(scheme, "curl")
    for name in ("sleep", "sh"):
        (tmp_path / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sources, "FIRST_SECONDS", 0.3)
    url = f"{scheme}://datasets/owner/name/x.tar"
    assert doctor(tmp_path, url) == 1
    captured = capsys.readouterr()
    assert f"needs the program '{program}'" in captured.out + captured.err
    tool = tmp_path / program
    tool.write_text("#!/bin/sh\nsleep 600\n")
    tool.chmod(0o755)
    started = time.monotonic()
    assert doctor(tmp_path, url) == 1
    captured = capsys.readouterr()
    assert "nothing arrived for 0.3 s" in captured.out + captured.err
    tool.write_text("#!/bin/sh\necho 'no \x1b[31mnetwork' >&2; exit 7\n")
    assert doctor(tmp_path, url) == 1
    captured = capsys.readouterr()
    assert "exit 7, no \\u001b[31mnetwork" in captured.out + captured.err
    assert time.monotonic() - started < 30


SMALL = [("b.png", picture(2)), ("b.txt", b"a picture")]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return the tar header of a member with this stated size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def test_huge_members_are_bad_samples(tmp_path, toy, capsys) -> None:
    """A caption of 50 MB and a JSON with a million tags are left out, and training continues."""
    tags = json.dumps({"caption": "x", "tags": ["tag"] * 10**6}).encode()
    pair = {".png": picture(2), ".txt": b"a"}
    good = [(f"g{number}{suffix}", pair[suffix]) for number in range(20) for suffix in pair]
    members = [("a.png", picture(1)), ("a.txt", b"word " * 10**7), ("c.png", picture(1)), ("c.json", tags), *good]
    path = write_tar(tmp_path / "x.tar", members)
    assert doctor(tmp_path, str(path), "--decode", "all") == 1
    captured = capsys.readouterr()
    assert "a.txt: found a caption of 50,000,000 bytes, expected at most 1,048,576" in captured.out
    assert "c.json: found a caption of 7,000,026" in captured.out
    assert "found 2 faults" in captured.err
    data = {"pairs": {"type": "image_text", "shards": str(path), "cache_dir": str(tmp_path / "cache")}}
    words: dict[str, Any] = {"max_bad_fraction": 0.9, "max_steps": 3, "dataloader_num_workers": 1}
    recipe = write_recipe(tmp_path / "t.yaml", toy, datasets=data, **words)
    assert main(["train", "--cfg-path", str(recipe)]) == 0


def test_a_huge_image_in_a_shard_is_refused(tmp_path, capsys) -> None:
    path = tmp_path / "x.tar"
    with path.open("wb") as file:  # sparse: it takes no room
        file.write(header("a.png", 2**33))
        file.seek(2**33, os.SEEK_CUR)
        file.write(write_tar(tmp_path / "y.tar", [("a.txt", b"a"), *SMALL]).read_bytes())
    assert doctor(tmp_path, str(path), "--decode", "all") == 1
    assert "a.png: found an image of 8,589,934,592 bytes" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["long name", "pax", "negative", "chain", "number"])
def test_wrong_sizes_in_tar_headers_are_refused(kind, tmp_path, capsys) -> None:
    small = write_tar(tmp_path / "y.tar", SMALL).read_bytes()
    path = tmp_path / "x.tar"
    extended = {"long name": tarfile.GNUTYPE_LONGNAME, "pax": tarfile.XHDTYPE}
    with path.open("wb") as file:
        file.write(small[: 4 * 512])
        if kind in extended:
            file.write(header("x", 2**32, extended[kind]))
            file.seek(2**32, os.SEEK_CUR)
        elif kind == "negative":
            file.write(header("a.txt", -1024))
        elif kind == "chain":
            file.write((header("x", 512, tarfile.XHDTYPE) + b"12 path=abc\n".ljust(512, b"\0")) * 3000)
        else:
            record = b"GNU.sparse.size=" + b"9" * 5000 + b"\n"
            record = f"{len(record) + 5} ".encode() + record
            size = len(record)
            file.write(header("x", size, tarfile.XHDTYPE) + record.ljust(-(-size // 512) * 512, b"\0"))
            file.write(header("a.txt", 0))
        file.write(small)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert doctor(tmp_path, str(path), "--decode", "all") == 1
    assert "the 1 samples before that are used" in capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10
