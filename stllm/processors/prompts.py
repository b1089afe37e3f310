"""Tokenization of prompts and decoding of answers, for training, chat and benchmarks.

The texts before and after the visual tokens are tokenized separately, each with sentencepiece's leading space, as in
the published code.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import chain
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

from cachetools import LRUCache, cachedmethod
from torch import Tensor
from transformers import AutoTokenizer, BertTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from stllm.common.errors import UserError, reason
from stllm.common.files import check_regular
from stllm.common.registry import templates
from stllm.processors.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID
from stllm.processors.templates import BOS, VISUAL, PromptTemplate, Turn

QFORMER_FOLDER = "qformer_tokenizer"  # beside the weights, as in transformers' InstructBLIP
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt")
DEFAULT_QFORMER_TOKENIZER = "bert-base-uncased"
OPTION = re.compile(r"^\(([A-Z])\) .*\S", re.MULTILINE)
LETTER = re.compile(r"\(([A-Z])\)")
NUM_CACHED = 16384  # texts whose token ids are kept
ENCODING = Lock()  # of all caches of token ids; a lock of one processor could not be sent to a worker process


class PromptProcessor:
    """Tokenizers of the language model and the Q-Former, with the prompt template.

    qformer_tokenizer: None if the Q-Former reads no text. max_txt_len: maximum number of tokens of an answer in
        training, and of the text for the Q-Former. max_qformer_len: number of the Q-Former's positions, which also
        limits its text.
    end_sym: text that ends a generated answer. system: system message of chat; None for the template's, "" for none.
    Letters in shapes: B prompts, L tokens of the longest text for the Q-Former.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase | None,
        template: PromptTemplate,
        max_txt_len: int,
        max_qformer_len: int = 512,
        end_sym: str = "###",
        system: str | None = None,
    ) -> None:
        self.tokenizer, self.qformer_tokenizer, self.template = tokenizer, qformer_tokenizer, template
        self.max_txt_len, self.max_qformer_len, self.end_sym = max_txt_len, max_qformer_len, end_sym
        self.system = template.system if system is None else system
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-text token, which "
                "every answer ends with: name it as eos_token in its tokenizer_config.json"
            )
        self.eos_token_id: int = tokenizer.eos_token_id
        if template.bos_is_eos:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            bos, pads = self.eos_token_id, [tokenizer.pad_token_id]
        else:
            bos = self.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
            pads = [tokenizer.get_vocab().get("$$"), tokenizer.unk_token_id, tokenizer.pad_token_id, self.eos_token_id]
        self._encoded: LRUCache[Any, tuple[int, ...]] = LRUCache(NUM_CACHED)  # prompts repeat most of their pieces
        self.bos_token_id: int = bos
        self.pad_token_id: int = next(token for token in pads if token is not None)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids that the language model must have, including the added pad token."""
        return len(self.tokenizer)

    # ---- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, config: PretrainedConfig, qformer_tokenizer: str | Path | None = None
    ) -> "PromptProcessor":
        """Load the tokenizers of a checkpoint folder. Raises UserError if one cannot be read.

        qformer_tokenizer: a folder, a `vocab.txt` or a hub name; None for the checkpoint's `qformer_tokenizer/`, or
        bert-base-uncased from the local hub cache if there is none.
        """
        folder = Path(folder)
        reader = None
        if config.qformer_text_input:
            reader = load_qformer_tokenizer(folder, qformer_tokenizer)
            if len(reader) != config.qformer_config.vocab_size:
                raise UserError(
                    f"the Q-Former's tokenizer {reader.name_or_path or qformer_tokenizer} has {len(reader)} tokens "
                    f"with [DEC], but the Q-Former knows {config.qformer_config.vocab_size}: name the tokenizer that "
                    "these weights were trained with in model.qformer_tokenizer"
                )
        return cls(
            tokenizer=_load_tokenizer(folder, config),
            qformer_tokenizer=reader,
            template=templates.get(config.template),
            max_txt_len=config.max_txt_len,
            max_qformer_len=config.qformer_config.max_position_embeddings,
            end_sym=config.end_sym,
            system=config.system,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both tokenizers into a checkpoint folder."""
        self.tokenizer.save_pretrained(folder)
        if self.qformer_tokenizer is not None:
            self.qformer_tokenizer.save_pretrained(Path(folder) / QFORMER_FOLDER)

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def prompt_ids(self, turns: Sequence[Turn], *, media: str | None = "video", system: str | None = None) -> list[int]:
        """Return the token ids of a conversation up to the next answer; one `VISUAL_TOKEN_ID` marks the visual tokens.

        turns: all except the last have answers, which are not cut. media: "video", "image" or None. system: overrides
        the processor's system message; "" for none.
        """
        return self._conversation(turns, media, self.system if system is None else system, longest_answer=None)[0]

    def training_ids(
        self, turns: Sequence[Turn], *, media: str | None = "video", system: str = "", judge_options: bool = False
    ) -> tuple[list[int], list[int]]:
        """Return (token ids, labels) of a conversation for training; labels are -100 except for answers and end marks.

        Answers are cut to `max_txt_len` tokens, as published. judge_options: see `_judgements`.
        """
        return self._conversation(turns, media, system, longest_answer=self.max_txt_len, judge_options=judge_options)

    def _conversation(
        self,
        turns: Sequence[Turn],
        media: str | None,
        system: str,
        *,
        longest_answer: int | None,
        judge_options: bool = False,
    ) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for number, turn in enumerate(turns):
            pieces = self.template.render(turn, first=number == 0, media=media, system=system)
            prompt = self.piece_ids(pieces)
            answer: list[int] = []
            if turn.answer is not None and self.template.ends_with_eos:
                answer = [*self._encode(turn.answer)[:longest_answer], self.eos_token_id]
            elif turn.answer is not None:
                answer = [*self._encode(turn.answer + self.end_sym)[:longest_answer]]
            ids += prompt + answer
            labels += self._judgements(pieces, turn.answer) if judge_options else [IGNORE_INDEX] * len(prompt)
            labels += answer
        return ids, labels

    def _judgements(self, pieces: Sequence[str], answer: str | None) -> list[int]:
        """Return labels of a prompt by which the last token of each option predicts "yes" or "no": is it the answer?

        An option is a line such as "(A) left", and the answer names its letter, as in "Best option:(A) left". All
        other labels are -100. So is everything if the answer names no letter.
        """
        right = next(iter(LETTER.findall(answer or "")), None)
        labels: list[int] = []
        for piece in pieces:
            ids = self.piece_ids([piece])
            judged = [IGNORE_INDEX] * len(ids)
            for option in OPTION.finditer(piece) if right else ():
                before = self.piece_ids([piece[: option.end()]])
                if ids[: len(before)] == before and len(before) < len(ids):  # a token ends where the line ends
                    judged[len(before)] = self._encode("yes" if option[1] == right else "no")[-1]
            labels += judged
        return labels

    def piece_ids(self, pieces: Sequence[str]) -> list[int]:
        """Return the token ids of a prompt's pieces, tokenized separately. `VISUAL` and `BOS` become single ids."""
        special = {VISUAL: VISUAL_TOKEN_ID, BOS: self.bos_token_id}
        tokens = ([special[piece]] if piece in special else self._encode(piece) for piece in pieces)
        return list(chain.from_iterable(tokens))

    @cachedmethod(attrgetter("_encoded"), lock=lambda self: ENCODING)
    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    # ---- batches ----------------------------------------------------------------------------------------------------

    def qformer_inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return qformer_input_ids and qformer_attention_mask, (B, L); {} if the Q-Former reads no text.

        A text that is too long loses its first tokens.
        """
        if self.qformer_tokenizer is None:
            return {}
        most = min(self.max_txt_len, self.max_qformer_len)
        batch = self.qformer_tokenizer(list(texts), padding=True, truncation=True, max_length=most, return_tensors="pt")
        return {"qformer_input_ids": batch["input_ids"], "qformer_attention_mask": batch["attention_mask"]}

    # ---- answers ----------------------------------------------------------------------------------------------------

    def decode(self, ids: list[int] | Tensor) -> str:
        """Return the answer's text from its token ids, cleaned by `clean`."""
        return self.clean(str(self.tokenizer.decode(ids, skip_special_tokens=True)))

    def clean(self, text: str) -> str:
        """Return the part of a generated text before the end mark and after the last `Assistant:`, as published."""
        return text.split(self.end_sym)[0].split("Assistant:")[-1].strip()

    def stopping(self) -> dict[str, Any]:
        """Return arguments for `generate` so that EOS, or the end mark as text, ends an answer."""
        ids = {"eos_token_id": self.eos_token_id, "pad_token_id": self.pad_token_id}
        return {**ids, "stop_strings": [self.end_sym]}


