"""Every family's facts against the stock model, and its pipeline with sparse attention."""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dit_sparse.method import CallContext
from dit_sparse.methods.window import WindowMethod
from dit_sparse.pipelines.apply import apply, remove, summary
from dit_sparse.pipelines.family import families, family_of
from dit_sparse.pipelines.tiny import tiny_call, tiny_names

ATOL = 3e-5
#: About half of the keys of every query, in video and, where it has but one frame, in images.
HALF = {"window": (0.67, 0.7, 0.7), "block": 64}
#: Two of seven words are padding, which no plan reads; of Qwen-Image's two prompts in one only.
REAL_KEYS = {"hunyuan_video": (72 + 5) / (72 + 7), "qwen_image": (96 + (5 + 7) / 2) / (96 + 7)}


@pytest.mark.parametrize("name", families())
def test_facts_name_things_that_exist(name: str) -> None:
    family = families()[name]
    assert importlib.import_module(f"dit_sparse.pipelines.{name}").FAMILY is family
    for cls in (*family.transformers, *family.pipelines):
        assert hasattr(diffusers, cls), cls
    owner, _, model = family.model.partition("/")
    assert owner
    assert model


@pytest.mark.parametrize("name", tiny_names())
def test_attention_is_every_module_that_attends_over_the_picture(name: str, tiny: Any) -> None:
    """Told from the calls of the stock model: as many keys as queries, and a whole grid of them."""
    pipe = tiny(name)
    family, lengths = family_of(pipe.transformer), {}
    inside: list[str] = []

    def core(query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Tensor:
        lengths[inside[-1]] = (query.shape[2], key.shape[2])
        return stock(query, key, *rest, **more)

    stock = torch.nn.functional.scaled_dot_product_attention
    processors = {}
    for module_name, module in pipe.transformer.named_modules():
        if hasattr(module, "processor"):
            processors[module_name] = type(module.processor).__name__
            module.register_forward_pre_hook(lambda *_, n=module_name: inside.append(n))
    torch.nn.functional.scaled_dot_product_attention = core
    try:
        pipe(**tiny_call(name, pipe))
    finally:
        torch.nn.functional.scaled_dot_product_attention = stock
    assert set(lengths) == set(processors)
    attending = {n for n, (q, k) in lengths.items() if q == k > 7}  # prompts have 7 tokens
    assert {n for n in processors if family.attends(n)} == attending
    assert {processors[n] for n in attending} == set(family.processors)


@pytest.mark.parametrize("name", tiny_names())
def test_tiny_pipelines_belong_to_a_tested_family(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    family = family_of(pipe.transformer)
    assert name.startswith(family.name)
    assert type(pipe).__name__ in family.pipelines
    assert set(families()) <= set(tiny_names())


def run(name: str, pipe: Any) -> Tensor:
    return torch.as_tensor(pipe(**tiny_call(name, pipe), return_dict=False)[0])


def transformers(pipe: Any) -> list[torch.nn.Module]:
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [transformer for transformer in found if transformer is not None]


def attention_modules(pipe: Any) -> list[str]:
    return [
        name
        for transformer in transformers(pipe)
        for name, _ in transformer.named_modules()
        if family_of(transformer).attends(name)
    ]


def cross_attention(pipe: Any) -> dict[str, Any]:
    family = family_of(pipe.transformer)
    return {
        name: module.processor
        for name, module in pipe.transformer.named_modules()
        if hasattr(module, "processor") and not family.attends(name)
    }


@pytest.mark.parametrize("name", tiny_names())
def test_density_one_is_the_stock_pipeline(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    stock, others = run(name, pipe), cross_attention(pipe)
    apply(pipe, "window", options={"density": 1.0})
    torch.testing.assert_close(run(name, pipe), stock, atol=ATOL, rtol=0)
    report = summary(pipe)
    assert [row.name for row in report.rows] == attention_modules(pipe)
    for row in report.rows:
        assert (row.backend, row.dense) == ("reference", 0)
        assert row.density == pytest.approx(REAL_KEYS.get(name, 1.0))
        assert row.sparse >= 1
    assert {n: id(p) for n, p in cross_attention(pipe).items()} == {
        n: id(p) for n, p in others.items()
    }


@pytest.mark.parametrize("name", tiny_names())
def test_half_density_differs_and_remove_restores(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    stock = run(name, pipe)
    apply(pipe, "window", options=HALF)
    sparse = run(name, pipe)
    assert sparse.isfinite().all()
    assert (sparse - stock).abs().max() > 30 * ATOL
    assert all(row.dense == 0 for row in summary(pipe).rows)
    remove(pipe)
    assert torch.equal(run(name, pipe), stock)


@pytest.mark.parametrize("name", tiny_names())
def test_half_density_is_the_stock_pipeline_with_a_mask(name: str, tiny: Any, probe: Any) -> None:
    """Tokens are reordered and put back: a mask in the model's own order gives the same."""
    method = WindowMethod(window=HALF["window"], tile=(1, 2, 2), block=64)
    pipe = tiny(name)
    probes = [probe(transformer) for transformer in transformers(pipe)]
    with ExitStack() as stack:
        watched = [stack.enter_context(p.watching(method)) for p in probes]
        masked = run(name, pipe)
    apply(pipe, method)
    difference = (run(name, pipe) - masked).abs().max()
    assert difference <= ATOL * masked.abs().max()
    assert all(row.dense == 0 and row.sparse for row in summary(pipe).rows)
    for forward in (forward for forwards in watched for forward in forwards):
        plan = method.plan(forward.q, forward.q, CallContext(forward.layout))
        assert plan.order is not None
        assert not torch.equal(plan.order.index, torch.arange(plan.order.length))
        assert all(n == 1 or n > 2 for n in forward.layout.grid.shape), "several tiles per axis"
        assert not plan.to_mask().all()


@pytest.mark.parametrize("name", ["hunyuan_video", "qwen_image"])
def test_padded_batches_are_the_stock_pipeline(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    call = tiny_call(name, pipe)
    batch = {k: torch.cat([v, 2 * v]) for k, v in call.items() if torch.is_tensor(v)}
    mask_name = "prompt_attention_mask" if name == "hunyuan_video" else "prompt_embeds_mask"
    for lengths in ([[7], [3]], [[7], [7]]):
        for key in [k for k in batch if k.endswith("mask")]:
            batch[key] = torch.ones(2, 7).long()
        batch[mask_name] = (torch.arange(7) < torch.tensor(lengths)).long()
        stock = pipe(**tiny_call(name) | batch, return_dict=False)[0]
        apply(pipe, "window", options={"density": 1.0})
        sparse = pipe(**tiny_call(name) | batch, return_dict=False)[0]
        torch.testing.assert_close(sparse, stock, atol=ATOL, rtol=0)
        assert all(row.dense == 0 and row.sparse for row in summary(pipe).rows)
        remove(pipe)
