"""Collation of prompts: expansion of placeholders, padding, packing, positions."""

import pytest
import torch

from stllm.processors.sequences import (
    IGNORE_INDEX,
    VISUAL_TOKEN_ID,
    pad_sequences,
    share_beginning,
    training_sequences,
)

V = VISUAL_TOKEN_ID
PAD = 0


def test_the_placeholder_is_repeated_for_each_visual_token() -> None:
    batch = pad_sequences([[5, V, 6, 7]], pad_id=PAD, num_visual=[3], labels=[[-100, -100, 6, 7]])
    assert batch["input_ids"].tolist() == [[5, V, V, V, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1] * 6]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 6, 7]]
    assert batch["visual_positions"].tolist() == [1, 2, 3]
    assert batch["label_positions"].tolist() == [3, 4]  # from where they are predicted


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_on_the_given_side(side: str) -> None:
    """Rows have one, three or no remaining visual tokens, or no medium."""
    rows = [[V, 6], [5, V], [V, 7], [8]]
    batch = pad_sequences(rows, pad_id=PAD, num_visual=[1, 3, 0, None], side=side)
    left = [[0, 0, V, 6], [5, V, V, V], [0, 0, 0, 7], [0, 0, 0, 8]]
    expected = torch.tensor(left if side == "left" else [sorted(row, key=lambda i: i == PAD) for row in left])
    assert batch["input_ids"].equal(expected)
    assert batch["attention_mask"].equal((expected != PAD).long())
    assert expected.flatten()[batch["visual_positions"]].tolist() == [V] * 4
    assert "labels" not in batch


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    batch = pad_sequences([[4, 5, 6], [7, 8]], pad_id=PAD, labels=[[IGNORE_INDEX, 5, 6], [7, 8]])
    assert batch["labels"].tolist() == [[IGNORE_INDEX, 5, 6], [7, 8, IGNORE_INDEX]]
    assert batch["label_positions"].tolist() == [0, 1, 3]
    assert not len(batch["visual_positions"])


def test_packed_rows_are_concatenated_and_positions_restart() -> None:
    rows, labels = [[5, V, 6], [8], [V, 7, 9]], [[-100, -100, 6], [8], [-100, 7, 9]]
    batch = pad_sequences(rows, pad_id=PAD, num_visual=[3, None, 1], labels=labels, packing=True)
    assert batch["input_ids"].tolist() == [[5, V, V, V, 6, 8, V, 7, 9]]
    assert batch["packed"]["lengths"] == [5, 1, 3]
    assert batch["packed"]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
    assert batch["visual_positions"].tolist() == [1, 2, 3, 6]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 6, 8, -100, 7, 9]]
    assert batch["label_positions"].tolist() == [3, 6, 7]  # no sample predicts the next one's beginning
    assert "attention_mask" not in batch


def test_questions_share_the_beginning_of_their_prompts() -> None:
    first, second = ([5, V, 4, 6, 7], [-100, -100, -100, -100, 7]), ([5, V, 4, 8, 9], [-100, -100, -100, -100, 9])
    ids, labels, questions = share_beginning([first, second])
    assert (ids, labels, questions) == ([5, V, 4, 6, 7, 8, 9], [*[-100] * 4, 7, -100, 9], [0, 0, 0, 1, 1, 2, 2])
    alone = share_beginning([second])
    assert alone == ([5, V, 4, 8, 9], [-100, -100, -100, -100, 9], [0, 0, 0, 1, 1])
    batch = pad_sequences(
        [ids, alone[0]],
        pad_id=PAD,
        num_visual=[3, 3],
        labels=[labels, alone[1]],
        questions=[questions, alone[2]],
    )
    assert batch["input_ids"].tolist() == [[5, V, V, V, 4, 6, 7, 8, 9], [5, V, V, V, 4, 8, 9, PAD, PAD]]
    assert batch["packed"]["questions"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, -1, -1]]
    assert batch["packed"]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 5, 6], [0, 1, 2, 3, 4, 5, 6, 0, 0]]
    assert batch["label_positions"].tolist() == [5, 7, 14] and batch["attention_mask"].sum() == 9 + 7


def test_nothing_that_is_predicted_is_shared() -> None:
    same = ([V, 4, 5, 6, 7], [-100, -100, -100, 6, 7])
    ids, labels, questions = share_beginning([same, same])
    assert (ids, questions) == ([V, 4, 5, 6, 7, 5, 6, 7], [0, 0, 1, 1, 1, 2, 2, 2])
    assert labels == [-100, -100, -100, 6, 7, -100, 6, 7]


def test_questions_without_a_medium_share_their_text() -> None:
    ids, _, questions = share_beginning([([5, 6], [-100, 6]), ([9, 7, 8], [-100, -100, 8])])
    assert (ids, questions) == ([5, 6, 9, 7, 8], [1, 1, 2, 2, 2])  # which has no common beginning
    batch = pad_sequences([ids], pad_id=PAD, questions=[questions])
    assert batch["packed"]["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert share_beginning([([5, 7, 6], [-100, -100, 6]), ([5, 8, 6], [-100, -100, 6])])[2] == [0, 1, 1, 2, 2]


def test_questions_of_one_medium_begin_alike() -> None:
    with pytest.raises(ValueError, match="different beginnings"):
        share_beginning([([5, V, 6], [-100] * 3), ([9, V, 6], [-100] * 3)])


@pytest.mark.parametrize(("row", "count"), [([4, 5], 1), ([V, V], 1), ([4, V], None)])
def test_rows_with_visual_tokens_have_one_placeholder_and_others_none(row: list[int], count: int | None) -> None:
    found, expected = row.count(V), int(count is not None)
    with pytest.raises(ValueError, match=f"{found} places for visual tokens, expected {expected}"):
        pad_sequences([row], pad_id=PAD, num_visual=[count])


def test_masking_shortens_the_prompts_and_the_teacher_ends_at_the_last_visual_token() -> None:
    rows, labels = [[5, V, 6], [V, 7, 8, 9]], [[-100, -100, 6], [-100, 7, 8, 9]]
    dropped = torch.tensor([[True, False, False], [False, True, False]])
    batch = training_sequences(rows, labels, pad_id=PAD, num_visual=3, dropped=dropped)
    teacher = batch.pop("teacher")
    assert batch.pop("kept").tolist() == [1, 2, 3, 5]  # of the six of both
    plain = pad_sequences(rows, pad_id=PAD, num_visual=[2, 2], labels=labels)
    assert batch.keys() == plain.keys() and all(batch[name].equal(plain[name]) for name in plain)
    assert teacher["input_ids"].tolist() == [[5, V, V, V], [V, V, V, PAD]]
    assert teacher["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert teacher["visual_positions"].tolist() == [1, 2, 3, 4, 5, 6]
