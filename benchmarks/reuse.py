"""Reuse: 25 questions about one video, ours against reading and encoding it again for each question.

The model has the published proportions (encoder : language model about 1 : 7 in parameters, 64 frames through the
global-local module, K = 32) at about an eightieth of the size; the video is rendered here as H.264.

    python -m benchmarks.reuse [--quick]
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import arguments, report
from stllm.common.device import resolve_device
from stllm.conversation.chat import Chat, Media, Request
from stllm.conversation.decoding import Decoding
from stllm.models.configuration import STLLMConfig
from stllm.models.st_llm import STLLM
from stllm.processors.prompts import PromptProcessor
from stllm.processors.templates import Turn
from tests.helpers.videos import write_video

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
NUM_QUESTIONS, FEW = 25, 4
DECODING = Decoding(num_beams=1, max_new_tokens=8)  # VideoQA's answers are a few words
NUM_FRAMES, SIZE, GOP = 1500, (1280, 720), 250  # a minute of 720p, as in VcgBench; x264's usual GOP


def new_model(image_size: int, device: torch.device, video_input: str = "residual") -> STLLM:
    """Random weights in the published proportions."""
    torch.manual_seed(0)
    with device:
        return STLLM(
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
                    "vocab_size": 513,
                    "hidden_size": 1024,
                    "intermediate_size": 2752,
                    "num_hidden_layers": 7,
                    "num_attention_heads": 8,
                },
                video_input=video_input,
                system="",
            ),
        )


def new_chat(model: STLLM, cache_bytes: int) -> Chat:
    """An engine around the model, with the tests' tokenizers."""
    assert isinstance(model.config, STLLMConfig)
    processor = PromptProcessor.from_pretrained(
        GOLDEN / "instructblip_residual_mvm",
        config=model.config,
        qformer_tokenizer=GOLDEN / "foreign" / "bert" / "vocab.txt",
    )
    return Chat(model=model, processor=processor, decoding=DECODING, cache_bytes=cache_bytes)


def requests(video: Path) -> list[Request]:
    """25 different questions about the one video."""
    words = ["circle", "square", "triangle", "object", "person"]
    questions = [f"what does the {a} do before the {b} moves" for a in words for b in words]
    return [Request((Turn(question),), Media(str(video))) for question in questions]


def main() -> None:
    """Measures, prints and writes."""
    args = arguments(__doc__ or "")
    device = resolve_device(args.device)
    model = new_model(112 if args.quick else 224, device)
    with tempfile.TemporaryDirectory() as folder:
        video = write_video(Path(folder) / "clip.mp4", num_frames=NUM_FRAMES, size=SIZE, gop=GOP)
        asked = requests(video)[: FEW if args.quick else NUM_QUESTIONS]
        again, ours, batched = new_chat(model, 0), new_chat(model, 1 << 30), new_chat(model, 1 << 30)
        new_chat(model, 0).answer(asked[:1])  # warm-up
        runs = {
            "read and encode for each question": lambda: [again.answer([one])[0].text for one in asked],
            "ours, one question at a time": lambda: [ours.answer([one])[0].text for one in asked],
            "ours, all questions in one batch": lambda: [answer.text for answer in batched.answer(asked)],
        }
        rows: list[dict[str, Any]] = []
        texts: list[list[str]] = []
        for name, run in runs.items():
            start = time.perf_counter()
            texts.append(run())
            spent = time.perf_counter() - start
            first = rows[0]["seconds"] if rows else spent
            rows.append({"": name, "seconds": spent, "questions/s": len(asked) / spent, "speed-up": first / spent})
    for row, answers in zip(rows, texts, strict=True):
        row["equal answers"] = f"{sum(a == b for a, b in zip(answers, texts[0], strict=True))}/{len(asked)}"
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6) for name, part in model.named_children()}
    sizes = {"questions": len(asked), "frames": 64, "num_frames": NUM_FRAMES, "size": SIZE, "gop": GOP}
    sizes["millions of parameters"] = millions
    report(
        "reuse",
        "the video read and encoded again for each question, one question at a time",
        rows,
        sizes,
        args.output_dir,
        device=device,
    )


if __name__ == "__main__":
    main()
