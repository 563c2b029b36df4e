"""Rebound processor classes: the stock code with another attention core, and nothing else."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dit_sparse import ops
from dit_sparse.forward import Forward
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.methods import create
from dit_sparse.pipelines import processor
from dit_sparse.pipelines.core import AttentionCore
from dit_sparse.pipelines.family import families
from dit_sparse.session import Session

GRID = TokenGrid(2, 4, 4)


def core(method: str = "window") -> AttentionCore:
    options = {"density": 1.0} if method == "window" else None
    session = Session(create(method, options), ["attn"])
    session.begin(Forward(TokenLayout.of(GRID)))
    return AttentionCore(session, 0)


def qkv(heads_k: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, N, H, D]`."""
    source = torch.Generator().manual_seed(0)
    shape = (1, GRID.length)
    q = torch.randn(*shape, 2, 16, generator=source)
    k, v = (torch.randn(*shape, heads_k, 16, generator=source) for _ in range(2))
    return q, k, v


def counts(core: AttentionCore) -> tuple[int, int]:
    record = core.session.layers[0]
    return record.sparse, record.dense.total()


class Attention:
    """A stock-like processor for tests: calls both cores with every kind of argument."""

    def __call__(self, attn: Any, hidden_states: Tensor, flag: int = 0) -> Tensor:
        if flag:
            raise KeyError("stop here")
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states)


class NoCore:
    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    "stock", [WanAttnProcessor, FluxAttnProcessor, JointAttnProcessor2_0, AttnProcessor2_0]
)
def test_class_has_the_stock_signature_and_leaves_the_stock_module_alone(stock: type[Any]) -> None:
    module = inspect.getmodule(stock)
    before = dict(vars(module))
    sparse = processor.sparse_class(stock)
    assert inspect.signature(sparse.__call__) == inspect.signature(stock.__call__)
    assert sparse.__call__.__globals__ is vars(module)
    assert vars(module).keys() == before.keys()
    assert "core" not in stock.__call__.__code__.co_names
    assert processor.sparse_class(stock) is sparse
    assert (sparse._attention_backend, sparse._parallel_config) == (None, None)
    assert not issubclass(sparse, torch.nn.Module)


def test_every_family_has_classes_by_name_that_pickle() -> None:
    for family in families().values():
        for name in family.processors:
            cls = getattr(processor, f"Sparse{name}")
            assert pickle.loads(pickle.dumps(cls)) is cls
    with pytest.raises(AttributeError, match="SparseNothing"):
        processor.SparseNothing  # noqa: B018


def test_core_call_goes_to_the_session() -> None:
    ours = processor.sparse_processor(Attention(), core())
    x = qkv()[0].transpose(1, 2)
    torch.testing.assert_close(ours(None, x), Attention()(None, x), atol=1e-5, rtol=0)
    assert counts(ours.core) == (1, 0)


def test_tracebacks_point_at_the_stock_source() -> None:
    ours = processor.sparse_processor(Attention(), core())
    frames = []
    for fails in (ours, Attention()):
        with pytest.raises(KeyError) as caught:
            fails(None, qkv()[0], flag=1)
        frames.append(traceback.extract_tb(caught.value.__traceback__)[-1])
    assert (frames[0].filename, frames[0].lineno) == (frames[1].filename, frames[1].lineno)
    assert frames[0].line == 'raise KeyError("stop here")'


def test_serves_the_module_that_it_was_made_for() -> None:
    own, other = torch.nn.Identity(), torch.nn.Identity()
    session = core().session
    ours = processor.sparse_processor(Attention(), AttentionCore(session, 0, own))
    x = qkv()[0].transpose(1, 2)
    ours(own, x)
    with pytest.raises(RuntimeError, match="got one of another transformer") as caught:
        ours(other, x)
    line = traceback.extract_tb(caught.value.__traceback__)[-2].line
    assert str(line).startswith("return F.scaled_dot_product_attention")
    del own
    with pytest.raises(RuntimeError, match="got one of another transformer"):
        ours(other, x)
    assert counts(ours.core) == (1, 0)
    copy.deepcopy(ours).core.serving(other)  # nobody knows which module a copy is for


def test_attributes_of_the_stock_instance_are_kept() -> None:
    stock = WanAttnProcessor()
    stock._attention_backend = "native"
    assert processor.sparse_processor(stock, core())._attention_backend == "native"


