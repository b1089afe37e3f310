"""TVBench, TempCompass, Vinoground and TOMATO: twins from file to table, official and strict rules on cases written
from the protocol, groups, bad files."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.common.registry import templates
from stllm.common.schema import EvaluationSettings
from stllm.conversation.chat import FOLDER, Chat
from stllm.conversation.requests import Answer, Prepared
from stllm.evaluation.benchmarks.base import Item, Loaded, load_benchmark
from stllm.evaluation.benchmarks.tempcompass import CAPTIONING, official_match, strict_match
from stllm.evaluation.benchmarks.tomato import official_option
from stllm.media.open import open_media
from tests.helpers.twins import read, twins

COUNTS = {"tvbench": 20, "tempcompass": 50, "vinoground": 8, "tomato": 12}  # items of twins(2), and captions


def loaded(name: str, root: Path | None = None, **settings: Any) -> Loaded:
    path = str(root or twins() / name)
    return load_benchmark(name, EvaluationSettings(anno_path=path, num_frames=4, **settings))


def evaluate(name: str, output: Path, *more: str, root: Path | None = None) -> int:
    argv = ["evaluate", name, "--ckpt-path", str(FOLDER), "--anno-path", str(root or twins() / name)]
    argv += ["--output-dir", str(output), "--device", "cpu", "--num-workers", "0", "--num-frames", "2", *more]
    return main(argv)


def results(output: Path, name: str) -> dict[str, Any]:
    return dict(read(output / f"{name}.results.json"))


def lines(output: Path, name: str) -> dict[str, dict[str, Any]]:
    records = [json.loads(line) for line in (output / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["id"]: record for record in records}


def replies(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str, str], str]) -> None:
    """Replace the language model's replies by `answer(path of the video, question with its options)`."""

    def complete(chat: Chat, prepared: Sequence[Prepared], *_: object) -> list[Answer]:
        found = []
        for one in prepared:
            assert one.request.media is not None
            path, asked = one.request.media.path, one.request.turns[-1].question
            spent = {**one.seconds, "answer": 0.0}
            found.append(Answer(answer(path, asked), asked, path, one.times, one.num_visual, spent))
        return found

    monkeypatch.setattr(Chat, "complete", complete)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies an imitated benchmark, so that a test may damage it."""
    return lambda name: Path(shutil.copytree(twins() / name, tmp_path / "copy" / name))


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    content = read(path)
    path.write_text(json.dumps(edit(content) or content))


# ---- from file to table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_evaluating_an_imitated_benchmark_writes_all_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(name, tmp_path) == 0
    said = capsys.readouterr().out
    assert f"{name}, strict: " in said and "95 % interval" in said
    content = results(tmp_path, name)
    counts = content["counts"]
    assert counts["total"] == COUNTS[name] and counts["failed"] == 0
    assert counts["excluded"] == (2 if name == "tvbench" else 0)
    assert all(len(content["scores"][rule]["interval"]) == 2 for rule in ("strict", "official"))
    text = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert "Published figures have no interval." in text and "95% interval" in text
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_killed_and_resumed_run_gives_the_same_results(tmp_path: Path) -> None:
    assert evaluate("tempcompass", tmp_path, "--tasks", "yes_no") == 0
    path = tmp_path / "tempcompass.jsonl"
    whole, report = path.read_text(), (tmp_path / "tempcompass.md").read_bytes()
    path.write_bytes(path.read_bytes()[: len(whole) // 2])
    assert evaluate("tempcompass", tmp_path, "--tasks", "yes_no") == 0
    without_times = [re.sub(r'"seconds": {.*?}', "", text) for text in (whole, path.read_text())]
    assert without_times[0] == without_times[1] and (tmp_path / "tempcompass.md").read_bytes() == report


def test_scores_of_a_model_that_knows_half_of_the_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model knows half of TOMATO; check all scores, groups and intervals."""
    right = {}
    for item in loaded("tomato").items:
        assert item.media is not None
        right[item.media.path] = "ABCDEFG"[item.candidates.index(item.answer)]
    replies(monkeypatch, lambda path, _: right[path] if "_0000" in path else "I cannot tell")
    assert evaluate("tomato", tmp_path) == 0
    strict, official = (results(tmp_path, "tomato")["scores"][rule] for rule in ("strict", "official"))
    assert strict["average"] == strict["parsed"] == official["parsed"] == 50.0 and official["average"] >= 50.0
    assert strict["interval"] == pytest.approx([25.38, 74.62], abs=0.01)  # Wilson's of 6 of 12
    assert set(strict["tasks"].values()) == {50.0}
    shown = {name: found["accuracy"] for name, found in strict["groups"]["demonstration type"].items()}
    assert shown == {"human": 100.0, "object": 0.0}
    assert strict["groups"]["motion type"]["translation"]["items"] == 4
    assert results(tmp_path, "tomato")["scores"]["chance"]["average"] == pytest.approx(
        sum(100 / len(item.candidates) for item in loaded("tomato").items) / 12
    )


