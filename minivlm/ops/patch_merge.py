"""LayerNorm fused with the gather of merge x merge patches: the entry of Qwen2-VL's merger, and of no other model."""

import torch
from torch import Tensor
from torch.nn import functional as F

from minivlm.errors import MinivlmError
from minivlm.ops import backend
from minivlm.ops.rms_norm import widest


def patch_merge_reference(x: Tensor, grid_thw: Tensor, merge: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    C, m = x.size(1), merge
    normed = F.layer_norm(x, (C,), weight, bias, eps)  # (P, C)
    grids = grid_thw.tolist()
    pictures = normed.split([t * h * w for t, h, w in grids])
    cells = [
        picture.reshape(t, h // m, m, w // m, m, C).transpose(2, 3).reshape(-1, m * m * C)
        for picture, (t, h, w) in zip(pictures, grids, strict=True)
    ]
    return torch.cat(cells) if cells else normed.reshape(0, m * m * C)  # (P / m^2, m^2 * C)


def patch_merge(x: Tensor, grid_thw: Tensor, merge: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise every patch of `x (P, C)` and lay each cell of merge x merge, row by row, into one row.

    Returns `(P / merge^2, merge^2 * C)`.

    x: the patches of all pictures, each in raster order (frame, row, column).
    grid_thw: `(pictures, 3)` int64: frames, rows and columns of each picture in patches; rows and columns are multiples
        of `merge`. Best kept on the CPU: its values are read there.
    """
    _check(x, grid_thw, merge, weight, bias)
    if x.dtype != weight.dtype or x.dtype != bias.dtype:
        x, weight, bias = widest(x, weight, bias)
    kernels = backend.kernels_for(x)
    if kernels is None:
        return patch_merge_reference(x, grid_thw, merge, weight, bias, eps)
    return kernels.patch_merge(x, grid_thw, merge, weight, bias, eps)


def _check(x: Tensor, grid_thw: Tensor, merge: int, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 2 or weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise MinivlmError(
            f"patch_merge: x is {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
            "they must be (P, C), (C,), (C,)"
        )
    backend.check_devices("patch_merge", "x weight bias", x, weight, bias)
    if grid_thw.dim() != 2 or grid_thw.size(1) != 3 or grid_thw.dtype != torch.int64:
        raise MinivlmError(
            f"patch_merge: grid_thw is {grid_thw.dtype} {tuple(grid_thw.shape)}; it must be int64 (pictures, 3)"
        )
    if grid_thw.is_meta or torch.compiler.is_compiling():
        return  # no values to look at; a kernel looks again when it runs
    grids = grid_thw.tolist()
    patches = sum(t * h * w for t, h, w in grids)
    if patches != x.size(0):
        raise MinivlmError(f"patch_merge: the grids {grids} hold {patches} patches, x has {x.size(0)}")
    if merge < 1 or any(min(grid) < 1 or grid[1] % merge or grid[2] % merge for grid in grids):
        raise MinivlmError(f"patch_merge: the grids {grids} are not made of {merge} x {merge} cells")


@backend.on_load
def _register(library: str) -> None:
    """LayerNorm's gradient, read from and written to the permuted places."""
    ops = getattr(torch.ops, library)

    def remember(ctx, inputs, output):  # noqa: ARG001, torch passes them by name
        x, grid_thw, ctx.merge, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, grid_thw, weight)

    def backward(ctx, grad):
        x, grid_thw, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ops.patch_merge_backward(grad, x, grid_thw, ctx.merge, weight, ctx.eps)
        return grad_x, None, None, grad_weight, grad_bias, None

    torch.library.register_fake(
        f"{library}::patch_merge",
        lambda x, _grids, merge, *_: x.new_empty(x.size(0) // merge**2, merge**2 * x.size(1)),
    )
    torch.library.register_fake(
        f"{library}::patch_merge_backward",
        lambda _grad, x, *_: (x.new_empty(x.shape), x.new_empty(x.size(1)), x.new_empty(x.size(1))),
    )
    torch.library.register_autograd(f"{library}::patch_merge", backward, setup_context=remember)
