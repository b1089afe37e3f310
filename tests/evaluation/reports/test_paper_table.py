"""The paper's table with a row from results files of `stllm evaluate` and `stllm judge`."""

import json
from pathlib import Path
from typing import Any

import pytest

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.evaluation import results
from stllm.evaluation.axes import VCGBENCH_AXES
from stllm.evaluation.reports.paper_table import paper_table
from tests.helpers.benchmarks import choice_benchmark, choice_item, lines_of

HEADER = (
    "|                      | MVBench | VcgBench avg | Correctness | Detail | Context | Temporal | Consistency | MSVD "
    "| MSRVTT | ANet |"
)


def judged(path: Path, axis: str, mean: float | None = 3.5, **changes: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "axis": axis,
        "mean": mean,
        "mean_truncated": None if mean is None else mean - 0.4,
        "accuracy": 70.25 if axis == "qa" else None,
        "counts": {"scored": 4, "failed": 1, "unanswered": 2},
        "judge": "judge-1",
        "prompt_digest": "c0ffee",
    }
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return str(path)


def axes_of(folder: Path, **changes: Any) -> list[str]:
    means = dict(zip(VCGBENCH_AXES, (3.0, 3.1, 3.2, 3.3, 3.4), strict=True))
    return [judged(folder / f"{axis}.results.json", axis, mean, **changes) for axis, mean in means.items()]


def mvbench(folder: Path, name: str = "mvbench", **evaluation: Any) -> str:
    """Write results in which three of four are correct by the official rule, and two by the strict rule."""
    benchmark = choice_benchmark([choice_item(number) for number in range(4)])
    said = dict(zip((item.id for item in benchmark.items), ("A", "B", "", "A"), strict=True))
    about: dict[str, Any] = {"settings": {"evaluation": evaluation}, "digests": {}, "seconds": 1.0}
    lines = lines_of(benchmark, lambda item: said[item.id])
    results.write(folder, name, benchmark, results.Outcome(lines, **about))
    return str(folder / f"{name}.results.json")