def _load_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    expected = (
        "a checkpoint folder needs tokenizer.model (with sentencepiece and protobuf installed) or tokenizer.json "
        "beside its weights"
    )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"no tokenizer was found in {folder}: {expected}")
    again = "where it is there, it may be damaged or cut off: copy or download it again"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, config=config.text_config, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds; the sentence keeps the cause
        try:
            import_module("sentencepiece.sentencepiece_model_pb2")
        except Exception as absent:  # sentencepiece is not installed, or protobuf is too old (VersionError)
            if (folder / "tokenizer.model").is_file():  # it cannot be read without them
                raise UserError(
                    f"{folder / 'tokenizer.model'} cannot be read here ({reason(absent)}): install sentencepiece and "
                    "a protobuf as new as it asks for, or an older sentencepiece"
                ) from absent
        # for a damaged file, transformers advises to install tiktoken, which would not help
        cause = "" if "tiktoken" in str(error) else f" ({reason(error)})"
        raise UserError(f"the tokenizer in {folder} could not be read{cause}: {expected}; {again}") from error
    if not set(tokenizer.encode("a video", add_special_tokens=False)) - {tokenizer.unk_token_id}:
        # from an empty or foreign tokenizer.model, transformers makes a tokenizer with special tokens only
        raise UserError(f"the tokenizer in {folder} knows {len(tokenizer)} tokens and no words: {expected}; {again}")
    return tokenizer


