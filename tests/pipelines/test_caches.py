"""Caches, guiders and offloading of diffusers on top of sparse attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.layer_skip import apply_layer_skip
from torch import Tensor

import dit_sparse
from dit_sparse.methods import create
from dit_sparse.pipelines.tiny import tiny_call

ALL = create("window", {"density": 1.0})
STEPS = 6


def run(pipe: Any, family: str) -> Tensor:
    with torch.no_grad():
        return pipe(**(tiny_call(family) | {"num_inference_steps": STEPS}))[0]


def cache(name: str, pipe: Any) -> Any:
    if name == "first block":
        return FirstBlockCacheConfig(threshold=10.0)
    if name == "mag":
        return MagCacheConfig(
            threshold=10.0,
            max_skip_steps=2,
            retention_ratio=0.2,
            num_inference_steps=STEPS,
            mag_ratios=torch.ones(STEPS),
        )
    if name == "taylor seer":
        return TaylorSeerCacheConfig(
            cache_interval=2,
            disable_cache_before_step=2,
            taylor_factors_dtype=torch.float32,  # bfloat16 turns 1e-6 into 3e-4
            cache_identifiers=[r"blocks\.\d+\.attn1", r"transformer_blocks\.\d+\.attn"],
        )
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


@pytest.mark.parametrize("name", ["first block", "mag", "taylor seer", "pyramid"])
@pytest.mark.parametrize("family", ["wan", "flux"])
def test_cached_runs_are_those_of_stock(family: str, name: str, tiny: Any) -> None:
    uncached = run(tiny(family), family)
    stock = tiny(family)
    stock.transformer.enable_cache(cache(name, stock))
    expected = run(stock, family)
    assert (expected - uncached).abs().max() > 1e-4  # the cache does skip something
    pipe = dit_sparse.apply(tiny(family), ALL)
    run(pipe, family)
    every = dit_sparse.summary(pipe).sparse
    dit_sparse.apply(pipe, ALL)
    pipe.transformer.enable_cache(cache(name, pipe))
    torch.testing.assert_close(run(pipe, family), expected, atol=3e-5, rtol=0)
    summary = dit_sparse.summary(pipe)
    assert 0 < summary.sparse < every
    assert summary.dense == 0
    pipe.transformer.disable_cache()
    torch.testing.assert_close(run(pipe, family), uncached, atol=3e-5, rtol=0)


@pytest.mark.parametrize("part", ["skip_attention", "skip_attention_scores"])
def test_layer_skipping_guiders(part: str, tiny: Any) -> None:
    def skipping(pipe: Any) -> Any:
        settings = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False}
        config = LayerSkipConfig([0], fqn="transformer_blocks", **(settings | {part: True}))
        apply_layer_skip(pipe.transformer, config)
        return pipe

    uncached = run(tiny("pixart"), "pixart")
    expected = run(skipping(tiny("pixart")), "pixart")
    assert (expected - uncached).abs().max() > 1e-2
    pipe = skipping(dit_sparse.apply(tiny("pixart"), ALL))
    # Ten times as far apart as other runs here, on some CPUs.
    torch.testing.assert_close(run(pipe, "pixart"), expected, atol=3e-4, rtol=0)
    assert dit_sparse.summary(pipe).sparse > 0


def offloaded(how: str, pipe: Any) -> None:
    device = torch.device("cpu")
    if how == "model":
        cpu_offload_with_hook(pipe.transformer, execution_device=device)
    elif how == "sequential":
        for model in (pipe.transformer, pipe.vae):
            cpu_offload(model, execution_device=device)
        assert pipe.transformer.device.type == "meta"
    elif how == "group":
        apply_group_offloading(
            pipe.transformer,
            onload_device=device,
            offload_device=device,
            offload_type="leaf_level",
        )
    else:
        pipe.transformer.enable_layerwise_casting(torch.float32, torch.float32)


@pytest.mark.parametrize("how", ["model", "sequential", "group", "layerwise casting"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_offloading(how: str, order: str, tiny: Any) -> None:
    expected = run(tiny("wan"), "wan")
    pipe = tiny("wan")
    if order == "before":
        offloaded(how, pipe)
    dit_sparse.apply(pipe, ALL)
    if order == "after":
        offloaded(how, pipe)
    torch.testing.assert_close(run(pipe, "wan"), expected, atol=3e-5, rtol=0)
    summary = dit_sparse.summary(pipe)
    assert (summary.sparse, summary.dense) == (2 * 2 * STEPS, 0)
