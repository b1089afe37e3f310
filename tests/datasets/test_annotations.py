"""Annotation files: all formats, and faults of files and of records."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stllm.common.errors import UserError
from stllm.datasets.annotations import AnnotationError, JsonRecords
from stllm.processors.templates import Turn

QA = [{"i": "Look.", "q": "What is it?", "a": "A cat."}]
GOOD = {"video": "a.mp4", "QA": QA}


def read(folder: Path, content: Any, name: str = "train.json", **options: Any) -> JsonRecords:
    """Return the records of a file with this content. Content that is not text is written as JSON."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return JsonRecords(path, **options)


def test_videochat2_records(tmp_path: Path) -> None:
    fields = {**GOOD, "start": 1.5, "end": 4, "num_frames": 30, "extra": {"kept": "silently"}}
    records = read(tmp_path, [fields, {"video": "b.mp4", "QA": [{"q": "", "a": "x"}]}], media_dir="/media")
    assert len(records) == 2 and records.kind == "video" and records.num_pairs.tolist() == [1, 1]
    first = records[0]
    assert first.turns == (Turn("What is it?", "A cat.", "Look."),)
    assert (first.media, first.kind, first.bounds) == ("/media/a.mp4", "video", (1.5, 4.0))
    assert first.where == f"{tmp_path / 'train.json'}, record 1"
    assert records[1].turns == (Turn("", "x"),) and records[1].bounds is None


def test_captions_answer_an_empty_question(tmp_path: Path) -> None:
    records = read(tmp_path, [{"image": "a.jpg", "caption": "A cat."}, {"image": "b.jpg", "caption": ["One.", "Two."]}])
    assert records.kind == "image" and records[0].turns == (Turn("", "A cat."),)
    assert records[1].turns == (Turn("", "One."), Turn("", "Two."))


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_one_record_a_line(tmp_path: Path, end: str) -> None:
    records = read(tmp_path, "\n".join(json.dumps({**GOOD, "start": s}) for s in range(3)) + end, "mine.jsonl")
    assert [records[i].bounds for i in range(3)] == [(float(s), math.inf) for s in range(3)]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(deadline=None)
@given(texts=st.lists(TEXTS, min_size=1), ascii=st.booleans(), indent=st.sampled_from([None, 1]), lines=st.booleans())
def test_any_text_is_read_unchanged(
    tmp_path_factory, texts: list[str], ascii: bool, indent: int | None, lines: bool
) -> None:
    items = [{"video": text, "QA": [{"q": text, "a": text}]} for text in texts]
    written = [json.dumps(item, ensure_ascii=ascii) for item in items]
    content = "\n".join(written) if lines else json.dumps(items, ensure_ascii=ascii, indent=indent)
    records = read(tmp_path_factory.mktemp("any"), content)
    assert [records[i].turns for i in range(len(records))] == [(Turn(text, text),) for text in texts]
    assert len(records) == len(texts)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    assert read(tmp_path, "\ufeff" + json.dumps([{"video": "é.mp4", "QA": QA}], ensure_ascii=False))[0].media == "é.mp4"


def test_numbers_may_be_text_and_bounds_null(tmp_path: Path) -> None:
    records = read(tmp_path, [{**GOOD, "start": "1.5", "end": "2"}, {**GOOD, "start": None, "end": None}])
    assert records[0].bounds == (1.5, 2.0) and records[1].bounds is None


def test_an_empty_answer_makes_one_pair_unusable(tmp_path: Path) -> None:
    pairs = [{"q": "one?", "a": ""}, {"q": "two?", "a": "yes"}, {"q": "three?"}, {"q": "how many?", "a": 4}]
    records = read(tmp_path, [{"video": "a.mp4", "QA": pairs}])
    assert records[0].turns == (Turn("one?"), Turn("two?", "yes"), Turn("three?"), Turn("how many?", "4"))
    assert records.num_pairs.tolist() == [2]


