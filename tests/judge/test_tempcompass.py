"""`stllm judge tempcompass`: captions and replies that no rule can score are judged once; scores combine both."""

import json
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.conversation.chat import FOLDER
from stllm.evaluation.axes import TEMPCOMPASS
from stllm.judge.items import CAPTION, load_prompts, read_predictions
from stllm.judge.parser import CutOff, Unparsable, parse_decision
from tests.helpers.judge_server import MODEL, Answer, fails, fair, judge_server, says, texts_of
from tests.helpers.twins import twins

RIGHT = "B. jumping"


def line(id_: str, task: str, video: str, **fields: Any) -> dict[str, Any]:
    known = {"question": "Which?\nA. running\nB. jumping", "answer": RIGHT, "groups": {"dimension": ["action"]}}
    return {"id": id_, "task": task, "video": video, **known, "error": None, **fields}


def ruled(prediction: str, official: bool | None, **fields: Any) -> dict[str, Any]:
    correct = {"strict": False, "official": bool(official)}
    parsed = {"strict": False, "official": official is not None}
    return {"prediction": prediction, "correct": correct, "parsed": parsed, **fields}


MC = {"mc_question": "Which?\nA. running\nB. jumping", "mc_answer": RIGHT}
LINES = [
    line("multi-choice/1/action/0", "multi-choice", "1.mp4", **ruled("B", True)),
    line("multi-choice/2/action/0", "multi-choice", "2.mp4", **ruled("It jumps", None)),
    line("multi-choice/3/action/0", "multi-choice", "3.mp4", **ruled("It runs", None)),
    line("captioning/1/action/0", "captioning", "1.mp4", prediction="A frog is jumping.", **MC),
    line("captioning/2/action/0", "captioning", "2.mp4", prediction="Nothing.", **MC),
    line("captioning/3/action/0", "captioning", "3.mp4", prediction=None, error="3.mp4: there is no such file"),
]


def behave(request: dict[str, Any], number: int) -> Answer:
    """Judge correctly; for a caption, the judge does not see the answer."""
    texts = texts_of(request)
    if "Description" in texts:
        assert "Correct answer" not in texts and RIGHT not in request["messages"][0]["content"]
        return says(str({"answer": "B" if "jump" in texts["Description"] else "none"}))
    return says(str({"pred": "yes" if "jump" in texts["Predicted answer"] else "no"}))


def write(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "tempcompass.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def judge(path: Path, *more: str, url: str | None = None) -> int:
    asking = [] if url is None else ["--base-url", url, "--model", MODEL]
    output = ["--output-dir", str(path.parent / "judged")]
    return main(["judge", TEMPCOMPASS, "--pred-path", str(path), *output, *asking, *more])


def results(path: Path) -> dict[str, Any]:
    return dict(json.loads((path.parent / "judged" / "tempcompass.results.json").read_text()))


def test_tempcompass_scores_combine_rules_and_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, LINES)
    with judge_server(behave) as server:
        assert judge(path, url=server.url) == 0
        assert len(server.requests) == 4  # what a rule settled, and what has no prediction, is not asked
    found = results(path)
    assert found["accuracy"] == 50.0 and found["counts"] == {"total": 5, "scored": 4, "failed": 0, "unanswered": 1}
    scores = found["scores"]["official"]
    assert scores["tasks"] == {"multi-choice": pytest.approx(200 / 3), "captioning": pytest.approx(100 / 3)}
    assert scores["average"] == 50.0 and scores["groups"]["dimension"]["action"]["items"] == 6
    assert scores["interval"][0] < 50.0 < scores["interval"][1]
    assert found["scores"]["strict"]["tasks"]["multi-choice"] == 0.0  # the judge decides nothing there
    assert "official rules and judge: 50.0 % (95 % interval" in capsys.readouterr().out
    before = (tmp_path / "judged" / "tempcompass.ledger.jsonl").read_text()
    assert [json.loads(one).get("form", "") for one in before.splitlines()[1:]].count(CAPTION) == 2
    assert judge(path, "--offline") == 0 and results(path)["scores"] == found["scores"]


def test_judging_the_imitated_tempcompass(tmp_path: Path) -> None:
    """Evaluate the tiny model; the judge accepts every reply, and assigns every caption to option B."""
    files = ["--anno-path", str(twins() / "tempcompass"), "--output-dir", str(tmp_path), "--num-frames", "2"]
    assert main(["evaluate", "tempcompass", "--ckpt-path", str(FOLDER), *files, "--device", "cpu"]) == 0
    records = [json.loads(text) for text in (tmp_path / "tempcompass.jsonl").read_text().splitlines()]
    open_ones = [record for record in records if not record.get("parsed", {}).get("official")]
    captions = [record for record in records if record["task"] == "captioning"]
    with judge_server(lambda request, _: says("{'pred': 'yes'}" if "Correct" in str(request) else "B")) as server:
        assert judge(tmp_path / "tempcompass.jsonl", url=server.url) == 0
        assert len(server.requests) == len(open_ones)
    scores = results(tmp_path / "tempcompass.jsonl")["scores"]["official"]
    settled = [record for record in records if record.get("parsed", {}).get("official")]
    right = sum(record["correct"]["official"] for record in settled) + len(open_ones) - len(captions)
    right += sum(record["mc_answer"].startswith("B") for record in captions)
    assert scores["average"] == pytest.approx(100 * right / 50)
    assert set(scores["tasks"]) == {"multi-choice", "yes_no", "caption_matching", "captioning"}


