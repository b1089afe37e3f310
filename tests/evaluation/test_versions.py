"""Versions in a results file are those of what is installed."""

import platform
from importlib import import_module

from stllm.evaluation.results import versions


def test_versions_are_the_modules_own() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    for name in ("stllm", "transformers", "av", "numpy"):
        assert found[name] == import_module(name).__version__
