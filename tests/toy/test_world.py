"""The toy world: what is written, the same again for a seed, nothing tested that was trained on, answers that hold."""

import io
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from stllm.common.config import load_config
from stllm.common.registry import templates
from stllm.evaluation.benchmarks.mvbench import prompt_pieces
from stllm.media.open import open_media
from stllm.models.build import build_model
from stllm.models.checkpoints.infer_config import decide_config, open_sources
from stllm.models.settings import model_section
from stllm.processors.prompts import PromptProcessor
from stllm.processors.templates import SYSTEM, question_block
from stllm.toy import world as toy_world
from stllm.toy.questions import Asked
from stllm.toy.scenes import COLORS, DIRECTIONS, Background, Event, Scene, Thing, follow, frame_times, render
from stllm.toy.tasks import FPS, PICTURES, RARE, TASKS, World, action_sequence, split_of
from stllm.toy.world import PAIRS, TESTED, shares, write_world
from tests.helpers.twins import files, read

SMALL: dict[str, Any] = {"num_train": 2 * len(TASKS), "num_test": 2 * len(TESTED), "seed": 3}
TRAIN_YAML = Path(__file__).parents[2] / "configs" / "tiny" / "train.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("toy") / "world"
    write_world(target, **SMALL)
    return target


def pixels(path: Path) -> np.ndarray:
    with open_media(path) as reader:
        return np.stack(list(reader.frames(range(reader.info.num_frames))))


# ---- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.corpus)
def test_training_sets_are_in_videochat2_layout(root: Path, task) -> None:
    records = read(root / "vc2" / "video" / task.corpus / "train.json")
    assert len(records) == 2
    for record in records:
        assert all(set(pair) == {"i", "q", "a"} and pair["a"] and (pair["i"] or pair["q"]) for pair in record["QA"])
        with open_media(root / "vc2" / "media" / record["video"]) as reader:
            info = reader.info
        assert (info.width, info.height, info.fps) == (64, 64, FPS)
        assert info.num_frames == (24 if "end" in record else 16)
        assert 0 <= record.get("start", 0) < record.get("end", 1) <= info.num_frames / FPS


@pytest.mark.parametrize("task", TESTED, ids=lambda task: task.benchmark)
def test_test_sets_are_in_mvbench_layout(root: Path, task) -> None:
    items = read(root / "mvbench" / "json" / f"{task.benchmark}.json")
    assert len(items) == 2
    for item in items:
        assert item["answer"] in item["candidates"] and len(set(item["candidates"])) == len(item["candidates"])
        assert (root / "mvbench" / "video" / task.media_dir / item["video"]).is_file()
        assert ("start" in item) == ("end" in item) == (task.benchmark == "action_sequence")


def test_videos_are_h264(root: Path) -> None:
    for path in root.rglob("*.mp4"):
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"


def test_pictures_and_shards(root: Path) -> None:
    for record in read(root / "vc2" / "image" / PICTURES.corpus / "train.json"):
        with Image.open(root / "vc2" / "media" / record["image"]) as picture:
            assert picture.size == (64, 64)
        assert record["QA"]
    (shard,) = (root / "images").iterdir()
    with tarfile.open(shard) as tar:
        members = {member.name: member for member in tar}
        assert len(members) == 2 * SMALL["num_train"]
        for index in range(SMALL["num_train"]):
            png, txt = (tar.extractfile(members[f"{index:06d}.{ending}"]) for ending in ("png", "txt"))
            assert png is not None and txt is not None
            assert Image.open(io.BytesIO(png.read())).size == (64, 64)
            assert txt.read().decode().startswith("A ")


def test_shares_are_even_and_nobody_goes_without() -> None:
    assert shares(16, TESTED) == [3, 3, 3, 3, 2, 2]
    assert shares(2, TESTED) == [1] * 6
    assert sum(shares(1200, TASKS)) == 1200


@pytest.mark.parametrize(("num_frames", "shapes"), [(8, (64, 12)), (64, (64, 64))])
def test_long_clips_stand_beside_the_others(num_frames: int, shapes: tuple[int, int]) -> None:
    world = World(0, num_frames, size=80)
    (sequence,) = (task for task in TASKS if task.make is action_sequence)
    assert world.clip(RARE, "train", 0)[1].shape == (shapes[0], 80, 80, 3)
    _, clip, bounds = world.clip(sequence, "train", 0)
    assert len(clip) == shapes[1] and 0 <= bounds["start"] < bounds["end"] <= shapes[1] / FPS


