"""The page's handlers: answers equal the chat's, tabs are separate, and every failure is shown as a sentence."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.conversation.evidence import measure_evidence
from stllm.conversation.requests import Media, Request
from stllm.media.views import VIEWS
from stllm.processors.templates import Turn
from stllm.serving.limits import PageLimits
from stllm.web.handlers import NO_ANSWER, NO_VIDEO, Handlers, Session
from tests.helpers.demo import answer_without_end
from tests.web.conftest import CONTROLS, last

FIRST, SECOND = "what moves first", "which color is the square"


def about(handlers: Handlers, path: Path, session: Session | None = None) -> Session:
    """Return the session of a tab in which the file was uploaded and read."""
    session = session or Session()
    handlers.begin(session, str(path))
    list(handlers.look(session, CONTROLS[0]))
    return session


def said(handlers: Handlers, session: Session, question: str, *controls: object) -> list[dict[str, Any]]:
    return list(handlers.ask(session, question, *(controls or CONTROLS)))


def test_reading_shows_the_frames_and_caches_the_encoding(handlers: Handlers, folder: Path) -> None:
    session = Session()
    handlers.begin(session, str(folder / "one.mp4"))
    shown = list(handlers.look(session, 6))
    film = session.talk.film
    assert film is not None and len(film.pictures) == 6 and film.times == pytest.approx(sorted(film.times))
    assert last(shown, "film").count("<img") == 6
    assert "6 frames" in last(shown, "status") and "24 visual tokens" in last(shown, "status")
    assert shown[0]["busy"] and last(shown, "busy") is False
    calls = []
    handle = handlers.service.chat.model.vision_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    said(handlers, session, FIRST)
    said(handlers, session, SECOND)
    handle.remove()
    assert not calls


def test_a_conversation_equals_the_chats(handlers: Handlers, folder: Path) -> None:
    """Two turns are streamed, and equal the chat's answers with the same history."""
    session = about(handlers, folder / "one.mp4")
    shown = [said(handlers, session, question) for question in (FIRST, SECOND)]
    conversation = handlers.service.chat.conversation(
        folder / "one.mp4", num_frames=6, num_beams=1, max_new_tokens=8, temperature=0.0
    )
    answers = [conversation.ask(question).text for question in (FIRST, SECOND)]
    assert [turn.answer for turn in session.talk.turns] == answers
    assert [message["content"] for message in last(shown[1], "chat")][1::2] == answers
    texts = [one["chat"][-1]["content"] for one in shown[0] if "chat" in one]
    assert texts[0] == "…" and len(set(texts)) > 3  # it grows
    assert all(answers[0].startswith(text) for text in texts[1:] if text != "…")
    assert shown[0][0]["question"] == "" and shown[0][0]["busy"]


