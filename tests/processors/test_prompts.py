"""Tokenization of prompts: golden ids, labels, truncation, and cleaning of answers as published."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from stllm.common.errors import UserError
from stllm.models.configuration import STLLMConfig
from stllm.processors.prompts import PromptProcessor, load_qformer_tokenizer
from stllm.processors.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID
from stllm.processors.templates import Turn

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = {"instructblip": GOLDEN / "instructblip_residual_mvm", "minigpt4": GOLDEN / "minigpt4_plain_all"}
BERT = GOLDEN / "foreign" / "bert" / "vocab.txt"
QUESTION = "what moves first? the red circle or the blue square"


def processor(family: str, *, vocab_size: int = 163, **changes) -> PromptProcessor:
    config = STLLMConfig(
        text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4},
        qformer_config={"vocab_size": vocab_size, "max_position_embeddings": 64},
        qformer_text_input=family == "instructblip",
        template=family,
        max_txt_len=changes.pop("max_txt_len", 64),
    )
    return PromptProcessor.from_pretrained(FOLDERS[family], config=config, **{"qformer_tokenizer": BERT, **changes})


def meta(family: str) -> dict:
    return json.loads((FOLDERS[family] / "meta.json").read_text())


@pytest.mark.parametrize("family", FOLDERS)
def test_prompt_ids_equal_the_golden_ones(family: str) -> None:
    expected = load_file(FOLDERS[family] / "expected.safetensors")
    ids = processor(family).prompt_ids([Turn(QUESTION)], system="")
    if family == "instructblip":
        assert ids == [VISUAL_TOKEN_ID, *expected["prompt_ids"][0].tolist()]
    else:
        before, after = expected["prompt_ids_before"][0].tolist(), expected["prompt_ids_after"][0].tolist()
        assert ids == [*before, VISUAL_TOKEN_ID, *after]


@pytest.mark.parametrize("family", FOLDERS)
def test_special_tokens_are_the_published_ones(family: str) -> None:
    prompts, published = processor(family), meta(family)
    assert prompts.vocab_size == published["vocab"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(prompts, name) == published[name]


@pytest.mark.parametrize("family", FOLDERS)
def test_labels_cover_answer_and_end_mark_only(family: str) -> None:
    prompts = processor(family)
    ids, labels = prompts.training_ids([Turn(QUESTION, "yellow square")])
    end = [2] if family == "instructblip" else [261]  # </s>, ###
    assert [label for label in labels if label != IGNORE_INDEX] == [314, 331, 300, 371, *end]
    assert ids[-5:] == labels[-5:]
    assert set(labels[:-5]) == {IGNORE_INDEX}


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("answer", ["Best option:(B) a red circle", "(B)", "the second", None])
def test_options_are_judged_at_their_last_tokens(family: str, answer: str | None) -> None:
    """In the prompt, "no", "yes" and "no" are predicted at the ends of the options, if the answer names a letter."""
    prompts = processor(family)
    options = ["(A) left", "(B) a red circle", "(C) 3"]
    turn = Turn("\n".join(["Question: what moves?", "Options:", *options, "Only give the best option."]), answer)
    plain_ids, plain = prompts.training_ids([turn])
    ids, labels = prompts.training_ids([turn], judge_options=True)
    assert ids == plain_ids and plain == prompts.training_ids([turn], judge_options=False)[1]
    added = [at for at, (label, before) in enumerate(zip(labels, plain, strict=True)) if label != before]
    if answer is None or "(" not in answer:
        assert not added
        return
    no, yes = (prompts.tokenizer.encode(word, add_special_tokens=False)[-1] for word in ("no", "yes"))
    assert [labels[at] for at in added] == [no, yes, no] and no != yes
    visual = ids.index(VISUAL_TOKEN_ID)
    for at, option in zip(added, options, strict=True):
        assert str(prompts.tokenizer.decode(ids[visual + 1 : at])).endswith(option)


def test_every_turn_of_a_conversation_is_labelled() -> None:
    prompts = processor("instructblip")
    turns = [Turn("what moves", "the red circle"), Turn("and then", "yellow square")]
    ids, labels = prompts.training_ids(turns)
    assert labels.count(prompts.eos_token_id) == 2
    assert ids.count(VISUAL_TOKEN_ID) == 1


@pytest.mark.parametrize(("family", "length"), [("instructblip", 4), ("minigpt4", 3)])
def test_answers_are_cut_to_max_txt_len(family: str, length: int) -> None:
    prompts = processor(family, max_txt_len=3)
    _, labels = prompts.training_ids([Turn(QUESTION, "the red circle moves first and then the blue square")])
    assert sum(label != IGNORE_INDEX for label in labels) == length


@pytest.mark.parametrize("family", FOLDERS)
def test_earlier_answers_are_not_cut_in_a_conversation(family: str) -> None:
    turns = [Turn("what", "the red circle moves first and then the blue square"), Turn("and then")]
    assert processor(family, max_txt_len=3).prompt_ids(turns) == processor(family).prompt_ids(turns)


def test_qformer_text_is_truncated_on_the_left_to_the_smaller_limit() -> None:
    text = "what " * 80 + "moves first"
    ids = processor("instructblip").qformer_inputs([text])["qformer_input_ids"][0]
    assert len(ids) == 64
    short = processor("instructblip", max_txt_len=6).qformer_inputs([text])["qformer_input_ids"][0]
    assert len(short) == 6
    assert short[-3:].tolist() == ids[-3:].tolist()  # moves, first, [SEP]


def test_a_qformer_without_text_gets_no_inputs() -> None:
    assert processor("minigpt4").qformer_inputs(["what"]) == {}


@pytest.fixture(scope="module")
def prompts() -> PromptProcessor:
    return processor("minigpt4")


@given(answer=st.text(alphabet="abc \n", max_size=30), rest=st.text(max_size=10))
def test_answers_are_cut_at_the_end_mark(prompts: PromptProcessor, answer: str, rest: str) -> None:
    assert prompts.clean(answer + "###" + rest) == answer.strip()


def test_text_before_the_last_assistant_is_removed() -> None:
    assert processor("minigpt4").clean("###Human: a? ###Assistant: no ### yes") == ""
    assert processor("minigpt4").clean("Human: a? Assistant: no Assistant:  yes ") == "yes"


def test_decoding_the_golden_labels_gives_the_answer() -> None:
    prompts = processor("minigpt4")
    _, labels = prompts.training_ids([Turn(QUESTION, "the red circle moves first.")])
    assert prompts.decode([label for label in labels if label != IGNORE_INDEX]) == "the red circle moves first."


def test_saved_tokenizers_load_again(tmp_path: Path) -> None:
    first = processor("instructblip")
    first.save_pretrained(tmp_path)
    config = STLLMConfig(
        text_config={"model_type": "llama", "hidden_size": 48, "num_attention_heads": 4},
        qformer_config={"vocab_size": 163, "max_position_embeddings": 64},
    )
    again = PromptProcessor.from_pretrained(tmp_path, config=config)
    assert again.prompt_ids([Turn(QUESTION)]) == first.prompt_ids([Turn(QUESTION)])
    assert torch.equal(
        again.qformer_inputs([QUESTION])["qformer_input_ids"], first.qformer_inputs([QUESTION])["qformer_input_ids"]
    )
    assert (again.vocab_size, again.pad_token_id) == (first.vocab_size, first.pad_token_id)


def test_a_folder_without_tokenizer_is_reported(tmp_path: Path) -> None:
    config = STLLMConfig(text_config={"model_type": "llama"}, qformer_text_input=False, template="minigpt4")
    with pytest.raises(UserError, match=r"no tokenizer was found in .* needs tokenizer.model"):
        PromptProcessor.from_pretrained(tmp_path, config=config)


@pytest.mark.parametrize("size", [0, 2, 4000])
def test_a_damaged_tokenizer_is_reported(tmp_path: Path, size: int) -> None:
    content = (FOLDERS["minigpt4"] / "tokenizer.model").read_bytes()[:size]
    (tmp_path / "tokenizer.model").write_bytes(b"x\n" if size == 2 else content)
    config = STLLMConfig(text_config={"model_type": "llama"}, qformer_text_input=False, template="minigpt4")
    with pytest.raises(UserError, match="damaged or cut off: copy or download it again") as caught:
        PromptProcessor.from_pretrained(tmp_path, config=config)
    assert "tiktoken" not in str(caught.value)


def test_missing_tokenizer_libraries_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an old protobuf, transformers treats a valid file as one of another format."""
    shutil.copy(FOLDERS["minigpt4"] / "tokenizer.model", tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    config = STLLMConfig(text_config={"model_type": "llama"}, qformer_text_input=False, template="minigpt4")
    with pytest.raises(UserError, match=r"cannot be read here .*: install sentencepiece and a protobuf as new"):
        PromptProcessor.from_pretrained(tmp_path, config=config)


def test_a_tokenizer_without_eos_is_refused() -> None:
    prompts = processor("minigpt4")
    prompts.tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end-of-text token"):
        PromptProcessor(tokenizer=prompts.tokenizer, qformer_tokenizer=None, template=prompts.template, max_txt_len=8)


def test_the_error_for_a_missing_qformer_tokenizer_names_its_folder() -> None:
    with pytest.raises(UserError, match=r"model\.qformer_tokenizer"):
        processor("instructblip", qformer_tokenizer=None)


def test_a_qformer_tokenizer_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 163 tokens with \[DEC\], but the Q-Former knows 30523"):
        processor("instructblip", vocab_size=30523)


def test_the_error_for_a_missing_qformer_tokenizer_advises_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A download is advised only if the user named no tokenizer."""
    monkeypatch.setattr("stllm.processors.prompts.DEFAULT_QFORMER_TOKENIZER", "nobody/bert")  # is in no cache
    with pytest.raises(UserError, match=r"tokenizer is not there, and nobody/bert is not in .* downloads it\)$"):
        load_qformer_tokenizer(tmp_path, None)
    with pytest.raises(UserError, match=r"not found as '.*/bert' .*put one into .* or a hub model$"):
        load_qformer_tokenizer(tmp_path, tmp_path / "bert")
