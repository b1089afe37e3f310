"""Chat: answers are the same with and without cache, batching and streaming; fields of an answer."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stllm.common.errors import UserError
from stllm.conversation.chat import Chat, Media, Request, load_chat
from stllm.conversation.decoding import Decoding
from stllm.media.clip import MediaError
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor
from stllm.processors.sequences import VISUAL_TOKEN_ID
from stllm.processors.templates import BOS, VISUAL, Turn
from tests.helpers.tiny import LLAMA, QFORMER, VISION
from tests.helpers.videos import write_video

GOLDEN = Path(__file__).parents[1] / "golden"
QUESTIONS = ["what moves first", "which color is the square", "how many times does the object move"]
SHORT = Decoding(num_beams=1, max_new_tokens=8)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_video(folder / f"{count}.mp4", num_frames=count, size=(64, 48)) for count in (20, 31)]


def new_chat(family: str = "instructblip", *, seed: int = 0, **options) -> Chat:
    """A tiny model with the golden tokenizers.

    Its weights are large, so that questions and videos matter; in float64, so that rounding does not decide. It writes
    no single bytes: the tokenizer decodes bytes that are no UTF-8 differently in one piece than token by token.
    """
    text = family == "instructblip"
    config = STLLMConfig(
        vision_config=VISION,
        qformer_config={**QFORMER, "vocab_size": 163},
        text_config={**LLAMA, "vocab_size": 513 if text else 512, **options.pop("text_config", {})},
        qformer_text_input=text,
        num_query_tokens=options.pop("num_query_tokens", 4),
        residual_size=options.pop("residual_size", 4),
        template=family,
        system="",
        max_txt_len=32,
        video_input=options.pop("video_input", "all"),
    )
    torch.manual_seed(seed)
    model: Any = STLLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    model.double()
    folder = GOLDEN / ("instructblip_residual_mvm" if text else "minigpt4_plain_all")
    processor = PromptProcessor.from_pretrained(
        folder, config=config, qformer_tokenizer=GOLDEN / "foreign" / "bert" / "vocab.txt"
    )
    with torch.no_grad():
        model.get_output_embeddings().weight[3:259] = 0  # <0x00> to <0xFF>
    return Chat(model=model, processor=processor, decoding=SHORT, **{"num_frames": 6, **options})


def requests_for(clips: list[Path]) -> list[Request]:
    return [
        Request(turns=(Turn(question),), media=Media(str(clip), num_frames=frames))
        for (clip, frames), question in itertools.product(zip(clips, (4, 6), strict=True), QUESTIONS)
    ]


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batched_answers_equal_single_answers(clips: list[Path], family: str, num_beams: int) -> None:
    chat = new_chat(family)
    decoding = Decoding(num_beams=num_beams, max_new_tokens=8, repetition_penalty=1.5)
    requests = [*requests_for(clips), Request((Turn(QUESTIONS[0]),))]  # the last one about no video
    together = chat.answer(requests, decoding)
    alone = [chat.answer([request], decoding)[0] for request in requests]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) > 1  # the test would be idle on equal answers


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
def test_cached_answers_equal_uncached_ones_and_encode_once(clips: list[Path], family: str) -> None:
    cached, uncached = new_chat(family), new_chat(family, cache_bytes=0)
    calls = {"cached": 0, "uncached": 0}
    for name, chat in (("cached", cached), ("uncached", uncached)):
        chat.model.vision_encoder.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    requests = requests_for(clips)
    texts = [[chat.answer([request])[0].text for request in requests] for chat in (cached, uncached)]
    assert texts[0] == texts[1]
    assert calls == {"cached": 2, "uncached": 6}


def test_the_same_content_under_another_name_is_not_encoded_again(clips: list[Path], tmp_path: Path) -> None:
    chat = new_chat()
    copy = Path(shutil.copy(clips[0], tmp_path / "copy.mp4"))
    first, second = chat.ask(clips[0], QUESTIONS[0]), chat.ask(copy, QUESTIONS[0])
    assert first.text == second.text
    assert len(chat.cache) == 1


def test_a_changed_file_is_read_again(clips: list[Path], tmp_path: Path) -> None:
    chat = new_chat()
    path = Path(shutil.copy(clips[0], tmp_path / "clip.mp4"))
    chat.ask(path, QUESTIONS[0])
    shutil.copy(clips[1], path)
    os.utime(path, ns=(1, 1))
    assert chat.ask(path, QUESTIONS[0]).text == chat.ask(clips[1], QUESTIONS[0]).text
    assert len(chat.cache) == 2


def conversations(clips: list[Path]) -> list[Request]:
    """Return questions about two videos alternately, with other frames, without video, and in growing conversations."""
    turns = [Turn(QUESTIONS[0], "a red circle"), Turn(QUESTIONS[1], "it is blue"), Turn(QUESTIONS[2])]
    edited = [Turn(QUESTIONS[0], "two green squares"), *turns[1:]]
    asked = [
        *((tuple(one[:end]), clip) for end in (1, 2, 3) for clip in clips for one in (turns, edited)),
        *(((Turn(question),), clip) for question in QUESTIONS for clip in clips),
        *((tuple(turns[:end]), None) for end in (1, 2, 3)),
    ]
    asked = [((*before, Turn(last.question)), clip) for (*before, last), clip in asked]
    requests = [Request(turns, Media(str(clip)) if clip else None) for turns, clip in asked]
    return [*requests, Request((Turn(QUESTIONS[0]),), Media(str(clips[0]), num_frames=4))]


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("positions", [None, 50])  # 50 cut most prompts, each at another place
def test_prefixes_do_not_change_answers(clips: list[Path], family: str, num_beams: int, positions: int | None) -> None:
    text_config = {} if positions is None else {"max_position_embeddings": positions}
    again, kept, batched = (
        new_chat(family, cache_bytes=size, text_config=text_config, residual_size=2) for size in (0, 1 << 24, 1 << 24)
    )
    decoding = replace(SHORT, num_beams=num_beams)
    requests = conversations(clips)
    expected = [again.answer([one], decoding)[0].text for one in requests]
    assert len(set(expected)) > 5
    assert [kept.answer([one], decoding)[0].text for one in requests] == expected
    assert [kept.answer([one], decoding)[0].text for one in reversed(requests)] == expected[::-1]
    assert [answer.text for answer in kept.answer(requests, decoding)] == expected
    assert [answer.text for answer in batched.answer(requests, decoding)] == expected
    assert again.cache.num_bytes == 0 and kept.cache._prefixes and batched.cache._prefixes


def test_the_language_model_processes_a_video_only_once(clips: list[Path]) -> None:
    """This holds for the MiniGPT-4 family; for the InstructBLIP family, visual tokens depend on the question."""
    read = {}
    for family in ("minigpt4", "instructblip"):
        chat = new_chat(family, num_query_tokens=20)
        positions: list[int] = []

        def watch(_: object, __: object, named: dict, positions: list[int] = positions) -> None:
            if named.get("inputs_embeds") is not None:
                positions.append(named["inputs_embeds"].shape[1])

        chat.model.language_model.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
        for question in (*QUESTIONS, QUESTIONS[0]):
            chat.ask(clips[0], question)
        read[family] = [one > 120 for one in positions if one > 1]  # 6 frames of 20 tokens
    assert read["minigpt4"] == [True, False, False]  # for the first question again nothing
    assert read["instructblip"] == [True, True, True]


@pytest.mark.parametrize("room", [5_000, 20_000, 60_000])
def test_dropped_prefixes_do_not_change_answers(clips: list[Path], room: int) -> None:
    """The cache has room for one or both videos, and for few or no prefixes."""
    again, tight = new_chat("minigpt4", cache_bytes=0), new_chat("minigpt4", cache_bytes=room)
    for request in conversations(clips):
        assert tight.answer([request])[0].text == again.answer([request])[0].text
        assert tight.cache.num_bytes <= room
    requests = conversations(clips)
    prepared = [tight.prepare(request) for request in requests]  # the first video's features are gone by the end
    texts = [answer.text for answer in tight.complete(prepared)]
    assert texts == [again.answer([request])[0].text for request in requests]
    assert tight.cache.num_bytes <= room


def test_prefixes_are_not_used_with_other_weights(clips: list[Path]) -> None:
    chat, other = new_chat("minigpt4"), new_chat("minigpt4", cache_bytes=0)
    before = chat.ask(clips[0], QUESTIONS[0]).text
    for one in (chat, other):
        with torch.no_grad():
            for layer in one.model.language_model.model.layers:
                layer.self_attn.v_proj.weight.mul_(-2)
    after = chat.ask(clips[0], QUESTIONS[0]).text
    assert after == other.ask(clips[0], QUESTIONS[0]).text != before


@pytest.mark.parametrize(("quantization", "keeps"), [("4bit", True), ("8bit", False)])
def test_quantized_models_answer_the_same_with_prefixes(clips: list[Path], quantization: str, keeps: bool) -> None:
    """In 8 bits, a token's keys depend on the other tokens of the pass, so prefixes are not kept."""
    pytest.importorskip("bitsandbytes")
    options = [f"model.quantization={quantization}"]
    kept, again = (
        load_chat(GOLDEN / "minigpt4_plain_all", device="cpu", options=options, cache_bytes=size)
        for size in (1 << 24, 0)
    )
    for question in QUESTIONS:
        texts = [chat.ask(clips[0], question, num_beams=4, max_new_tokens=8).text for chat in (kept, again)]
        assert texts[0] == texts[1]
    assert bool(kept.cache._prefixes) == keeps


