"""The full-size models that are timed, and the methods that random weights cannot flatter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dit_sparse
from dit_sparse.grid import TokenGrid, TokenLayout
from dit_sparse.method import CallContext
from dit_sparse.pipelines.family import family_of
from dit_sparse.pipelines.install import attention_modules
from dit_sparse.pipelines.tiny import tiny_pipeline
from scripts.bench_pipeline import MODELS, Run
from scripts.step_variants import paro_method, variants

#: Published parameters of the transformers, in billions.
SIZES = {"wan-1.3b": 1.42, "wan-14b": 14.3, "flux": 11.9, "hunyuan": 12.8, "cogvideox-5b": 5.57}
#: Tokens of the picture and of the text in its sequence.
TOKENS = {
    "wan-1.3b-480p": (32_760, 0),
    "wan-14b-720p": (75_600, 0),
    "flux-1024": (4_096, 512),
    "flux-4096": (65_536, 512),
    "hunyuan-720p": (118_800, 256),
    "cogvideox-5b": (17_550, 226),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_published_ones(name: str) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        transformer, inputs = model.build(), model.inputs()
    billions = sum(p.numel() for p in transformer.parameters()) / 1e9
    wanted = next(size for prefix, size in SIZES.items() if name.startswith(prefix))
    assert billions == pytest.approx(wanted, rel=0.01)
    modules = attention_modules(transformer, family_of(transformer))
    layers, heads, tokens, dim = model.attention
    assert len(modules) == layers
    first = next(iter(modules.values()))
    assert (first.heads, first.to_q.out_features) == (heads, heads * dim)
    picture, text = TOKENS.get(name, (model.grid.length, tokens - model.grid.length))
    assert (model.grid.length, tokens) == (picture, picture + text)
    assert inputs


@pytest.mark.parametrize("density", [0.1, 0.25])
def test_what_looks_at_q_and_k_has_the_density_of_its_name(density: float) -> None:
    layout = TokenLayout.of(TokenGrid(8, 32, 32))  # 64 blocks of 128
    context = CallContext(layout, step=0, steps=1)
    found = dict(variants([density]))
    assert set(found) == {f"{name} {density}" for name in ("window", "pisa", "psa")}
    for seed in (0, 1):
        torch.manual_seed(seed)
        q, k = torch.randn(2, 1, 2, layout.length, 16) * 3
        pisa = found[f"pisa {density}"].plan(q, k, context)
        psa = found[f"psa {density}"].plan(q, k, context)
        assert pisa.density == pytest.approx(density, abs=0.03)
        assert psa.density == pytest.approx(density, abs=0.03)


def test_paro_runs_random_masks_of_the_density(tmp_path: Path) -> None:
    transformer = tiny_pipeline("wan").transformer
    method = paro_method(transformer, TokenGrid(4, 16, 16), 2, 2, 0.25, tmp_path)
    dit_sparse.apply(transformer, method, steps=1)
    with torch.no_grad():
        transformer(
            hidden_states=torch.randn(1, 16, 4, 32, 32),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 7, 32),
        )
    assert dit_sparse.summary(transformer).density == pytest.approx(0.25)


def test_rows_say_how_much_of_the_ideal_was_reached() -> None:
    run = Run(times=[50.0, 40.0, 60.0], first=70.0, density=0.2)
    found = run.record(share=0.5, fastest=75.0)
    assert (found["ms"], found["plan_ms"], found["speedup"]) == (50.0, 20.0, 1.5)
    assert found["ideal"] == pytest.approx(1 / 0.6, abs=1e-3)
    assert found["of_ideal"] == pytest.approx(0.9)
