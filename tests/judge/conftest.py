"""A fake judge for every test of this folder."""

from collections.abc import Iterator

import pytest

from tests.helpers.judge_server import FakeJudge, judge_server


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let openai's client pause for a millisecond."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


@pytest.fixture
def server() -> Iterator[FakeJudge]:
    """An honest judge, until a test gives it another `behave`."""
    with judge_server() as judge:
        yield judge
