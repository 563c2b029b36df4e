"""Plans of methods on real grids, made on the CPU as the library makes them.

Windows and sliding tiles need no q and k. For what chooses from them, queries and keys stand for a
model's: `"random"` ones are independent vectors of blocks, of a length that is each row's and
head's own, which makes some rows' softmax narrow and others' wide; in `"clustered"` ones tokens
near each other on the grid are alike, over a distance that is the head's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from dit_sparse import selection
from dit_sparse.block_budget import by_density, by_mass, row_shares
from dit_sparse.calibration_solver import forced_of
from dit_sparse.frame import frame_of
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext, SparseMethod
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.sta import SlidingTileMethod
from dit_sparse.methods.window import WindowMethod
from dit_sparse.plan import BlockPlan

Kind: TypeAlias = Literal["random", "clustered"]

FLUX = TokenGrid(1, 64, 64)
LARGE_FLUX = TokenGrid(1, 128, 128)
LTX = TokenGrid(9, 32, 32)
WAN = TokenGrid(21, 30, 52)
HUNYUAN = TokenGrid(30, 48, 80)
_DIM = 32  # of made-up queries and keys: enough to tell blocks apart


@dataclass(frozen=True)
class Case:
    """A plan and the heads that a call has."""

    name: str
    plan: BlockPlan
    heads: int
    head_dim: int = 128


def cases() -> Iterator[Case]:
    yield from windows()
    yield from windows_of_heads()
    yield from chosen()
    yield from budgets()


def windows() -> Iterator[Case]:
    """The explicit cases of `bench_kernels`, with text too, and windows of a density."""
    explicit = (
        (TokenGrid(1, 256, 256), 24, (80, 80), ((16, 16), (1, 1))),
        (HUNYUAN, 24, (18, 24, 24), ((16, 8, 8), (1, 1, 1))),
        (TokenGrid(21, 45, 80), 40, (9, 15, 24), ((3, 5, 8), (1, 1, 1))),
    )
    for grid, heads, window, strides in explicit:
        for text in (0, 512):
            for stride in strides:
                name = f"window {_x(window)} stride {_x(stride)}"
                yield _case(name, WindowMethod(window=window, stride=stride), grid, text, heads)
    for grid, text, heads in ((HUNYUAN, 256, 24), (FLUX, 512, 24), (LARGE_FLUX, 512, 24)):
        for density in (0.1, 0.2, 0.3):
            method = WindowMethod(density=density)
            yield _case(f"window density {density}", method, grid, text, heads)
    yield _case("window density 0.1, 64", WindowMethod(density=0.1), FLUX, 512, 24, 64)
    yield _case("window density 0.1, 3 heads", WindowMethod(density=0.1), HUNYUAN, 256, 3)


def windows_of_heads() -> Iterator[Case]:
    """Mixtures of small windows and heads that read all, as searches find them."""
    small, line, plane, full = (3, 3, 3), (5, 1, 10), (1, 6, 10), (5, 6, 10)
    for name, heads in (
        ("sta 3 of 24 heads full, last", [small] * 21 + [full] * 3),
        ("sta 3 of 24 heads full, spread", ([small] * 7 + [full]) * 3),
        ("sta mixed", [small, line, plane, small, (5, 6, 1), full] * 4),
    ):
        method = SlidingTileMethod(window=tuple(heads))
        yield _case(name, method, HUNYUAN, 256, 24)
    mixed = SlidingTileMethod(window=((3, 3), (1, 5), (3, 3), (8, 8)) * 6, tile=(16, 8))
    yield _case("sta mixed", mixed, LARGE_FLUX, 512, 24)
    few = SlidingTileMethod(window=((3, 3), (1, 4), (3, 3), (4, 8)) * 6, tile=(16, 8))
    yield _case("sta mixed", few, FLUX, 512, 24)
    truncated = WindowMethod(window=(9, 15, 17), stride=(3, 5, 4), borders="truncated")
    yield _case("window 9x15x17, truncated", truncated, WAN, 0, 12)


def chosen() -> Iterator[Case]:
    """PISA by density, where rows are alike, and by mass, where they are not."""
    for grid, text, heads in ((FLUX, 512, 24), (LTX, 0, 32), (LARGE_FLUX, 512, 24)):
        tokens = grid.length + text
        for kind in ("random", "clustered"):
            q, k = made_up(grid, text, heads, kind)
            layout = TokenLayout.of(grid, text_first=text)
            for method in (PisaMethod(density=0.15), PisaMethod(mass=0.6), PisaMethod(mass=0.9)):
                plan = method.plan(q, k, CallContext(layout))
                asked = "density 0.15" if method.mass is None else f"mass {method.mass}"
                yield Case(f"pisa {asked}, {kind}, {tokens:,}", plan, heads)


def budgets() -> Iterator[Case]:
    """PARO: heads that share a density, rows that reach a mass, heads that fell back to dense."""
    for grid, text, heads, dim in ((TokenGrid(13, 30, 45), 226, 48, 64), (WAN, 0, 12, 128)):
        layout = TokenLayout.of(grid, text_first=text)
        frame = frame_of(layout, 128)
        assert frame.blocks.picture is not None
        inside = slice(frame.blocks.picture.start, frame.blocks.picture.stop)
        q, k = made_up(grid, text, heads, "clustered")
        scores = selection.pooled_scores(q, k, frame)[0, :, inside, inside]
        shares, forced = row_shares(scores.softmax(-1)), forced_of(grid, 128)
        one = by_density(shares, 0.2, forced, shared=False)
        dense = one.clone()
        dense[-2:] = True
        for name, mask in (
            ("paro density 0.2, budget of heads", one),
            ("paro density 0.2, budget shared", by_density(shares, 0.2, forced, shared=True)),
            ("paro mass 0.8", by_mass(shares, 0.8, forced)),
            ("paro density 0.2, last 2 heads dense", dense),
        ):
            level = torch.zeros(1, heads, frame.blocks.n, frame.blocks.n, dtype=torch.uint8)
            level[0, :, inside, inside] = mask
            total = _entries(level, frame.context)
            plan = selection.plan_of_selection(level, frame, total=total, uneven=True, lasting=True)
            yield Case(f"{name}, {layout.length:,}", plan, heads, dim)


def made_up(grid: TokenGrid, text: int, heads: int, kind: Kind) -> tuple[Tensor, Tensor]:
    """Queries and keys `[1, H, N, 32]` in raster order, text first; the same on every machine."""
    source = torch.Generator().manual_seed(0)
    shape = (heads, grid.length, _DIM)
    # Heads of 1 to 8 times the sharpness, rows of 0.5 to 2 times.
    sharp = 2.0 ** torch.linspace(0.0, 3.0, heads)[torch.randperm(heads, generator=source)]
    if kind == "random":
        patch = torch.randn(heads, -(-grid.length // 64), _DIM, generator=source)
        length = 2.0 ** (2 * torch.rand(*patch.shape[:2], 1, generator=source) - 1)
        patches = torch.randn(patch.shape, generator=source)
        q = (patch * length).repeat_interleave(64, 1)[:, : grid.length]
        k = patches.repeat_interleave(64, 1)[:, : grid.length]
    else:
        at = grid.coordinates().float() / torch.tensor(grid.shape)
        reach = 2.0 ** (2 + 2 * torch.rand(heads, 1, 1, generator=source))
        waves = torch.randn(heads, 3, _DIM // 2, generator=source) * reach
        phase = at @ waves
        q = k = torch.cat([phase.cos(), phase.sin()], -1) * math.sqrt(2)
        length = 2.0 ** (2 * torch.rand(1, 1, 1, generator=source) - 1)
        # What is salient in the picture differs from place to place.
        salient = 2.0 ** (at @ (3 * torch.randn(3, 1, generator=source))).sin()
        q = q * salient * length
    q = q * sharp[:, None, None]
    q, k = (x + 0.1 * torch.randn(shape, generator=source) for x in (q, k))
    around = torch.randn(2, heads, text, _DIM, generator=source)
    return torch.cat([around[0], q], 1)[None], torch.cat([around[1], k], 1)[None]


def _entries(level: Tensor, context: Tensor) -> int:
    """Entries of a plan that reads the picture at this level and text in full."""
    read = (level > 0) | context[:, None] | context
    return int(read.sum())


def _case(
    name: str, method: SparseMethod, grid: TokenGrid, text: int, heads: int, head_dim: int = 128
) -> Case:
    q = torch.empty(1, heads, grid.length + text, head_dim, device="cpu", dtype=torch.bfloat16)
    layout = TokenLayout.of(grid, text_first=text)
    plan = method.plan(q, q, CallContext(layout))
    return Case(f"{name}, {grid}+{text}, {heads} heads", plan, heads, head_dim)


def _x(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))