def test_half_a_surrogate_pair_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    records = read(tmp_path, r'[{"video": "a", "QA": [{"q": "\ud83d", "a": "\ud83d\ude00"}]}]')
    assert records[0].turns == (Turn("?", "\N{GRINNING FACE}"),)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{}\n {}]", "line 2, column 2: not valid JSON (Expecting ',' or ']')"),
        ('[{"video": "a.mp4",\n', "line 2, column 1: not valid JSON"),
        (json.dumps([GOOD])[:-1], "not valid JSON (Expecting ',' or ']')"),
        (json.dumps([GOOD])[:-1] + ",\n", "line 2, column 1: not valid JSON (The list does not end)"),
        (json.dumps([GOOD]) + "x", "not valid JSON (Extra data)"),
        ('{"video": }', "line 1, column 11: not valid JSON (Expecting value)"),
        ("video,question\na.mp4,what", "line 1, column 1: not valid JSON"),
        ("", "found no record"),
        ("[]", "found no record"),
        ([GOOD, ["a.mp4"]], 'record 2: found ["a.mp4"], expected a mapping'),
        ([{"video": "a", "question": "q", "candidates": [], "answer": "a"}], "record 1: found an MVBench task"),
        ([{"Q": "q", "A": "a", "video_name": "v"}], "record 1: found a VcgBench ground truth"),
        ([{"question": "q", "answer": "a", "video_id": 1}], "found a VideoQA ground truth"),
        ([{"id": 1, "image": "a.jpg", "conversations": []}], "found LLaVA's conversations"),
        ([{"video": "a.mp4"}, {"video": "b.mp4"}], "no record has QA or caption (the first has video)"),
        ([{"video": "a.mp4", "QA": [{"q": "why?", "a": " "}]}], "found 1 records and not one answer"),
        ([{"QA": QA}], "no record names a video or image"),
        ([GOOD, {"image": "a.jpg", "QA": QA}], "found videos and images in one file"),
        ('[{"video": "a", "n": ' + "1" * 5000 + "}]", "found a value that cannot be read"),
    ],
)
def test_faults_of_a_whole_file_are_reported(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and str(tmp_path / "train.json") in str(error.value)
    assert "\n" not in str(error.value) and not isinstance(error.value, AnnotationError)


def test_unreadable_files_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such file"):
        JsonRecords(tmp_path / "none.json")
    with pytest.raises(UserError, match="found a folder"):
        JsonRecords(tmp_path)
    (tmp_path / "latin.json").write_bytes('[{"video": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 12\)"):
        JsonRecords(tmp_path / "latin.json")


@pytest.mark.parametrize(
    ("fields", "message", "cause"),
    [
        ({"video": "a.mp4"}, "found no QA (fields video)", "annotation"),
        ({"video": "a.mp4", "QA": []}, "found no QA", "annotation"),
        ({"video": "a.mp4", "QA": None}, "found an empty answer", "annotation"),
        ({"video": "a.mp4", "QA": [{"q": "why?", "a": ""}]}, "found an empty answer", "annotation"),
        ({"video": "a.mp4", "caption": None}, "found an empty answer", "annotation"),
        ({"video": "a.mp4", "QA": [*QA, {"q": ["why?"], "a": "x"}]}, "found q ['why?'], expected a text", "annotation"),
        ({"video": "a.mp4", "QA": [{"i": {}, "q": "", "a": "x"}]}, "found i {}, expected a text", "annotation"),
        ({"QA": QA}, "found video None", "annotation"),
        ({**GOOD, "video": " "}, "found video ' '", "annotation"),
        ({**GOOD, "video": 7}, "found video 7", "annotation"),
        ({**GOOD, "start": 3, "end": 2}, "found start 3 and end 2, expected 0 <= start < end", "bounds"),
        ({**GOOD, "start": 2, "end": 2}, "found start 2 and end 2", "bounds"),
        ({**GOOD, "start": -1, "end": 2}, "found start -1", "bounds"),
        ({**GOOD, "start": float("nan")}, "found start nan", "bounds"),
        ({**GOOD, "end": float("inf")}, "found end inf", "bounds"),
        ({**GOOD, "end": "later"}, "found end 'later'", "bounds"),
        ({**GOOD, "end": [1]}, "found end [1]", "bounds"),
        ({**GOOD, "end": True}, "found end True", "bounds"),
    ],
)
def test_faults_of_one_record_are_reported(tmp_path: Path, fields: dict[str, Any], message: str, cause: str) -> None:
    records = read(tmp_path, [GOOD, fields])
    assert records[0].turns  # the other records are usable
    with pytest.raises(AnnotationError) as error:
        records[1]
    assert str(error.value).startswith(f"{tmp_path / 'train.json'}, record 2: ")
    assert message in str(error.value) and error.value.cause == cause


def test_records_can_be_filtered_by_kind_of_media(tmp_path: Path) -> None:
    mixed = [GOOD, {"image": "a.jpg", "QA": QA}, {"QA": QA}, {"image": "b.jpg", "QA": QA}]
    images = read(tmp_path, mixed, kind="image")
    assert [images[i].media for i in (0, 2)] == ["a.jpg", "b.jpg"] and images[2].where.endswith("record 4")
    with pytest.raises(AnnotationError, match="record 3: found image None"):
        images[1]
    texts = read(tmp_path, mixed, kind="text")
    assert len(texts) == 1 and texts[0].media is None
    with pytest.raises(UserError, match="found no text record among 1"):
        read(tmp_path, [GOOD], kind="text")


def test_records_are_held_compactly(tmp_path: Path) -> None:
    records = read(tmp_path, [{**GOOD, "start": s} for s in range(1000)])
    size = (tmp_path / "train.json").stat().st_size
    assert len(pickle.dumps(records)) < size + 50 * 1000  # what a spawned worker gets
    with pytest.raises(IndexError):
        records[1000]