def rows_of(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_a_complete_row_of_the_paper_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videoqa = [f"{name}={judged(tmp_path / name / 'r.json', 'qa')}" for name in ("msvd", "msrvtt", "activitynet")]
    assert main(["table", mvbench(tmp_path), *axes_of(tmp_path), *videoqa]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == HEADER
    rows = rows_of(text)
    assert list(rows) == [
        *("VideoChatGPT", "LLaMA-VID", "Chat-UniVi", "VideoChat2", "ST-LLM"),
        *("ours, official rules", "ours, strict rules"),
    ]
    assert rows["LLaMA-VID"] == ["–", "2.89", "2.96", "3.00", "3.53", "2.46", "2.51", "69.7", "57.7", "47.4"]
    assert rows["ST-LLM"] == ["54.9", "3.15", "3.23", "3.05", "3.74", "2.93", "2.81", "74.6", "63.2", "50.9"]
    qa = ["70.2"] * 3
    assert rows["ours, official rules"] == ["75.0", "2.80", "2.60", "2.70", "2.80", "2.90", "3.00", *qa]
    assert rows["ours, strict rules"] == ["50.0", "3.20", "3.00", "3.10", "3.20", "3.30", "3.40", *qa]
    assert "Rows above ours: published (arXiv 2404.00308)" in text
    assert "judge judge-1, instructions c0ffee, 3 not judged" in text and "4 answered, 0 failed, 0 excluded" in text


def test_missing_results_are_dashes(tmp_path: Path) -> None:
    rows = rows_of(paper_table([judged(tmp_path / "r.json", "temporal")]))
    assert rows["ours, strict rules"] == ["–", "–", "–", "–", "–", "3.50", "–", "–", "–", "–"]
    rows = rows_of(paper_table([judged(tmp_path / "r.json", "temporal", None)]))
    assert set(rows["ours, strict rules"]) == {"–"}


@pytest.mark.parametrize(
    ("change", "words"), [({"judge": "judge-2"}, "judge"), ({"prompt_digest": "decade"}, "instructions")]
)
def test_scores_of_different_judges_or_instructions_are_never_averaged(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    files = axes_of(tmp_path)
    files[3] = judged(tmp_path / "other.json", "temporal", 3.5, **change)
    text = paper_table(files)
    assert rows_of(text)["ours, strict rules"][1] == "–" and rows_of(text)["ours, strict rules"][5] == "3.50"
    assert f"no average of VcgBench: the axes have another {words} each" in text


def test_videoqa_beside_its_predictions_needs_no_name(tmp_path: Path) -> None:
    (tmp_path / "run.results.json").write_text('{"benchmark": "msrvtt", "scores": {}, "counts": {}}')
    rows = rows_of(paper_table([judged(tmp_path / "run.judged" / "qa.results.json", "qa")]))
    assert rows["ours, official rules"][7:] == ["–", "70.2", "–"]


def ours(text: str) -> list[str]:
    return [row for row in rows_of(text) if row.startswith("ours")]


def test_a_row_names_partly_asked_benchmarks(tmp_path: Path) -> None:
    whole = ["ours, official rules", "ours, strict rules"]
    assert ours(paper_table([mvbench(tmp_path, limit=None, tasks=[])])) == whole
    first = mvbench(tmp_path, limit=5, tasks=[])
    assert ours(paper_table([first])) == [f"{row} (MVBench: first 5 a task)" for row in whole]
    (tmp_path / "vcg.results.json").write_text(
        '{"benchmark": "vcgbench", "counts": {}, "settings": {"evaluation": {"limit": 7, "tasks": ["generic"]}}}'
    )
    axes = axes_of(tmp_path / "vcg.judged")  # five columns of one benchmark
    both = "MVBench: 2 of its tasks, first 3 a task; VcgBench: first 7 a task"
    text = paper_table([mvbench(tmp_path, limit=3, tasks=["a", "b"]), *axes])
    assert ours(text) == [f"{row} ({both})" for row in whole]
    assert rows_of(text)[f"ours, official rules ({both})"][:2] == ["75.0", "2.80"]


def test_unknown_facts_about_a_judges_file_are_noted(tmp_path: Path) -> None:
    said = "4 judged; whether those are all of the benchmark's the file does not say"
    (tmp_path / "run.results.json").write_text('{"benchmark": "msvd", "counts": {}}')
    assert said in paper_table([judged(tmp_path / "r.json", "temporal")])
    assert said not in paper_table([judged(tmp_path / "run.judged" / "qa.results.json", "qa")])


@pytest.mark.parametrize(
    "changed",
    [{"settings": [1]}, {"settings": {"evaluation": [1]}}, {"settings": {"evaluation": {"tasks": 5}}}, {"axis": [""]}],
)
def test_a_damaged_results_file_is_refused(changed: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "run.results.json"
    path.write_text(json.dumps({"benchmark": "mvbench", "scores": {}, "counts": {}, **changed}))
    assert main(["table", str(path)]) == 1
    assert f"{path}: another kind of file; expected a results file" in capsys.readouterr().err


def test_wrong_inputs_are_reported_as_one_sentence(tmp_path: Path) -> None:
    qa = judged(tmp_path / "qa.json", "qa")
    (tmp_path / "msvd.results.json").write_text('{"benchmark": "msvd", "scores": {}, "counts": {}}')
    (tmp_path / "tvbench.results.json").write_text('{"benchmark": "tvbench", "scores": {"strict": {}}, "counts": {}}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "text.json").write_text("Hello")
    (tmp_path / "half.json").write_text('{"benchmark": "mvbench", "scores": {}, "counts": {"answered": 1}}')
    for entries, words in (
        ([qa], "of which benchmark is it? the file does not say, the table has columns for msvd, msrvtt, activitynet"),
        ([f"tgif={qa}"], "unknown benchmark 'tgif': known are activitynet, msrvtt, msvd"),
        ([f"msvd={qa}", f"msvd={qa}"], "a second result for the column MSVD"),
        ([str(tmp_path / "tvbench.results.json")], "no column for tvbench: `stllm evaluate suite` prints a table"),
        ([str(tmp_path / "msvd.results.json")], "of msvd it has counts and no scores: run `stllm judge`"),
        ([str(tmp_path / "list.json")], "another kind of file; expected a results file"),
        ([str(tmp_path / "text.json")], "no JSON; expected a results file"),
        ([str(tmp_path / "half.json")], "lacks 'failed'; expected a results file"),
        ([str(tmp_path / "none.json")], "cannot be read .No such file or directory"),
    ):
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            paper_table(entries)
