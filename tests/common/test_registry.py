"""The registry, and its error messages for unknown names."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stllm.common.errors import UserError, nearest, unknown_name
from stllm.common.registry import Registry

NAMES = st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=8, unique=True)


def test_entries_are_found_by_name_and_alias() -> None:
    shapes: Registry[type] = Registry("shape")

    @shapes.register("square", "quadrate", "box")
    class Square:
        pass

    assert [shapes.get(name) for name in ("square", "quadrate", "box")] == [Square] * 3
    assert shapes.names() == ["square"]
    assert "box" in shapes and "circle" not in shapes


def test_data_is_registered_by_a_call() -> None:
    numbers: Registry[int] = Registry("number")
    assert numbers.register("seven")(7) == 7
    assert numbers.get("seven") == 7


@pytest.mark.parametrize("taken", ["square", "box"])
def test_a_name_cannot_be_registered_twice(taken: str) -> None:
    shapes: Registry[int] = Registry("shape")
    shapes.register("square", "box")(1)
    with pytest.raises(ValueError, match=f"'{taken}' is registered twice"):
        shapes.register("other", taken)(2)
    assert shapes.names() == ["square"]


def test_the_error_for_an_unknown_name_lists_known_ones_and_the_nearest() -> None:
    inputs: Registry[int] = Registry("video input")
    for name in ("mean", "all", "residual"):
        inputs.register(name)(0)
    message = "unknown video input 'residul': known are all, mean, residual; did you mean 'residual'?"
    with pytest.raises(UserError) as caught:
        inputs.get("residul")
    assert str(caught.value) == message


def test_modules_are_imported_at_the_first_lookup(tmp_path, monkeypatch) -> None:
    (tmp_path / "shapes_for_test.py").write_text(
        "from tests.common import test_registry\n"
        "registry = test_registry.LATE\n"
        "registry.register('late')(1)\n"
        "assert 'late' in registry  # a look-up during the import sees what is there\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "shapes_for_test" not in sys.modules
    assert LATE.get("late") == 1
    assert "shapes_for_test" in sys.modules


def test_every_module_of_a_package_is_imported(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "things_for_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("from tests.common.test_registry import IN_FOLDER\nIN_FOLDER.register('one')(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert IN_FOLDER.names() == ["one"]


IN_FOLDER: Registry[int] = Registry("thing", modules=("things_for_test",))
LATE: Registry[int] = Registry("shape", modules=("shapes_for_test",))


@given(NAMES)
def test_every_registered_name_is_found_and_listed(names: list[str]) -> None:
    registry: Registry[int] = Registry("thing")
    for number, name in enumerate(names):
        registry.register(name)(number)
    assert [registry.get(name) for name in names] == list(range(len(names)))
    assert registry.names() == sorted(names)


@given(NAMES, st.text(max_size=12))
def test_the_nearest_name_is_a_known_name(names: list[str], name: str) -> None:
    guess = nearest(name, names)
    assert guess is None or guess in names
    assert all(repr(known)[1:-1] in repr(unknown_name("thing", name, names)) for known in names if known.isalnum())


def test_the_nearest_name_ignores_case() -> None:
    assert nearest("Freeze_llm", ["freeze_LLM", "freeze_vit"]) == "freeze_LLM"
    assert nearest("xyz", ["freeze_LLM"]) is None
