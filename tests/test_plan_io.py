"""Plans through files: bit-equal round trips, and a sentence for every damaged file."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dit_sparse.grid import Permutation
from dit_sparse.plan import BlockPlan, Blocks, BoxPredicate, Pools
from dit_sparse.plan_check import tensors
from dit_sparse.plan_io import load_plan, save_plan


def plan_of(seed: int = 0, *, box: bool = True, pooled: bool = True, order: int | None = 2):
    generator = torch.Generator().manual_seed(seed)
    blocks = Blocks.of_runs([5, 7, 1], 4)
    visited = torch.rand(2, 2, blocks.n, blocks.n, generator=generator) < 0.6
    key = torch.arange(13, dtype=torch.int32)
    plan = BlockPlan.from_mask(visited, blocks, blocks, tail="zeroth")
    if box:
        plan = replace(plan, box=BoxPredicate(key[None], key[None] + 2, key, key, guard=32))
    if pooled:
        counts = torch.zeros(*plan.offsets.shape, 2, dtype=torch.int32)
        hidden = torch.zeros(2, blocks.n, dtype=torch.bool)
        plan = replace(plan, pools=Pools((4, 8), counts), hidden=hidden)
    if order is not None:
        index = torch.stack([torch.randperm(13, generator=generator) for _ in range(order or 1)])
        plan = replace(plan, order=Permutation(index if order else index[0]))
    return plan


def assert_equal(a: BlockPlan, b: BlockPlan) -> None:
    ours, theirs = dict(tensors(a)), dict(tensors(b))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
    assert (a.q_blocks.size, a.k_blocks.size, a.tail) == (b.q_blocks.size, b.k_blocks.size, b.tail)
    assert (a.box and a.box.guard) == (b.box and b.box.guard)
    assert (a.pools and a.pools.factors) == (b.pools and b.pools.factors)


def rewrite(path: Path, **changes: object) -> None:
    """Changes header fields and keeps the file sound; `...` removes the field."""
    header, stored = parts(path)
    for name, value in changes.items():
        header.pop(name) if value is ... else header.update({name: value})
    safetensors.torch.save_file(stored, path, metadata={"dit_sparse.plan": json.dumps(header)})


def parts(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["dit_sparse.plan"])
    return header, safetensors.torch.load(path.read_bytes())


def sealed(path: Path, **changes: object) -> None:
    """As `rewrite`, with a digest that fits: the writer meant it."""
    from dit_sparse.plan_io import _digest

    header, stored = parts(path)
    header.update(changes)
    rewrite(path, **changes, sha256=_digest(header, stored))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_plan(plan_of(), tmp_path / "plan.safetensors")


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("order", [None, 0, 2])
def test_round_trip(tmp_path, box, pooled, order):
    plan = plan_of(box=box, pooled=pooled, order=order)
    path = save_plan(plan, tmp_path / "plan.safetensors")
    assert_equal(load_plan(path), plan)
    assert torch.equal(load_plan(str(path)).to_mask(), plan.to_mask())
    assert os.listdir(tmp_path) == ["plan.safetensors"]


@given(st.integers(0, 10_000))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_of_random_plans(tmp_path, seed):
    plan = plan_of(seed)
    assert_equal(load_plan(save_plan(plan, tmp_path / "plan.safetensors")), plan)


def test_a_plan_without_entries(tmp_path):
    plan = replace(plan_of(pooled=False), indices=torch.zeros(0, dtype=torch.int32))
    zero = torch.zeros_like(plan.full)
    plan = replace(plan, offsets=zero, full=zero, partial=zero)
    assert_equal(load_plan(save_plan(plan, tmp_path / "empty")), plan)


def test_shared_tensors_are_stored_once_and_stay_shared(saved):
    loaded = load_plan(saved)
    assert loaded.q_blocks.starts is loaded.k_blocks.starts
    assert loaded.box.above is loaded.box.below
    assert not {"k_blocks.starts", "box.below"} & parts(saved)[1].keys()


def test_views_are_stored(tmp_path):
    plan = plan_of(box=False, pooled=False, order=None)
    plan = replace(plan, offsets=plan.offsets.mT.contiguous().mT)
    assert_equal(load_plan(save_plan(plan, tmp_path / "plan")), plan)


def test_saving_replaces(saved):
    other = plan_of(seed=1)
    save_plan(other, saved)
    assert_equal(load_plan(saved), other)


def test_a_faulty_plan_is_not_saved(tmp_path):
    plan = replace(plan_of(), tail="second")
    with pytest.raises(ValueError, match="Expected a tail"):
        save_plan(plan, tmp_path / "plan")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["missing/plan", "."])
def test_unwritable_paths(tmp_path, target):
    with pytest.raises(OSError, match=r"Expected to write a plan.*existing folder") as error:
        save_plan(plan_of(), tmp_path / target)
    assert str(tmp_path) in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["missing", "."])
def test_unreadable_paths(tmp_path, target):
    with pytest.raises(OSError, match=r"Expected to read a plan.*save_plan") as error:
        load_plan(tmp_path / target)
    assert str(tmp_path) in str(error.value)


def test_a_missing_file_is_still_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_plan(tmp_path / "missing")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or not safetensors") as error:
        load_plan(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"hello, world, this is text", b"\x80\x04K\x01.", bytes(64), b"\xff" * 64]
)
def test_foreign_files(saved, content):
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or not safetensors"):
        load_plan(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors(saved, metadata):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, saved, metadata=metadata)
    with pytest.raises(ValueError, match="a safetensors file of something else"):
        load_plan(saved)


def test_header_that_is_not_json(saved):
    stored = parts(saved)[1]
    safetensors.torch.save_file(stored, saved, metadata={"dit_sparse.plan": "{version"})
    with pytest.raises(ValueError, match="JSON in the header"):
        load_plan(saved)


@pytest.mark.parametrize("version", [0, 1, "2", None, ...])
def test_other_versions(saved, version):
    rewrite(saved, version=version)
    with pytest.raises(ValueError, match=r"Expected format version 2.*make the plan again"):
        load_plan(saved)


@pytest.mark.parametrize(
    "field", ["q_size", "k_size", "tail", "guard", "factors", "tensors", "sha256"]
)
@pytest.mark.parametrize("value", [..., 1.5])
def test_missing_and_mistyped_fields(saved, field, value):
    rewrite(saved, **{field: value})
    with pytest.raises(ValueError, match=f"header field {field!r}.*got (none|1.5)"):
        load_plan(saved)


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_goes_unseen(saved, data):
    """Either the file is refused with a sentence that names it, or it still means the same."""
    original = saved.read_bytes()
    at = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    path = saved.with_name("damaged")
    path.write_bytes(bytes(damaged))
    try:
        loaded = load_plan(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
    else:
        assert_equal(loaded, load_plan(saved))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k_size": 3}, "1 to 3 tokens in k_blocks"),
        ({"tail": "second"}, "Expected a tail"),
        ({"guard": 8}, "guard bits of 0x8"),
        ({"guard": None}, "Expected tensors .* got 'box.above'"),
        ({"tensors": {}}, "Expected a tensor 'box.above', got none"),
    ],
)
def test_sealed_files_are_checked_all_the_same(saved, changes, sentence):
    sealed(saved, **changes)
    with pytest.raises(ValueError, match=sentence):
        load_plan(saved)


@pytest.mark.parametrize("key", ["nowhere", 5, ["a"]])
def test_tensors_that_are_not_in_the_file(saved, key):
    names = parts(saved)[0]["tensors"]
    sealed(saved, tensors={**names, "full": key})
    with pytest.raises(ValueError, match="for 'full', got none"):
        load_plan(saved)
