"""The tiny vision encoder's and Q-Former's own stage: `python -m stllm.runners.toy_encoder --cfg-path YAML`.

The published ones arrive with EVA-CLIP's and BLIP-2's training behind them; a fresh encoder learns almost nothing
through a language model in the time a laptop has. Here linear heads, thrown away afterwards, say what each patch shows
and what each query has found: the first queries take a shape each, the next one the background. The folder that is left
holds these two parts, to be named as `model.ckpt` over a language model.

B frames, P patches, C encoder width, K queries, Q their width.
"""

import argparse
import math
import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from stllm.common.config import load_config
from stllm.common.errors import UserError
from stllm.common.files import check_new, new_folder
from stllm.datasets.toy_scenes import SHAPES
from stllm.datasets.toy_seeing import NUM_COLORS, NUM_PATTERNS, NUM_PLACES, NUM_SHAPES, Seen, SeenFrames
from stllm.models.factory import build_model
from stllm.models.st_llm import STLLM
from stllm.processors.vision import EvalTransform

BATCH, LEARNING_RATE, WARMUP, LOGGED = 32, 2e-3, 50, 250
NOTHING = 0.1  # weight of patches that show no thing: most of them
TAUGHT = ("vision_encoder.", "qformer.")
WORDS = (6, 16)  # random words read by a Q-Former that reads text: the fewest, and one more than the most


class SeeingHeads(nn.Module):
    """What is seen, read off the encoder's patches and the Q-Former's queries by one linear layer each."""

    def __init__(self, *, width: int, query_width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, NUM_COLORS + NUM_SHAPES + 2)
        self.slots = nn.ModuleList(_normed(query_width, NUM_COLORS + 2 * NUM_PLACES) for _ in SHAPES)
        self.patterns = nn.ModuleList([nn.Linear(width, NUM_PATTERNS), _normed(query_width, NUM_PATTERNS)])

    def forward(self, features: Tensor, queries: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """The loss, and the share of frames whose things all have their right colors.

        features: (B, 1+P, C); queries: (B, K, Q). Both results are scalars.
        """
        colors, shapes, places = self.patch(features[:, 1:]).split([NUM_COLORS, NUM_SHAPES, 2], dim=-1)
        there = seen.colors > 0  # (B, P)
        weights = there + NOTHING * ~there
        named = F.cross_entropy(colors.transpose(1, 2), seen.colors, reduction="none")
        named = named + F.cross_entropy(shapes.transpose(1, 2), seen.shapes, reduction="none")
        loss = (named * weights).sum() / weights.sum() + F.mse_loss(places[there], seen.places[there])
        found = torch.stack([slot(queries[:, number]) for number, slot in enumerate(self.slots)], dim=1)  # (B, H, ...)
        slot_colors, *slot_places = found.split([NUM_COLORS, NUM_PLACES, NUM_PLACES], dim=-1)
        known = seen.slot_colors > 0  # (B, H)
        loss = loss + F.cross_entropy(slot_colors.transpose(1, 2), seen.slot_colors) * len(self.slots) / 2
        for axis, scores in enumerate(slot_places):
            loss = loss + F.cross_entropy(scores[known], seen.slot_places[known][:, axis]) / 2
        of_patches, of_queries = self.patterns
        for patterns in (of_patches(features[:, 0]), of_queries(queries[:, len(self.slots)])):
            loss = loss + F.cross_entropy(patterns, seen.patterns) / 4
        return loss, (slot_colors.argmax(-1) == seen.slot_colors).all(1).float().mean()


def _normed(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, count))


def teach(model: STLLM, *, steps: int, seed: int) -> float:
    """Trains the encoder and the Q-Former in place. Returns the share of frames right in the last steps."""
    config = model.config
    heads = SeeingHeads(width=config.vision_config["embed_dim"], query_width=config.qformer_config.hidden_size)
    taught = nn.ModuleList([model.vision_encoder, model.qformer, heads]).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(taught.parameters(), lr=LEARNING_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    size, patch = config.vision_config["image_size"], config.vision_config["patch_size"]
    frames, prepare = SeenFrames(size=size, patch=patch, batch=BATCH, seed=seed), EvalTransform(size)
    right = torch.zeros(())
    with tqdm(desc="vision encoder", total=steps, disable=None, leave=False) as bar:
        for step, seen in enumerate(islice(DataLoader(frames, batch_size=None, num_workers=1), steps), start=1):
            video = torch.stack([prepare(frame) for frame in seen.frames.numpy()])[:, None]  # (B, 1, 3, S, S)
            features = model.vision_features(video)  # (B, 1, 1+P, C)
            queries = model.qformer(features, *_words(model, len(features)))  # (B, 1, K, Q)
            loss, share = heads(features[:, 0], queries[:, 0], seen)
            loss.backward()
            nn.utils.clip_grad_norm_(taught.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right = 0.98 * right + 0.02 * share
            bar.set_postfix(loss=f"{loss.item():.2f}", right=f"{right.item():.0%}", refresh=False)
            bar.update()
            if step % LOGGED == 0:
                bar.write(
                    f"step {step} of {steps}: loss {loss.item():.2f}, of {right.item():.0%} of the frames all told"
                )
    model.eval()
    return right.item()


def _rate(step: int, steps: int) -> float:
    """Of the learning rate: up over WARMUP steps, down along a cosine."""
    return min(1.0, (step + 1) / WARMUP) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _words(model: STLLM, count: int) -> tuple[Tensor, Tensor] | tuple[()]:
    """Random words, (B, L), and their mask: what is seen must not hang on what is asked. () if no text is read."""
    if not model.config.qformer_text_input:
        return ()
    length = int(torch.randint(*WORDS, ()))
    words = torch.randint(model.config.qformer_config.vocab_size, (count, length))
    return words, torch.ones_like(words)


def main(argv: list[str] | None = None) -> int:
    """The command: teaches, writes the folder, says how much is seen."""
    parser = argparse.ArgumentParser(description="teaches the tiny vision encoder and Q-Former to see the toy world")
    parser.add_argument("--cfg-path", required=True, help="YAML whose `model` section says what is built")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the two parts")
    parser.add_argument("--steps", type=int, default=3500, help=f"of {BATCH} frames each (default: 3500)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and frames (default: 0)")
    args = parser.parse_args(argv)
    try:
        check_new(args.output, "--output")
        torch.manual_seed(args.seed)
        model = build_model(load_config(args.cfg_path), device="cpu", dtype="float32")
        if not model.config.has_qformer or model.config.num_query_tokens <= len(SHAPES):
            raise UserError(f"{args.cfg_path}: expected a Q-Former of more than {len(SHAPES)} queries, one a shape")
        right = teach(model, steps=args.steps, seed=args.seed)
        learned = {name: value for name, value in model.state_dict().items() if name.startswith(TAUGHT)}
        with new_folder(args.output, sum(tensor.nbytes for tensor in learned.values())) as folder:
            model.config.save_pretrained(folder)
            save_file(learned, folder / "model.safetensors", metadata={"format": "pt"})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"written to {args.output}: of {right:.0%} of the frames, all shapes and their colors are told")
    return 0


if __name__ == "__main__":
    sys.exit(main())
