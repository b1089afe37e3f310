"""A local judge: a tiny LLaMA that always generates one word, and a random one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stllm.cli import main
from stllm.judge.local import LocalJudge
from tests.helpers.judging import ledger, questions, results, write
from tests.helpers.tiny import LLAMA

TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}[assistant]"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


def write_judge(folder: Path, *, says: str | None = None, template: str | None = None, max_length: int = 512) -> Path:
    """Write a random LLaMA with a vocabulary of words. says: a word that it always generates."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {**LLAMA, "max_position_embeddings": max_length, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**{key: value for key, value in fields.items() if key != "model_type"}))
    words = ["[PAD]", "[UNK]", "[EOS]", "4", "no", "score", "what", "cat", "dog"]
    if says is not None:
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.lm_head.weight.zero_()
        first = words.index(says)
        words[0], words[first] = says, "[PAD]"  # all logits are equal: the first word is said
        model.config.pad_token_id = model.generation_config.pad_token_id = words.index("[PAD]")
    model.save_pretrained(folder)
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def judge(folder: Path, model: Path, *options: str, axis: str = "detail") -> int:
    write(folder / "pred.json", questions(5))
    common = ["--pred-path", str(folder / "pred.json"), "--output-dir", str(folder / "out"), "--device", "cpu"]
    return main(["judge", axis, *common, "--model", f"local:{model}", "--concurrency", "2", *options])


@pytest.mark.parametrize("template", [None, TEMPLATE, NO_SYSTEM])
def test_a_local_model_scores_in_batches(tmp_path, template) -> None:
    model = write_judge(tmp_path / "judge", says="4", template=template)
    assert judge(tmp_path, model, "--max-tokens", "1") == 0
    found = results(tmp_path, "detail")
    assert (found["mean"], found["counts"]["scored"]) == (4.0, 5)
    assert found["judge"].startswith("local:judge@")
    assert [line["reply"] for line in ledger(tmp_path, "detail")] == ["4"] * 5
    assert main(["judge", "detail", "--output-dir", str(tmp_path / "out"), "--offline"]) == 0
    assert results(tmp_path, "detail") == found


def test_a_local_reply_that_does_not_end_within_128_tokens_fails_with_advice(tmp_path) -> None:
    assert judge(tmp_path, write_judge(tmp_path / "judge", says="4"), "--concurrency", "5") == 1
    found = results(tmp_path, "detail")
    assert (found["counts"]["failed"], found["mean"]) == (5, None)
    assert all("raise --max-tokens" in reason for reason in found["failed_items"].values())
    assert [(line["reply"].split(), line["cut"]) for line in ledger(tmp_path, "detail")] == [(["4"] * 128, True)] * 5
    assert judge(tmp_path, tmp_path / "judge", "--concurrency", "5", "--max-tokens", "130") == 1  # continues the ledger
    assert [len(line["reply"].split()) for line in ledger(tmp_path, "detail")] == [128] * 5 + [130] * 5


def test_a_reply_ends_at_its_end_token_and_keeps_other_special_ones(tmp_path, monkeypatch) -> None:
    local = LocalJudge(str(write_judge(tmp_path / "judge", says="4")), device="cpu", dtype="float32", max_new_tokens=3)
    ids = local.tokenizer.get_vocab()
    end, pad, other, four = (ids[token] for token in ("[EOS]", "[PAD]", "[UNK]", "4"))

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[other, four, end], [four, end, pad], [four] * 3])], dim=1)

    monkeypatch.setattr(local.model, "generate", generate)
    chats = [[{"role": "user", "content": "cat"}]] * 3
    assert [(reply.reply, reply.cut) for reply in local.replies(chats)] == [
        ("[UNK] 4", False),
        ("4", False),
        ("4 4 4", True),
    ]


def test_a_system_message_dropped_by_the_template_is_put_into_the_users(tmp_path, monkeypatch) -> None:
    drops = TEMPLATE.replace("in messages", "in messages if message.role != 'system'")
    local = LocalJudge(
        str(write_judge(tmp_path / "judge", template=drops)), device="cpu", dtype="float32", max_new_tokens=8
    )
    asked: list[list[int]] = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.extend(input_ids.tolist())
        return input_ids

    monkeypatch.setattr(local.model, "generate", generate)
    local.replies([[{"role": "system", "content": "cat dog"}, {"role": "user", "content": "what"}]])
    local.replies([[{"role": "user", "content": "cat dog\n\nwhat"}]])
    assert asked[0] == asked[1]
    assert "cat dog what" in str(local.tokenizer.decode(asked[0]))


def test_a_template_that_refuses_every_chat_is_named(tmp_path, capsys) -> None:
    model = write_judge(tmp_path / "judge", template="{{ raise_exception('not a chat model') }}")
    assert judge(tmp_path, model) == 1
    assert "its chat template refuses a single user message (not a chat model)" in capsys.readouterr().err


def test_a_model_without_verdicts_fails_each_item_after_one_request(tmp_path, capsys) -> None:
    assert judge(tmp_path, write_judge(tmp_path / "judge"), "--max-tokens", "8") == 1
    assert "no item was scored" in capsys.readouterr().err
    found = results(tmp_path, "detail")
    assert (found["counts"]["failed"], found["mean"]) == (5, None)
    assert {line["attempts"] for line in ledger(tmp_path, "detail")} == {1}


def test_a_too_long_prompt_makes_its_item_fail(tmp_path, capsys) -> None:
    assert judge(tmp_path, write_judge(tmp_path / "judge", says="4", max_length=20), "--max-tokens", "1") == 1
    assert set(results(tmp_path, "detail")["failed_items"].values()) == {
        "the instructions and texts are too long for the judge"
    }


def test_batched_replies_equal_single_ones(tmp_path) -> None:
    folder = write_judge(tmp_path / "judge", template=TEMPLATE)
    model = LocalJudge(str(folder), device="cpu", dtype="float32", max_new_tokens=8)
    chats = [[{"role": "user", "content": text}] for text in ("cat", "what dog what cat score no", "dog dog dog")]
    assert model.replies(chats) == [model.replies([chat])[0] for chat in chats]
    assert len(set(model.replies(chats))) > 1


def test_the_model_id_differs_for_different_weights(tmp_path) -> None:
    ids = set()
    for place, says in (("one", None), ("two", "4"), ("three", "no")):
        folder = write_judge(tmp_path / place / "judge", says=says)
        ids.add(LocalJudge(str(folder), device="cpu", dtype="float32", max_new_tokens=8).model_id)
    assert len(ids) == 3


def test_a_folder_that_holds_no_model_is_refused(tmp_path, capsys) -> None:
    assert judge(tmp_path, tmp_path / "absent") == 1
    assert "found no config.json there" in capsys.readouterr().err
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert judge(tmp_path, tmp_path / "half") == 1
    assert "no causal language model can be loaded" in capsys.readouterr().err
