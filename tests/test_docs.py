"""The documents: their commands parse, their links lead somewhere, and what they and the code's comments name exists.

What docs/training.md computes: tests/configs/test_training_page.py. CONTRIBUTING.md's examples: test_contributing.py.
"""

import html
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from stllm.cli import COMMANDS, build_parser, command_of
from stllm.common.config import load_config, load_evaluation, suite_of
from stllm.common.registry import video_inputs
from stllm.evaluation.published import METHODS

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
DOCS = ("README.md", "trainval.md", *PAGES)
LINKING = [
    *(*DOCS, "CONTRIBUTING.md", "CHANGELOG.md", "stllm/assets/stllm-tiny/README.md"),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))),
]
FIGURE = ROOT / "docs" / "architecture.svg"
NOTEBOOK = ROOT / "docs" / "tour.ipynb"
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
    if words[:2] == ["docker", "build"]:
        return None  # stllm is an image's name there
    for place, word in enumerate(words):
        if word in OURS:
            return [*OURS[word], *words[place + 1 :]]
        script, rest = Path(word).stem, words[place + 1 :]
        if word.startswith("scripts/train") and rest:
            return ["train", "--cfg-path", *rest]
        if word.startswith("scripts/eval_"):
            name = script.removeprefix("eval_")
            return ["evaluate", name, "--cfg-path", f"configs/eval/{name}.yaml", *rest]
    return None


@pytest.mark.parametrize("doc", DOCS)
def test_commands_parse(doc: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each parses and passes its command's own checks; a configuration of ours can be read with those options."""
    found = [arguments for words in commands(doc) if (arguments := of_stllm(words)) is not None]
    for arguments in found:
        try:
            args = build_parser().parse_args(arguments)
        except SystemExit:
            pytest.fail(f"{doc}: stllm {shlex.join(arguments)}: {capsys.readouterr().err}")
        assert command_of(args.command).check(args) is None, arguments
        path = ROOT / args.cfg_path if getattr(args, "cfg_path", None) else None
        if args.command == "evaluate" and (path is None or path.exists()):
            for name in suite_of(path, args.options) if args.benchmark == "suite" else [args.benchmark]:
                load_evaluation(name, path, args.options)
        elif path is not None and path.exists():
            load_config(path, args.options)


def test_there_are_commands_of_every_kind() -> None:
    found = [arguments for doc in DOCS for words in commands(doc) if (arguments := of_stllm(words)) is not None]
    assert len(found) > 90 and {arguments[0] for arguments in found} == set(COMMANDS)


@pytest.mark.parametrize("doc", DOCS)
def test_files_are_there(doc: str) -> None:
    text = (ROOT / doc).read_text(encoding="utf-8")
    named = {*FILE.findall(text), *(word for words in commands(doc) for word in words if FILE.fullmatch(word))}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("doc", LINKING)
def test_no_link_is_dead(doc: str) -> None:
    """The files that a page links to, and the headings in them, by GitHub's rule for their names."""
    page = ROOT / doc
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8"))
    for name, heading in links:
        target = page.parent / name if name else page
        assert target.is_file(), f"{doc}: {name}"
        assert not heading or heading in headings(target), f"{doc}: {name}#{heading}"


def headings(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(
        re.findall(r'<a id="([^"]+)"', text)
    )


def test_readme_leads_to_every_page_and_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(PAGES) > 6 and not [page for page in PAGES if f"]({page})" not in text]
    assert len(text.splitlines()) <= 250


def test_the_notebook_is_ten_cells_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) == 10 and not [cell for cell in cells if cell.get("outputs")]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines() if line.startswith("!stllm ")]
    assert [build_parser().parse_args(shlex.split(line)[1:]).command for line in lines] == ["chat", "toy", "train"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[docs]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[docs]'")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert said[2] == "vanishes\n" and "vanishes" in said[5] and said[7] == "grows\n" and said[9].strip()
    assert "image/png" in notebook.cells[5].outputs[-1].data and (tmp_path / "output/tour/config.json").exists()


@pytest.mark.slow
def test_the_site_has_every_page_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a link that leads nowhere is an error
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    assert {page.replace("md", "html") for page in PAGES} <= set(pages)
    text = html.unescape(pages["commands.html"])
    for name in COMMANDS:
        assert f"usage: stllm {name}" in text and command_of(name).example in text
    for name in (
        "stllm",
        *(path.parent.name for path in CODE if path.name == "__init__.py" and path.parents[2] == ROOT),
    ):
        assert name == "commands" or f"api/{name}.html" in pages
    assert "load_chat" in pages["api/stllm.html"] and "Raises UserError" in pages["api/models.html"]
    for page, text in pages.items():
        fetched = re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", text
        )
        assert not fetched, f"{page} fetches {fetched}"
    styles = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.css")]
    assert styles and not [text for text in styles if re.search(r"url\([\"']?(?:https?:)?//", text)]


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
    table = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Training")[0]
    symptoms = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)
    quoted = [text for symptom in symptoms for text in re.findall(r"`([^`]{12,})`", symptom)]
    quoted = [text for text in quoted if "SomeError" not in text]
    assert len(quoted) > 5
    assert not [text for text in quoted if text not in said]
