"""A judge on this machine: any causal language model of transformers, asked in batches, greedily."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.errors import UserError
from stllm.evaluation.judge_prompts import Messages

SAMPLE = 1 << 20  # bytes read at both ends of a weight file for its digest
MAX_NEW_TOKENS = 128  # a verdict takes a dozen


class LocalJudge:
    """A causal LM with its tokenizer, in evaluation mode.

    model_id: the folder's name and a digest of its files (names, sizes, both ends), since a name alone can mean
        anything.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, *, model_id: str, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.model_id, self.max_new_tokens = model, tokenizer, model_id, max_new_tokens
        self.max_length = getattr(model.config, "max_position_embeddings", None)  # tokens, the reply's included
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token

    @classmethod
    def load(cls, path: str, *, device: str, dtype: str, max_new_tokens: int | None) -> "LocalJudge":
        """The model in a folder of transformers' layout. Raises UserError for a folder that holds none."""
        folder = Path(path).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"local:{path}: found no config.json there, expected a folder of a transformers language model"
            )
        place = resolve_device(device)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=resolve_dtype(dtype, place))
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"local:{path}: no causal language model can be loaded from it ({reason})") from error
        limit = max_new_tokens or MAX_NEW_TOKENS
        return cls(
            model.to(place).eval(),
            tokenizer,
            model_id=f"local:{folder.resolve().name}@{_digest(folder)}",
            max_new_tokens=limit,
        )

    @torch.inference_mode()
    def replies(self, chats: list[Messages]) -> list[str | None]:
        """A reply to each chat, None to one that is too long for the model."""
        prompts = [self._prompt(messages) for messages in chats]
        fitting = [index for index, ids in enumerate(prompts) if self._fits(len(ids))]
        replies: list[str | None] = [None] * len(chats)
        if not fitting:
            return replies
        batch = self.tokenizer.pad({"input_ids": [prompts[index] for index in fitting]}, return_tensors="pt")
        batch = batch.to(self.model.device)
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )  # (B, S + new)
        texts = self.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(fitting, texts, strict=True):
            replies[index] = text
        return replies

    def _prompt(self, messages: Messages) -> list[int]:
        """Token ids of a chat: by the model's own template, or one message after the other where it has none."""
        if self.tokenizer.chat_template:
            try:
                text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except TemplateError:  # of a family that has no system role
                merged = [{"role": "user", "content": _joined(messages)}]
                text = self.tokenizer.apply_chat_template(merged, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(f"{_joined(messages)}\n\n")["input_ids"]

    def _fits(self, length: int) -> bool:
        return self.max_length is None or length + self.max_new_tokens <= self.max_length


def _joined(messages: Messages) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _digest(folder: Path) -> str:
    """8 hex digits over the names, sizes and both ends of the model's files."""
    digest = hashlib.blake2b(digest_size=4)
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".jinja") and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(SAMPLE))
                stream.seek(max(0, size - SAMPLE))
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()
