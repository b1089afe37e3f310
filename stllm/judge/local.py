"""A judge that runs in this process: any causal language model of transformers, with greedy decoding in batches."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer

from stllm.common.device import resolve_device, resolve_dtype
from stllm.common.errors import UserError, reason
from stllm.common.files import check_regular, user_path
from stllm.judge.items import Messages, without_system
from stllm.judge.ledger import MAX_NEW_TOKENS, JudgeReply

SAMPLE = 1 << 20  # bytes at each end of a file that its hash covers


class LocalJudge:
    """A causal language model with its tokenizer, loaded from a folder in transformers' format.

    Attribute model_id: the folder's name and a hash of its files, because different models may have the same name.
    Raises UserError if the folder has no such model.
    """

    def __init__(self, path: str, *, device: str, dtype: str, max_new_tokens: int | None) -> None:
        folder = user_path(path)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"local:{path}: found no config.json there, expected a folder of a transformers language model"
            )
        check_regular(folder, "a transformers language model")
        place = resolve_device(device)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=resolve_dtype(dtype, place), trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"local:{path}: no causal language model can be loaded from it ({reason(error)})"
            ) from error
        self.model = model.to(place).eval()
        self.model_id = f"local:{folder.resolve().name}@{_digest(folder)}"
        self.max_new_tokens = max_new_tokens or MAX_NEW_TOKENS
        self.max_length = getattr(model.config, "max_position_embeddings", None)  # tokens of prompt and reply
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        ends = model.generation_config.eos_token_id
        self.end_ids = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}

    @torch.inference_mode()
    def replies(self, chats: list[Messages]) -> list[JudgeReply]:
        """Reply to each chat in one batch. The reply to a chat that is too long for the model is an error."""
        prompts = [self._prompt(messages) for messages in chats]
        longest = math.inf if self.max_length is None else self.max_length - self.max_new_tokens
        fitting = [index for index, ids in enumerate(prompts) if len(ids) <= longest]
        too_long = JudgeReply(model=self.model_id, error="the instructions and texts are too long for the judge")
        replies = [too_long] * len(chats)
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
        for index, new in zip(fitting, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            length = next((place for place, token in enumerate(new) if token in self.end_ids), None)
            text = str(self.tokenizer.decode(new[:length]))  # keep special tokens: some mark a model's reasoning
            replies[index] = JudgeReply(text, self.model_id, cut=length is None)
        return replies

    def _prompt(self, messages: Messages) -> list[int]:
        """Return the token ids of a chat, by the model's chat template. Without one, the messages are concatenated."""
        merged = without_system(messages)
        if not self.tokenizer.chat_template:
            return self.tokenizer(f"{merged[0]['content']}\n\n")["input_ids"]
        text, refusal = "", "it renders no text"
        for chat in (messages, merged):
            try:
                text = str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
            except TemplateError as error:  # the template may not allow a system role
                text, refusal = "", str(error)
            if messages[0]["content"].strip() in text:  # some templates drop the system message
                break
        if not text:
            raise UserError(
                f"{self.model_id}: its chat template refuses a single user message ({refusal}): use a chat model"
            )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _digest(folder: Path) -> str:
    """Return a hash of the model's files (names, sizes, first and last MiB), 8 hex digits."""
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
