"""What a call of PISA and PSA launches on a Hopper GPU, counted without one.

Tensors have no values, so that whatever would wait for the device raises, and say that they are on
a GPU. `docs/piecewise.md` has the counts.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_sparse import methods
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.summaries import Summaries

block_sparse = pytest.importorskip("dit_sparse.kernels.block_sparse")
kernels = {
    name: pytest.importorskip(f"dit_sparse.kernels.{name}")
    for name in (
        "approximate",
        "choose",
        "hopper",
        "importance",
        "longest_first",
        "norms",
        "permute",
        "pool",
        "pooled",
        "portable",
        "summaries",
        "tail",
    )
}
# Operators that make room or another view of a tensor, and launch nothing.
NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "alias", "detach"),
    *("view", "_unsafe_view", "expand", "slice", "select", "squeeze", "unsqueeze", "transpose"),
}
# A picture alone, with enough blocks for a bound of the scores: rows that it fails are run again.
LAYOUT = TokenLayout.of(TokenGrid(8, 32, 64))


class Operators(TorchDispatchMode):
    """Notes what PyTorch launches."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        on_gpu = isinstance(out, torch.Tensor) and out.device.type == "meta"
        if on_gpu and name not in NOTHING:
            self.seen.append(name)
        return out


class Kernel:
    """In the place of a Triton kernel."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    def __getitem__(self, grid: object) -> Any:
        return lambda *_, **__: self.seen.append(self.name)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the launches, as they come."""
    found: list[str] = []
    for module, name in (
        *(("pool", "_means_fwd"), ("pool", "_covariance_fwd"), ("choose", "_choose_fwd")),
        *(
            ("importance", "_take_fwd"),
            ("importance", "_importance_fwd"),
            ("approximate", "_approximate_fwd"),
        ),
        ("pooled", "_pooled_tiles_fwd"),
        ("pooled", "_pooled_again_fwd"),
        ("summaries", "_summaries_fwd"),
        ("longest_first", "_longest_first_fwd"),
    ):
        monkeypatch.setattr(kernels[module], name, Kernel(name, found))

    def note(kernel: Any, grid: Any, arguments: Any, constants: Any, **_: int) -> str:
        found.append(kernel.__name__)
        return found[-1]

    for module in ("hopper", "pooled"):
        monkeypatch.setattr(kernels[module], "launch_specialised", note)
    monkeypatch.setattr(kernels["norms"], "launch", note)
    monkeypatch.setattr(kernels["permute"], "launch", note)
    monkeypatch.setattr(kernels["portable"], "launch_kernel", note)
    monkeypatch.setattr(kernels["tail"], "launch_kernel", note)
    monkeypatch.setattr(kernels["hopper"], "chosen", lambda *_: "hopper")
    monkeypatch.setattr(kernels["hopper"], "masks", lambda _: True)
    monkeypatch.setattr(block_sparse, "device_of", lambda _: nullcontext())
    monkeypatch.setattr(kernels["importance"], "processors", lambda _: 132)
    return found


