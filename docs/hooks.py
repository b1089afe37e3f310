"""Hooks of mkdocs: the pages of the site.

The site has the layout of the repository, so that links work in both. Besides the pages in Markdown it has the files
that they link to, the `--help` of every command (commands.md), and the docstrings of every package (api/).
"""

import re
from collections.abc import Mapping
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from stllm.cli import COMMANDS, build_parser, command_of

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/*.md", "benchmarks/results/*.md", "stllm/assets/stllm-tiny/README.md")
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
PACKAGES = [
    path.parent.name for path in sorted((ROOT / "stllm").glob("*/__init__.py")) if path.parent.name != "commands"
]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the generated pages to the navigation."""
    assert config.nav is not None
    config.nav += ["commands.md", {"API": [{name: f"api/{name}.md"} for name in ("stllm", *PACKAGES)]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what is in docs/ by pages and files under their paths in the repository."""
    for file in [*files.documentation_pages(), *files.static_pages(), *files.media_files()]:
        if file.abs_src_path is not None and Path(file.abs_src_path).is_relative_to(config.docs_dir):
            files.remove(file)
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    linked = {(page.parent / name).resolve() for page in pages for name in LINK.findall(page.read_text("utf-8"))}
    linked |= {ROOT / name for name in config.extra["polyfills"]}
    for path in [*pages, *sorted(linked - set(pages))]:
        if path.is_file():  # mkdocs complains of the others
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    files.append(File.generated(config, "commands.md", content=help_page()))
    files.append(File.generated(config, "api/stllm.md", content="::: stllm\n    options: {show_submodules: false}\n"))
    for name in PACKAGES:
        files.append(File.generated(config, f"api/{name}.md", content=f"::: stllm.{name}\n"))
    return files


def help_page() -> str:
    """The page of all commands: what each prints with `--help`."""
    parser = build_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    assert isinstance(commands.choices, Mapping)
    texts = {name: commands.choices[name].format_help() for name in COMMANDS}
    sections = [f"## stllm {name}\n\n{command_of(name).help}\n\n```text\n{text}```\n" for name, text in texts.items()]
    return "\n".join(["# Commands\n", f"```text\n{parser.format_help()}```\n", *sections])