def test_a_world_with_rare_events(tmp_path: Path) -> None:
    write_world(tmp_path / "long", num_train=1, num_test=1, seed=0, long=True, num_frames=8)
    (item,) = read(tmp_path / "long" / "mvbench" / "json" / "unexpected_action.json")
    clip = pixels(tmp_path / "long" / "mvbench" / "video" / "FunQA_test" / "test" / item["video"])
    assert clip.shape == (64, 64, 64, 3)
    for form, count in (("train", 1), ("open", 1), ("choices", 2)):
        records = read(tmp_path / "long" / "vc2" / "video" / "reasoning" / "toy_rare" / f"{form}.json")
        assert [record["video"] for record in records] == ["toy_rare_00000.mp4"] * count
        assert not any("Tell the" in turn["q"] for record in records for turn in record["QA"])
    told = read(tmp_path / "long" / "vc2" / "video" / "reasoning" / "toy_mixed" / "open.json")
    paths = [turn for record in told for turn in record["QA"] if turn["q"].startswith("Tell the")]
    assert len({turn["q"] for turn in paths}) == len(paths) > 1  # a turn for each thing, a state for each frame of 8
    assert all(len(turn["a"].split(", ")) == 8 for turn in paths)


# ---- the same again, and another ------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_world(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", **SMALL)
    assert files(tmp_path / "again") == files(root)


def test_several_processes_write_the_same_world(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "shared", **SMALL, num_workers=2)
    assert files(tmp_path / "shared") == files(root)


