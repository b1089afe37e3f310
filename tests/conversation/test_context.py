"""The context rule: long prompts are cut at the beginning as published, or not at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from stllm.cli import main
from stllm.common.errors import UserError
from stllm.common.schema import CONTEXTS, EvaluationSettings
from stllm.conversation.chat import Chat, Media, Request
from stllm.conversation.decoding import Decoding
from stllm.conversation.evidence import measure_evidence
from stllm.conversation.requests import CutTokens
from stllm.models.st_llm import STLLM
from stllm.processors.sequences import VISUAL_TOKEN_ID
from stllm.processors.templates import Turn
from tests.conversation.test_chat import QUESTIONS, new_chat
from tests.helpers.evaluation import lines
from tests.helpers.videos import write_video

FAMILIES = ("instructblip", "minigpt4")
FRAMES, QUERIES = 64, 32  # the published MSVD and MSRVTT setting: 2,048 visual tokens
ONE_LAYER = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 32}
PUBLISHED_SIZES: dict[str, Any] = {
    "num_query_tokens": QUERIES,
    "text_config": {"max_position_embeddings": 2048, **ONE_LAYER},
}
SHORT = Decoding(num_beams=1, max_new_tokens=8, repetition_penalty=1.5)
GPT2 = {"model_type": "gpt2", "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", num_frames=70, size=(32, 32))


@pytest.fixture(scope="module")
def chats() -> dict[str, Chat]:
    """Return tiny models of both families with the published numbers of frames, queries and positions."""
    return {name: new_chat(name, num_frames=FRAMES, **PUBLISHED_SIZES) for name in FAMILIES}


def request(clip: Path, *turns: Turn, num_frames: int | None = None) -> Request:
    return Request(turns or (Turn(QUESTIONS[0]),), Media(str(clip), num_frames=num_frames))


def long_talk(words: int) -> tuple[Turn, ...]:
    return Turn("what " * words, "a ball"), Turn("and then", "red"), Turn(QUESTIONS[1])


def joined(chat: Chat, asked: Request) -> Tensor:
    """Return the embeddings of the whole prompt, (1, S, D), computed independently of the code under test."""
    assert asked.media is not None
    embed, ids = chat.model.get_input_embeddings(), chat.processor.prompt_ids(asked.turns)
    visual = chat.model.video_input(chat.frame_tokens(asked, chat.see(asked.media)))
    at = ids.index(VISUAL_TOKEN_ID)
    before, after = (embed(torch.tensor([part], dtype=torch.long)) for part in (ids[:at], ids[at + 1 :]))
    return torch.cat([before, visual, after], dim=1)


def by_hand(chat: Chat, embeds: Tensor, decoding: Decoding) -> list[int]:
    """Return the ids that transformers generates from embeddings without an attention mask, as published."""
    ids = chat.model.language_model.generate(
        inputs_embeds=embeds,
        num_beams=decoding.num_beams,
        max_new_tokens=decoding.max_new_tokens,
        min_length=1,
        do_sample=False,
        logits_processor=LogitsProcessorList([RepetitionPenaltyLogitsProcessor(decoding.repetition_penalty)]),
        eos_token_id=chat.processor.eos_token_id,
        pad_token_id=chat.processor.pad_token_id,
    )
    return ids[0].tolist()


def published_cut(embeds: Tensor, max_new_tokens: int) -> Tensor:
    return embeds[:, max(0, embeds.shape[1] + max_new_tokens - 2000) :]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_published_rule_keeps_the_last_tokens(chats: dict[str, Chat], clip: Path, family: str) -> None:
    """With 300 new tokens, 1,700 are kept. The cut ones are visual tokens, or MiniGPT-4's first text."""
    chat, asked = chats[family], request(clip)
    whole = joined(chat, asked)
    prepared = chat.prepare(asked, Decoding.published(chat.processor.template))
    assert prepared.length == 1700
    text = 0 if family == "instructblip" else prepared_front(chat, asked)
    assert prepared.cut == CutTokens(visual=whole.shape[1] - 1700 - text, text=text)
    assert prepared.num_visual == FRAMES * QUERIES - prepared.cut.visual
    batch = chat.batch([prepared], side="left")
    found = chat.model.embed(batch["input_ids"], batch["visual_positions"], batch["visual_tokens"])
    assert torch.equal(found, published_cut(whole, 300))


def prepared_front(chat: Chat, asked: Request) -> int:
    return chat.processor.prompt_ids(asked.turns).index(VISUAL_TOKEN_ID)


