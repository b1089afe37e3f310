"""The page in a real browser: upload, questions, stop, a new video, evidence, probe, two tabs, bad input.

This needs Chromium and `pip install playwright` (without its own browser). STLLM_SHOTS=DIR stores screenshots.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from stllm.conversation.chat import Chat, find_examples
from stllm.serving.limits import PageLimits
from tests.helpers.demo import answer_without_end, served
from tests.helpers.videos import write_video

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (chromium, chromium-browser, google-chrome)"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 30_000  # milliseconds; only a test that fails waits so long
FIRST, SECOND = "what moves first", "which color is the square"
Page = Any


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "uploads").mkdir()
    for name, count in (("one", 20), ("two", 31)):
        write_video(folder / f"{name}.mp4", num_frames=count, size=(64, 48))
    (folder / "text.mp4").write_text("no video at all\n" * 9)
    (folder / "large.mp4").write_bytes(os.urandom(3 << 20))
    return folder


@pytest.fixture(scope="module")
def url(chat: Chat, place: Path) -> Iterator[str]:
    with served(chat, place / "uploads", PageLimits(media_bytes=1 << 20)) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tabs(browser: Any, url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open tabs of one browser. At the end, check that no request left this machine, and that no script failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    requests: list[str] = []
    faults: list[str] = []

    def open_tab() -> Page:
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda one: requests.append(one.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#question textarea")
        page.wait_for_selector("#video input[type=file]", state="attached")
        return page

    yield open_tab
    if folder := os.environ.get("STLLM_SHOTS"):
        for number, page in enumerate(context.pages):
            page.screenshot(path=f"{folder}/{request.node.name}.{number}.png", full_page=True)
    context.close()
    assert not [one for one in requests if not one.startswith((url, "data:", "blob:"))]
    assert not faults


def upload(page: Page, path: Path) -> None:
    page.set_input_files("#video input[type=file]", path)
    page.wait_for_selector("text=Ready: ask about it.")


def ask(page: Page, question: str) -> None:
    """Ask, and wait for the answer. gradio drops an event while the previous one is still ending."""
    page.fill("#question textarea", question)
    while page.input_value("#question textarea") == question and page.locator("#send").is_visible():
        page.press("#question textarea", "Enter")
        with suppress(playwright.TimeoutError):  # a second Enter soon after would ask an empty question
            page.wait_for_selector("#stop", timeout=2000)
    page.wait_for_selector("#send")


def messages(page: Page) -> list[str]:
    """Return the texts of questions and answers in turn."""
    return [text.strip() for text in page.locator("#chat .message-content, #chat .message .prose").all_inner_texts()]


def streamed(chat: Chat, path: Path, questions: list[str]) -> list[str]:
    conversation = chat.conversation(path)
    return ["".join(conversation.stream(question)).strip() for question in questions]


def same(shown: list[str], expected: list[str]) -> bool:
    """Compare texts, ignoring spaces and control characters, which an untrained model generates."""
    return [re.sub(r"[\s\x00-\x1f]+", "", text) for text in shown] == [
        re.sub(r"[\s\x00-\x1f]+", "", text) for text in expected
    ]


def test_an_example_is_shown_and_asked_about(tabs: Any, chat: Chat) -> None:
    """The frames are visible together with the answer, for any number of examples."""
    path, question = find_examples()[1]
    page = tabs()
    page.locator("#examples tbody tr").nth(1).click()
    page.wait_for_selector("text=Ready: ask about it.")
    assert page.input_value("#question textarea") == question
    ask(page, question)
    assert same(messages(page), [question, *streamed(chat, path, [question])])
    top = page.locator("#chat").bounding_box()["y"]
    strip = page.locator("#film").bounding_box()
    assert 0 <= top < strip["y"] and strip["y"] + strip["height"] <= 900


def test_a_conversation_about_a_video(tabs: Any, chat: Chat, place: Path) -> None:
    page = tabs()
    upload(page, place / "one.mp4")
    assert page.locator(".film-frame").count() == 6
    assert "0:00.0" in page.inner_text("#film")
    ask(page, FIRST)
    ask(page, SECOND)
    answers = streamed(chat, place / "one.mp4", [FIRST, SECOND])
    assert same(messages(page), [FIRST, answers[0], SECOND, answers[1]])
    assert re.search(r"Reading\s*kept · 6 frames\s*Encoding\s*[\d.]+ s · 24 visual tokens", page.inner_text("#status"))
    assert re.search(r"Answering\s*[\d.]+ s · \d+ tokens", page.inner_text("#status"))

    page.click("#evidence")
    page.wait_for_selector(".film-curve")
    assert page.locator(".film-curve rect").count() == 6 and page.locator(".film-peak").count() == 1
    page.wait_for_selector("#send")
    assert "Answering" not in page.inner_text("#status")
    page.click("#temporal")
    page.wait_for_selector(".probe-words")
    assert page.locator(".probe-card").count() == 5
    page.wait_for_selector("#send")
    assert re.search(r"Answering\s*[\d.]+ s · \d+ tokens", page.inner_text("#status"))
    assert page.locator(".film-curve").count() == 1  # of the same frames
    assert same(messages(page), [FIRST, answers[0], SECOND, answers[1]])

    page.click("#undo")
    page.wait_for_function("document.querySelector('#question textarea').value !== ''")
    assert page.input_value("#question textarea") == SECOND
    assert same(messages(page), [FIRST, answers[0]])
    page.click("#retry")
    page.wait_for_selector("#stop")
    page.wait_for_selector("#send")
    assert same(messages(page), [FIRST, answers[0]])
    page.click("#clear")
    page.wait_for_selector(".welcome")
    assert messages(page) == [] and page.locator(".film-frame").count() == 6


def ask_without_end(page: Any, chat: Chat, place: Path, monkeypatch: pytest.MonkeyPatch) -> Event:
    """Ask about a clip, and return while the answer is being generated. The event is set when it has ended."""
    upload(page, place / "one.mp4")
    closed = answer_without_end(chat, monkeypatch, 0.05)
    page.fill("#question textarea", FIRST)
    page.click("#send")
    page.wait_for_selector("#chat >> text=word word")
    return closed


def test_stop_keeps_the_text_so_far(tabs: Any, chat: Chat, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tabs()
    closed = ask_without_end(page, chat, place, monkeypatch)
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    assert closed.wait(30)
    assert messages(page)[1].startswith("word word")
    monkeypatch.undo()
    ask(page, SECOND)
    assert len(messages(page)) == 4


def test_a_new_video_starts_a_conversation_during_an_answer(tabs: Any, chat: Chat, place: Path, monkeypatch) -> None:
    page = tabs()
    closed = ask_without_end(page, chat, place, monkeypatch)
    page.locator("#video button[aria-label=Clear]").click()
    page.wait_for_selector("text=There is no video yet")
    assert closed.wait(30) and messages(page) == []
    monkeypatch.undo()
    upload(page, place / "two.mp4")
    ask(page, FIRST)
    assert same(messages(page), [FIRST, *streamed(chat, place / "two.mp4", [FIRST])])


def test_a_closed_tab_ends_its_answer(tabs: Any, chat: Chat, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tabs()
    closed = ask_without_end(page, chat, place, monkeypatch)
    page.close()
    assert closed.wait(60)
    monkeypatch.undo()
    other = tabs()
    upload(other, place / "two.mp4")
    ask(other, FIRST)
    assert len(messages(other)) == 2


def test_two_tabs_are_two_conversations(tabs: Any, chat: Chat, place: Path) -> None:
    one, two = tabs(), tabs()
    upload(one, place / "one.mp4")
    upload(two, place / "two.mp4")
    for page in (one, two):
        page.fill("#question textarea", FIRST)
    for page in (one, two):
        page.click("#send")
    for page, name in ((one, "one.mp4"), (two, "two.mp4")):
        page.wait_for_selector("#status >> text=/Answering\\s*[\\d.]+ s/")
        page.wait_for_selector("#send")
        assert same(messages(page), [FIRST, *streamed(chat, place / name, [FIRST])])


def test_an_image(tabs: Any, place: Path) -> None:
    from PIL import Image

    path = place / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    page = tabs()
    page.click("button[role=tab]:has-text('Image')")
    page.set_input_files("#image input[type=file]", path)
    page.wait_for_selector("text=Ready: ask about it.")
    ask(page, FIRST)
    assert len(messages(page)) == 2 and page.locator(".film-frame").count() == 1
    page.click("#temporal")
    page.wait_for_selector("text=needs a video of at least two frames")


def test_bad_input_is_reported(tabs: Any, place: Path) -> None:
    page = tabs()
    page.fill("#question textarea", FIRST)
    page.click("#send")
    page.wait_for_selector("text=There is no video yet")
    page.set_input_files("#video input[type=file]", place / "text.mp4")
    page.wait_for_selector("[role=alert] >> text=text.mp4: found text")
    page.locator("#video button[aria-label=Clear]").click()
    page.wait_for_selector("text=There is no video yet")
    page.set_input_files("#video input[type=file]", place / "large.mp4")
    page.wait_for_selector("text=/maximum allowed size|too large/i")
    page.reload()
    upload(page, place / "one.mp4")
    page.click("#send")
    page.wait_for_selector("[role=alert] >> text=the question is empty")
    ask(page, "what " * 700)
    page.wait_for_selector("[role=alert] >> text=512 positions")
    assert page.input_value("#question textarea").startswith("what what")
    ask(page, FIRST)
    assert len(messages(page)) == 2


def test_html_and_markdown_are_shown_as_text(tabs: Any, place: Path) -> None:
    page = tabs()
    upload(page, place / "one.mp4")
    question = '<b>x</b> <img src="/nowhere" onerror="alert(1)"> **y** `z` $a^2$ <script>alert(2)</script>'
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    ask(page, question)
    assert messages(page)[0] == question
    page.click("#temporal")
    page.wait_for_selector(".probe-words")
    assert question in page.inner_text("#probe")
    assert page.locator("#chat b, #chat strong, #chat code, #chat script, #chat img, #probe img[src^='/']").count() == 0
