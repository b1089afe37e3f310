"""Single frames with what is seen in them: the labels are what the frame shows."""

import numpy as np
import torch

from stllm.datasets.samples import SampleKey
from stllm.toy.scenes import COLORS, PATTERNS, SHAPES, Background, Cut, Event, Scene, Thing
from stllm.toy.seeing import NUM_COLORS, FrameLabels, ToyFrame, ToyFrames, collate, labels
from stllm.toy.tasks import split_of

PLAIN, STRIPED = Background("plain", 90, 0), Background("striped", 90, 0)
THINGS = (
    Thing("red", "square", 20, 44, 8, (Event("turn", 0.4, 0.6, "green"),)),
    Thing("blue", "cross", 50, 12, 5, (Event("disappear", 0.5, 0.6),)),
)


def drawn(count: int, *, seed: int) -> list[ToyFrame]:
    """Frames of a patch size of 8 pixels."""
    source, generator = ToyFrames(size=64, patch=8), np.random.default_rng(seed)
    return [source.load(SampleKey(0, 0, 0, number), generator) for number in range(count)]


def test_labels_follow_the_scene_through_time() -> None:
    scene = Scene(THINGS, PLAIN, Cut(0.7, STRIPED))
    for time, square, cross, pattern in ((0.1, "red", "blue", "plain"), (0.9, "green", None, "striped")):
        colors, shapes, places, slot_colors, slot_places, number = labels(scene, np.array([time]), 8)
        expected = {"square": square, "cross": cross}
        for slot, shape in enumerate(SHAPES):
            color = expected.get(shape)
            assert slot_colors[slot] == (0 if color is None else 1 + list(COLORS).index(color))
            assert ((shapes == 1 + slot).sum() > 0) == (color is not None)
        place = [20 / 8 - 4, 44 / 8 - 4, 8 / 4]  # x and y from the middle, in eighths, and the radius in quarters of 16
        assert slot_places[list(SHAPES).index("square")].tolist() == place
        assert list(PATTERNS)[int(number)] == pattern
        covered = np.flatnonzero(colors)
        assert {(patch % 8, patch // 8) for patch in covered} >= {(2, 5)}
        assert np.allclose(places[shapes == 1 + list(SHAPES).index("square")], place)


def test_frames_show_what_their_labels_say() -> None:
    batch = collate(drawn(24, seed=5))
    truth = FrameLabels(**batch["truth"])
    assert batch["pixel_values"].shape == (24, 1, 3, 64, 64) and truth.colors.shape == (24, 64)
    frames = batch["pixel_values"][:, 0].permute(0, 2, 3, 1).float()  # (B, S, S, 3)
    levels = torch.tensor(list(COLORS.values()))
    right = total = 0
    for frame, colors, places in zip(frames, truth.slot_colors, truth.slot_places, strict=True):
        for color, (across, down, _) in zip(colors.tolist(), places.tolist(), strict=True):
            if color:
                x, y = round(32 + 8 * across), round(32 + 8 * down)
                around = frame[max(y - 4, 0) : y + 4, max(x - 4, 0) : x + 4].reshape(-1, 3)
                nearest = torch.cdist(around, levels.float()).argmin(1)
                total, right = total + 1, right + bool((nearest == color - 1).sum() >= 8)
    assert total > 24 and right > 0.9 * total  # the others are covered, or change just then
    assert int(truth.colors.max()) < NUM_COLORS and bool(((truth.colors > 0) == (truth.shapes > 0)).all())


def test_the_seed_decides() -> None:
    first, again, other = (collate(drawn(4, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_scenes_of_the_test_are_never_seen(monkeypatch) -> None:
    scenes: list[Scene] = []

    def noted(scene: Scene, *_: object) -> FrameLabels:
        scenes.append(scene)
        return FrameLabels(*[torch.zeros(1)] * 6)

    monkeypatch.setattr("stllm.toy.seeing.labels", noted)
    drawn(30, seed=0)
    assert len(scenes) == 30 and all(split_of(scene) == "train" for scene in scenes)