@pytest.mark.parametrize(("context", "num_beams"), [("published", 3), ("all", 1)])
@torch.no_grad()
def test_the_answer_is_generated_from_the_remaining_embeddings(
    chats: dict[str, Chat], clip: Path, context: str, num_beams: int
) -> None:
    """This tests the MiniGPT-4 family; the InstructBLIP family is tested below with the command."""
    chat, decoding = chats["minigpt4"], Decoding(num_beams=num_beams, max_new_tokens=4, context=context)
    whole = joined(chat, request(clip))
    embeds = published_cut(whole, 4) if context == "published" else whole
    answer = chat.answer([request(clip)], decoding)[0]
    assert answer.text == chat.processor.decode(by_hand(chat, embeds, decoding))
    assert answer.cut.total == whole.shape[1] - embeds.shape[1]
    assert answer.visual_tokens == FRAMES * QUERIES - answer.cut.visual


@torch.no_grad()
def test_the_repetition_penalty_ignores_the_prompt(clip: Path) -> None:
    """Compare with the formula, step by step, for a model that repeats words of the prompt."""
    chat, asked = new_chat("minigpt4"), request(clip, num_frames=4)
    embeds, prompt = joined(chat, asked), set(chat.processor.prompt_ids(asked.turns)) - {VISUAL_TOKEN_ID}
    ends = chat.processor.tokenizer.encode("###", add_special_tokens=False)
    others = [token for token in range(512) if token not in prompt or token in ends]
    chat.model.get_output_embeddings().weight[others] = 0

    def greedy(penalty: float, penalised: set[int]) -> list[int]:
        found: list[int] = []
        for _ in range(12):
            tail = chat.model.get_input_embeddings()(torch.tensor([found], dtype=torch.long))
            scores = chat.model.language_model(inputs_embeds=torch.cat([embeds, tail], dim=1)).logits[0, -1]
            for token in penalised.union(found):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            found.append(int(scores.argmax()))
        return found

    expected = greedy(1.5, set())
    assert expected != greedy(1.0, set()) and expected != greedy(1.5, prompt)  # else the test would be idle
    decoding = Decoding(num_beams=1, max_new_tokens=12, repetition_penalty=1.5)
    prepared = chat.prepare(asked, decoding)
    assert chat._generate([prepared], decoding)[0].tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_is_cut_separately(chats: dict[str, Chat], clip: Path, family: str) -> None:
    """A batch with cut rows, uncut rows and a row without remaining visual tokens gives the answers of single ones."""
    chat = chats[family]
    asked = [
        request(clip, Turn(QUESTIONS[1]), num_frames=4),
        request(clip, *long_talk(1000), num_frames=4),
        request(clip, *long_talk(900), num_frames=8),
    ]
    decoding = replace(SHORT, max_new_tokens=2)
    prepared = [chat.prepare(one, decoding) for one in asked]
    assert prepared[0].length < 300 and not prepared[0].cut.total
    assert [one.length for one in prepared[1:]] == [1998, 1998]
    assert prepared[1].num_visual == 0 and 0 < prepared[2].num_visual < 8 * QUERIES
    together = chat.complete(prepared, decoding)
    assert [answer.text for answer in together] == [chat.answer([one], decoding)[0].text for one in asked]
    assert len({answer.text for answer in together}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_longer_than_the_limit_continues(chats: dict[str, Chat], clip: Path, family: str) -> None:
    """Each turn's question stays complete in the prompt; a streamed answer is the same."""
    chat = chats[family]
    conversation = chat.conversation(clip, num_frames=50, num_beams=1, max_new_tokens=4)
    cuts = []
    for number in range(3):
        question = f"{'what ' * 150} {number}"
        pieces = "".join(chat.stream(conversation.request(question), conversation.decoding))
        answer = conversation.ask(question)
        assert pieces == answer.text
        cuts.append(answer.cut.total)
    assert cuts[0] == 0 < cuts[1] < cuts[2] and len(conversation.turns) == 3


def test_a_question_that_does_not_fit_is_refused(chats: dict[str, Chat], clip: Path) -> None:
    chat = chats["minigpt4"]
    question = "what " * 1100
    with pytest.raises(
        UserError, match=r"has \d+ tokens \(128 of the video\), but the published context rule has 2000"
    ):
        chat.ask(clip, question, num_frames=4, max_new_tokens=8)
    with pytest.raises(UserError, match=r"and the \d+ tokens of the question are never cut: .* \(--context all\)"):
        chat.ask(None, question, max_new_tokens=8)
    assert chat.ask(clip, question, num_frames=4, max_new_tokens=1, num_beams=1, context="all").cut == CutTokens()


def test_a_model_with_fewer_positions_limits_the_prompt(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With 512 positions, the prompt is cut, and a longer question is refused. With `all`, one warning is logged."""
    chat = new_chat("minigpt4")
    asked = request(clip, Turn("what " * 230), num_frames=30)
    assert chat.prepare(asked, SHORT).length == 512
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens \(24 of the video\), but .* has 512 positions"):
        chat.ask(clip, "what " * 600)
    everything = replace(SHORT, context="all")
    uncut = chat.prepare(asked, everything)
    assert uncut.length > 460 + 120 and uncut.cut == CutTokens()
    assert chat.prepare(asked, everything).length == uncut.length
    assert caplog.text.count("the language model was trained for 512 positions") == 1


def test_a_table_of_positions_is_never_exceeded(clip: Path) -> None:
    chat = new_chat(text_config=GPT2)
    answer = chat.answer([request(clip, num_frames=20)], SHORT)[0]
    assert answer.cut.visual == 80 - answer.visual_tokens > 80 - 56  # of 64 positions, 8 are for the answer
    for context in CONTEXTS:
        decoding = replace(SHORT, max_new_tokens=60, context=context)
        shared = "the language model has 64 positions, which it shares with 60 new tokens"
        with pytest.raises(UserError, match=shared) as caught:
            chat.prepare(request(clip, num_frames=4), decoding)
        assert "--context all" not in str(caught.value)
    with pytest.raises(UserError, match="which it shares with 8 new tokens"):
        chat.prepare(request(clip, num_frames=20), replace(SHORT, context="all"))


@torch.no_grad()
def test_evidence_covers_only_frames_that_the_model_read(chats: dict[str, Chat], clip: Path) -> None:
    """Cut frames have no evidence; each other frame is left out of the embeddings that remain after the cut."""
    chat = chats["instructblip"]
    asked, answer = request(clip), "the red square"
    decoding = Decoding(num_beams=1, max_new_tokens=1700)  # 300 tokens are kept
    found = measure_evidence(chat, asked, answer, decoding=decoding)
    whole = joined(chat, asked)
    kept, tail = whole[:, -300:], whole.shape[1] - FRAMES * QUERIES
    cut = FRAMES * QUERIES - (300 - tail)
    assert found.cut == list(range(cut // QUERIES))
    assert found.scores[: len(found.cut)] == pytest.approx([0.0] * len(found.cut), abs=1e-9)
    ids = [*chat.processor.tokenizer.encode(answer, add_special_tokens=False), chat.processor.eos_token_id]
    end = chat.model.get_input_embeddings()(torch.tensor([ids]))

    def score(prompt: Tensor) -> float:
        logits = chat.model.language_model(inputs_embeds=torch.cat([prompt, end], dim=1)).logits[0]
        return float(logits[-len(ids) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum())

    for frame in (cut // QUERIES, FRAMES - 1):  # the one that lost a part of its tokens, and the last
        first = max(frame * QUERIES - cut, 0)
        rest = torch.cat([kept[:, :first], kept[:, (frame + 1) * QUERIES - cut :]], dim=1)
        assert found.scores[frame] == pytest.approx(score(kept) - score(rest), abs=1e-9)
        assert abs(found.scores[frame]) > 1e-3


# ---- as it is typed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(chats: dict[str, Chat], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    chats["instructblip"].model.save_pretrained(folder)
    chats["instructblip"].processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write MSVD-QA with one long video and one video of four frames."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "long.mp4").write_bytes(clip.read_bytes())
    write_video(folder / "short.mp4", num_frames=4, size=(32, 32))
    items = [
        {"video_name": f"{name}.mp4", "question_id": number, "question": QUESTIONS[number], "answer": "it"}
        for number, name in enumerate(("long", "short", "long"))
    ]
    (folder / "test_qa.json").write_text(json.dumps(items))
    return folder


@pytest.fixture
def evaluate(checkpoint: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*more: str) -> int:
        files = ["--anno-path", str(data / "test_qa.json"), "--video-dir", str(data), "--output-dir", str(tmp_path)]
        quick = ["--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32", "--num-workers", "0"]
        return main(["evaluate", "msvd", "--ckpt-path", str(checkpoint), *files, *quick, *more])

    return run


def test_64_frames_with_all_tokens_run_as_published(
    evaluate: Callable[..., int],
    chats: dict[str, Chat],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """MSVD's preset: 64 frames, no system message, 5 beams, penalty 1.5. Only the answers are shorter here."""
    generated: list[list[int]] = []
    generate = STLLM.generate

    def spy(self: STLLM, **options: Any) -> Tensor:
        ids = generate(self, **options)
        generated.extend(ids.tolist())
        return ids

    monkeypatch.setattr(STLLM, "generate", spy)
    assert evaluate("--batch-size", "1") == 0
    assert "the context rule cut the prompts of 2 items" in capsys.readouterr().out
    chat = chats["instructblip"]
    decoding = replace(SHORT, num_beams=5, max_new_tokens=4)
    found = lines(tmp_path)
    total = 0
    for line in found:
        asked = request(data / line["video"], Turn(line["question"]))
        with torch.no_grad():
            whole = joined(chat, asked)
            expected = by_hand(chat, published_cut(whole, 4), decoding)
        cut = max(0, whole.shape[1] + 4 - 2000)
        assert line["cut_tokens"] == {"visual": cut, "text": 0} and bool(cut) == (line["video"] == "long.mp4")
        assert expected in generated and line["prediction"] == chat.processor.decode(expected)
        total += cut
    results = json.loads((tmp_path / "msvd.results.json").read_text())
    counts = {"total": 3, "answered": 3, "failed": 0, "excluded": 0}
    assert results["counts"] == {**counts, "cut": 2, "cut_visual_tokens": total, "cut_text_tokens": 0}
    assert results["settings"]["decoding"]["context"] == "published"
    assert results["settings"]["evaluation"]["num_frames"] == 64


def test_a_rerun_with_another_context_rule_is_refused(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_beam = ("--num-beams", "1", "--limit", "1")
    assert evaluate(*one_beam) == 0
    first = json.loads((tmp_path / "msvd.results.json").read_text())
    capsys.readouterr()
    assert evaluate(*one_beam, "--context", "all") == 1
    assert "was made with another setting: decoding.context" in capsys.readouterr().err
    assert evaluate(*one_beam, "--options", "evaluation.context=all", "--output-name", "other") == 0
    second = json.loads((tmp_path / "other.results.json").read_text())
    assert first["counts"]["cut"] == 1 and "cut" not in second["counts"]
    assert first["digests"]["config"] != second["digests"]["config"]
    assert evaluate("--options", "evaluation.context=some") == 1
    assert "unknown evaluation.context 'some': known are all, published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "frames", "summary"),
    [
        ([], 3, "3 frames of each video, the checkpoint's own number"),
        (["--num-frames", "4"], 4, "4 frames of each video (the checkpoint's own number: 3)"),
        (["--cfg-path", "frames.yaml"], 2, "2 frames of each video (the checkpoint's own number: 3)"),
        (["--options", "evaluation.num_frames=null"], 3, "3 frames of each video, the checkpoint's own number"),
    ],
)
def test_the_checkpoints_number_of_frames_overrides_the_benchmarks(
    evaluate: Callable[..., int],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    frames: int,
    summary: str,
) -> None:
    """The checkpoint's number is 3. It overrides the preset's 64, and the user's number overrides it."""
    folder = tmp_path / "own"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "num_frames": 3}))
    monkeypatch.chdir(tmp_path)
    Path("frames.yaml").write_text("evaluation: {num_frames: 2}\n")
    assert evaluate("--num-beams", "1", "--limit", "1", "--ckpt-path", str(folder), *words) == 0
    assert summary in capsys.readouterr().out
    assert lines(tmp_path)[0]["frames"]["count"] == frames
    settings = json.loads((tmp_path / "msvd.results.json").read_text())["settings"]
    assert settings["evaluation"]["num_frames"] == frames and settings["model"]["num_frames"] == 3


