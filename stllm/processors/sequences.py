"""Collation of prompts: expand placeholders, pad or pack rows, and compute the positions of visual tokens and labels.

Several questions about one medium can share a row (`share_beginning`). The row begins with what their prompts have in
common: the visual tokens, an instruction, of the orders of a question's options even the question. The rest of each
follows as if it were alone: it sees the beginning and itself, and its positions continue those of the beginning.

All positions are computed here on the CPU, so that the model never waits for values from its device.
Letters in shapes: B prompts, S positions of a row, N visual tokens of a clip, V visual tokens of the batch. Positions
are indices into the flattened (B*S) or (B*N). Packed prompts are concatenated to a single row without padding: B is 1,
and S is the number of all tokens.
"""

from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

VISUAL_TOKEN_ID = -200  # placeholder of a visual token in input_ids; no vocabulary contains it
IGNORE_INDEX = -100  # label of a position without loss


def share_beginning(prompts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[int], list[int], list[int]]:
    """Join prompts about one medium into one row: their longest common beginning once, then the rest of each.

    prompts: pairs of token ids and labels; all media have the same place. Nothing that is predicted is shared: a rest
    begins with a token without a label.
    Returns ids, labels, and each id's question: 0 for the beginning, which all questions see, then 1, 2, and so on.
    Raises ValueError if the common beginning ends before the placeholder of the visual tokens.
    """
    rows = [list(row) for row, _ in prompts]
    common = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))
    unlabelled = [sum(1 for _ in takewhile(IGNORE_INDEX.__eq__, targets)) for _, targets in prompts]
    shared = max(0, min(common, *(count - 1 for count in unlabelled)))
    if any(VISUAL_TOKEN_ID in row[shared:] for row in rows):
        raise ValueError("the prompts have different beginnings, expected the same text before the visual tokens")
    ids, labels, questions = rows[0][:shared], [IGNORE_INDEX] * shared, [0] * shared
    for number, (row, targets) in enumerate(prompts, start=1):
        ids += row[shared:]
        labels += targets[shared:]
        questions += [number] * (len(row) - shared)
    return ids, labels, questions


def pad_sequences(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    num_visual: Sequence[int | None] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    side: str = "right",
    packing: bool = False,
    questions: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Expand placeholders of visual tokens, and pad the rows to one length or pack them into one row.

    rows: token ids; one `VISUAL_TOKEN_ID` marks the visual tokens and is repeated `num_visual` times. num_visual: one
    number per row; None for a row without media. labels: as long as the rows. side: side to pad on; "left" for
    generation. questions: the question of each id, from `share_beginning`; not with packing.
    Returns input_ids and attention_mask (B, S); visual_positions (V,). With labels, also labels (B, S) and
    label_positions, the positions whose next token has a label. With packing, `packed` replaces attention_mask: it has
    the prompts' lengths (a list) and position_ids (1, S), which restart at 0 for each prompt. With questions, there
    is also `packed` with questions (B, S), with -1 for padding, and position_ids (B, S).
    Raises ValueError unless each row with visual tokens has exactly one placeholder, and each other row has none.
    """
    counts = [None] * len(rows) if num_visual is None else num_visual
    ids, repeats = [], []
    for row, count in zip(rows, counts, strict=True):
        if (found := list(row).count(VISUAL_TOKEN_ID)) != (expected := int(count is not None)):
            raise ValueError(f"a prompt has {found} places for visual tokens, expected {expected}")
        ids.append(torch.tensor(row, dtype=torch.long))
        repeats.append(torch.where(ids[-1] == VISUAL_TOKEN_ID, count or 0, 1))

    def expanded(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.repeat_interleave(times) for tensor, times in zip(tensors, repeats, strict=True)]

    def joined(tensors: Sequence[Tensor], value: int) -> Tensor:
        if packing:
            return torch.cat(list(tensors))[None]
        return pad_sequence(list(tensors), batch_first=True, padding_value=value, padding_side=side)

    ids = expanded(ids)
    batch: dict[str, Any] = {"input_ids": joined(ids, pad_id)}
    if packing:
        lengths = [len(row) for row in ids]
        batch["packed"] = {
            "lengths": lengths,
            "position_ids": joined([torch.arange(length) for length in lengths], 0),
        }
    else:
        batch["attention_mask"] = joined([torch.ones_like(row) for row in ids], 0)
    if questions is not None:
        numbers = expanded([torch.tensor(row, dtype=torch.long) for row in questions])
        batch["packed"] = {
            "questions": joined(numbers, -1),
            "position_ids": joined([_positions_of(row) for row in numbers], 0),
        }
    batch["visual_positions"] = (batch["input_ids"] == VISUAL_TOKEN_ID).flatten().nonzero()[:, 0]
    if labels is not None:
        targets = expanded([torch.tensor(row, dtype=torch.long) for row in labels])
        batch["labels"] = joined(targets, IGNORE_INDEX)
        following = joined([F.pad(row[1:], (0, 1), value=IGNORE_INDEX) for row in targets], IGNORE_INDEX)
        batch["label_positions"] = (following != IGNORE_INDEX).flatten().nonzero()[:, 0]
    return batch


def _positions_of(questions: Tensor) -> Tensor:
    """Return the positions (S,) of a row's tokens: those of each question continue those of the beginning."""
    shared = int((questions == 0).sum())
    lengths = questions[shared:].unique_consecutive(return_counts=True)[1].tolist()
    return torch.cat([torch.arange(shared), *(shared + torch.arange(length) for length in lengths)])


def training_sequences(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int,
    num_visual: int | None,
    dropped: Tensor | None = None,
    packing: bool = False,
    questions: Sequence[Sequence[int]] | None = None,
) -> dict[str, Any]:
    """Return the arguments of `STLLM.forward` for a batch: the result of `pad_sequences`, and those for masking.

    num_visual: N, the same for all rows; None without media. dropped: visual tokens to leave out, (B, N) bool. With it,
    the result also has `kept`, the positions of the other visual tokens in (B*N), and `teacher`, the `pad_sequences` of
    prompts with all visual tokens. The teacher's prompts end after these, since attention is causal: later text cannot
    change the states of visual tokens. questions: as in `pad_sequences`.
    """
    join = partial(pad_sequences, pad_id=pad_id, packing=packing)
    if dropped is None:
        return join(rows, labels=labels, num_visual=[num_visual] * len(rows), questions=questions)
    whole = [list(row)[: list(row).index(VISUAL_TOKEN_ID) + 1] for row in rows]
    return {
        **join(rows, labels=labels, num_visual=(~dropped).sum(dim=1).tolist(), questions=questions),
        "kept": (~dropped).flatten().nonzero()[:, 0],
        "teacher": join(whole, num_visual=[num_visual] * len(rows)),
    }
