"""Image tokens land on their placeholders, in order, or nowhere."""

import pytest
import torch

from minivlm.errors import MinivlmError
from minivlm.fuse import BaseModel, embed, fuse
from minivlm.inputs import Inputs


def test_image_tokens_fill_the_placeholders_row_by_row():
    """Two rows with three placeholders: the first row's come first."""
    x = torch.zeros(2, 4, 2)
    where = torch.tensor([[False, True, False, True], [True, False, False, False]])
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    ours = fuse(x, where, tokens)
    assert ours[0].tolist() == [[0, 0], [1, 2], [0, 0], [3, 4]]
    assert ours[1].tolist() == [[5, 6], [0, 0], [0, 0], [0, 0]]
    assert not x.any()  # the embeddings given are left alone


def test_tokens_take_the_dtype_of_the_embeddings():
    ours = fuse(torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.tensor([[False, True]]), torch.ones(1, 3))
    assert ours.dtype == torch.bfloat16 and ours[0, 1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_counts_that_differ_are_both_in_the_error(num_tokens):
    with pytest.raises(MinivlmError, match=f"2 image placeholders.* {num_tokens} image tokens"):
        fuse(torch.zeros(1, 4, 5), torch.tensor([[True, False, True, False]]), torch.ones(num_tokens, 5))


def test_gradients_reach_pictures_and_the_words_between_them():
    x, tokens = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 2, requires_grad=True)
    fuse(x, torch.tensor([[False, True, False]]), tokens).sum().backward()
    assert tokens.grad.tolist() == [[1, 1]]
    assert x.grad[0].tolist() == [[1, 1], [0, 0], [1, 1]]


class Eyes(BaseModel):
    """Sees what it is given; the table of its decoder has 4 words, and no rows for the placeholders 7 and 8."""

    def __init__(self):
        super().__init__()
        self.language_model = torch.nn.Module()
        self.language_model.embed_tokens = torch.nn.Embedding(4, 1).requires_grad_(False)

    def encode_images(self, inputs):
        return inputs.pixel_values

    def encode_videos(self, inputs):
        return inputs.pixel_values_videos


def test_embed_puts_each_kind_in_its_own_places():
    model, ids = Eyes(), torch.tensor([[1, 7, 2], [8, 3, 7]])
    seen = {"pixel_values": torch.tensor([[70.0], [71.0]]), "pixel_values_videos": torch.tensor([[80.0]])}
    ours = embed(model, Inputs(ids, torch.ones_like(ids), **seen), 7, 8)
    word = model.language_model.embed_tokens.weight[:, 0]
    assert torch.equal(ours[..., 0], torch.tensor([[word[1], 70, word[2]], [80, word[3], 71]]))


@pytest.mark.parametrize("token_id", [7, 8])
def test_embed_refuses_placeholders_of_what_is_not_there(token_id):
    ids = torch.tensor([[1, token_id]])
    with pytest.raises(MinivlmError, match="1 image placeholders.* 0 image tokens"):
        embed(Eyes(), Inputs(ids, torch.ones_like(ids)), 7, 8)
