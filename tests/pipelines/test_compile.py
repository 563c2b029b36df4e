"""torch.compile: no more graphs than stock, whatever the layers, steps, schedule and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import dit_sparse
from dit_sparse import ops
from dit_sparse.methods import create
from dit_sparse.methods.schedule import Schedule
from dit_sparse.pipelines.compile import compile_blocks
from dit_sparse.pipelines.tiny import tiny_call

# Its name before torch 2.7 was another.
RECOMPILE_LIMIT = next(
    name for name in ("recompile_limit", "cache_size_limit") if hasattr(torch._dynamo.config, name)
)
METHOD = Schedule(create("window", {"density": 0.5}), dense_first=1)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(pipe: Any, family: str, sizes: list[dict[str, int]]) -> list[Tensor]:
    with torch.no_grad():
        calls = [tiny_call(family, pipe) | {"num_inference_steps": 4} | size for size in sizes]
        return [pipe(**call)[0] for call in calls]


def compiled(pipe: Any, how: str) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("aot_eager")
    if how == "regional":
        compile_blocks(pipe.transformer, counter)
    elif how == "in place":
        pipe.transformer.compile(fullgraph=True, backend=counter)
    else:
        pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend=counter)
    return counter


# A family of one kind of block compiles in one graph; others meet blocks with tensors of two kinds
# of strides, so that stock diffusers needs one more, and the last block of SD3 differs. Diffusers
# does not name the blocks of the last two.
@pytest.mark.parametrize(
    ("family", "limit"),
    [("wan", 1), ("ltx", 1), ("flux", 2), ("cogvideox", 2), ("sd3", 3)],
)
def test_regional_compilation_has_the_graphs_of_stock(family: str, limit: int, tiny: Any) -> None:
    eager = dit_sparse.apply(tiny(family), METHOD)
    expected = run(eager, family, [{}])[0]
    with torch._dynamo.config.patch({RECOMPILE_LIMIT: limit}):
        stock, ours = tiny(family), dit_sparse.apply(tiny(family), METHOD)
        counters = [compiled(pipe, "regional") for pipe in (stock, ours)]
        run(stock, family, [{}])
        torch._dynamo.reset()
        torch.testing.assert_close(run(ours, family, [{}])[0], expected, atol=3e-5, rtol=0)
    assert counters[1].frame_count == counters[0].frame_count
    assert dit_sparse.summary(ours).to_dict() == dit_sparse.summary(eager).to_dict()
    assert dit_sparse.summary(ours).sparse > 0


def test_regional_compilation_with_changing_sizes(tiny: Any) -> None:
    sizes = [{}, {"height": 96, "width": 64}, {"height": 64, "width": 64}]
    eager = dit_sparse.apply(tiny("wan"), METHOD)
    expected = run(eager, "wan", sizes)
    graphs = []
    for pipe in (tiny("wan"), dit_sparse.apply(tiny("wan"), METHOD)):
        torch._dynamo.reset()
        counter = compiled(pipe, "regional")
        out = run(pipe, "wan", sizes)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0]
    for one, other in zip(out, expected, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=0)


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_whole_model_compilation(how: str, tiny: Any) -> None:
    expected = run(dit_sparse.apply(tiny("wan"), METHOD), "wan", [{}])[0]
    pipe = dit_sparse.apply(tiny("wan"), METHOD)
    with torch._dynamo.config.patch({RECOMPILE_LIMIT: 1}):
        counter = compiled(pipe, how)
        torch.testing.assert_close(run(pipe, "wan", [{}])[0], expected, atol=3e-5, rtol=0)
    assert counter.frame_count == 1
    summary = dit_sparse.summary(pipe)  # also through the wrapper
    assert (summary.sparse, summary.dense) == (12, 4)


def test_applied_after_compilation(tiny: Any) -> None:
    expected = run(dit_sparse.apply(tiny("wan"), METHOD), "wan", [{}])[0]
    pipe = tiny("wan")
    compiled(pipe, "regional")
    stock = run(pipe, "wan", [{}])[0]
    dit_sparse.apply(pipe, METHOD)
    torch.testing.assert_close(run(pipe, "wan", [{}])[0], expected, atol=3e-5, rtol=0)
    dit_sparse.remove(pipe)
    assert torch.equal(run(pipe, "wan", [{}])[0], stock)


class Doubler:
    def attend(self, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        return (value * 2).transpose(1, 2).contiguous().transpose(1, 2)


def test_operator_passes_torch_checks() -> None:
    core = Doubler()
    ticket = ops.enrol(core)
    q = torch.randn(1, 6, 2, 4)
    arguments = (q, q, q, ticket, None, None, 0.0, False, False, "")
    torch.library.opcheck(ops.attend, arguments)
    assert ops.attend(*arguments).is_contiguous()
    del core
    with pytest.raises(RuntimeError, match="Compile the transformer again"):
        ops.attend(*arguments)


def test_operator_stays_out_of_cuda_graphs() -> None:
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this torch has no such tag")
    assert tag in torch.ops.dit_sparse.attend.default.tags