# ---- TVBench --------------------------------------------------------------------------------------------------------


def test_tvbench_averages_over_tasks_not_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One item of one of two tasks is correct; then that task's other item is left out."""
    known = next(one for one in loaded("tvbench").items if one.id == "moving_direction/0")
    letter = "ABCD"[known.candidates.index(known.answer)]
    replies(monkeypatch, lambda path, asked: f"{letter}) x" if "moving_direction_00000" in path else "")
    assert evaluate("tvbench", tmp_path, "--tasks", "moving_direction,object_count") == 0
    assert results(tmp_path, "tvbench")["scores"]["strict"]["average"] == 25.0
    both = ["--tasks", "moving_direction,object_count"]
    root = Path(shutil.copytree(twins() / "tvbench", tmp_path / "tvbench"))
    change(root / "json" / "moving_direction.json", lambda items: items[:1])
    assert evaluate("tvbench", tmp_path / "less", *both, root=root) == 0
    scores = results(tmp_path / "less", "tvbench")["scores"]
    assert scores["strict"]["average"] == 50.0  # over items it would be 33.3
    assert scores["official"]["average"] == 100.0  # an empty prediction is right everywhere


def test_tvbench_prompts_are_those_of_mvbench() -> None:
    template = templates.get("instructblip")
    (one, *_), mvbench = loaded("tvbench").items, loaded("mvbench", sampling="segment")
    assert loaded("tvbench").requests(one, template) == mvbench.requests(one, template)


def test_tvbench_bounds_are_used() -> None:
    bounded = {item.task for item in loaded("tvbench").items if item.media and item.media.bounds}
    assert bounded == {"Action Sequence", "Action Localization"}


# ---- TempCompass ----------------------------------------------------------------------------------------------------

CHOICE = "What is it doing?\nA. jumping\nB. running\nC. resting"
SENTENCES = "Which fits?\nSentence A: A man runs.\nSentence B: A man sits."
NUMBERED = "Which fits?\nOption 1: A man runs.\nOption 2: A man sits."


def question(task: str, text: str, answer: str, candidates: tuple[str, ...] = ()) -> Item:
    return Item("x", task, "x.mp4", None, (text,), answer, candidates)


@pytest.mark.parametrize(
    ("said", "official", "strict"),
    [
        ("B. running", True, True),
        ("B", True, True),
        ("A", False, False),
        ("B. jumping", True, True),  # the letter decides
        ("B) running", True, True),
        ("C) running", False, False),
        ("D", False, None),  # beyond the options
        ("running", None, True),
        ("b", None, True),
        ("(B) running", None, True),
        ("E. running", None, None),
        ("The answer is B", None, None),
        ("", None, None),
    ],
)
def test_tempcompass_multiple_choice_rules(said: str, official: bool | None, strict: bool | None) -> None:
    one = question("multi-choice", CHOICE, "B. running", ("jumping", "running", "resting"))
    assert (official_match(one, said), strict_match(one, said)) == (official, strict)


