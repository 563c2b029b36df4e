"""Block statistics of softmax maps in Triton's interpreter, against whole maps in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.attention_map import block_statistics as reference
from dit_sparse.frame import frame_of
from dit_sparse.plan import Blocks
from tests.selection_cases import LAYOUTS, ordered, qkv

attention_map = pytest.importorskip("dit_sparse.kernels.attention_map")
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned"),
]


def compare(q: Tensor, k: Tensor, blocks: Blocks, bound: float, hidden: Tensor | None) -> None:
    """With the reference in float64, which `tests/test_attention_map.py` holds to whole maps."""
    sums, maxima, small = attention_map.block_statistics(q, k, blocks, bound, hidden)
    exact = reference(q.double(), k.double(), blocks, bound, hidden)
    assert (sums.dtype, maxima.dtype, small.dtype) == (torch.float32,) * 3
    torch.testing.assert_close(sums.double(), exact.sums, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(maxima.double(), exact.maxima, rtol=1e-5, atol=1e-9)
    # Of weights as near the bound as their rounding either side is right.
    fewest, most = (
        reference(q.double(), k.double(), blocks, bound * x, hidden).small
        for x in (1 - 1e-5, 1 + 1e-5)
    )
    assert ((fewest <= small) & (small <= most)).all()
    assert (most - fewest).sum() <= 1e-3 * exact.small.sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("block", "dtype"), [(64, torch.float32), (128, torch.float16)])
def test_against_the_whole_map(layout: str, block: int, dtype: torch.dtype):
    frame = frame_of(LAYOUTS[layout], block, "WFH")
    q, k, _ = (ordered(x.to(dtype), frame)[-1] for x in qkv(layout, heads=2))
    hidden = None if frame.hidden is None else frame.hidden[-1]
    compare(q, k, frame.blocks, 1.5 / LAYOUTS[layout].length, hidden)


@pytest.mark.parametrize("block", [12, 64, 192])
@pytest.mark.parametrize(
    ("dtype", "dim", "unseen"), [(torch.float32, 128, True), (torch.float16, 72, False)]
)
def test_blocks_of_other_sizes_in_several_tiles(
    dtype: torch.dtype, dim: int, block: int, unseen: bool
):
    """Text before and after, blocks of any length, tiles smaller and larger than they are."""
    blocks = Blocks.of_runs([5, 130, 21], block)
    generator = torch.Generator().manual_seed(block)
    q, k = (torch.randn(2, 156, dim, generator=generator).to(dtype) for _ in range(2))
    hidden = torch.arange(blocks.n) % 3 == 1 if unseen else None
    compare(q, k, blocks, 1.0 / 156, hidden)


def test_high_scores_do_not_overflow():
    """exp of these would, and most weights vanish."""
    q, k = (40.0 * torch.randn(1, 100, 16, generator=torch.manual_seed(0)) for _ in range(2))
    blocks = Blocks.uniform(100, 32)
    sums, maxima, small = attention_map.block_statistics(q, k, blocks, 0.01)
    exact = reference(q.double(), k.double(), blocks, 0.01)
    torch.testing.assert_close(sums.double(), exact.sums, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(maxima.double(), exact.maxima, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums.sum(-1), blocks.lengths.float()[None])
    assert torch.equal(small.double(), exact.small)


def test_tensors_with_any_strides():
    q, k = torch.randn(2, 70, 3, 32, generator=torch.manual_seed(0)).transpose(1, 2)
    compare(q, k, Blocks.uniform(70, 32), 0.01, None)
    compare(q[..., ::2], k[..., 1::2], Blocks.uniform(70, 32), 0.01, None)


def test_what_is_not_a_number_is_seen():
    q, k = torch.randn(2, 1, 70, 16, generator=torch.manual_seed(0))
    q[0, 3, 0] = torch.nan
    sums = attention_map.block_statistics(q, k, Blocks.uniform(70, 32), 0.01)[0]
    assert sums[0, 0].isnan().all()
    assert sums[0, 1:].isfinite().all()


@pytest.mark.parametrize(
    ("size", "dim", "element_size", "expected"),
    [
        (128, 64, 2, (128, 64)),
        (128, 128, 2, (128, 64)),
        (64, 64, 2, (64, 64)),
        (128, 256, 2, (128, 32)),
        (128, 256, 4, (64, 16)),
        (8, 16, 4, (16, 16)),
        (192, 16, 2, (128, 64)),
    ],
)
def test_tiles(size: int, dim: int, element_size: int, expected: tuple[int, int]):
    assert attention_map.tile(size, dim, element_size) == expected
