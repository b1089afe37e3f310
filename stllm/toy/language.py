"""The toy world's language: a tiny LLaMA with random weights, and two tokenizers with the world's words.

They replace Vicuna and bert-base-uncased, in the same layouts, so that a tiny model runs through the same code. Both
tokenizers are the same for every world. The Q-Former's has a fixed size, so that a configuration can name it.
"""

import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stllm.common.registry import templates
from stllm.toy.annotations import PICTURE_REQUEST, STORY_REQUEST, TELLING, look_up, seen_in_words, tell
from stllm.toy.tasks import PICTURES, RARE, TASKS

NUM_TEXTS = 40  # examples of each task for the vocabularies: they contain every word
LLM_TOKENS = 1024  # at most
QFORMER_TOKENS = 512  # exactly, without [DEC]; BERT's vocabulary is filled up in the same way
QFORMER_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "initializer_range": 0.14,  # sharp attention from the start: at 0.07 what is looked up is found much later
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def world_texts() -> Iterator[str]:
    """Texts of the toy world and around it: questions, options, answers, prompts."""
    for number, task in enumerate((*TASKS, RARE, PICTURES)):
        for index in range(NUM_TEXTS):
            generator = np.random.default_rng([number, index])
            example = task.make(generator)
            turns = example.turns
            if task in TELLING:
                turns = (*turns, *tell(example, generator), *look_up(example, generator))
            for turn in turns:
                yield from (turn.instruction, turn.question, turn.answer or "")
            yield seen_in_words(example.scene)
    yield from (STORY_REQUEST, PICTURE_REQUEST)
    for name in templates.names():
        template = templates.get(name)
        yield from (template.system, template.followup, *template.opening, *template.text_opening)


def write_language_model(folder: Path, texts: Iterable[str], seed: int) -> None:
    """Write a LLaMA of about a million parameters and its tokenizer: config.json, model.safetensors, tokenizer.json.

    seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bytes_of_text = pre_tokenizers.ByteLevel(add_prefix_space=True)  # every text has tokens; a space leads, as LLaMA's
    tokenizer = Tokenizer(models.BPE())
    # A word is the same token at the beginning of a line, and "Assistant: ", with which training's prompts end, is the
    # same as in the benchmarks' longer ones: otherwise what was learned in training is not found again in a benchmark.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r" *\n *"), "\n "), normalizers.Replace(Regex(r" +\z"), "")]
    )
    tokenizer.pre_tokenizer = bytes_of_text
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\n ", "\n")])
    trainer = trainers.BpeTrainer(
        vocab_size=LLM_TOKENS,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(bytes_of_text.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(wrapped), **LLAMA)
        model = LlamaForCausalLM(config)
    config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def write_qformer_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """Write a BERT vocabulary, vocab.txt, and its settings: whole words of the world, letters for others."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import BertTokenizer

    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    letters = string.ascii_lowercase + string.digits
    characters = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    known = [*QFORMER_SPECIAL, *characters, *sorted(words - set(characters))]
    assert len(known) <= QFORMER_TOKENS, f"{len(known)} tokens"
    known += [f"[unused{number}]" for number in range(QFORMER_TOKENS - len(known))]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(known) + "\n", encoding="utf-8")
    BertTokenizer(str(vocabulary), do_lower_case=True).save_pretrained(folder)