def load_qformer_tokenizer(folder: Path, named: str | Path | None) -> PreTrainedTokenizerBase:
    """Load the Q-Former's BERT tokenizer. `[DEC]` is added as BOS; long texts lose their beginning. Raises UserError.

    folder: the checkpoint's folder. named: the argument `qformer_tokenizer` of `from_pretrained`.
    """
    own = folder / QFORMER_FOLDER
    source = str(named) if named is not None else str(own) if own.is_dir() else DEFAULT_QFORMER_TOKENIZER
    check_regular(source, "a tokenizer")
    try:
        if Path(source).is_file():
            tokenizer: PreTrainedTokenizerBase = BertTokenizer(source, do_lower_case=True)
        else:
            # download only a hub model that the user named
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=named is None, trust_remote_code=False)
    except Exception as error:
        where = f"found as {source!r} ({reason(error)})"
        if source == DEFAULT_QFORMER_TOKENIZER and named is None:
            where = f"found: {own} is not there, and {source} is not in the hub's cache on this machine"
        download = f" (--options model.qformer_tokenizer={DEFAULT_QFORMER_TOKENIZER} downloads it)"
        raise UserError(
            f"the Q-Former reads the question, but its tokenizer was not {where}; put one into {own}, or name a "
            f"folder, a vocab.txt or a hub model{download if named is None else ''}"
        ) from error
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.truncation_side = "left"
    return tokenizer
