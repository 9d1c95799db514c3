"""Puts image tokens where the prompt holds their placeholders."""

from torch import Tensor

from minivlm.errors import MinivlmError


def fuse(embeddings: Tensor, is_placeholder: Tensor, image_tokens: Tensor) -> Tensor:
    """Replaces the embedding of every placeholder by the next image token.

    `embeddings (B, T, D)`, `is_placeholder (B, T)` bool, `image_tokens (N, D)` in the order of the placeholders, row
    by row. Returns `(B, T, D)`. Raises when the counts differ: a shifted picture would look like a weak model, not
    like a bug.
    """
    expected, got = int(is_placeholder.sum()), image_tokens.shape[0]
    if expected != got:
        raise MinivlmError(
            f"the prompt has {expected} image placeholders, but the vision tower gave {got} image tokens; "
            "was the prompt cut off, or made with another processor?"
        )
    return embeddings.masked_scatter(is_placeholder[..., None], image_tokens.to(embeddings.dtype))