def test_refuses_what_cannot_be_rebound() -> None:
    with pytest.raises(ValueError, match="without weights, got FluxIPAdapterAttnProcessor"):
        processor.sparse_class(FluxIPAdapterAttnProcessor)
    with pytest.raises(ValueError, match=r"Expected NoCore.__call__ to call"):
        processor.sparse_class(NoCore)
    namespace: dict[str, Any] = {}
    exec("class Unreadable:\n    def __call__(self, attn): ...", namespace)
    with pytest.raises(ValueError, match="Expected the source of Unreadable"):
        processor.sparse_class(namespace["Unreadable"])


def test_registered_where_diffusers_looks_up_by_class() -> None:
    ours = processor.sparse_class(AttnProcessor2_0)
    stock = AttentionProcessorRegistry.get(AttnProcessor2_0)
    assert AttentionProcessorRegistry.get(ours) is stock


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_answer_to_their_own_ticket(clone: Any) -> None:
    ours = processor.sparse_processor(WanAttnProcessor(), core())
    other = clone(ours)
    assert type(other) is type(ours)
    assert other.core.session is not ours.core.session
    for one in (ours, other):
        one.core.session.begin(Forward(TokenLayout.of(GRID)))
    ops.attend(*qkv(), other.core._ticket, None, None, 0.0, False, False, "")
    assert (counts(ours.core), counts(other.core)) == ((0, 0), (1, 0))


@pytest.mark.parametrize(
    "keywords",
    [
        {"is_causal": True},
        {"attn_mask": torch.ones(GRID.length, GRID.length).tril().bool()},
        {"attn_mask": torch.randn(1, 2, GRID.length, GRID.length)},
        {"enable_gqa": True},
    ],
)
@pytest.mark.parametrize("kind", ["dispatch", "sdpa"])
def test_unusual_stock_keywords_are_honoured_densely(kind: str, keywords: dict[str, Any]) -> None:
    ours = core()
    q, k, v = qkv(heads_k=1 if "enable_gqa" in keywords else 2)
    keywords = keywords | {"scale": 0.3}
    if kind == "dispatch":
        out = ours.dispatch(q, k, v, **keywords)
        expected = dispatch_attention_fn(q, k, v, **keywords)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = ours.sdpa(q, k, v, **keywords)
        expected = F.scaled_dot_product_attention(q, k, v, **keywords)
    assert torch.equal(out, expected)
    assert counts(ours) == (0, 1)


def test_dropout_is_honoured() -> None:
    ours = core()
    q, k, v = qkv()
    torch.manual_seed(0)
    out = ours.dispatch(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(out, dispatch_attention_fn(q, k, v, dropout_p=0.5))
    assert counts(ours) == (0, 1)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_scale_reaches_the_sparse_core(scale: float | None) -> None:
    ours = core()
    q, k, v = qkv()
    expected = dispatch_attention_fn(q, k, v, scale=scale)
    torch.testing.assert_close(ours.dispatch(q, k, v, scale=scale), expected, atol=1e-5, rtol=0)
    assert counts(ours) == (1, 0)


def test_backend_that_the_user_chose_runs_the_dense_calls(monkeypatch: Any) -> None:
    used = []

    def watched(*args: Any, backend: Any = None, **more: Any) -> Tensor:
        used.append(backend)
        return dispatch_attention_fn(*args, backend=backend, **more)

    monkeypatch.setattr("dit_sparse.pipelines.core.dispatch_attention_fn", watched)
    ours = core("dense")
    ours.dispatch(*qkv())
    assert used == []
    ours.dispatch(*qkv(), backend="_native_math")
    with attention_backend("_native_math"):
        ours.dispatch(*qkv())
    assert used == ["_native_math", None]


def test_function_modes_that_replace_attention_see_the_stock_call() -> None:
    class Identity(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return (
                args[2] if func is F.scaled_dot_product_attention else func(*args, **kwargs or {})
            )

    ours = core()
    q, k, v = (t.transpose(1, 2) for t in qkv())
    with Identity():
        assert torch.equal(ours.sdpa(q, k, v), v)
    with torch.device("cpu"):  # also a function mode
        ours.sdpa(q, k, v)
    assert counts(ours) == (1, 1)


def test_refuses_context_parallel_and_masks_that_are_no_tensors() -> None:
    with pytest.raises(NotImplementedError, match="context parallelism"):
        core().dispatch(*qkv(), parallel_config=object())
    with pytest.raises(NotImplementedError, match="mask of type object"):
        core().dispatch(*qkv(), attn_mask=object())
