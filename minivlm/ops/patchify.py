"""Bytes to patches in one pass: a tower without a size, Qwen2-VL's, takes its picture as rows of patches.

A byte has 256 values, so that rescaling and normalising a picture is a table of 3 x 256 numbers, made once by the very
arithmetic it stands for (images.pixel_table): the result is equal to the last bit, and no kernel needs to know in which
precision and order that arithmetic goes.
"""

import torch
from torch import Tensor

from minivlm.errors import MinivlmError
from minivlm.ops import backend


def patchify_reference(pixels: Tensor, table: Tensor, depth: int, side: int) -> Tensor:
    pixels = torch.cat([pixels, pixels[-1:].expand(-len(pixels) % depth, -1, -1, -1)])
    t, h, w = len(pixels) // depth, pixels.size(1) // side, pixels.size(2) // side
    values = table.gather(1, pixels.reshape(-1, 3).T.long())  # (3, I · height · width)
    patches = values.view(3, t, depth, h, side, w, side).permute(1, 3, 5, 0, 2, 4, 6)
    return patches.reshape(t * h * w, 3 * depth * side**2)  # (P, 3 · depth · side²)


def patchify(pixels: Tensor, table: Tensor, depth: int, side: int) -> Tensor:
    """Cut a picture or film into patches of `depth` frames of `side` x `side` pixels, and look every byte up.

    Returns `(P, 3 · depth · side²)` in the dtype of `table`, P = ceil(I / depth) · (height / side) · (width / side).

    pixels: `(I, height, width, 3)` uint8, any strides; a picture is a film of one frame. The last frame is repeated
        where the last patches lack some. Both sides are multiples of `side`.
    table: `(3, 256)` floating: what a byte becomes in each colour.
    Patches are in raster order (frame group, row, column); within one come colour, frame, line, pixel, as the weight of
    a 3-D convolution has them. There is no gradient: bytes have none.
    """
    _check(pixels, table, depth, side)
    kernels = backend.kernels_for(pixels)
    if kernels is None:
        return patchify_reference(pixels, table, depth, side)
    return kernels.patchify(pixels, table, depth, side)


def _check(pixels: Tensor, table: Tensor, depth: int, side: int) -> None:
    if pixels.dim() != 4 or pixels.size(3) != 3 or pixels.dtype != torch.uint8:
        raise MinivlmError(
            f"patchify: pixels are {pixels.dtype} {tuple(pixels.shape)}; they must be uint8 (frames, height, width, 3)"
        )
    if table.shape != (3, 256) or not table.is_floating_point():
        raise MinivlmError(f"patchify: table is {table.dtype} {tuple(table.shape)}; it must be floating (3, 256)")
    backend.check_devices("patchify", "pixels table", pixels, table)
    height, width = pixels.shape[1:3]
    if depth < 1 or side < 1 or height % side or width % side:
        raise MinivlmError(
            f"patchify: {height} x {width} pixels are no whole patches of {depth} frames of {side} x {side}"
        )


@backend.on_load
def _register(library: str) -> None:
    def shape(pixels, table, depth, side):
        frames, height, width, _ = pixels.shape
        P = -(-frames // depth) * (height // side) * (width // side)
        return table.new_empty(P, 3 * depth * side**2)

    torch.library.register_fake(f"{library}::patchify", shape)
