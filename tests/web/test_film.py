"""HTML of frames, evidence curve, steps and probe cards: numbers, positions and escaping."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from stllm.conversation.evidence import Evidence
from stllm.conversation.requests import Media
from stllm.media.views import VIEWS
from stllm.web.film import HEIGHT, MARGIN, Film, Pictures, clock, film_html, probe_html, small_strip, verdict
from stllm.web.handlers import progress_html
from stllm.web.service import JobProgress

FILM = Film(Media("x.mp4", num_frames=4), ("data:a", "data:b", "data:c", "data:d"), (0.0, 1.25, 62.5, 600.0))
EVIDENCE = Evidence("what", "<b>red</b>", -3.0, list(FILM.times), [(0, 1), (1, 2), (2, 4)], [1.0, -0.5, 2.0])


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00.0"), (1.25, "0:01.2"), (59.96, "1:00.0"), (600, "10:00.0")])
def test_times_are_formatted_as_minutes_and_seconds(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_pictures_show_the_models_crop() -> None:
    """Pictures show the centre square; the model's transform is not changed."""
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 30:70] = 255  # the centre
    pictures = Pictures(lambda given: torch.tensor(float(given.sum())))
    assert pictures(frame) == 40 * 40 * 3 * 255
    data = pictures.taken[0]
    assert data.startswith("data:image/jpeg;base64,")
    import base64
    import io

    from PIL import Image

    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))))
    assert shown.shape == (144, 144, 3) and shown[:, 3:-3].min() > 245


def test_the_curve_is_aligned_with_its_frames() -> None:
    html = film_html(FILM, EVIDENCE)
    assert re.findall(r'<img src="(data:\w)"', html) == list(FILM.pictures)
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)" width="([\d.]+)" y="([\d.]+)" height="([\d.]+)">', html)
    assert [bar[0] for bar in bars] == ["for", "against", "for"]
    assert [(float(x), float(width)) for _, x, width, _, _ in bars] == [(0.06, 0.88), (1.06, 0.88), (2.06, 1.88)]
    unit = (HEIGHT - 2 * MARGIN) / 2.5
    assert [float(bar[4]) for bar in bars] == pytest.approx([unit, unit / 2, 2 * unit], abs=0.01)
    zero = MARGIN + 2 * unit
    assert [float(bar[3]) for bar in bars] == pytest.approx([zero - unit, zero, MARGIN], abs=0.01)
    assert html.count("film-peak") == 2  # both frames of the last segment
    assert "1:02.5 to 10:00.0: without it, the answer is 2 nats less likely" in html
    assert "&lt;b&gt;red&lt;/b&gt;" in html and "<b>red" not in html


def test_a_probable_answer_is_not_called_certain() -> None:
    html = film_html(FILM, replace(EVIDENCE, log_probability=-0.00207, scores=[0.0, 0.0, 0.0134]))
    assert "(-0.00207 nats)" in html and "0.0134 nats less likely" in html


def test_zero_evidence_is_drawn() -> None:
    html = film_html(FILM, replace(EVIDENCE, scores=[0.0, 0.0, 0.0]))
    assert "No part of the video makes this answer more or less likely" in html and "nan" not in html
    assert "film-peak" not in html
    assert "film-strip" not in film_html(None)


def test_differences_within_the_bound_are_ignored() -> None:
    small = replace(EVIDENCE, scores=[0.009, -0.009, 0.0])
    html = film_html(FILM, small)
    assert "difference of at most 0.01 nats" in html and "most important" not in html
    heights = [float(height) for height in re.findall(r'height="([\d.]+)">', html)]
    assert heights == pytest.approx([0.225 * (HEIGHT - 2 * MARGIN)] * 2 + [0], abs=0.01)  # 0.009 of four bounds
    assert "The most important part is" in film_html(FILM, replace(EVIDENCE, scores=[0.011, 0.0, 0.0]))
    against = film_html(FILM, replace(EVIDENCE, scores=[0.001, -2.0, 0.0]))
    assert "No part of the video makes this answer more likely: " in against and "film-peak" not in against
    assert "did not read 2 parts" in film_html(FILM, replace(EVIDENCE, cut=[0, 1]))


def test_a_small_strip_shows_the_order() -> None:
    assert re.findall(r'src="data:(\w)"', small_strip(FILM, [3, 2, 1, 0])) == ["d", "c", "b", "a"]
    assert small_strip(FILM, [0, 1, 2, 3], most=2).count("<img") == 2
    assert small_strip(FILM, [0, 1, 2, 3], blank=True).count("small-blank") == 4


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ("red blue green red red", "order of the frames is changed"),
        ("red blue red red red", "changes if the frames are reversed, but not if they are shuffled"),
        ("red red blue red red", "changes if the frames are shuffled"),
        ("red Red red blue red", "needs several frames"),
        ("red red red red blue", "One frame gives the same answer"),
        ("red red red red red", "comes from the question alone"),
    ],
)
def test_the_verdict_of_a_probe(answers: str, words: str) -> None:
    said = dict(zip(VIEWS, answers.split(), strict=True))
    assert words in verdict(said)
    assert words in probe_html(FILM, "what", said)


def test_probe_cards_show_waiting_and_different_answers() -> None:
    html = probe_html(FILM, "<i>", {"forward": "red", "reversed": "<u>"})
    assert html.count("waiting") == 3 and html.count('class="other"') == 1 and "probe-words" not in html
    assert "<u>" not in html and "“&lt;i&gt;”" in html


def test_steps_show_seconds_and_counts() -> None:
    progress = JobProgress().at("read", 0.0, 16).at("encode", 1.26, 1).at("answer")
    html = progress_html(progress)
    assert "kept · 16 frames" in html and "1.3 s · 1 visual token<" in html and html.count("going") == 1
    ended = progress_html(progress.at("answer", count=3, text="a"), error="<x>")
    assert "going" not in ended and "3 tokens" in ended and "&lt;x&gt;" in ended