@pytest.mark.parametrize(
    ("said", "answer", "official", "strict"),
    [
        ("yes", "yes", True, True),
        ("Yes, it is.", "yes", True, True),
        ("No.", "yes", False, False),
        ("nothing moves", "no", True, None),
        ("It is", "yes", None, None),
        ("", "no", None, None),
    ],
)
def test_tempcompass_yes_or_no_rules(said: str, answer: str, official: bool | None, strict: bool | None) -> None:
    one = question("yes_no", "Is it?", answer, ("yes", "no"))
    assert (official_match(one, said), strict_match(one, said)) == (official, strict)


@pytest.mark.parametrize(
    ("asked", "said", "official", "strict"),
    [
        (NUMBERED, "Option 2: A man sits.", True, True),
        (NUMBERED, "Option 2", True, True),
        (NUMBERED, "Option 2.", True, True),
        (NUMBERED, "2.", True, True),
        (NUMBERED, "1", False, False),
        (NUMBERED, "A man sits.", True, True),
        (NUMBERED, "(2) A man sits.", True, None),
        (NUMBERED, "a man sits", None, True),
        (NUMBERED, "3", None, None),
        (NUMBERED, "Both", None, None),
        (SENTENCES, "Sentence B", True, True),
        (SENTENCES, "B", True, True),
        (SENTENCES, "Sentence A: A man runs.", False, False),
        (SENTENCES, "", None, None),
    ],
)
def test_tempcompass_caption_matching_rules(asked: str, said: str, official: bool | None, strict: bool | None) -> None:
    one = question("caption_matching", asked, asked.split("\n")[2])
    assert (official_match(one, said), strict_match(one, said)) == (official, strict)


def test_tempcompass_reports_dimensions_aspects_and_parsed_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model answers yes to questions about order; its other replies cannot be parsed."""
    replies(monkeypatch, lambda path, _: "Yes" if Path(path).stem.startswith("4") else "hm")
    assert evaluate("tempcompass", tmp_path) == 0
    scores = results(tmp_path, "tempcompass")["scores"]["official"]
    assert scores["tasks"] == {"multi-choice": 0.0, "yes_no": 10.0, "caption_matching": 0.0}
    assert scores["average"] == 100 * 2 / 40 and scores["parsed"] == 100 * 4 / 40  # captions are not among the 40
    assert {name: found["accuracy"] for name, found in scores["groups"]["dimension"].items()} == {
        **dict.fromkeys(("action", "attribute_change", "direction", "speed"), 0.0),
        "order": 25.0,
    }
    assert scores["groups"]["fine aspect"]["object motion"]["items"] == 8
    captions = {id: line for id, line in lines(tmp_path, "tempcompass").items() if line["task"] == CAPTIONING}
    assert len(captions) == 10 and not any("correct" in line for line in captions.values())
    choices = read(twins() / "tempcompass" / "questions" / "multi-choice.json")
    assert captions["captioning/4000/order/0"]["mc_question"] == choices["4000"]["order"][0]["question"]
    official = read(tmp_path / "tempcompass.yes_no.json")
    assert [row["prediction"] for row in official["4001"]["order"]] == ["Yes", "Yes"]


def test_the_end_of_sequence_text_is_removed_before_matching() -> None:
    one = next(item for item in loaded("tempcompass").items if item.task == "yes_no" and item.answer == "no")
    assert loaded("tempcompass").benchmark.score(one, [" No</s>"])["correct"] == {"official": True, "strict": True}


# ---- Vinoground -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "official", "strict"),
    [
        ("A", True, True),
        ("a.", True, True),
        ("(A)", False, True),
        ("Ah", True, False),
        ("", False, False),
        ("B", False, False),
    ],
)
def test_vinoground_compares_the_first_character(said: str, official: bool, strict: bool) -> None:
    benchmark = loaded("vinoground")
    one = next(item for item in benchmark.items if item.answer == "A")
    assert benchmark.benchmark.score(one, [said])["correct"] == {"official": official, "strict": strict}


def test_vinoground_pairs_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pair 0 is correct in all four questions; pair 1 in both of the text score and one of the video score."""
    wrong = ("vinoground_videos_concated/1_neg",)
    answers = {item.media.path: item.answer for item in loaded("vinoground").items if item.media}
    replies(monkeypatch, lambda path, _: "C" if any(name in path for name in wrong) else answers[path])
    assert evaluate("vinoground", tmp_path) == 0
    scores = results(tmp_path, "vinoground")["scores"]["official"]
    assert scores["tasks"] == {"text": 100.0, "video": 50.0, "group": 50.0} and scores["average"] == 50.0
    assert scores["interval"] == scores["task_intervals"]["group"] == pytest.approx([9.45, 90.55], abs=0.01)
    majors = {name: found["accuracy"] for name, found in scores["groups"]["major, video"].items()}
    assert majors == {"object": 100.0, "action": 0.0}
    assert evaluate("vinoground", tmp_path / "text", "--tasks", "text", "--limit", "3") == 0
    scores = results(tmp_path / "text", "vinoground")["scores"]["official"]
    assert scores["tasks"] == {"text": 100.0} and scores["average"] is None  # no group was asked
    assert "groups" not in scores or set(scores["groups"]) == {"major, text"}


