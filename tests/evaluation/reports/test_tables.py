"""Tables in Markdown, to the byte."""

from stllm.evaluation.benchmarks.multiple_choice import share
from stllm.evaluation.reports.tables import percent, score, table


def test_a_table_lines_up_as_text() -> None:
    assert table(("task", "strict"), [("Action Sequence", "66.0"), ("a|b\nc", "–")]) == (
        "| task            | strict |\n"
        "| --------------- | -----: |\n"
        "| Action Sequence |   66.0 |\n"
        "| a\\|b c          |      – |\n"
    )


def test_of_nothing_there_is_no_figure() -> None:
    assert (percent(None), score(None), share(0, 0)) == ("–", "–", None)
    assert (percent(share(1, 3)), score(3.146)) == ("33.3", "3.15")
