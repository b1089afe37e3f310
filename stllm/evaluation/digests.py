"""Short digests of what made a result: the configuration, the prompts, the checkpoint. 16 hex digits each."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stllm.evaluation.benchmarks.base import Item, Loaded
from stllm.models.checkpoints.formats import Source, weight_files
from stllm.processors.prompts import PromptProcessor

SMALL = 16 << 20  # bytes: a file up to here is read whole
BLOCK, STRIDE = 4 << 10, 4 << 20  # of a larger one, a block in every stride: some seconds for 16 GiB
# beside the weights, what decides on an answer
BESIDE = (
    *("config.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    "qformer_tokenizer/*",
)


def content_digest(content: Any) -> str:
    """Of what JSON can hold; the order of keys does not matter."""
    return _digest([json.dumps(content, sort_keys=True, ensure_ascii=False).encode()])


def prompts_digest(loaded: Loaded, processor: PromptProcessor) -> str:
    """Of every prompt that the benchmark's items give, and what the Q-Former reads beside it."""
    asked = [item for item in loaded.items if item.media is not None]
    return content_digest([[item.id, item_prompts(loaded, item, processor)] for item in asked])


def item_prompts(loaded: Loaded, item: Item, processor: PromptProcessor) -> list[dict[str, Any]]:
    """`pieces` of each question's prompt, and what the `qformer` reads."""
    template = processor.template
    prompts = []
    for request in loaded.requests(item, template):
        turn = request.turns[-1]
        system = processor.system if request.system is None else request.system
        pieces = request.pieces or template.render(turn, first=True, media="video", system=system)
        prompts.append({"pieces": list(pieces), "qformer": template.text(turn)})
    return prompts


def checkpoint_digest(sources: Sequence[Source]) -> str:
    """Of the files that weights and tokenizers come from, wherever they lie: names, sizes, and content.

    Large files are sampled, so that a checkpoint that differs in a few numbers alone could pass for another; training
    changes nearly all of what trains.
    """
    parts: list[bytes] = []
    for place in (source.path for source in sources):
        files = [place]
        if not place.is_file():
            beside = {path for pattern in BESIDE for path in place.glob(pattern) if path.is_file()}
            files = sorted({*weight_files(place), *beside})
        for path in files:
            size = path.stat().st_size
            parts += [f"{path.name} {size}".encode(), *_blocks(path, size)]
    return _digest(parts)


def _blocks(path: Path, size: int) -> Iterable[bytes]:
    with path.open("rb") as stream:
        if size <= SMALL:
            yield stream.read()
            return
        for start in (*range(0, size, STRIDE), size - BLOCK):
            stream.seek(start)
            yield stream.read(BLOCK)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