def test_the_video_score_clip_contains_both_clips() -> None:
    one = next(item for item in loaded("vinoground").items if item.task == "video")
    alone = next(item for item in loaded("vinoground").items if item.task == "text")
    sizes = []
    for item in (alone, one):
        assert item.media is not None
        with open_media(item.media.path) as medium:
            sizes.append(medium.info.num_frames)
    assert sizes[1] == 2 * sizes[0] + 8  # and black frames between them


# ---- TOMATO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("B", 1),
        ("b", 1),
        ("B: two", 1),
        ("Answer is (C)", 2),
        ("Answer is: C", 2),
        ("D", None),
        ("two", None),
        ("B: three", None),
        ("", None),
        ("The answer is (B)", None),
    ],
)
def test_tomato_finds_the_letter(said: str, number: int | None) -> None:
    assert official_option(said, ("one", "two", "three")) == number


def test_tomato_guesses_only_by_the_official_rule() -> None:
    benchmark = loaded("tomato")
    found = [benchmark.benchmark.score(item, ["no idea"]) for item in benchmark.items for _ in range(2)]
    assert not any(one["correct"]["strict"] or any(one["parsed"].values()) for one in found)
    assert 0 < sum(one["correct"]["official"] for one in found) < len(found) and found[::2] == found[1::2]


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tempcompass", "vinoground", "tomato"])
def test_prompts_have_no_system_message_and_the_published_wording(name: str) -> None:
    benchmark, template = loaded(name), templates.get("instructblip")
    endings = {
        "multi-choice": "\nPlease directly give the best option:",
        "caption_matching": "\nPlease directly give the best option:",
        "yes_no": "\nPlease answer yes or no:",
        "text": "\nPlease only output one English character.",
        "video": "\nPlease only output one English character.",
    }
    for item in benchmark.items:
        (request,) = benchmark.benchmark.ask(item, template, "")
        (turn,) = request.turns
        assert request.pieces is None and request.system == "" and request.media == item.media
        if name == "tomato":
            letters = "ABCDEFG"
            options = "{" + ", ".join(f"'{a}': {b!r}" for a, b in zip(letters, item.candidates, strict=False)) + "}"
            assert f"\n\n<options> \n{options} \n</options>\n\n" in turn.question
            assert turn.question.startswith("You will be provided with 4 separate frames uniformly sampled")
        else:
            assert turn.question == item.questions[0] + endings.get(item.task, "")