def test_an_aborted_stream_leaves_a_correct_prefix(clips: list[Path]) -> None:
    chat, again = new_chat("minigpt4"), new_chat("minigpt4", cache_bytes=0)
    stream = chat.conversation(clips[0]).stream(QUESTIONS[0])
    next(stream, None)  # random weights' answer may be empty
    stream.close()
    for question in QUESTIONS:
        assert "".join(chat.conversation(clips[0]).stream(question)) == again.ask(clips[0], question).text


def test_prefixes_are_dropped_when_memory_runs_out(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    chat = new_chat("minigpt4")
    text = chat.ask(clips[0], QUESTIONS[0]).text
    assert chat.cache._prefixes

    def fail(**_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(chat.model, "generate", fail)
        chat.ask(clips[0], QUESTIONS[1])
    assert not chat.cache._prefixes
    assert chat.ask(clips[0], QUESTIONS[0]).text == text


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
def test_streamed_pieces_join_to_the_answer(clips: list[Path], family: str) -> None:
    chat = new_chat(family)
    for question in QUESTIONS:
        pieces = list(chat.conversation(clips[0]).stream(question))
        assert "".join(pieces) == chat.ask(clips[0], question).text


def test_a_stream_can_be_aborted(clips: list[Path]) -> None:
    chat = new_chat()
    chat.decoding = Decoding(num_beams=1, max_new_tokens=200)
    conversation = chat.conversation(clips[0])
    stream = conversation.stream(QUESTIONS[0])
    first = next(stream)
    stream.close()
    assert conversation.turns == [Turn(QUESTIONS[0], first)]
    assert chat.ask(clips[0], QUESTIONS[1]).text  # the model is free again


def test_a_stream_of_several_beams_is_refused(clips: list[Path]) -> None:
    with pytest.raises(UserError, match="streaming follows one beam, but 3 were asked for"):
        list(new_chat().conversation(clips[0], num_beams=3).stream(QUESTIONS[0]))


def test_a_streamed_turn_is_stored_like_an_answered_one(clips: list[Path], monkeypatch) -> None:
    chat = new_chat()
    monkeypatch.setattr(chat, "stream", lambda *_: iter(["Assistant: a ", "dog"]))
    conversation = chat.conversation(clips[0])
    assert list(conversation.stream("what")) == ["Assistant: a ", "dog"]
    assert conversation.turns == [Turn("what", "a dog")]


def test_a_conversation_keeps_turns_until_reset(clips: list[Path]) -> None:
    chat = new_chat()
    conversation = chat.conversation(clips[0])
    answers = [conversation.ask(question).text for question in QUESTIONS[:2]]
    assert [turn.answer for turn in conversation.turns] == answers
    conversation.reset(conversation.media)
    assert conversation.ask(QUESTIONS[0]).text == answers[0]
    turns = (Turn(QUESTIONS[0], answers[0]), Turn(QUESTIONS[1]))
    assert chat.answer([Request(turns, Media(str(clips[0])))])[0].text == answers[1]


def test_the_fields_of_an_answer(clips: list[Path]) -> None:
    answer = new_chat(video_input="residual").ask(clips[0], QUESTIONS[0])
    assert answer.video == str(clips[0])
    assert len(answer.frame_times) == 6
    assert answer.frame_times == sorted(answer.frame_times)
    assert answer.visual_tokens == 4 * 4
    assert set(answer.seconds) == {"read", "encode", "answer"}


def test_a_question_can_be_about_a_part_of_the_video(clips: list[Path]) -> None:
    answer = new_chat().ask(clips[1], QUESTIONS[0], start=0.4, end=0.8)
    assert all(0.35 <= seconds <= 0.85 for seconds in answer.frame_times)


def test_questions_about_an_image_and_without_media_are_answered(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    chat = new_chat("minigpt4")
    assert chat.ask(path, QUESTIONS[0]).visual_tokens == 4
    assert chat.ask(None, QUESTIONS[0]).visual_tokens == 0


@pytest.mark.parametrize("question", ["", "  \n"])
def test_an_empty_question_is_refused(clips: list[Path], question: str) -> None:
    with pytest.raises(UserError, match="the question is empty"):
        new_chat().ask(clips[0], question)


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
def test_a_custom_prompt_is_not_changed(clips: list[Path], family: str) -> None:
    """The Q-Former still gets the question."""
    chat = new_chat(family)
    usual = Request(turns=(Turn(QUESTIONS[0]),), media=Media(str(clips[0])))
    own = replace(usual, pieces=(VISUAL, BOS, "###Human: Choose.\n###Assistant: Best option:("))
    prepared = chat.prepare(own)
    assert prepared.ids == chat.processor.piece_ids(own.pieces or ())
    assert prepared.ids[:2] == [VISUAL_TOKEN_ID, chat.processor.bos_token_id]
    seen, usually = prepared.visual, chat.prepare(usual).visual
    assert seen is not None and usually is not None and torch.equal(seen, usually)
    assert chat.answer([own])[0].text != chat.answer([usual])[0].text


def test_nan_weights_raise_an_error(clips: list[Path]) -> None:
    chat = new_chat()
    with torch.no_grad():
        chat.model.projection.bias[0] = float("nan")
    with pytest.raises(UserError, match="visual tokens are no numbers"):
        chat.ask(clips[0], QUESTIONS[0])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_nan_scores_raise_an_error(clips: list[Path], num_beams: int) -> None:
    chat = new_chat()
    with torch.no_grad():
        chat.model.get_output_embeddings().weight[5, 0] = float("nan")
    with pytest.raises(UserError, match="the language model's scores are no numbers"):
        chat.ask(clips[0], QUESTIONS[0], num_beams=num_beams)


def test_one_frame_per_second_can_be_requested(clips: list[Path]) -> None:
    assert len(new_chat().ask(clips[0], QUESTIONS[0], num_frames=0, sampling="segment").frame_times) == 4
    with pytest.raises(MediaError, match="num_frames is 0"):
        new_chat().ask(clips[0], QUESTIONS[0], num_frames=0)


def test_a_misspelled_option_is_named(clips: list[Path]) -> None:
    with pytest.raises(UserError, match=r"unknown option 'num_frame': known are .*; did you mean 'num_frames'\?"):
        new_chat().ask(clips[0], QUESTIONS[0], num_frame=4)


def test_the_attention_implementation_can_be_configured(clips: list[Path]) -> None:
    folder = GOLDEN / "minigpt4_plain_all"
    texts = set()
    for name in ("auto", "eager"):  # eager attention reads a prompt for each beam
        chat = load_chat(folder, options=[f"model.attn_implementation={name}"], device="cpu")
        assert chat.model.language_model.config._attn_implementation == ("sdpa" if name == "auto" else name)
        texts.add(chat.ask(clips[0], QUESTIONS[0], num_beams=3, max_new_tokens=8).text)
    assert len(texts) == 1
    with pytest.raises(UserError, match="is flash_attention_2, but that needs a CUDA GPU"):
        load_chat(folder, options=["model.attn_implementation=flash_attention_2"], device="cpu")


def test_no_requests_no_answers() -> None:
    assert new_chat().answer([]) == []


def test_an_unreadable_video_does_not_change_the_conversation(tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"")
    conversation = new_chat().conversation(broken)
    with pytest.raises(MediaError):
        conversation.ask(QUESTIONS[0])
    assert conversation.turns == []


def test_the_stop_string_ends_an_answer(clips: list[Path]) -> None:
    """A biased output layer forces the tokens of the end mark, which must end the generation at once."""
    chat = new_chat("minigpt4")
    ends = chat.processor.tokenizer.encode("###", add_special_tokens=False)
    seen = []
    original = chat.model.language_model.generate

    def spy(**options):
        seen.append(original(**options))
        return seen[-1]

    chat.model.language_model.generate = spy
    with torch.no_grad():
        chat.model.language_model.lm_head.weight.zero_()
        chat.model.language_model.lm_head.weight[ends[0]] = 0
        bias = torch.zeros(512, dtype=torch.float64)
        bias[ends[0]] = 100.0
    chat.model.language_model.lm_head.bias = torch.nn.Parameter(bias)
    assert chat.ask(clips[0], QUESTIONS[0]).text == ""
    assert seen[0].shape == (1, 1)


@pytest.mark.parametrize(
    ("video_input", "own", "asked", "frames"),
    [("all", None, None, 16), ("residual", None, None, 64), ("residual", 8, None, 8), ("all", 8, 5, 5)],
)
def test_the_default_number_of_frames_comes_from_the_checkpoint(
    video_input: str, own: int | None, asked: int | None, frames: int
) -> None:
    made = new_chat(video_input=video_input)
    made.model.config.num_frames = own
    again = Chat(model=made.model, processor=made.processor, decoding=SHORT, num_frames=asked)
    assert again.num_frames == frames
