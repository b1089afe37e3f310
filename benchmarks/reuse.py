"""Reuse: CPU seconds of 25 questions about one video, ours against reading and encoding the video for each question.

In the MiniGPT-4 family the visual tokens do not depend on the question, so their keys and values in the language model
are reused as well (prefixes). The baseline of that family is therefore ours without prefixes. At the start of each row
the cache is empty. The model has the published proportions (encoder to language model about 1 : 7 in parameters, 64
frames, the video input residual, 32 tokens a frame) at about an eightieth of the size. The video is H.264, rendered for
this measurement.

    python -m benchmarks.reuse [--quick]
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import arguments, now, peak_rise, report
from stllm.common.device import resolve_device
from stllm.conversation.chat import Chat, Media, Request
from stllm.conversation.decoding import Decoding
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor
from stllm.processors.templates import Turn
from tests.helpers.videos import write_video

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
FOLDERS = {"instructblip": "instructblip_residual_mvm", "minigpt4": "minigpt4_plain_all"}  # tokenizers, by family
NUM_QUESTIONS, FEW = 25, 4
DECODING = Decoding(num_beams=1, max_new_tokens=8)  # VideoQA's answers are a few words
NUM_FRAMES, SIZE, GOP = 1500, (1280, 720), 250  # a minute of 720p, as in VcgBench; x264's usual GOP


def new_model(
    image_size: int, device: torch.device, video_input: str = "residual", family: str = "instructblip"
) -> STLLM:
    """Return a model in the published proportions. Its random weights are scaled up so that answers differ."""
    torch.manual_seed(0)
    with device:
        model = STLLM(
            STLLMConfig(
                vision_config={
                    "image_size": image_size,
                    "embed_dim": 352,
                    "depth": 8,
                    "num_heads": 4,
                    "mlp_ratio": 4.3637,
                },
                qformer_config={
                    "vocab_size": 163,
                    "hidden_size": 192,
                    "num_hidden_layers": 4,
                    "num_attention_heads": 4,
                    "intermediate_size": 768,
                    "max_position_embeddings": 64,
                },
                text_config={
                    "model_type": "llama",
                    "vocab_size": 513 if family == "instructblip" else 512,
                    "hidden_size": 1024,
                    "intermediate_size": 2752,
                    "num_hidden_layers": 7,
                    "num_attention_heads": 8,
                },
                video_input=video_input,
                system="",
                template=family,
                qformer_text_input=family == "instructblip",
            ),
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def new_chat(model: STLLM, cache_bytes: int) -> Chat:
    """Return a chat with the model, with the tokenizers of the tests. cache_bytes: the size of its cache."""
    assert isinstance(model.config, STLLMConfig)
    processor = PromptProcessor.from_pretrained(
        GOLDEN / FOLDERS[model.config.template],
        config=model.config,
        qformer_tokenizer=GOLDEN / "foreign" / "bert" / "vocab.txt",
    )
    return Chat(model=model, processor=processor, decoding=DECODING, cache_bytes=cache_bytes)


def requests(video: Path) -> list[Request]:
    """Return 25 different questions about a video."""
    words = ["circle", "square", "triangle", "object", "person"]
    questions = [f"what does the {a} do before the {b} moves" for a in words for b in words]
    return [Request((Turn(question),), Media(str(video))) for question in questions]


def keep_none(*_: Any) -> None:
    """Do nothing: replaces the cache's `put_prefixes`, so that no prefixes are kept."""


def main() -> None:
    """Measure, print the result and write it."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    rows: list[dict[str, Any]] = []
    different = {}
    with tempfile.TemporaryDirectory() as folder:
        video = write_video(Path(folder) / "clip.mp4", num_frames=NUM_FRAMES, size=SIZE, gop=GOP)
        asked = requests(video)[: FEW if args.quick else NUM_QUESTIONS]
        for family in FOLDERS:
            model = new_model(112 if args.quick else 224, device, family=family)
            new_chat(model, 0).ask(None, "what moves")  # warm-up
            first = {"instructblip": "read and encode for each question", "minigpt4": "without prefixes"}[family]
            found: dict[str, list[str]] = {}
            expected: list[str] = []  # from the first row, and for questions that it lacks from the second
            for name in (first, "ours, one question at a time", "ours, all questions in one batch"):
                chat = new_chat(model, 0 if name.startswith("read") else 1 << 30)
                some = asked[:FEW] if name.startswith("read") else asked  # each question takes equally long
                batches = [some] if name.endswith("batch") else [[one] for one in some]
                start = now(device)

                def run() -> None:
                    found[name] = [answer.text for batch in batches for answer in chat.answer(batch)]  # noqa: B023

                with (
                    patch.object(chat.cache, "put_prefixes", keep_none) if name == "without prefixes" else nullcontext()
                ):
                    most = peak_rise(run)
                seconds = now(device) - start
                row: dict[str, Any] = {"": f"{family}, {name}", "questions": len(some), "seconds": seconds}
                row["questions/s"] = len(some) / seconds
                row["speed-up"] = row["questions/s"] / (row if name == first else rows[1 - len(found)])["questions/s"]
                row["MiB kept"] = chat.cache.num_bytes / 2**20
                row["MiB at most"] = most / 2**20
                expected = expected or found[name]
                equal = [a == b for a, b in zip(found[name], expected, strict=False)]
                expected = expected + found[name][len(expected) :]
                rows.append(row | {"equal answers": f"{sum(equal)}/{len(equal)}"})
                print(rows[-1], flush=True)
            different[family] = len(set(found["ours, one question at a time"]))
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6) for name, part in model.named_children()}
    sizes: dict[str, Any] = {"frames": 64, "num_frames": NUM_FRAMES, "size": SIZE, "gop": GOP}
    sizes["millions of parameters"] = millions
    report(
        "reuse",
        "the video read and encoded again for each question, or (minigpt4) without prefixes, one question at a time",
        rows,
        sizes,
        args.output_dir,
        {"different answers": different},
        device=device,
    )


if __name__ == "__main__":
    main()
