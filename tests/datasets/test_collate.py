"""The collator: prompts, media and masks of a batch, equal for any number of workers and processes."""

from dataclasses import replace
from functools import partial
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stllm.common.registry import video_inputs
from stllm.datasets.collate import Collator
from stllm.datasets.mixture import Mixture, MixturePart, MixtureSampler
from stllm.datasets.samples import Failure, Sample, SampleKey
from stllm.models.video_inputs import build_video_input, num_visual_tokens
from stllm.processors.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID
from stllm.processors.templates import Turn
from stllm.processors.transforms import TrainTransform
from tests.helpers.corpora import corpus_of, numbered_record, write_numbered_videos
from tests.helpers.tiny import tiny_config
from tests.processors.test_prompts import processor

RATES = {"mean": 0.5, "std": 0.1, "min": 0.1, "max": 0.7}
K = 4  # tokens a frame


def collator(family: str = "instructblip", *, seed: int = 0, mask_rate: dict[str, float] | None = None) -> Collator:
    return Collator(processor(family), seed=seed, num_tokens=partial(mul, K), mask_rate=mask_rate)


def sample(index: int = 0, **fields: Any) -> Sample:
    turns = fields.pop("turns", (Turn("what moves first?", "the red circle", "watch."),))
    pixels = torch.full((fields.pop("num_frames", 3), 3, 8, 8), float(index))
    defaults = {"media": "video", "pixel_values": pixels}
    return Sample(SampleKey(0, 0, 0, index), f"sample {index}", turns, **{**defaults, **fields})


@pytest.mark.parametrize("family", ["instructblip", "minigpt4"])
def test_prompts_are_the_processors_padded_on_the_right(family: str) -> None:
    prompts = processor(family)
    long = (Turn("what moves first? the red circle or the blue square", "the red circle"),)
    samples = [sample(0), sample(1, turns=long, failures=[Failure("a", "missing", "b.mp4", "b.mp4: gone")])]
    batch = collator(family)(samples)
    for row, (ids, labels) in enumerate(prompts.training_ids(s.turns) for s in samples):
        at, more = ids.index(VISUAL_TOKEN_ID), 3 * K - 1
        length = len(ids) + more
        assert batch["input_ids"][row, :length].tolist() == ids[:at] + [VISUAL_TOKEN_ID] * more + ids[at:]
        assert batch["labels"][row, :length].tolist() == labels[:at] + [IGNORE_INDEX] * more + labels[at:]
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (batch["input_ids"].shape[1] - length)
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()
    assert batch["pixel_values"].shape == (2, 3, 3, 8, 8) and batch["pixel_values"][1].eq(1).all()
    assert batch["names"] == ["sample 0", "sample 1"] and batch["failures"] == samples[1].failures
    assert ("qformer_input_ids" in batch) == (family == "instructblip") and "kept" not in batch


def test_the_q_former_reads_the_first_turn() -> None:
    prompts = processor("instructblip")
    turns = (Turn("what moves first?", "the circle", "watch."), Turn("and then?", "the square"))
    batch = collator()([sample(turns=turns)])
    assert batch["qformer_input_ids"].equal(prompts.qformer_inputs(["watch. what moves first?"])["qformer_input_ids"])
    assert (batch["labels"] == prompts.eos_token_id).sum() == 2  # both answers are learned


def test_pairs_that_are_trained_together_are_prompts_of_their_own() -> None:
    prompts = processor("minigpt4")
    turns = (Turn("what moves first?", "the circle", "watch."), Turn("and then?", "the square", "watch."))
    batch = collator("minigpt4")([sample(0, turns=turns, together=True), sample(1, turns=turns[1:], together=True)])
    for number, turn in enumerate(turns, start=1):
        ids, labels = prompts.training_ids((turn,))
        own = (batch["packed"]["questions"][0] == 0) | (batch["packed"]["questions"][0] == number)
        at, more = ids.index(VISUAL_TOKEN_ID), 3 * K - 1
        assert batch["input_ids"][0, own].tolist() == ids[:at] + [VISUAL_TOKEN_ID] * more + ids[at:]
        assert batch["labels"][0, own].tolist() == labels[:at] + [IGNORE_INDEX] * more + labels[at:]
        assert batch["packed"]["position_ids"][0, own].tolist() == list(range(len(ids) + more))
    assert len(batch["visual_positions"]) == 2 * 3 * K and (batch["packed"]["questions"][1] == -1).any()


def test_options_are_judged_in_data_sets_that_ask_for_it() -> None:
    turns = (Turn("what moves?\n(A) the circle\n(B) the square\n", "Best option:(A) the circle"),)
    plain, judged = (collator("minigpt4")([sample(turns=turns, judge_options=judge)]) for judge in (False, True))
    assert len(judged["label_positions"]) == len(plain["label_positions"]) + 2
    assert judged["input_ids"].equal(plain["input_ids"])


@pytest.mark.parametrize(("name", "shape"), [("vision_features", (3, 5, 8)), ("query_features", (3, 4, 6))])
def test_stored_features_are_stacked(name: str, shape: tuple[int, ...]) -> None:
    samples = [sample(i, **{"pixel_values": None, name: torch.full(shape, i).half()}) for i in range(2)]
    batch = collator("minigpt4", mask_rate=RATES)(samples)
    assert batch[name].shape == (2, *shape) and batch[name].dtype == torch.float16 and "pixel_values" not in batch
    assert batch["teacher"]["visual_positions"].shape == (2 * 3 * K,)


def test_text_only_samples_have_no_media() -> None:
    batch = collator(mask_rate=RATES)([sample(media=None, pixel_values=None)])
    positions = {"visual_positions", "label_positions"}
    assert set(batch) == {"input_ids", "attention_mask", "labels", "names", "failures"} | positions
    assert not (batch["input_ids"] == VISUAL_TOKEN_ID).any() and not len(batch["visual_positions"])