def test_several_beams_show_the_complete_answer(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    shown = said(handlers, session, FIRST, 6, 3, 0, 8)
    expected = handlers.service.chat.ask(folder / "one.mp4", FIRST, num_frames=6, num_beams=3, max_new_tokens=8).text
    assert session.talk.turns == [Turn(FIRST, expected)]
    assert {one["chat"][-1]["content"] for one in shown if "chat" in one} == {"…", expected}


def test_another_number_of_frames_is_read_again(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    shown = said(handlers, session, FIRST, 4, 1, 0, 8)
    assert session.talk.film is not None and len(session.talk.film.times) == 4
    assert last(shown, "film").count("<img") == 4
    assert session.talk.turns[0].answer == handlers.service.chat.ask(folder / "one.mp4", FIRST, num_frames=4).text


def test_tabs_have_separate_conversations(handlers: Handlers, folder: Path) -> None:
    one, two = about(handlers, folder / "one.mp4"), about(handlers, folder / "two.mp4")
    first, second = handlers.ask(one, FIRST, *CONTROLS), handlers.ask(two, SECOND, *CONTROLS)
    for _ in first:  # by turns, until the first ends
        next(second, None)
    list(second)
    chat = handlers.service.chat
    assert one.talk.turns == [Turn(FIRST, chat.ask(folder / "one.mp4", FIRST).text)]
    assert two.talk.turns == [Turn(SECOND, chat.ask(folder / "two.mp4", SECOND).text)]


def test_stop_keeps_the_text_so_far(handlers: Handlers, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = about(handlers, folder / "one.mp4")
    closed = answer_without_end(handlers.service.chat, monkeypatch)
    shown = []
    for one in handlers.ask(session, FIRST, *CONTROLS):
        shown.append(one)
        if "word word" in one.get("chat", [{"content": ""}])[-1]["content"]:
            handlers.stop(session)
    assert closed.wait(30)
    assert "Stopped." in last(shown, "status") and last(shown, "busy") is False
    assert session.talk.turns[0].question == FIRST
    assert str(session.talk.turns[0].answer).startswith("word word")


def test_a_closed_tab_ends_the_answer(handlers: Handlers, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = about(handlers, folder / "one.mp4")
    closed = answer_without_end(handlers.service.chat, monkeypatch)
    shown = handlers.ask(session, FIRST, *CONTROLS)
    while "word" not in next(shown).get("chat", [{"content": ""}])[-1]["content"]:
        pass
    shown.close()  # type: ignore[attr-defined]
    assert closed.wait(30)
    monkeypatch.undo()
    assert said(handlers, about(handlers, folder / "two.mp4"), FIRST)  # the model is free


def test_a_new_video_ends_the_answer_about_the_old(handlers: Handlers, folder: Path, monkeypatch) -> None:
    session = about(handlers, folder / "one.mp4")
    answer_without_end(handlers.service.chat, monkeypatch)
    begun, after = None, []
    for one in handlers.ask(session, FIRST, *CONTROLS):
        if begun is not None:
            after.append(one)
        elif one.get("chat", [{"content": ""}])[-1]["content"].startswith("word"):
            begun = handlers.begin(session, str(folder / "two.mp4"))
    assert begun is not None and begun["chat"] == [] and session.talk.turns == []
    assert session.talk.path == str(folder / "two.mp4")
    # what the old answer showed may come to the browser after that: its last word is the new conversation
    assert [one["chat"] for one in after] == [[]]


def test_undo_retry_clear(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    said(handlers, session, FIRST)
    said(handlers, session, SECOND)
    before = list(session.talk.turns)
    list(handlers.retry(session, *CONTROLS))
    assert session.talk.turns == before
    shown = handlers.undo(session)
    assert shown["question"] == SECOND and session.talk.turns == before[:1]
    shown = handlers.clear(session)
    assert shown["chat"] == [] and session.talk.turns == []
    assert session.talk.film is not None and shown["film"].count("<img") == 6
    assert NO_ANSWER in handlers.undo(session)["status"]


def test_a_failed_retry_loses_nothing(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    said(handlers, session, FIRST)
    before = list(session.talk.turns)
    shown = list(handlers.retry(session, 6, 99, 0, 8))
    assert "the number of beams is 99: expected a number from 0 to 8" in last(shown, "status")
    assert session.talk.turns == before and len(last(shown, "chat")) == 2


def test_evidence_equals_the_chats(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    said(handlers, session, FIRST)
    said(handlers, session, SECOND)
    shown = list(handlers.evidence(session, *CONTROLS))
    turns = session.talk.turns
    request = Request((turns[0], Turn(SECOND)), Media(str(folder / "one.mp4"), num_frames=6))
    expected = measure_evidence(handlers.service.chat, request, turns[1].answer)
    found = session.talk.evidence
    assert found is not None and found.scores == pytest.approx(expected.scores)
    assert last(shown, "film").count("<rect") == 6 and "film-curve" in last(shown, "film")
    assert all("Answering" not in one["status"] for one in shown if "status" in one)  # no answer is generated
    said(handlers, session, FIRST)
    assert session.talk.evidence is None  # it was about another answer


def test_the_probe_asks_in_every_view(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    shown = list(handlers.probe(session, FIRST, *CONTROLS))
    expected = [handlers.service.chat.ask(folder / "one.mp4", FIRST, view=view, num_frames=6).text for view in VIEWS]
    html = last(shown, "probe")
    assert [html.count(f"<b>{view}") for view in VIEWS] == [1] * 5 and len(set(expected)) > 1
    assert all(f"<p>{answer}</p>" in html for answer in expected)
    assert session.talk.turns == []
    tokens = sum(handlers.service._num_tokens(answer) for answer in expected)
    done = last(shown, "status")
    assert re.search(rf'stage done"><b>Answering</b><span>[\d.]+ s · {tokens} tokens<', done) and "–" not in done
    assert f"{5 * 24} visual tokens" in done


@pytest.mark.parametrize("view", ["evidence", "probe"])
def test_an_image_is_refused_for_evidence_and_probe(handlers: Handlers, folder: Path, view: str) -> None:
    session = about(handlers, folder / "picture.png")
    said(handlers, session, FIRST)
    assert session.talk.turns[0].answer
    question = [FIRST] if view == "probe" else []
    shown = list(getattr(handlers, view)(session, *question, *CONTROLS))
    assert "needs a video of at least two frames" in last(shown, "status") and last(shown, "busy") is False


@pytest.mark.parametrize(
    ("question", "controls", "sentence"),
    [
        ("", CONTROLS, "the question is empty"),
        (" \n", CONTROLS, "the question is empty"),
        (None, CONTROLS, "the question is empty"),
        ("x" * 4001, CONTROLS, "has 4001 characters, at most 4000"),
        ("what " * 700, CONTROLS, "the language model has 512 positions"),
        (FIRST, (0, 1, 0, 8), "the number of frames is 0"),
        (FIRST, (6.5, 1, 0, 8), "the number of frames is 6.5"),
        (FIRST, (6, "many", 0, 8), "the number of beams is &#x27;many&#x27;"),
        (FIRST, (6, 1, float("nan"), 8), "the temperature is nan"),
        (FIRST, (6, 1, 0, 100_000), "the number of tokens of the longest answer is 100000"),
    ],
)
def test_unsupported_messages_are_refused(handlers: Handlers, folder: Path, question, controls, sentence) -> None:
    session = about(handlers, folder / "one.mp4")
    shown = list(handlers.ask(session, question, *controls))
    assert sentence in last(shown, "status") and 'role="alert"' in last(shown, "status")
    assert session.talk.turns == []


def test_a_question_without_a_video_is_refused(handlers: Handlers) -> None:
    session = Session()
    for asking in (handlers.ask, handlers.probe):
        assert NO_VIDEO in last(list(asking(session, FIRST, *CONTROLS)), "status")
    for of_an_answer in (handlers.evidence, handlers.retry):
        assert NO_ANSWER in last(list(of_an_answer(session, *CONTROLS)), "status")
    assert list(handlers.look(session, 6))  # gradio needs something to show


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("text.mp4", "text.mp4: found text"),
        ("gone.mp4", "no longer here: uploads are removed 60 minutes after"),
        ("../../etc/passwd", "only uploaded files"),
        ("/etc/passwd", "only uploaded files"),
    ],
)
def test_an_unreadable_file_is_reported(handlers: Handlers, folder: Path, name: str, sentence: str) -> None:
    session = Session()
    handlers.begin(session, str(folder / name))
    shown = list(handlers.look(session, 6))
    assert sentence in last(shown, "status") and str(folder) not in last(shown, "status")
    assert last(shown, "busy") is False


def test_a_too_long_video_is_reported(handlers: Handlers, folder: Path) -> None:
    handlers.service.limits = PageLimits(media_seconds=1.0)
    session = Session()
    handlers.begin(session, str(folder / "two.mp4"))
    assert "the video lasts 1.2 s, at most 1.0 s are taken" in last(list(handlers.look(session, 6)), "status")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "not enough memory for this: take fewer frames"),
        (KeyError("x"), "the server failed on this request"),
    ],
)
def test_errors_of_the_model_are_reported(handlers: Handlers, folder: Path, monkeypatch, error, sentence) -> None:
    session = about(handlers, folder / "one.mp4")

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(handlers.service.chat, "prepare", broken)
    shown = said(handlers, session, FIRST)
    assert sentence in last(shown, "status")
    assert last(shown, "question") == FIRST and last(shown, "chat") == []  # the question is not lost
    monkeypatch.undo()
    said(handlers, session, FIRST)
    assert len(session.talk.turns) == 1


def test_text_is_shown_as_text(handlers: Handlers, folder: Path) -> None:
    session = about(handlers, folder / "one.mp4")
    question = '<img src="http://x/y" onerror=alert(1)> **bold**\n$x$'
    shown = said(handlers, session, question) + list(handlers.probe(session, question, *CONTROLS))
    shown += list(handlers.evidence(session, *CONTROLS))
    for one in shown:
        assert '<img src="http' not in str(one) and "<img src='http" not in str(one)
    escaped = "&lt;img src=&quot;http://x/y&quot; onerror=alert(1)&gt; **bold**<br>$x$"
    assert last(shown, "chat")[0]["content"] == escaped
