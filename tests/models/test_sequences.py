"""Visual tokens at the placeholder's place, whatever the padding."""

import pytest
import torch

from stllm.models.sequences import IGNORE_INDEX, VISUAL_TOKEN_ID, join_visual_tokens

WIDTH = 3


def join(rows: list[list[int]], visual: list[torch.Tensor] | None, **options):
    """Embeds each id as its own value, so that the joined sequence can be read off."""
    ids = torch.tensor(rows)
    embeds = ids[..., None].expand(-1, -1, WIDTH).float()
    return join_visual_tokens(embeds, ids, (ids != 0).long(), visual, **options)


def block(value: float, count: int) -> torch.Tensor:
    return torch.full((count, WIDTH), value)


def test_visual_tokens_replace_the_placeholder() -> None:
    out = join([[5, VISUAL_TOKEN_ID, 6, 7]], [block(9, 3)], labels=torch.tensor([[-100, -100, 6, 7]]))
    assert out.inputs_embeds[0, :, 0].tolist() == [5, 9, 9, 9, 6, 7]
    assert out.attention_mask.tolist() == [[1] * 6]
    assert out.labels.tolist() == [[-100, -100, -100, -100, 6, 7]]
    assert out.visual_positions(3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_different_length_are_padded_on_that_side(side: str) -> None:
    out = join([[VISUAL_TOKEN_ID, 6], [5, VISUAL_TOKEN_ID]], [block(9, 1), block(8, 3)], padding_side=side)
    rows = out.inputs_embeds[..., 0].tolist()
    assert rows == ([[0, 0, 9, 6], [5, 8, 8, 8]] if side == "left" else [[9, 6, 0, 0], [5, 8, 8, 8]])
    assert out.attention_mask.tolist()[0] == ([0, 0, 1, 1] if side == "left" else [1, 1, 0, 0])
    for row, (count, value) in enumerate([(1, 9), (3, 8)]):
        positions = out.visual_positions(count)[row]
        assert (out.inputs_embeds[row, positions, 0] == value).all()


def test_padding_embeddings_of_the_text_are_kept() -> None:
    out = join([[VISUAL_TOKEN_ID, 4, 0]], [block(9, 2)])
    assert out.attention_mask.tolist() == [[1, 1, 1, 0]]
    assert out.inputs_embeds[0, :, 0].tolist() == [9, 9, 4, 0]


def test_text_alone_passes_through() -> None:
    out = join([[4, 5]], None, labels=torch.tensor([[IGNORE_INDEX, 5]]))
    assert out.inputs_embeds[0, :, 0].tolist() == [4, 5]
    assert out.labels.tolist() == [[IGNORE_INDEX, 5]]


@pytest.mark.parametrize("row", [[4, 5], [VISUAL_TOKEN_ID, VISUAL_TOKEN_ID]])
def test_each_row_needs_one_placeholder(row: list[int]) -> None:
    with pytest.raises(ValueError, match="exactly one place"):
        join([row], [block(1, 1)])


def test_a_placeholder_needs_visual_tokens() -> None:
    with pytest.raises(ValueError, match="no visual tokens were given"):
        join([[4, VISUAL_TOKEN_ID]], None)