class OnGpu(TorchFunctionMode):
    """All tensors say that they are on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        return func(*args, **(kwargs or {}))


MEANS = ["_means_fwd", "mul", "bmm"]
NORMS = ["_means_fwd", "_covariance_fwd", "sum", "sqrt", "add", "log", "add"]
PLACES = ["_to_copy", "sub", "minimum", "add", "_to_copy"]
IMPORTANCE = ["_take_fwd", "_importance_fwd", "sum", "clamp", "div"]
SAMPLED = [*PLACES, "gather", *IMPORTANCE]
SAMPLED_IN_ORDER = [*PLACES, *IMPORTANCE]
CHOICE = ["_choose_fwd"]

SPARSE = ["_block_sparse_fwd_hopper", "_portable_fwd"]
EXACT = ["zeros", "_permute_rows", *SPARSE]
QUEUED = [*EXACT[:-2], "_longest_first_fwd", *SPARSE]  # lists of any length
LISTED = ["zeros", "_permute_blocks", *SPARSE]
TAIL = ["_tail_bias_fwd", "_tail_fwd"]
WITH_MEANS = [*LISTED, *TAIL]
COVARIANCE = ["_covariance_fwd", "sum", "div"]
WITH_SLOPE = [*LISTED, *COVARIANCE, *TAIL]
POOLED = ["_means_fwd", "_pooled_tiles_fwd", "_pooled_fwd_hopper", "_pooled_again_fwd"]

CALLS: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("pisa", {"tail": "zeroth"}, [*MEANS, *CHOICE], WITH_MEANS),
    ("pisa", {}, [*MEANS, *CHOICE], WITH_SLOPE),
    ("pisa", {"mass": 0.8, "tail": "none"}, [*MEANS, *CHOICE], QUEUED),
    (
        "pisa",
        {"prior": "norm", "tail": "zeroth"},
        [*MEANS, *NORMS, *CHOICE],
        WITH_MEANS,
    ),
    ("psa", {}, [*SAMPLED, *CHOICE], [*EXACT, *POOLED]),
    (
        "psa",
        {"importance": "means"},
        [*MEANS, "nan_to_num_", *CHOICE],
        [*EXACT, *POOLED],
    ),
    ("psa", {"skipped": "mean"}, [*SAMPLED, *CHOICE], [*WITH_MEANS, *POOLED]),
]


# Tokens are in the order of the blocks, and attention knows what planning has measured.
SUMMARIES = ["_summaries_fwd", "bmm"]
MEASURED = ["amax", *SPARSE]
IN_ORDER: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("pisa", {"tail": "zeroth"}, [*SUMMARIES, *CHOICE], [*MEASURED, *TAIL]),
    ("pisa", {}, [*SUMMARIES, *CHOICE], [*MEASURED, *COVARIANCE, *TAIL]),
    ("pisa", {"mass": 0.8, "tail": "none"}, [*SUMMARIES, *CHOICE], ["amax", *QUEUED[-3:]]),
    (
        "pisa",
        {"prior": "norm", "tail": "zeroth"},
        [*SUMMARIES, *NORMS[1:], *CHOICE],
        [*MEASURED, *TAIL],
    ),
    ("psa", {}, [*SAMPLED_IN_ORDER, *CHOICE], ["zeros", "_norms", *SPARSE, *POOLED]),
    (
        "psa",
        {"importance": "means", "skipped": "mean"},
        [*SUMMARIES, "nan_to_num_", *CHOICE],
        [*MEASURED, *TAIL, *POOLED],
    ),
]


@pytest.mark.parametrize(("name", "options", "planning", "attending"), IN_ORDER)
def test_launches_of_tensors_in_order(
    name: str,
    options: dict[str, Any],
    planning: list[str],
    attending: list[str],
    seen: list[str],
):
    method = methods.create(name, options)
    q, k, v = torch.empty(3, 1, 24, LAYOUT.length, 128, dtype=torch.bfloat16, device="meta")
    context = CallContext(LAYOUT, values=v, ordered=True)
    backend = block_sparse.TritonBackend()
    with OnGpu():
        backend.run(q, k, v, method.plan(q, k, context), 0.1)
        seen.clear()
        with Operators(seen):
            summaries = Summaries(q, k, v)
            plan = method.plan(q, k, replace(context, summaries=summaries))
            first = list(seen)
            seen.clear()
            found = summaries.of(q, k, v, plan)
            if found is None:
                backend.run(q, k, v, plan, 0.1)
            else:
                backend.run_summarised(q, k, v, plan, 0.1, found)
    assert first == planning
    assert seen == attending


@pytest.mark.parametrize(("name", "options", "planning", "attending"), CALLS)
def test_launches(
    name: str,
    options: dict[str, Any],
    planning: list[str],
    attending: list[str],
    seen: list[str],
):
    method = methods.create(name, options)
    q, k, v = torch.empty(3, 1, 24, LAYOUT.length, 128, dtype=torch.bfloat16, device="meta")
    context = CallContext(LAYOUT, values=v)
    with OnGpu():
        # The first call makes what all calls on a layout share.
        block_sparse.TritonBackend().run(q, k, v, method.plan(q, k, context), 0.1)
        seen.clear()
        with Operators(seen):
            plan = method.plan(q, k, context)
            first = list(seen)
            seen.clear()
            block_sparse.TritonBackend().run(q, k, v, plan, 0.1)
    assert first == planning
    assert seen == attending


@pytest.mark.parametrize("refused", ["pooled", "exact"])
def test_pooled_entries_where_a_kernel_is_refused(
    refused: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
):
    """Their kernel needs queries in order, which only the one for exact entries has."""
    path = f"dit_sparse.kernels.{'pooled' if refused == 'pooled' else 'hopper'}.launch_specialised"
    monkeypatch.setattr(path, lambda *_, **__: None)
    method = methods.create("psa", {"skipped": "mean"})
    q, k, v = torch.empty(3, 1, 24, LAYOUT.length, 128, dtype=torch.bfloat16, device="meta")
    with OnGpu():
        plan = method.plan(q, k, CallContext(LAYOUT, values=v))
        seen.clear()
        with Operators(seen):
            block_sparse.TritonBackend().run(q, k, v, plan, 0.1)
    assert seen[-2:] == ["_means_fwd", "_approximate_fwd"]
    assert "_tail_fwd" in seen
    assert "_pooled_fwd_hopper" not in seen
    assert ("_block_sparse_fwd_hopper" in seen) == (refused == "pooled")
