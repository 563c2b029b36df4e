"""Block statistics of softmax maps at real sizes, on a GPU."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from dit_sparse import orders
from dit_sparse.attention_map import BlockStatistics, block_statistics, map_metrics, small_weight
from dit_sparse.frame import frame_of
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from tests.selection_cases import ordered

pytest.importorskip("dit_sparse.kernels.attention_map")

LAYOUTS = {
    "video": TokenLayout.of(TokenGrid(5, 20, 40)),
    "text": TokenLayout.of(TokenGrid(5, 19, 40), 77, 130),
    "padding": TokenLayout((TokenGrid(5, 19, 40), TextSpan(300, (300, 17)))),
}
SECONDS = 10.0


def qk(layout: TokenLayout, heads: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, heads, layout.length, dim)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(2)]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_to_the_reference(layout: str, dim: int, block: int, dtype: torch.dtype):
    """The reference in float64, which the kernel refuses."""
    frame = frame_of(LAYOUTS[layout], block, "WFH", device=torch.device("cuda"))
    q, k = (ordered(x, frame)[0] for x in qk(LAYOUTS[layout], 3, dim, dtype))
    hidden = None if frame.hidden is None else frame.hidden[-1]
    bound = small_weight(LAYOUTS[layout].length) / 10
    got = block_statistics(q, k, frame.blocks, bound, hidden)
    exact = block_statistics(q.double(), k.double(), frame.blocks, bound, hidden)
    assert got.sums.dtype == torch.float32
    torch.testing.assert_close(got.sums.double(), exact.sums, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.maxima.double(), exact.maxima, rtol=1e-4, atol=1e-8)
    # Weights as near the bound as their rounding may fall on either side.
    torch.testing.assert_close(got.small.double(), exact.small, rtol=1e-3, atol=2.0)
    again = block_statistics(q, k, frame.blocks, bound, hidden)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
def test_a_layer_of_cogvideox_in_all_orders_takes_seconds(block: int):
    """17,550 tokens and 48 heads; the copies that put them in order count."""
    layout = TokenLayout.of(TokenGrid(13, 30, 45))
    x = qk(layout, 48, 64, torch.bfloat16)
    bound = small_weight(layout.length)
    frames = [frame_of(layout, block, name, device=torch.device("cuda")) for name in orders.AXES]

    def in_all_orders() -> list[BlockStatistics]:
        return [
            block_statistics(*(ordered(y, frame)[0] for y in x), frame.blocks, bound)
            for frame in frames
        ]

    in_all_orders()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    found = in_all_orders()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    held = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"blocks of {block}: {len(frames)} orders in {seconds:.3f} s, {held:.2f} GiB")  # noqa: T201
    assert seconds < SECONDS
    assert held < 2.0  # the map of one head alone has 1.2 GB in fp32
    for statistics, frame in zip(found, frames, strict=True):
        rows = frame.blocks.lengths.float().expand(48, -1)
        torch.testing.assert_close(statistics.sums.sum(-1), rows, rtol=1e-4, atol=0)
        assert torch.stack(map_metrics(statistics, frame)).isfinite().all()
