"""`benchmarks.quantization` on a tiny model."""

import json
from pathlib import Path

import pytest

from benchmarks.quantization import main
from tests.models.checkpoints.conftest import GOLDEN


@pytest.mark.slow  # a new process
def test_a_row_is_measured_with_stllm_chat(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    main(["--bits", "4bit", "--folder", str(GOLDEN / "minigpt4_plain_all"), "--output-dir", str(tmp_path)])
    result = json.loads((tmp_path / "quantization.json").read_text())
    row = result["rows"][0]
    assert row[""] == "4bit" and 0 < row["loaded, GiB"] <= row["peak, GiB"]
    assert all(row[column] > 0 for column in row if column.endswith(", s"))
    assert result["sizes"]["frames"] == 8
