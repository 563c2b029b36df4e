"""Disks, the second predicate, in every backend and in the files and checks of plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dit_sparse import attention
from dit_sparse.attention import attend
from dit_sparse.backend import Backend
from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.kernels.flex import FlexBackend
from dit_sparse.kernels.reference import ReferenceBackend
from dit_sparse.method import CallContext
from dit_sparse.methods.disk import DiskMethod
from dit_sparse.plan import BlockPlan, Blocks
from dit_sparse.plan_check import check
from dit_sparse.plan_io import load_plan, save_plan
from dit_sparse.predicate import BoxPredicate, DiskPredicate
from tests.oracle import masked_attention

LAYOUT = TokenLayout((TextSpan(5, (5, 2)), TokenGrid(2, 13, 15), TextSpan(3)))


def disk_plan() -> BlockPlan:
    q = torch.empty(1, 1, 1, 1)
    return check(DiskMethod(radius=4.5, block=64).plan(q, q, CallContext(LAYOUT)))


def per_head(plan: BlockPlan) -> BlockPlan:
    """All visited tiles masked, with a radius for each of two heads."""
    assert plan.disk is not None
    small = plan.disk.limit.clamp(max=9)
    disk = replace(
        plan.disk,
        centre=plan.disk.centre.expand(2, -1),
        limit=torch.cat([plan.disk.limit, small]),
    )
    context = torch.tensor([start < 5 or start >= 395 for start in plan.q_blocks.starts[:-1]])
    unmasked = plan.visited & (context | context[:, None])
    at = plan.disk.key
    lists = BlockPlan.from_mask(
        plan.visited,
        plan.q_blocks,
        plan.k_blocks,
        full=unmasked,
        box=BoxPredicate(at[None], at[None], at, at, guard=16),
        order=plan.order,
    )
    return check(replace(lists, box=None, disk=disk))


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, LAYOUT.length, 32, generator=generator).to(dtype) for _ in range(3)]


def compare(plan: BlockPlan, backend: Backend, dtype: torch.dtype = torch.float32) -> None:
    q, k, v = tensors(dtype)
    out, lse = attend(q, k, v, plan, backend=backend)
    expected, expected_lse = masked_attention(q, k, v, plan.to_mask(), 32**-0.5 * plan.scale)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


@given(st.integers(0, 10_000))
def test_mask_by_the_definition(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        """Coordinates up to the largest that a grid may have."""
        edges = torch.tensor([0, 1, 5, 9, 32_000, 32_766])
        return edges[torch.randint(6, shape, generator=generator)]

    centre, key = draw(2, 7, 2), draw(9, 2)
    limit = draw(2, 7) + 1
    text = torch.rand(9, generator=generator) < 0.3
    packed = (key[:, 0] << 16) + key[:, 1]
    disk = DiskPredicate(
        centre=((centre[..., 0] << 16) + centre[..., 1]).int(),
        limit=limit.int(),
        key=torch.where(text, -1, packed).int(),
    )
    every = slice(None)
    for head in range(4):
        distance = ((centre[head % 2][:, None] - key) ** 2).sum(-1)
        expected = (distance < limit[head % 2][:, None]) | text
        assert torch.equal(disk.mask(head, every, every), expected)


@pytest.mark.parametrize("change", [lambda p: p, per_head, lambda p: replace(p, scale=1.3)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_reference_and_flex(change):
    plan = change(disk_plan())
    assert plan.disk is not None
    assert plan.partial.any()
    compare(plan, ReferenceBackend())
    compare(plan, FlexBackend(eager=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("change", [lambda p: p, per_head])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("poisoned")
def test_the_portable_kernel(change, dtype: torch.dtype):
    block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
    tiles = pytest.importorskip("dit_sparse.kernels.tiles")
    tile = tiles.Tile(32, warps=4, stages=1, tma=False)
    compare(change(disk_plan()), block_sparse.TritonBackend(tile=tile, interpreted=True), dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["reference", "triton"])
def test_calls_that_are_repeated(name: str, monkeypatch: pytest.MonkeyPatch):
    """With the plan's mask and its factor on the scale, first and again."""
    block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
    tiles = pytest.importorskip("dit_sparse.kernels.tiles")
    tile = tiles.Tile(32, warps=4, stages=1, tma=False)
    triton = block_sparse.TritonBackend(tile=tile, interpreted=True)
    monkeypatch.setattr(
        attention, "backends", lambda precision="bf16": (triton, ReferenceBackend())
    )
    plan = replace(disk_plan(), scale=1.3)
    q, k, v = tensors(torch.float32)
    first, prepared = attention.prepare(q, k, v, plan, backend=name)
    assert prepared.backend.name == name
    for got, (a, b, c) in ((first, (q, k, v)), (prepared.again(v, q, k), (v, q, k))):
        expected, lse = masked_attention(a, b, c, plan.to_mask(), 1.3 * 32**-0.5)
        torch.testing.assert_close(got.out.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-4)


def test_plans_with_disks_are_kept(tmp_path: Path):
    plan = replace(disk_plan(), scale=1.25)
    loaded = load_plan(save_plan(plan, tmp_path / "disk.plan"))
    assert loaded.scale == 1.25
    assert loaded.box is None
    assert torch.equal(loaded.to_mask(), plan.to_mask())
    assert "disk" in str(loaded)
    assert "scale x 1.25" in str(loaded)
    assert loaded.to("meta").disk.key.device.type == "meta"


class TestCheck:
    def sound(self) -> BlockPlan:
        blocks = Blocks.uniform(10, 4)
        at = torch.arange(10, dtype=torch.int32)
        every = torch.ones(1, 1, 3, 3, dtype=torch.bool)
        box = BoxPredicate(at[None], at[None], at, at, guard=16)
        plan = BlockPlan.from_mask(every, blocks, blocks, full=~every, box=box)
        disk = DiskPredicate(at[None], torch.full_like(at[None], 4), at)
        return check(replace(plan, box=None, disk=disk))

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"limit": torch.zeros(1, 10, dtype=torch.int32)}, "disk.limit above 0, got 0"),
            ({"key": torch.zeros(9, dtype=torch.int32)}, r"disk.key of shape \[10\], got \[9\]"),
            ({"limit": torch.ones(2, 10, dtype=torch.int32)}, r"disk.limit of shape \[1, 10\]"),
            ({"centre": torch.zeros(1, 10)}, "disk.centre of dtype torch.int32"),
        ],
    )
    def test_faults(self, changes: dict[str, Tensor], sentence: str):
        plan = self.sound()
        with pytest.raises(ValueError, match=sentence):
            check(replace(plan, disk=replace(plan.disk, **changes)))

    def test_a_box_and_a_disk(self):
        at = torch.arange(10, dtype=torch.int32)
        box = BoxPredicate(at[None], at[None], at, at, guard=16)
        with pytest.raises(ValueError, match="a box or a disk, got both"):
            check(replace(self.sound(), box=box))

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
    def test_scales(self, scale: float):
        with pytest.raises(ValueError, match="Expected a scale above 0, got"):
            check(replace(self.sound(), scale=scale))
