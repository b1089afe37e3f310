"""What differs between two configurations, in words."""

from stllm.common.changes import flat, told_changes


def test_nested_settings_have_dotted_keys() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "d": [2]}


def test_the_first_change_is_told_and_the_others_are_named() -> None:
    assert told_changes({"a": 1}, {"a": 1}) == ""
    assert told_changes({"a": 1}, {"a": "1"}) == "a was 1 and is now '1'"
    assert told_changes({"b": 1, "a": 0}, {"c": 2, "a": 0}) == "b was 1 and is now None (and 1 more: c)"
    many = told_changes({}, {f"k{number}": number for number in range(9)})
    assert many == "k0 was None and is now 0 (and 8 more: k1, k2, k3, k4, k5)"
