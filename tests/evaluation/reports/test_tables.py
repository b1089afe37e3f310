"""Tables equal their snapshots; charts are deterministic, and matplotlib is imported only to draw one."""

import subprocess
import sys
from pathlib import Path

import pytest

from stllm.evaluation.reports.tables import Bars, bars_figure, draw_bars, percent, score, table
from stllm.evaluation.scores import share

BARS = Bars(
    title="Two",
    axis="%",
    groups=["first", "second"],
    series={"ours": [10.0, None], "theirs": [20.0, 30.0]},
    notes={"second": "left out"},
)


def test_a_missing_value_draws_no_bar() -> None:
    axes = bars_figure(BARS).axes[0]
    bars = {
        group.get_label(): [(bar.get_y() + bar.get_height() / 2, bar.get_width()) for bar in group]
        for group in axes.containers
    }
    assert bars == {
        "ours": [(pytest.approx(-0.2), 10.0)],
        "theirs": [(pytest.approx(0.2), 20.0), (pytest.approx(1.2), 30.0)],
    }
    assert [text.get_text() for text in axes.texts] == ["10.0", "20.0", "30.0", "left out"]
    legend = axes.get_legend()
    assert legend and [text.get_text() for text in legend.get_texts()] == ["ours", "theirs"]


def test_equal_charts_are_equal_files(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_bars(tmp_path / name, BARS)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2


def test_matplotlib_is_imported_when_a_chart_is_drawn() -> None:
    code = "import sys, stllm.evaluation.reports.tables; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_table_lines_up_as_text() -> None:
    assert table(("task", "strict"), [("Action Sequence", "66.0"), ("a|b\nc", "–")]) == (
        "| task            | strict |\n"
        "| --------------- | -----: |\n"
        "| Action Sequence |   66.0 |\n"
        "| a\\|b c          |      – |\n"
    )


def test_missing_values_are_dashes() -> None:
    assert (percent(None), score(None), share(0, 0)) == ("–", "–", None)
    assert (percent(share(1, 3)), score(3.146)) == ("33.3", "3.15")
