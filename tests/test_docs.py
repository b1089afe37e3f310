"""What README.md tells a reader to type parses; every file that it and trainval.md name is there.

The commands of trainval.md: tests/configs/test_trainval.py.
"""

import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from stllm.cli import build_parser
from stllm.common.registry import video_inputs
from stllm.evaluation.published import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ("README.md", "trainval.md")
FIGURE = ROOT / "docs" / "architecture.svg"
FENCE = re.compile(r"```bash\n(.*?)```", re.DOTALL)
OURS: dict[str, list[str]] = {"demo.py": ["chat"], "demo_gradio.py": ["demo"], "stllm": []}
FILE = re.compile(
    r"(?<![\w/$.-])(?:stllm|configs|scripts|benchmarks|experiments|tests)/[\w./-]*\w\.(?:py|yaml|sh|md)\b"
)

NAME = re.compile(r"(?:def|class) (\w+)|self\.(\w+)(?:: \w+)? =|^    (\w+): |\.register\(\"(\w+)\"", re.MULTILINE)


def commands(doc: str) -> list[list[str]]:
    """The words of each command in the document's bash blocks, without comments; it may go on over several lines."""
    found: list[list[str]] = []
    for block in FENCE.findall((ROOT / doc).read_text()):
        command = ""
        for line in block.replace("\\\n", " ").splitlines():
            command += line + "\n"
            if command.count("'") % 2 == 0:  # no quotation is open
                found.append(shlex.split(command, comments=True))
                command = ""
        assert not command, f"{doc}: an open quotation in {command}"
    return [words for words in found if words]


def of_stllm(words: list[str]) -> list[str] | None:
    """The arguments of our command in a line, whoever launches it; None when it is another's."""
    for place, word in enumerate(words):
        if word in OURS:
            return [*OURS[word], *words[place + 1 :]]
    return None


def complaint_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        build_parser().parse_args(arguments)
    except SystemExit:
        return capsys.readouterr().err
    return ""


def test_commands_parse(capsys: pytest.CaptureFixture[str]) -> None:
    found = [arguments for words in commands("README.md") if (arguments := of_stllm(words)) is not None]
    assert len(found) > 10
    for arguments in found:
        complaint = complaint_of(arguments, capsys)
        assert not complaint, f"README.md: stllm {shlex.join(arguments)}"


@pytest.mark.parametrize("doc", DOCS)
def test_files_are_there(doc: str) -> None:
    text = (ROOT / doc).read_text()
    named = {*FILE.findall(text), *(word for words in commands(doc) for word in words if FILE.fullmatch(word))}
    named |= {link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)}
    assert len(named) > 5
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_the_figure_s_names_are_the_code_s() -> None:
    texts = [text for text in ET.parse(FIGURE).iter() if "code" in text.get("class", "").split()]
    drawn = {name for text in texts for name in re.findall(r"\w+", text.text or "")}
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "stllm").rglob("*.py")]
    known = {name for source in sources for names in NAME.findall(source) for name in names}
    assert len(drawn) > 12 and not drawn - known
    assert {"mean", "all", "residual"} == drawn & set(video_inputs.names())
    assert "docs/architecture.svg" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_published_table_is_the_one_we_print() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("**Published, not measured here**")[2].partition("## ")[0]
    rows = dict(re.findall(r"^\| ([A-Z][\w-]+) \| (.+) \|$", section, re.MULTILINE))
    assert set(rows) == set(METHODS)
    for name, figures in METHODS.items():
        read = [None if cell == "–" else float(cell) for cell in rows[name].split(" | ")]
        assert read == list(figures), name


def test_what_troubleshooting_quotes_is_what_is_said() -> None:
    """Sentences of the code, their pieces put together; what is computed stands as ... in the table."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "stllm").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", sources)
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Troubleshooting")[2].partition("## ")[0]
    symptoms = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    quoted = [text for symptom in symptoms for text in re.findall(r"`([^`]{12,})`", symptom)]
    quoted = [text for text in quoted if "SomeError" not in text]
    assert len(quoted) > 5
    assert not [text for text in quoted if text not in said]