def test_too_many_new_tokens_are_refused(
    evaluate: Callable[..., int], clip: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = "error: max_new_tokens is 2000, but the published context rule has 2000 positions"
    too_many = ("--max-new-tokens", "2000")
    chat = ["chat", "--ckpt-path", str(checkpoint), "--video", str(clip), "--question", QUESTIONS[0], *too_many]
    for code in (evaluate(*too_many), main(chat)):
        assert code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(refusal)]
    assert len(errors) == 2 and all("or keep the whole prompt (--context all)" in line for line in errors)
    assert evaluate(*too_many, "--context", "all", "--limit", "1", "--num-frames", "1", "--num-beams", "1") == 0


def test_chat_reports_the_number_of_cut_tokens(
    checkpoint: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "--ckpt-path", str(checkpoint), "--video", str(clip), "--num-frames", "64", "--device", "cpu"]
    words += ["--question", QUESTIONS[0], "--max-new-tokens", "4", "--num-beams", "1", "--json"]
    counted = []
    for context in CONTEXTS:
        assert main([*words, "--context", context]) == 0
        out, err = capsys.readouterr()
        line = json.loads(out)
        counted.append(line["cut_tokens"]["visual"])
        assert line["visual_tokens"] + line["cut_tokens"]["visual"] == FRAMES * QUERIES
        assert ("of them the video's" in err) == (context == "published")
    assert counted[0] > 0 == counted[1]


def test_all_commands_have_the_same_context_rules() -> None:
    field = EvaluationSettings.__dataclass_fields__["context"]
    assert field.metadata["choices"] == CONTEXTS and field.default == Decoding().context == "published"
