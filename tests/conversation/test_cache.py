"""The feature cache: bounded in bytes, least recently used first out."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.conversation.requests import FeatureCache


@given(sizes=st.lists(st.integers(1, 30), max_size=40), room=st.integers(1, 60))
def test_never_more_than_its_room(sizes: list[int], room: int) -> None:
    cache = FeatureCache(max_bytes=room)
    for key, size in enumerate(sizes):
        cache.put(key, torch.zeros(size, dtype=torch.uint8))
        held = [k for k in range(key + 1) if cache.get(k) is not None]
        assert cache.num_bytes == sum(sizes[k] for k in held) <= room
        if size <= room:
            assert key in held


def test_the_least_recently_used_goes_first() -> None:
    cache = FeatureCache(max_bytes=2)
    for key in "ab":
        cache.put(key, torch.zeros(1, dtype=torch.uint8))
    cache.get("a")
    cache.put("c", torch.zeros(1, dtype=torch.uint8))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_what_has_no_room_drops_nothing_else() -> None:
    cache = FeatureCache(max_bytes=4)
    cache.put("small", torch.zeros(3, dtype=torch.uint8))
    cache.put("large", torch.zeros(5, dtype=torch.uint8))
    assert [cache.get(key) is not None for key in ("small", "large")] == [True, False]
    cache.put("small", torch.zeros(5, dtype=torch.uint8))  # a larger one of that key leaves no old one
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_a_key_put_twice_counts_once() -> None:
    cache = FeatureCache(max_bytes=10)
    for size in (3, 4):
        cache.put("a", torch.zeros(size, dtype=torch.uint8))
    assert (len(cache), cache.num_bytes) == (1, 4)
