"""Unreadable samples are replaced as a whole and counted; too many of them stop the run."""

import json
import logging
from pathlib import Path

import pytest

from stllm.common.errors import UserError
from stllm.datasets.instruction import InstructionCorpus
from stllm.datasets.mixture import Mixture, MixturePart
from stllm.datasets.samples import BadSampleLog, Failure, Sample, SampleKey
from tests.helpers.corpora import FPS, codes_of, corpus_of, numbered_record, write_numbered_videos

NUM_GOOD = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("videos")
    write_numbered_videos(folder, range(NUM_GOOD))
    (folder / "11.mp4").write_bytes((folder / "0.mp4").read_bytes()[:400])
    (folder / "12.mp4").write_text("<html>not found</html>")
    (folder / "13.mp4").touch()
    return folder


@pytest.fixture
def corpus(folder: Path) -> InstructionCorpus:
    """Write records of six good videos, each in two halves, and of faulty files of every kind."""
    halves = [{"start": 0, "end": 1}, {"start": 1, "end": 2}]
    good = [numbered_record(number, **half) for number in range(NUM_GOOD) for half in halves]
    bad = [
        numbered_record(10),  # there is no such file
        numbered_record(11),  # cut short
        numbered_record(12),  # a page of text
        numbered_record(13),  # empty
        numbered_record(1, start=50),  # after the video's end
        numbered_record(2, start=1, end=0.5),
        numbered_record(3, QA=[{"q": "?", "a": ""}]),
        {"video": "4.mp4"},
    ]
    return corpus_of(folder / "train.json", [*bad, *good], qa_sampling="all")


def check_pairing(sample: Sample) -> None:
    """Assert that pixels, question, answer, instruction and bounds belong to one record."""
    assert sample.pixel_values is not None
    codes = codes_of(sample.pixel_values)
    number = codes[0] // 100
    assert all(code // 100 == number for code in codes)
    (turn,) = sample.turns
    pair = turn.question[len("pair ")]
    assert (turn.instruction, turn.answer) == (f"video {number}", f"{number} {pair}")
    record = int(sample.name.rsplit(" ", 1)[1].rstrip(")")) - 1
    assert f"/{number}.mp4 " in sample.name
    half = (record - 8) % 2  # good records come after eight bad ones, first and second halves in turn
    assert all(code % 100 // FPS == half for code in codes)


def test_a_question_is_never_paired_with_another_video(corpus: InstructionCorpus) -> None:
    mixture = Mixture([MixturePart(corpus)], seed=3, max_tries=20)
    failures: list[Failure] = []
    for epoch in range(3):
        for index in range(len(corpus)):
            sample = mixture[SampleKey(epoch, 0, 0, index)]
            check_pairing(sample)
            failures += sample.failures
    first_tries = {(failure.cause, Path(failure.subject).name) for failure in failures}
    assert first_tries == {
        ("missing", "10.mp4"),
        ("unreadable", "11.mp4"),
        ("unreadable", "12.mp4"),
        ("unreadable", "13.mp4"),
        ("bounds", "1.mp4"),
        ("bounds", "train.json, record 6"),
        ("annotation", "train.json, record 7"),
        ("annotation", "train.json, record 8"),
    }


def test_the_replacement_depends_on_the_key_alone(corpus: InstructionCorpus) -> None:
    load = Mixture([MixturePart(corpus)], seed=0, max_tries=20).__getitem__
    key = SampleKey(0, 5, 0, 0)
    first, again = load(key), load(key)
    assert first.name == again.name and first.turns == again.turns and first.failures == again.failures
    assert first.pixel_values is not None and again.pixel_values is not None
    assert first.pixel_values.equal(again.pixel_values)
    assert len({load(key._replace(epoch=epoch)).name for epoch in range(10)}) > 3


def test_the_number_of_replacements_is_limited(folder: Path) -> None:
    broken = corpus_of(folder / "broken.json", [numbered_record(number) for number in range(10, 14)])
    with pytest.raises(UserError) as error:
        Mixture([MixturePart(broken)], seed=0, max_tries=3)[SampleKey(0, 0, 0, 0)]
    message = str(error.value)
    assert message.startswith("data set numbered: 4 samples drawn one after another could not be read, the last one is")
    assert str(folder / "1") in message and "run.max_tries (3)" in message
    single = corpus_of(folder / "single.json", [numbered_record(10)])
    with pytest.raises(UserError, match="2 samples"):
        Mixture([MixturePart(single)], seed=0, max_tries=1)[SampleKey(0, 0, 0, 0)]


def failure(number: int, cause: str = "missing") -> Failure:
    return Failure("a", cause, f"{number}.mp4", f"{number}.mp4: there is no such file")


def test_each_bad_file_gives_one_warning_and_is_always_counted(caplog) -> None:
    bad = BadSampleLog(max_bad_fraction=0.1, epoch_size=1000)
    with caplog.at_level(logging.WARNING):
        for number in (1, 2, 1, 1):
            bad.add(failure(number))
    assert [record.getMessage() for record in caplog.records] == [
        "data set a, left out: 1.mp4: there is no such file",
        "data set a, left out: 2.mp4: there is no such file",
    ]
    assert bad.total == 4 and dict(bad.by_cause) == {"missing": 4}


@pytest.mark.parametrize(
    ("num_bad", "num_seen", "epoch_size", "stops"),
    [(10, 0, 1000, False), (11, 0, 1000, True), (20, 180, 1000, False), (20, 170, 1000, True), (1, 0, 5, True)],
)
def test_too_many_bad_samples_stop_the_run(num_bad: int, num_seen: int, epoch_size: int, stops: bool) -> None:
    bad = BadSampleLog(max_bad_fraction=0.1, epoch_size=epoch_size)
    for number in range(num_bad):
        bad.add(failure(number, "bounds" if number % 2 else "missing"))
    if not stops:
        bad.check(num_seen)
        return
    with pytest.raises(UserError) as error:
        bad.check(num_seen)
    message = str(error.value)
    assert message.startswith(f"{num_bad} of {num_bad + num_seen} samples could not be read (") and "0.mp4" in message
    assert "run.max_bad_fraction (0.1)" in message
    if num_bad > 5:
        assert f"4.mp4 and {num_bad - 5} more" in message and "5.mp4" not in message


def test_the_count_of_bad_samples_is_resumed(caplog) -> None:
    bad = BadSampleLog(max_bad_fraction=0.5, epoch_size=10)
    for number in range(3):
        bad.add(failure(number))
    resumed = BadSampleLog(max_bad_fraction=0.5, epoch_size=10)
    resumed.load_state_dict(json.loads(json.dumps(bad.state_dict())))
    assert resumed.total == 3 and resumed.state_dict() == bad.state_dict()
    caplog.clear()
    resumed.add(failure(2))
    assert not caplog.records and resumed.total == 4
