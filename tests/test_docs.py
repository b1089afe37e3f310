"""README.md's commands parse, and what the documents, docstrings and comments name exists.

The commands of trainval.md: tests/configs/test_trainval.py. The examples of CONTRIBUTING.md: test_contributing.py.
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

TEXTS = [  # whatever names files or things of the package
    *(ROOT / name for name in (*DOCS, "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.svg")),
    *(
        path
        for folder in ("stllm", "benchmarks", "experiments", "configs", "scripts")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".sh", ".md")
    ),
]
CODE = {path: path.read_text(encoding="utf-8") for path in (ROOT / "stllm").rglob("*.py")}
# a/b.py, b.py, run.sh, stllm/configs/x.yaml; not a/{b,c}.py, *.py, $DIR/a.py, nor a YAML without a folder
NAMED_FILE = re.compile(r"(?<![\w/$.{}*-])((?:[\w-]+/)*[\w-]+\.(?:py|sh)|(?:[\w-]+/)+[\w-]+\.(?:yaml|md))\b")
DOTTED = re.compile(r"(?<![\w/.])stllm((?:\.[A-Za-z_]\w*)+)")  # stllm.a.b.name
OF_CLASS = re.compile(r"`([A-Z]\w*)\.([a-z_]\w*)")  # `Class.name`
FILES = [
    f"/{path.relative_to(ROOT).as_posix()}"
    for folder in ("", "stllm", "configs", "scripts", "benchmarks", "experiments", "tests", "docs")
    for path in (ROOT / folder).glob("**/*" if folder else "*")
]

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


def test_what_the_texts_name_exists() -> None:
    """Files by any end of their path, dotted names of the package, and attributes of its classes."""
    missing = {str(path.relative_to(ROOT)): found for path in TEXTS if (found := unknown_names(path))}
    assert len(TEXTS) > 150 and not missing


def unknown_names(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    written = set(re.findall(r"^```\w+\n# (\S+)$", text, re.MULTILINE))  # the files of CONTRIBUTING.md's examples
    named = {name for name in NAMED_FILE.findall(text) if name not in written}
    unknown = [name for name in named if not any(file.endswith(f"/{name}") for file in FILES)]
    unknown += [f"stllm{name}" for name in DOTTED.findall(text) if not known_in_package(name.split(".")[1:])]
    for name, attribute in OF_CLASS.findall(text):
        sources = [code for code in (text, *CODE.values()) if re.search(rf"^class {name}\b", code, re.MULTILINE)]
        if sources and not any(re.search(rf"\b{attribute}\b", code) for code in sources):
            unknown.append(f"{name}.{attribute}")
    return unknown


def known_in_package(parts: list[str]) -> bool:
    """True for the path of a module, and for a module's path followed by a name in it."""
    for length in range(len(parts), -1, -1):
        place = ROOT.joinpath("stllm", *parts[:length])
        code = CODE.get(place.with_suffix(".py")) or CODE.get(place / "__init__.py")
        if code is not None:
            return length == len(parts) or bool(re.search(rf"\b{parts[length]}\b", code))
    return False


@pytest.mark.parametrize(("doc", "heading"), [("README.md", "## Where things are"), ("CONTRIBUTING.md", "## The map")])
def test_a_map_names_every_folder(doc: str, heading: str) -> None:
    section = (ROOT / doc).read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    folders = {path.parent.name for path in CODE if path.name == "__init__.py" and path.parents[1] == ROOT / "stllm"}
    assert folders <= set(re.findall(r"(\w+)/", section))


def test_the_figure_s_names_are_the_code_s() -> None:
    texts = [text for text in ET.parse(FIGURE).iter() if "code" in text.get("class", "").split()]
    drawn = {name for text in texts for name in re.findall(r"\w+", text.text or "")}
    known = {name for source in CODE.values() for names in NAME.findall(source) for name in names}
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
    said = re.sub(r'"\s*\n\s*f?"', "", "".join(CODE.values()))
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Troubleshooting")[2].partition("## ")[0]
    symptoms = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    quoted = [text for symptom in symptoms for text in re.findall(r"`([^`]{12,})`", symptom)]
    quoted = [text for text in quoted if "SomeError" not in text]
    assert len(quoted) > 5
    assert not [text for text in quoted if text not in said]
