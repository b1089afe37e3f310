"""From prompts' ids to the model's arguments: placeholders expanded, rows padded or packed, positions computed.

Everything that the model needs to place and find tokens is computed here, on the CPU, so that nothing is read from a
device.
B prompts, S positions of a row, N visual tokens of a clip, V of the whole batch. Positions are those of the flattened
(B*S) or (B*N), row after row. Packed prompts are one row without padding, one prompt after another: there B is 1 and S
is the number of all tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

VISUAL_TOKEN_ID = -200  # stands for a visual token in input_ids; it is in no vocabulary
IGNORE_INDEX = -100  # labels without a loss


def pad_sequences(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int,
    num_visual: Sequence[int | None] | None = None,
    labels: Sequence[Sequence[int]] | None = None,
    side: str = "right",
    packing: bool = False,
) -> dict[str, Any]:
    """Expand the placeholders and pad the rows to one length, or pack them into one row.

    rows: ids, with one `VISUAL_TOKEN_ID` where a row's visual tokens go; it becomes `num_visual` of them.
    num_visual: of each row; None for text alone. labels: as long as their rows. side: left for generation.
    Returns input_ids and attention_mask (B, S); visual_positions (V,); with labels also labels (B, S) and
    label_positions, the positions from which a labelled token is predicted. packing: in place of attention_mask it
    returns packed, with the prompts' lengths, a list of numbers, and position_ids (1, S), which begin at 0 in each.
    Raises ValueError for a row with other than one placeholder, or with one and no visual tokens.
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
    batch["visual_positions"] = (batch["input_ids"] == VISUAL_TOKEN_ID).flatten().nonzero()[:, 0]
    if labels is not None:
        targets = expanded([torch.tensor(row, dtype=torch.long) for row in labels])
        batch["labels"] = joined(targets, IGNORE_INDEX)
        following = joined([F.pad(row[1:], (0, 1), value=IGNORE_INDEX) for row in targets], IGNORE_INDEX)
        batch["label_positions"] = (following != IGNORE_INDEX).flatten().nonzero()[:, 0]
    return batch


def training_sequences(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    *,
    pad_id: int,
    num_visual: int | None,
    dropped: Tensor | None = None,
    packing: bool = False,
) -> dict[str, Any]:
    """Arguments of `STLLM.forward` for prompts of one kind: those of `pad_sequences`, and those of dynamic masking.

    num_visual: N; None for text alone. dropped: (B, N) bool, the visual tokens that are left out. It adds `kept`, the
    positions of the others in (B*N), and `teacher`. `teacher` is the `pad_sequences` of prompts with all visual tokens
    and no text after them: attention is causal, so nothing after the last visual token can change the teacher's states
    of them.
    """
    join = partial(pad_sequences, pad_id=pad_id, packing=packing)
    if dropped is None:
        return join(rows, labels=labels, num_visual=[num_visual] * len(rows))
    whole = [list(row)[: list(row).index(VISUAL_TOKEN_ID) + 1] for row in rows]
    return {
        **join(rows, labels=labels, num_visual=(~dropped).sum(dim=1).tolist()),
        "kept": (~dropped).flatten().nonzero()[:, 0],
        "teacher": join(whole, num_visual=[num_visual] * len(rows)),
    }