def test_another_seed_gives_another_world_with_the_same_words(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "other", **{**SMALL, "seed": 4})
    ours, theirs = files(root), files(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    equal = {name for name in ours if ours[name] == theirs[name]}
    assert not any(name.endswith((".mp4", ".png", ".tar", ".safetensors", "train.json")) for name in equal)
    assert {"qformer_tokenizer/vocab.txt", "language_model/tokenizer.json"} <= equal


@given(seed=st.integers(0, 2**32 - 1), other=st.integers(0, 2**32 - 1), index=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_training_and_test_never_overlap_whatever_the_seed(seed: int, other: int, index: int) -> None:
    for task in (*TASKS, PICTURES, PAIRS):
        trained = World(seed, 16).draw(task, "train", index)[0].scene
        tested = World(other, 16).draw(task, "test", index)[0].scene
        assert (split_of(trained), split_of(tested)) == ("train", "test")  # a function of the scene alone
        assert trained != tested


def test_no_clip_of_a_world_is_trained_and_tested() -> None:
    world = World(0, 16)
    for task in TESTED:
        trained = {repr(world.draw(task, "train", index)[0].scene) for index in range(300)}
        tested = {repr(world.draw(task, "test", index)[0].scene) for index in range(100)}
        assert trained.isdisjoint(tested)


# ---- answers are true, and not guessed from the question ------------------------------------------------------------


@pytest.mark.parametrize("task", TESTED, ids=lambda task: task.benchmark)
def test_no_answer_and_no_letter_is_preferred(task) -> None:
    examples = [World(1, 16).draw(task, "test", index)[0] for index in range(400)]
    count = len(examples[0].asked[0].options)
    letters = Counter(example.asked[0].options.index(str(example.turns[0].answer)) for example in examples)
    answers = Counter(example.turns[0].answer for example in examples)
    for found in (letters, answers):
        assert max(found.values()) < 1.35 * 400 / min(count, len(found))


def test_options_are_asked_as_the_benchmark_asks() -> None:
    example = World(0, 16).draw(TASKS[0], "train", 0)[0]
    asked, chosen = example.turns
    letter = chr(ord("A") + example.asked[0].options.index(str(asked.answer)))
    assert question_block("Where?", ("here", "there")) == "Question: Where?\nOptions:\n(A) here\n(B) there"
    assert chosen.question.startswith(question_block(asked.question, example.asked[0].options))
    assert chosen.answer == f"Best option:({letter}) {asked.answer}"


@pytest.mark.parametrize(("towards", "opposite"), [("left", "right"), ("up", "down")])
def test_only_the_order_of_frames_tells_the_direction(towards: str, opposite: str) -> None:
    times = (np.arange(16) + 0.5) / 16
    there, back = (
        follow(Thing("red", "circle", 32, 32, 8, (Event("move", 0, 1, way),)), times) for way in (towards, opposite)
    )
    np.testing.assert_allclose(there.x, back.x[::-1])
    np.testing.assert_allclose(there.y, back.y[::-1])
    assert np.hypot(there.x[-1] - there.x[0], there.y[-1] - there.y[0]) > 20


@pytest.mark.parametrize("towards", DIRECTIONS)
def test_things_move_where_they_are_said_to(towards: str) -> None:
    track = follow(Thing("red", "circle", 32, 32, 8, (Event("move", 0, 1, towards),)), np.array([0.0, 0.5, 1.0]))
    right, down = DIRECTIONS[towards]
    assert np.sign(np.diff(track.x)).tolist() == [right, right]
    assert np.sign(np.diff(track.y)).tolist() == [down, down]


def test_the_written_video_shows_the_colors_that_the_answers_name(root: Path) -> None:
    task = next(task for task in TESTED if task.benchmark == "state_change")
    for index, item in enumerate(read(root / "mvbench" / "json" / "state_change.json")):
        example = World(SMALL["seed"], 16).draw(task, "test", index)[0]
        thing = example.scene.things[0]
        clip = pixels(root / "mvbench" / "video" / task.media_dir / item["video"]).astype(int)
        frame = clip[0 if "beginning" in item["question"] else -1]
        seen = frame[thing.y - 2 : thing.y + 3, thing.x - 2 : thing.x + 3].mean((0, 1))
        distances = {color: np.abs(seen - levels).sum() for color, levels in COLORS.items()}
        assert min(distances, key=lambda color: distances[color]) == item["answer"]
        assert item["question"].split()[4] == thing.shape


def test_a_rendered_shape_is_where_its_scene_says() -> None:
    scene = Scene((Thing("white", "square", 20, 40, 8),), Background("plain", 60, 0))
    clip = render(scene, times=frame_times(2), size=128, generator=np.random.default_rng(0))
    assert clip.shape == (2, 128, 128, 3) and clip.dtype == np.uint8
    rows, columns = np.nonzero(clip[0].min(axis=2) > 150)
    assert (rows.mean(), columns.mean()) == pytest.approx((80, 40), abs=1)
    assert np.ptp(rows) == pytest.approx(2 * 0.85 * 16, abs=2)


# ---- language -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(root: Path):
    return AutoTokenizer.from_pretrained(root / "language_model", local_files_only=True)


@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_has_tokens(tokenizer, text: str) -> None:
    """From which it is read again, but for spaces around newlines and at the ends."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert str(tokenizer.decode(ids)).removeprefix(" ") == re.sub(" *\n *", "\n", text).rstrip(" ").removeprefix(" ")
    assert tokenizer.unk_token_id not in ids


def test_a_choice_has_the_same_tokens_in_training_and_in_the_benchmark(tokenizer) -> None:
    template = templates.get("instructblip")
    asked = Asked("Is there a red circle?", "no", ("yes", "no"))
    choice = asked.as_choice()
    trained = template.render(choice, first=True, media="video")
    tested = prompt_pieces(question_block(asked.question, asked.options), SYSTEM, template)
    assert trained[:-1] == list(tested[:-1])
    answered = [*tokenizer.tokenize(trained[-1]), *tokenizer.tokenize(choice.answer)]
    prompt = tokenizer.tokenize(tested[-1])
    assert answered == [*prompt, "B", ")", "Ġno"]


def test_the_language_model_and_both_tokenizers_load(root: Path, tmp_path: Path) -> None:
    asked = {"llama_model": str(root / "language_model"), "qformer": {"vocab_size": 513}, "qformer_text_input": True}
    config = decide_config(open_sources(asked), asked)
    processor = PromptProcessor.from_pretrained(
        root / "language_model", config=config, qformer_tokenizer=root / "qformer_tokenizer"
    )
    tokenizer = processor.tokenizer
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert processor.vocab_size == config.text_config.vocab_size  # [PAD] included
    assert processor.qformer_tokenizer is not None
    words = "What does the red circle do first?"
    assert "[UNK]" not in processor.qformer_tokenizer.tokenize(words + " (A) zebra_7!")
    assert len(processor.qformer_tokenizer.tokenize(words)) == 8  # whole words
    processor.save_pretrained(tmp_path)
    again = PromptProcessor.from_pretrained(tmp_path, config=config)
    assert again.tokenizer.encode(words) == tokenizer.encode(words)


def test_the_tiny_training_configuration_finds_the_world(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_ROOT", str(root))
    cfg = load_config(TRAIN_YAML)
    model = build_model(model_section(cfg), device="cpu", dtype="float32")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert 1e6 < model.num_parameters() < 4e6
    entries = {name: entry for name, entry in cfg.datasets.items() if not str(name).endswith("_root")}
    assert entries
    assert all((Path(cfg.datasets.anno_root) / entry.anno_path).is_file() for entry in entries.values())


def test_the_room_asked_for_is_enough(root: Path) -> None:
    media = [path for path in root.rglob("*") if path.suffix in (".mp4", ".png", ".tar")]
    clips = [path.stat().st_size for path in media if path.suffix == ".mp4"]
    assert sum(clips) <= len(clips) * 16 * toy_world.FRAME_BYTES
    assert sum(path.stat().st_size for path in root.glob("images/*")) <= SMALL["num_train"] * toy_world.PICTURE_BYTES
