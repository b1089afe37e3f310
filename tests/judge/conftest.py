"""A fake judge for every test of this folder."""

from collections.abc import Iterator

import pytest

from tests.helpers.judge_server import FakeJudge, judge_server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses of openai's client to a millisecond."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    """Start a fake judge that scores correctly; tests may replace its `behave`."""
    with judge_server() as judge:
        yield judge