def test_an_image_is_called_image_in_the_prompt_and_never_masked() -> None:
    prompts = processor("minigpt4")
    images = [sample(num_frames=1, media="image")]
    batch = collator("minigpt4", mask_rate=RATES)(images)
    assert "kept" not in batch and len(batch["visual_positions"]) == K
    ids = batch["input_ids"][0]
    first = batch["visual_positions"][0]
    assert [*ids[: first + 1], *ids[first + K :]] == prompts.training_ids(images[0].turns, media="image")[0]


def draw(keys: list[SampleKey], num_frames: int = 8, seed: int = 0) -> Tensor:
    """Return the mask of a batch, (B, N) bool, True where a visual token is dropped."""
    samples = [replace(sample(num_frames=num_frames), key=key) for key in keys]
    kept = collator(seed=seed, mask_rate=RATES)(samples)["kept"]
    return torch.ones(len(keys), num_frames * K).bool().flatten().index_fill(0, kept, False).view(len(keys), -1)


def test_masks_are_keyed_by_batch_and_sample() -> None:
    keys = [SampleKey(1, 7, 0, index) for index in range(4)]
    whole = draw(keys)
    assert whole.equal(torch.cat([draw(keys[:2]), draw(keys[2:])]))  # two processes drop what one does
    assert whole.sum(dim=1).unique().numel() == 1 and whole.unique(dim=0).shape[0] == 4
    assert not whole.equal(draw(keys, seed=1)) and not whole.equal(draw([key._replace(epoch=2) for key in keys]))
    assert not draw(keys[:1]).equal(draw([keys[0]._replace(round=1)]))


def test_masks_have_the_published_distribution() -> None:
    rates = [draw([SampleKey(0, batch, 0, 0)], 64).float().mean().item() for batch in range(400)]
    mean, std = torch.tensor(rates).mean().item(), torch.tensor(rates).std().item()
    assert abs(mean - 0.5) < 0.02 and abs(std - 0.1) < 0.02 and min(rates) >= 0.09 and max(rates) <= 0.7
    dropped = sum(draw([SampleKey(0, 0, 0, index)], 8).int() for index in range(400)) / 400
    assert isinstance(dropped, Tensor) and dropped.std() < 0.04  # each place with equal chance


@pytest.mark.parametrize("name", video_inputs.names())
@pytest.mark.parametrize("num_frames", [1, 3, 16])
def test_masks_fit_every_video_input(name: str, num_frames: int) -> None:
    config = tiny_config(video_input=name, residual_size=5)
    own = Collator(processor("instructblip"), seed=0, num_tokens=partial(num_visual_tokens, config), mask_rate=RATES)
    batch = own([sample(num_frames=num_frames)])
    places = batch.get("teacher", batch)["visual_positions"]
    assert len(places) == build_video_input(config)(torch.zeros(1, num_frames, 4, 48)).shape[1]
    assert ("teacher" in batch) == (num_frames > 1)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory) -> Mixture:
    """Return a mixture of two data sets of videos, some of them missing, with random frames and crops."""
    folder: Path = tmp_path_factory.mktemp("videos")
    write_numbered_videos(folder, range(6))
    records = [numbered_record(number) for number in range(9)]
    corpora = [
        corpus_of(folder / "a.json", records, transform=TrainTransform(32)),
        corpus_of(folder / "b.json", records[:5], transform=TrainTransform(32), qa_sampling="all"),
    ]
    return Mixture([MixturePart(corpus) for corpus in corpora], seed=5, max_tries=10)


def batches(mixture: Mixture, *, num_workers: int = 0, context: str | None = None, **division: int) -> list[dict]:
    return list(
        DataLoader(
            mixture,
            batch_sampler=MixtureSampler(mixture, **division),
            collate_fn=collator(seed=5, mask_rate=RATES),
            num_workers=num_workers,
            multiprocessing_context=context,
        )
    )


def check_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    torch.testing.assert_close(tensors(first), tensors(second), rtol=0, atol=0)
    for name in ("names", "failures"):
        assert first[name] == second[name]


def tensors(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("names", "failures")}


def test_the_number_of_workers_changes_nothing(mixture: Mixture) -> None:
    alone, with_workers = batches(mixture, batch_size=4), batches(mixture, batch_size=4, num_workers=2)
    assert any(batch["failures"] for batch in alone)
    for first, second in zip(alone, with_workers, strict=True):
        check_equal(first, second)


@pytest.mark.slow
def test_spawned_workers_change_nothing(mixture: Mixture) -> None:
    spawned = batches(mixture, batch_size=4, num_workers=1, context="spawn")
    for first, second in zip(batches(mixture, batch_size=4), spawned, strict=True):
        check_equal(first, second)


def test_processes_divide_the_batches_of_a_single_process(mixture: Mixture) -> None:
    whole = batches(mixture, batch_size=4)
    parts = [batches(mixture, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for name in ("names", "failures"):
            assert batch[name] == halves[0][name] + halves[1][name]
        assert batch["pixel_values"].equal(torch.cat([half["pixel_values"] for half in halves]))
        places = len(halves[0]["teacher"]["visual_positions"])
        assert batch["kept"].equal(torch.cat([halves[0]["kept"], halves[1]["kept"] + places]))
        for half, rows in zip(halves, (slice(0, 2), slice(2, 4)), strict=True):  # padded to their own longest row
            length = half["input_ids"].shape[1]
            for name in ("input_ids", "labels", "attention_mask"):
                assert batch[name][rows, :length].equal(half[name])
