"""Requests: parts and stamps of media, valid questions, the cache of encoded videos, batched calls."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stllm.common.errors import UserError
from stllm.conversation.requests import MAX_PREFIXES, FeatureCache, Media, Request, Together
from stllm.media.clip import MediaError
from stllm.processors.templates import Turn
from tests.helpers.serving import wait_until
from tests.helpers.videos import write_video


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(path: str) -> None:
    with pytest.raises(UserError, match="path of the video is empty"):
        Media(path)


def test_a_missing_bound_means_the_rest_of_the_video() -> None:
    assert Media("x").bounds is None
    assert Media("x", start=2.0).bounds == (2.0, float("inf"))
    assert Media("x", end=2.0).bounds == (0.0, 2.0)


def test_a_medium_can_be_checked_before_it_is_read(tmp_path: Path) -> None:
    video = write_video(tmp_path / "video.mp4", num_frames=25)
    Media(str(video), start=0.5).check()
    Media(str(video), num_frames=0, sampling="segment").check()
    with pytest.raises(MediaError, match=r"the bound \[1, end\] s lies outside the video, which lasts 1.00 s"):
        Media(str(video), start=1.0).check()
    with pytest.raises(MediaError, match="num_frames is 0"):
        Media(str(video), num_frames=0).check()


def test_the_stamp_changes_with_the_content_and_ignores_dead_links(tmp_path: Path) -> None:
    (tmp_path / "00001.jpg").write_bytes(b"one")
    (tmp_path / "notes").symlink_to(tmp_path / "nowhere")
    media = Media(str(tmp_path))
    before = media.stamp()
    assert media.stamp() == before
    (tmp_path / "00001.jpg").write_bytes(b"three")
    assert media.stamp() != before
    assert Media(str(tmp_path / "gone")).stamp() == (Media(str(tmp_path / "gone")), ())


@pytest.mark.parametrize(("question", "words"), [("", "is empty"), (" \n", "is empty"), ("a\udcff", "no valid text")])
def test_a_question_must_be_valid_text(question: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Request(turns=(Turn(question),)).check()


@given(sizes=st.lists(st.integers(1, 30), max_size=40), room=st.integers(1, 60))
def test_the_cache_never_exceeds_its_size(sizes: list[int], room: int) -> None:
    cache = FeatureCache(max_bytes=room)
    for key, size in enumerate(sizes):
        cache.put(key, torch.zeros(size, dtype=torch.uint8))
        held = [k for k in range(key + 1) if cache.get(k) is not None]
        assert cache.num_bytes == sum(sizes[k] for k in held) <= room
        if size <= room:
            assert key in held


def test_the_least_recently_used_entry_is_dropped_first() -> None:
    cache = FeatureCache(max_bytes=2)
    for key in "ab":
        cache.put(key, torch.zeros(1, dtype=torch.uint8))
    cache.get("a")
    cache.put("c", torch.zeros(1, dtype=torch.uint8))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_an_entry_larger_than_the_cache_drops_no_other() -> None:
    cache = FeatureCache(max_bytes=4)
    cache.put("small", torch.zeros(3, dtype=torch.uint8))
    cache.put("large", torch.zeros(5, dtype=torch.uint8))
    assert [cache.get(key) is not None for key in ("small", "large")] == [True, False]
    cache.put("small", torch.zeros(5, dtype=torch.uint8))  # a larger one of that key leaves no old one
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_prefixes_use_the_room_left_by_videos() -> None:
    cache = FeatureCache(max_bytes=10)
    sizes = [torch.zeros(size, dtype=torch.uint8) for size in range(12)]
    cache.put_prefixes("a", 0, [sizes[1]])
    assert cache.prefixes("a", 0) == []  # without features
    cache.put("a", sizes[2])
    cache.put("b", sizes[2])
    cache.put_prefixes("a", 0, [sizes[7], sizes[1], sizes[2]])  # the first is larger than the room
    cache.put_prefixes("b", 0, [sizes[1]])
    cache.put_prefixes("a", 1, [sizes[1]])
    cache.put_prefixes(None, 0, [sizes[1]])
    assert [len(one) for one in cache.prefixes("a", 0)] == [1, 2] and cache.num_bytes == 10
    cache.put_prefixes("b", 0, [*cache.prefixes("b", 0), sizes[1]])  # those of "a" were used before all others
    assert [len(one) for one in cache.prefixes("a", 0)] == [2]
    cache.put("c", sizes[6])  # the features of all three fill the cache
    assert [len(cache.prefixes(*key)) for key in (("a", 0), ("b", 0), ("a", 1), (None, 0))] == [0, 0, 0, 0]
    assert (len(cache), cache.num_bytes) == (3, 10)


def test_prefixes_are_dropped_with_their_video() -> None:
    cache = FeatureCache(max_bytes=10)
    for key in "ab":
        cache.put(key, torch.zeros(3, dtype=torch.uint8))
        cache.put_prefixes(key, 0, [torch.zeros(1, dtype=torch.uint8)] * 6)
    assert [len(cache.prefixes(key, 0)) for key in "ab"] == [0, MAX_PREFIXES]
    cache.put("c", torch.zeros(5, dtype=torch.uint8))  # drops the features of "a"
    assert [len(cache.prefixes(key, 0)) for key in "ab"] == [0, 2]
    cache.put("d", torch.zeros(4, dtype=torch.uint8))  # and those of "b"
    assert [len(cache.prefixes(key, 0)) for key in "ab"] == [0, 0]


def test_replacing_an_entry_counts_its_size_once() -> None:
    cache = FeatureCache(max_bytes=10)
    for size in (3, 4):
        cache.put("a", torch.zeros(size, dtype=torch.uint8))
    assert (len(cache), cache.num_bytes) == (1, 4)


def test_waiting_calls_are_batched_and_each_gets_its_result() -> None:
    calls: list[list[int]] = []
    begun, go = Event(), Event()

    def halves(items: Sequence[int]) -> list[int]:
        calls.append(list(items))
        begun.set()
        assert go.wait(30)
        if any(item % 2 for item in items):
            raise ValueError(f"odd: {items}")
        return [item // 2 for item in items]

    together = Together(halves)
    with ThreadPoolExecutor(5) as threads:
        first = threads.submit(together, 2)
        assert begun.wait(30)
        others = [threads.submit(together, item) for item in (4, 5, 6, 8)]
        wait_until(lambda: together._waiting.qsize() == 4)
        go.set()
        assert [first.result(30), *(others[place].result(30) for place in (0, 2, 3))] == [1, 2, 3, 4]
        with pytest.raises(ValueError, match=r"odd: \[5\]"):
            others[1].result(30)
    assert (
        calls[0] == [2]
        and sorted(calls[1]) == [4, 5, 6, 8]
        and sorted(map(tuple, calls[2:])) == [(4,), (5,), (6,), (8,)]
    )
