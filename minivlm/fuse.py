"""Puts image tokens where the prompt holds their placeholders; and what all models do alike around their decoder."""

from torch import Tensor, nn

from minivlm.cache import KVCache
from minivlm.errors import MinivlmError
from minivlm.inputs import Inputs


def embed(model: "BaseModel", inputs: Inputs, image_id: int, video_id: int | None = None) -> Tensor:
    """Token embeddings `(B, T, D)`, with what the model sees in the places of its placeholders, pictures' and films'.

    Raises for a placeholder of which the batch has no picture or film.
    """
    seen = {image_id: None if inputs.pixel_values is None else model.encode_images(inputs)}  # (N, D)
    if video_id is not None:
        seen[video_id] = None if inputs.pixel_values_videos is None else model.encode_videos(inputs)
    words = inputs.input_ids
    for token_id in seen:
        # The placeholder's own row is never used, and in some checkpoints the table has none.
        words = words.masked_fill(words == token_id, 0)
    x = model.language_model.embed_tokens(words)  # (B, T, D)
    for token_id, tokens in seen.items():
        x = fuse(x, inputs.input_ids == token_id, x.new_empty(0, x.shape[-1]) if tokens is None else tokens)
    return x


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


class BaseModel(nn.Module):
    """A model is a decoder, `language_model`, and eyes, `encode_images` and `encode_videos`. What they see becomes
    words in `embed`, where a family names its placeholders; one whose pictures are no words has its own `forward`."""

    Config: type  # the family's, which has `from_hf(config.json's contents)`

    @classmethod
    def from_config(cls, config: dict) -> "BaseModel":
        """A model of the sizes that a config.json has, its weights still to be filled in."""
        return cls(cls.Config.from_hf(config))

    def forward(self, inputs: Inputs, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits `(B, T, V)` float32; `(B, 1, V)` with `last_only`, which is all that generation needs."""
        return self.language_model(self.embed(inputs), inputs.attention_mask, cache=cache, last_only=last_only)

    def decode(self, token_ids: Tensor, cache: KVCache) -> Tensor:
        """One further token `(B, 1)` for every row → logits `(B, V)`."""
        return self.language_model.decode(token_ids, cache)

    def new_cache(self, capacity: int = 0) -> KVCache:
        return KVCache(self.language_model.config.num_layers, capacity)