PLACES = {
    "tempcompass": ("", "questions", "questions/yes_no.json"),
    "tomato": ("", "data", "data/count.json"),
    "vinoground": ("", "vinoground_textscore.json"),
}


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, places in PLACES.items() for place in places])
def test_the_ground_truth_may_be_a_folder_or_a_file(name: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The media are found from each place."""
    assert main(["doctor", "--anno-path", str(twins() / name / place), "--format", name, "--num-workers", "0"]) == 0
    assert "nothing found in" in capsys.readouterr().out


# ---- bad files ------------------------------------------------------------------------------------------------------


def one_sentence(name: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the sentence with which `stllm evaluate` stops; check that `stllm doctor` finds it, too."""
    assert evaluate(name, tmp_path / "out", root=root) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: "), said
    assert main(["doctor", "--anno-path", str(root), "--format", name, "--num-workers", "0"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    return said


def twice(path: Path) -> None:
    text = path.read_text()
    first = re.search(r'"(\w+)":', text)
    assert first
    path.write_text("{" + f'"{first[1]}": {{}},' + text[1:])


def empty_videos(root: Path) -> None:
    shutil.rmtree(root / "videos")
    (root / "videos").mkdir()


BAD: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "another benchmark's folder": (
        "tvbench",
        lambda root: (root / "json" / "action_prediction.json").write_text("[]"),
        "no task of TVBench",
    ),
    "a media folder of the wrong set": (
        "tvbench",
        lambda root: (root / "video").rename(root / "other"),
        "no such folder of media",
    ),
    "media of another set": (
        "tomato",
        empty_videos,
        "none of its 12 items can be asked",
    ),
    "no questions": (
        "tempcompass",
        lambda root: shutil.rmtree(root / "questions"),
        "found none of TempCompass's files",
    ),
    "no file": (
        "vinoground",
        lambda root: list(map(Path.unlink, root.rglob("*score.json"))),
        "found none of Vinoground's files (vinoground_textscore.json, vinoground_videoscore.json): name the folder",
    ),
    "a list": (
        "tempcompass",
        lambda root: (root / "questions" / "yes_no.json").write_text('[{"a": 1}]'),
        "expected TempCompass's",
    ),
    "an id twice": ("tempcompass", lambda root: twice(root / "questions" / "yes_no.json"), "'1000' occurs twice"),
    "an id of tomato twice": ("tomato", lambda root: twice(root / "data" / "count.json"), "'0' occurs twice"),
    "an unknown dimension": (
        "tempcompass",
        lambda root: change(root / "questions" / "yes_no.json", lambda c: {"1000": {"size": []}}),
        "attribute_change",
    ),
    "an idx twice": (
        "vinoground",
        lambda root: change(root / "vinoground_textscore.json", lambda c: c + c[:1]),
        "the idx 0_pos is also that of",
    ),
    "another list": (
        "vinoground",
        lambda root: (root / "vinoground_textscore.json").write_text('[{"question": "a"}]'),
        "it looks like a VideoQA ground truth",
    ),
    "another idx": (
        "vinoground",
        lambda root: change(root / "vinoground_videoscore.json", lambda c: [{**c[0], "idx": 7}]),
        "N_pos or N_neg",
    ),
    "no data": ("tomato", lambda root: shutil.rmtree(root / "data"), "found none of TOMATO's files"),
    "other records": (
        "tomato",
        lambda root: change(root / "data" / "count.json", lambda c: {"0": {"question": "a"}}),
        "expected TOMATO's",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_reported_as_one_sentence(
    case: str, copy: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, spoil, sentence = BAD[case]
    root = copy(name)
    spoil(root)
    assert sentence in one_sentence(name, root, tmp_path, capsys)


RECORDED: dict[str, tuple[str, str, Callable[[Any], Any], str, str]] = {
    "a letter beyond the options": (
        "tempcompass",
        "questions/multi-choice.json",
        lambda c: c["1000"]["action"][0].update(answer="F. x"),
        "multi-choice/1000/action/0",
        "'F. x' is none of the options",
    ),
    "an answer that is not yes or no": (
        "tempcompass",
        "questions/yes_no.json",
        lambda c: c["1000"]["action"][0].update(answer="maybe"),
        "yes_no/1000/action/0",
        "none of the options 'yes', 'no'",
    ),
    "an index beyond the options": (
        "tomato",
        "data/count.json",
        lambda c: c["0"].update(answer=3),
        "count/0",
        "found 3, expected a number from 0 to 2",
    ),
    "no options": (
        "tomato",
        "data/count.json",
        lambda c: c["0"].update(options=[]),
        "count/0",
        "expected a list of 2 to 26 texts",
    ),
    "more options than letters": (
        "tomato",
        "data/count.json",
        lambda c: c["0"].update(options=[str(number) for number in range(27)]),
        "count/0",
        "expected a list of 2 to 26 texts",
    ),
    "another letter": (
        "vinoground",
        "vinoground_textscore.json",
        lambda c: c[0].update(GT="C"),
        "text/0_pos",
        "found 'C', expected A or B",
    ),
    "half of a pair": (
        "vinoground",
        "vinoground_textscore.json",
        lambda c: c.pop(0),
        "text/0_neg",
        "0_pos, is missing",
    ),
    "a candidate that is none": (
        "tvbench",
        "json/object_count.json",
        lambda c: c[0].update(answer="9"),
        "object_count/0",
        "'9' is none of the candidates",
    ),
    "a caption without a question": (
        "tempcompass",
        "questions/multi-choice.json",
        lambda c: c.pop("1000"),
        "captioning/1000/action/0",
        "no multi-choice question",
    ),
}


@pytest.mark.parametrize("case", RECORDED)
def test_a_bad_record_is_recorded_as_failed(
    case: str, copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, file, edit, id_, sentence = RECORDED[case]
    root = copy(name)
    content = read(root / file)
    edit(content)
    (root / file).write_text(json.dumps(content))
    (item,) = (one for one in loaded(name, root).items if one.id == id_)
    assert item.media is None and sentence in item.error
    assert main(["doctor", "--anno-path", str(root), "--format", name, "--num-workers", "0"]) == 1
    assert sentence.split(",")[-1] in capsys.readouterr().out
    if case == "half of a pair":
        replies(monkeypatch, lambda path, _: "A")
        assert evaluate(name, root / "out", root=root) == 0
        scores = results(root / "out", name)["scores"]
        assert scores["official"]["tasks"]["text"] == 0.0 and results(root / "out", name)["counts"]["failed"] == 1


def test_missing_media_are_reported_and_counted(copy: Callable[[str], Path], tmp_path: Path) -> None:
    root = copy("vinoground")
    (root / "vinoground_videos" / "0_pos.mp4").unlink()
    assert evaluate("vinoground", tmp_path, root=root) == 0
    assert results(tmp_path, "vinoground")["counts"]["failed"] == 1
    assert "0_pos.mp4: there is no such file in" in lines(tmp_path, "vinoground")["text/0_pos"]["error"]
    assert "Failed items" in (tmp_path / "vinoground.md").read_text()


@pytest.mark.parametrize("name", COUNTS)
def test_the_doctor_finds_no_faults_in_an_imitated_benchmark(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--anno-path", str(twins() / name), "--format", name, "--num-workers", "0"])
    said = capsys.readouterr()
    assert code == (name == "tvbench"), said.out  # the folder that each user fetches
    assert "1 missing" in said.err if name == "tvbench" else "nothing found in" in said.out


# ---- probes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_the_temporal_probe_works_on_all_benchmarks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(name, tmp_path, "--limit", "2", "--max-new-tokens", "3", "--probe") == 0
    assert "temporal probe: " in capsys.readouterr().out
    assert CAPTIONING not in (tmp_path / f"{name}.reversed.jsonl").read_text()
    probe = read(tmp_path / f"{name}.probe.json")
    assert probe["compared"] > 0 and set(probe["accuracy"]["all tasks"]) >= {"forward", "reversed", "blank"}


def test_permute_rotates_options_only_if_they_are_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "vinoground", "--permute"]) == 2
    assert "the questions of vinoground contain theirs" in capsys.readouterr().err
    assert evaluate("tomato", tmp_path, "--tasks", "count", "--max-new-tokens", "3", "--permute") == 0
    first, moved = (lines(tmp_path, f"tomato{ending}")["count/0"] for ending in ("", ".rotated1"))
    assert (
        moved["candidates"] == first["candidates"][1:] + first["candidates"][:1] and moved["answer"] == first["answer"]
    )


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="unknown task 'speed'"):
        loaded("tempcompass", tasks=["speed"])
