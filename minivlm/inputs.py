"""What travels from a processor to a model: `Prompt` on the way in, `Inputs` on the way out."""

from dataclasses import dataclass, field, fields, replace

from torch import Tensor

from minivlm.errors import MinivlmError


@dataclass(frozen=True)
class Prompt:
    """An already rendered prompt, for base models and for experiments; it stands wherever messages may.

    The text is tokenised as it is, special tokens included: `Prompt("<image>\\nA photo of", images=["cat.jpg"])`.
    Placeholders are matched with `images` and `videos` in order. A BOS token is added unless the text starts with it.
    """

    text: str
    images: list = field(default_factory=list)
    videos: list = field(default_factory=list)

    def __post_init__(self):
        check_lists(self.images, self.videos)


def check_lists(images: "list | tuple", videos: "list | tuple"):
    """Trap: a path is a list of letters, too, and an array of frames one of pictures."""
    for name, given in (("images", images), ("videos", videos)):
        if not isinstance(given, (list, tuple)):
            raise MinivlmError(f"{name}= is a list, of one where there is only one, not {type(given).__name__}")


@dataclass
class Inputs:
    """One batch, left-padded, on one device. Only the fields that the family uses are set.

    Names are transformers', so that `theirs(**vars_of_inputs)` can be compared with ours. Letters: B rows, T tokens,
    I pictures, tiles or frames, P patches; all that was seen is in the order of its placeholders, row by row.
    """

    input_ids: Tensor  # (B, T) int64; every placeholder already stands once per image token
    attention_mask: Tensor  # (B, T) int64; 0 marks left padding
    labels: Tensor | None = None  # (B, T) int64; −100 everywhere but on assistant answers

    # (I, 3, height, width), or (P, ...) in Qwen2-VL, or (B, pictures, tiles, 3, height, width) in Mllama
    pixel_values: Tensor | None = None
    image_sizes: Tensor | None = None  # (pictures, 2) int64, their own (height, width) in pixels
    image_grids: Tensor | None = None  # (pictures, 2) int64, anyres: rows and columns of tiles (a name of ours)
    image_grid_thw: Tensor | None = None  # (pictures, 3) int64, Qwen2-VL: frame pairs, rows, columns of patches
    pixel_values_videos: Tensor | None = None  # (I, 3, height, width), or (P, ...) in Qwen2-VL
    video_sizes: Tensor | None = None  # (films,) int64, frames of each film
    video_grid_thw: Tensor | None = None  # (films, 3) int64
    aspect_ratio_ids: Tensor | None = None  # Mllama: (B, pictures) int64
    aspect_ratio_mask: Tensor | None = None  # Mllama: (B, pictures, tiles) int64
    cross_attention_mask: Tensor | None = None  # Mllama: (B, T, pictures, tiles) int64

    def to(self, device=None, dtype=None) -> "Inputs":
        """Moves every tensor; `dtype` concerns the floating ones alone (pixels)."""
        moved = {
            f.name: x.to(device=device, dtype=dtype if x.is_floating_point() else None)
            for f in fields(self)
            if (x := getattr(self, f.name)) is not None
        }
        return replace(self, **moved)