def test_an_interrupted_tempcompass_judge_is_resumed(tmp_path: Path) -> None:
    path = write(tmp_path, LINES)
    broken = lambda request, number: behave(request, number) if number < 3 else fails(400, "broken")  # noqa: E731
    with judge_server(broken) as server:
        assert judge(path, "--concurrency", "1", "--max-retries", "0", url=server.url) == 0
    assert results(path)["counts"]["failed"] == 2
    with judge_server(behave) as server:
        assert judge(path, url=server.url) == 0
        assert len(server.requests) == 2
    assert results(path)["scores"]["official"]["average"] == 50.0


def test_tempcompass_without_anything_to_judge_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, LINES[:1])
    assert judge(path, url="http://127.0.0.1:9/v1") == 1
    assert "lines with captions, or with replies that no rule settles" in capsys.readouterr().err
    path.write_text('{"id": 1, "question": "q", "answer": "a", "pred": "b"}\n')
    assert judge(path, url="http://127.0.0.1:9/v1") == 1


def test_tempcompass_instructions_have_a_separate_hash() -> None:
    assert load_prompts(None, TEMPCOMPASS).digest != load_prompts(None).digest
    assert set(load_prompts(None, TEMPCOMPASS).prompts) == {TEMPCOMPASS, CAPTION}


def test_a_caption_is_judged_by_its_multiple_choice_question(tmp_path: Path) -> None:
    (caption,) = (item for item in read_predictions(str(write(tmp_path, LINES[3:4])), TEMPCOMPASS).items)
    assert (caption.form, caption.question, caption.answer) == (CAPTION, MC["mc_question"], RIGHT)


@pytest.mark.parametrize(
    ("reply", "pred"),
    [
        ("{'pred': 'yes'}", "yes"),
        ("```python\n{'pred': 'no'}\n```", "no"),
        ("<think>yes?</think>{'pred': 'no', 'score': 1}", "no"),
        ("Correct", "yes"),
        ("Incorrect. It runs.", "no"),
        ("I cannot tell", None),
        ("{'pred': 'perhaps'}", None),
        ("", None),
    ],
)
def test_replies_about_a_choice(reply: str, pred: str | None) -> None:
    if pred is None:
        with pytest.raises(Unparsable):
            parse_decision(reply, None)
    else:
        verdict = parse_decision(reply, None)
        assert (verdict.pred, verdict.score) == (pred, 5.0 if pred == "yes" else 0.0)


@pytest.mark.parametrize(
    ("reply", "pred"),
    [
        ("{'answer': 'B'}", "yes"),
        ("{'answer': 'A'}", "no"),
        ("{'answer': 'none'}", "no"),
        ("{'answer': 'B. jumping'}", "yes"),
        ("Reasoning: it jumps.\nAnswer: B. jumping", "yes"),
        ("Answer: None of the choices are correct", "no"),
        ("B", "yes"),
        ("A frog jumps", None),
        ("{'answer': 'A'} or {'answer': 'B'}", None),
    ],
)
def test_replies_about_a_caption(reply: str, pred: str | None) -> None:
    if pred is None:
        with pytest.raises(Unparsable):
            parse_decision(reply, RIGHT)
    else:
        assert parse_decision(reply, RIGHT).pred == pred


def test_a_reply_that_was_cut_off_is_no_verdict() -> None:
    with pytest.raises(CutOff):
        parse_decision("Correct is what I would", None, cut=True)


def test_scores_have_intervals_clustered_by_video(tmp_path: Path) -> None:
    """VideoQA: two questions about each of two videos, correct for one video: the interval is that of two draws."""
    records = [
        {"id": number, "video_name": f"v{number // 2}", "question": "q", "answer": "a", "pred": "ab"[number // 2]}
        for number in range(4)
    ]
    path = tmp_path / "pred.json"
    path.write_text(json.dumps(records))
    with judge_server() as server:
        argv = ["--pred-path", str(path), "--output-dir", str(tmp_path), "--base-url", server.url, "--model", MODEL]
        assert main(["judge", "qa", *argv]) == 0
    found = json.loads((tmp_path / "qa.results.json").read_text())
    assert found["accuracy"] == 50.0 and found["intervals"]["accuracy"] == [0.0, 100.0]  # 50 ± 1.96 * 35.4
    low, high = found["intervals"]["mean"]  # scores of 5 and 1
    assert low == pytest.approx(3.0 - 1.959964 * 2**0.5) and high == 5.0


def test_ledgers_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first run answers half of VcgBench's questions correctly, the second run all of them."""
    for name, words in (("a", ("right", "wrong")), ("b", ("right", "right"))):
        records = [
            {"video_name": f"v{number}", "Q": "q?", "A": "right", "pred": words[number % 2]} for number in range(6)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        with judge_server(fair) as server:
            argv = ["--pred-path", str(tmp_path / f"{name}.json"), "--output-dir", str(tmp_path / name)]
            assert main(["judge", "detail", *argv, "--base-url", server.url, "--model", MODEL]) == 0
    capsys.readouterr()
    paths = [str(tmp_path / name / "detail.ledger.jsonl") for name in "ab"]
    assert main(["table", "--compare", *paths, "--output", str(tmp_path / "both")]) == 0
    assert "b/detail.ledger against a/detail.ledger" in capsys.readouterr().out
    found = json.loads((tmp_path / "both.json").read_text())["strict"]["all items"]
    assert (*found["accuracies"], found["difference"]) == pytest.approx((3.0, 5.0, 2.0))
    assert (found["gained"], found["lost"]) == (3, 0)
    assert found["p"] == pytest.approx(2 / 2**3)
    error = 5 * (6 * 0.4**2) ** 0.5 / 6  # of changes of 0 and 0.8
    assert found["interval"] == pytest.approx([2.0 - 1.959964 * error, 2.0 + 1.959964 * error])
