"""patchify: every backend equals looking bytes up and permuting, to the last bit, from one patch to films."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_helpers import DTYPES, LAYOUTS, SEEDS, backends, kernels, laid_out, library, on, randn

from minivlm import ops
from minivlm.errors import MinivlmError
from minivlm.ops.patchify import patchify_reference

FRAMES, DEPTHS, GRIDS = st.integers(0, 5), st.integers(1, 3), st.tuples(st.integers(1, 4), st.integers(1, 4))
SIDES = st.sampled_from([1, 2, 7, 14, 16])


def draw(frames, grid, side, seed=0):
    """A film of random bytes: `(frames, rows · side, columns · side, 3)`."""
    size = frames, grid[0] * side, grid[1] * side, 3
    film = torch.randint(256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8, device="cpu")
    return film.to(torch.get_default_device())


@kernels
@given(FRAMES, DEPTHS, GRIDS, SIDES, DTYPES, LAYOUTS, SEEDS)
def test_patchify_equals_reference(backend, frames, depth, grid, side, dtype, layout, seed):
    with on(backend):
        film, table = draw(frames, grid, side, seed), randn(3, 256, dtype=dtype, seed=seed)
        ours = ops.patchify(laid_out(film, layout), laid_out(table, layout), depth, side)
        assert ours.dtype == dtype and ours.is_contiguous()
        assert torch.equal(ours, patchify_reference(film, table, depth, side))


@backends
def test_patchify_order_by_hand(backend):
    """Three frames of 2 x 4 pixels, patches of 2 frames x 2 x 2: byte n is 10 · frame + pixel, colours add 100 each."""
    pixel = torch.arange(8).view(1, 2, 4, 1) + 10 * torch.arange(3).view(3, 1, 1, 1)
    first = [0, 1, 4, 5, 10, 11, 14, 15]  # frames 0 and 1, the left square
    last = [22, 23, 26, 27, 22, 23, 26, 27]  # frame 2 twice, the right square
    with on(backend):
        film = (pixel + torch.tensor([0, 100, 200])).byte().to(torch.get_default_device())
        patches = ops.patchify(film, torch.arange(256.0).expand(3, 256), 2, 2)
        assert patches.shape == (4, 24)
        assert patches[0].tolist() == first + [100 + n for n in first] + [200 + n for n in first]
        assert patches[3].tolist() == last + [100 + n for n in last] + [200 + n for n in last]


@backends
@given(depth=DEPTHS, grid=GRIDS, side=SIDES, seed=SEEDS)
def test_patchify_is_a_convolutions_view(backend, depth, grid, side, seed):
    """A 3-D convolution whose stride is its kernel gives for each patch what its weight gives for our row."""
    with on(backend):
        film, table = draw(2 * depth, grid, side, seed), randn(3, 256, dtype=torch.float64, seed=seed)
        weight = randn(5, 3, depth, side, side, dtype=torch.float64, seed=seed)
        pixels = torch.stack([table[colour][film[..., colour].long()] for colour in range(3)])  # (3, I, height, width)
        theirs = torch.nn.functional.conv3d(pixels[None], weight, stride=weight.shape[2:])[0].flatten(1).T  # (P, 5)
        ours = ops.patchify(film, table, depth, side) @ weight.flatten(1).T
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@backends
@given(grid=GRIDS, side=SIDES, seed=SEEDS)
def test_a_picture_is_a_film_that_stands_still(backend, grid, side, seed):
    with on(backend):
        picture, table = draw(1, grid, side, seed), randn(3, 256)
        assert torch.equal(
            ops.patchify(picture, table, 2, side), ops.patchify(picture.expand(2, -1, -1, -1), table, 2, side)
        )


@backends
def test_patchify_frame_groups_together_are_the_groups_apart(backend):
    with on(backend):
        film, table = draw(5, (2, 3), 14), randn(3, 256)
        together = ops.patchify(film, table, 2, 14)
        apart = [ops.patchify(film[start : start + 2], table, 2, 14) for start in (0, 2, 4)]
        assert torch.equal(together, torch.cat(apart))


@backends
def test_what_is_not_finite_in_the_table_comes_through(backend):
    with on(backend):
        table = randn(3, 256)
        table[1, 7], table[2, 255] = float("nan"), float("-inf")
        film = torch.tensor([7, 7, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
        patch = ops.patchify(film, table, 1, 2)
    assert patch[0, :4].isfinite().all() and patch[0, 4:8].isnan().all() and (patch[0, 8:] == float("-inf")).all()


WRONG = [
    ({"pixels": torch.zeros(1, 4, 6, 3)}, "torch.float32.*uint8"),
    ({"pixels": torch.zeros(4, 6, 3, dtype=torch.uint8)}, r"\(4, 6, 3\).*\(frames, height, width, 3\)"),
    ({"pixels": torch.zeros(1, 3, 4, 6, dtype=torch.uint8)}, r"\(1, 3, 4, 6\).*\(frames, height, width, 3\)"),
    ({"table": torch.zeros(3, 255)}, r"\(3, 255\).*\(3, 256\)"),
    ({"table": torch.zeros(3, 256, dtype=torch.int64)}, "torch.int64.*floating"),
    ({"side": 4}, "4 x 6 pixels.*4 x 4"),
    ({"side": 0}, "4 x 6 pixels.*0 x 0"),
    ({"depth": 0}, "4 x 6 pixels.*0 frames"),
]


@backends
@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
def test_patchify_errors_name_both_sizes(backend, change, message):
    right = {"pixels": torch.zeros(1, 4, 6, 3, dtype=torch.uint8), "table": torch.zeros(3, 256), "depth": 2, "side": 2}
    with on(backend), pytest.raises(MinivlmError, match=message):
        arguments = {**right, **change}.values()
        ops.patchify(*[x.to(torch.get_default_device()) if torch.is_tensor(x) else x for x in arguments])


@backends
def test_patchify_refuses_tensors_on_two_devices(backend):
    with on(backend), pytest.raises(MinivlmError, match="pixels is on (cpu|cuda:0), table is on meta"):
        ops.patchify(torch.zeros(1, 4, 6, 3, dtype=torch.uint8), torch.zeros(3, 256, device="meta"), 2, 2)


HOSTILE = {
    "no whole patches": ((2, 3, 4, 3), 1, 2),
    "no frames in a patch": ((1, 4, 4, 3), 0, 2),
    "a negative side": ((1, 4, 4, 3), 2, -2),
    "a size that overflows": ((1, 4, 4, 3), 2**62, 4),
    "no batch of frames": ((4, 4, 3), 2, 2),
}


@kernels
@pytest.mark.parametrize("case", HOSTILE)
def test_patchify_kernels_check_for_themselves(backend, case):
    size, depth, side = HOSTILE[case]
    with on(backend), pytest.raises(RuntimeError, match="patchify"):
        library(backend).patchify(torch.zeros(size, dtype=torch.uint8), torch.zeros(3, 256), depth, side)
