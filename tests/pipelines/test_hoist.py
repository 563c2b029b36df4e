"""Tokens reordered once per forward: the same pictures, no permutation in any layer."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import dit_sparse
from dit_sparse.grid import Permutation, TokenGrid, TokenLayout
from dit_sparse.hoist import TokenFlow, TokenOrder, common_order
from dit_sparse.method import CallContext
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.psa import PsaMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.orders import axes, lift, tile
from dit_sparse.pipelines.family import Hoist, Tokens, families, family_of
from dit_sparse.pipelines.hoist import Entrance, replaced
from dit_sparse.pipelines.install import installation_of
from dit_sparse.pipelines.tiny import tiny_call, tiny_names
from dit_sparse.plan import BlockPlan

#: About half of the keys, in an order that is not that of the model.
HALF = WindowMethod(window=(0.67, 0.7, 0.7), tile=(1, 2, 2), block=64)
BLOCK = r"(transformer_)?blocks\.0"
ALL = WindowMethod(window=(1.0, 1.0, 1.0), tile=(1, 2, 2), block=64)


@dataclass(frozen=True)
class Scoped:
    """A window that says to depend on more than the layout."""

    scope: str
    name: ClassVar[str] = "scoped"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        return HALF.plan(q, k, ctx)


def run(pipe: Any, name: str, **changes: Any) -> Tensor:
    return torch.as_tensor(pipe(**(tiny_call(name, pipe) | changes), return_dict=False)[0])


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=3e-5, rtol=0)


@pytest.fixture
def permutations(monkeypatch: Any) -> list[str]:
    """Every permutation of q, k, v or a result in a layer."""
    seen: list[str] = []
    put, undo = Permutation.__call__, Permutation.undo
    monkeypatch.setattr(Permutation, "__call__", lambda p, x: (seen.append("put"), put(p, x))[1])
    monkeypatch.setattr(Permutation, "undo", lambda p, x: (seen.append("undo"), undo(p, x))[1])
    return seen


@pytest.mark.parametrize("name", tiny_names())
def test_every_family_runs_without_permutations(
    name: str, tiny: Any, permutations: list[str]
) -> None:
    pipe = tiny(name)
    stock = run(pipe, name)
    dit_sparse.apply(pipe, HALF, hoist=False)
    expected = run(pipe, name)
    summary = dit_sparse.summary(pipe)
    assert len(permutations) == 5 * summary.sparse > 0  # q, k, v, values and their log-sum-exp
    assert (summary.hoisted, summary.permuted) == (0, {"hoist=False": summary.sparse})
    permutations.clear()
    dit_sparse.apply(pipe, HALF)
    same(run(pipe, name), expected)
    assert (expected - stock).abs().max() > 1e-3
    summary = dit_sparse.summary(pipe)
    assert not permutations
    assert (summary.hoisted, summary.permuted) == (summary.sparse, {})
    assert f"once per forward: {summary.sparse} sparse calls" in str(summary)
    dit_sparse.apply(pipe, ALL)
    same(run(pipe, name), stock)
    assert not permutations
    dit_sparse.remove(pipe)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())
    assert torch.equal(run(pipe, name), stock)


PISA = PisaMethod(density=0.5, least=1, order="tile", block=64, tail="first", prior="norm")
PSA = PsaMethod(ends=(0.3, 0.5, 0.5, 0.7), least=1, order="FWH", block=64, skipped="mean", share=2)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("method", [PISA, PSA], ids=["pisa", "psa"])
def test_plans_from_queries_and_keys_in_order(
    name: str, method: Any, tiny: Any, permutations: list[str]
) -> None:
    """The picture is large enough for several blocks to choose from."""
    size = {"height": 96, "width": 96} if name in ("wan", "flux") else {}
    pipe = tiny(name)
    dit_sparse.apply(pipe, method, hoist=False)
    expected = run(pipe, name, **size)
    summary = dit_sparse.summary(pipe)
    assert (summary.hoisted, summary.permuted) == (0, {"hoist=False": summary.sparse})
    density = summary.rows[0].density
    assert permutations
    permutations.clear()
    dit_sparse.apply(pipe, method)
    same(run(pipe, name, **size), expected)
    assert not permutations
    summary = dit_sparse.summary(pipe)
    assert (summary.hoisted, summary.permuted) == (summary.sparse, {})
    assert summary.rows[0].density == density
    if size:
        assert density is not None
        assert density < 0.9


WHF = PisaMethod(density=0.5, least=1, order="WHF", block=64)


@dataclass(frozen=True)
class Late:
    """PISA in an order of its own, from the second step on."""

    inner: PisaMethod = WHF
    name: ClassVar[str] = "late"
    scope: ClassVar[str] = "call"

    def dense_reason(self, ctx: CallContext) -> str | None:
        return None if ctx.step else "the first step"

    def token_order(self, layout: TokenLayout, device: torch.device) -> Permutation | None:
        return self.inner.token_order(layout, device)

    def plan(self, q: Tensor, k: Tensor, ctx: CallContext) -> BlockPlan:
        return self.inner.plan(q, k, ctx)


def test_a_late_layer_with_another_order(tiny: Any) -> None:
    """Nobody knew of its order at the model's entry."""
    results = []
    for hoist in (False, True):
        pipe = tiny("wan")
        dit_sparse.apply(pipe, Schedule(PISA, layers=((0, Late()),)), hoist=hoist)
        results.append(run(pipe, "wan", height=96, width=96, num_inference_steps=3))
    same(*results)
    summary = dit_sparse.summary(pipe)
    assert summary.hoisted > 0
    assert list(summary.permuted) == ["its order is not that of the other layers"]


def test_plans_in_order_serve_later_steps(tiny: Any, permutations: list[str]) -> None:
    method = PisaMethod(density=0.5, order="tile", block=64, reuse_steps=2, share_branches=True)
    results = []
    for hoist in (False, True):
        pipe = dit_sparse.apply(tiny("wan"), Schedule(method, dense_layers=(0,)), hoist=hoist)
        permutations.clear()
        results.append(run(pipe, "wan", height=96, width=96, num_inference_steps=3))
    same(*results)
    assert not permutations


@pytest.mark.parametrize("name", families())
def test_blocks_see_tokens_in_plan_order(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    block = next(m for n, m in pipe.transformer.named_modules() if re.fullmatch(BLOCK, n))
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    block.register_forward_pre_hook(note, with_kwargs=True)
    dit_sparse.apply(pipe, HALF, hoist=False)
    run(pipe, name)
    layout = installation_of(pipe.transformer).session.layout.without_text()
    count = len(seen)
    dit_sparse.apply(pipe, HALF)
    run(pipe, name)
    order = lift(tile(layout.grid, HALF.shape_on(layout.grid).tile), layout)
    same(seen[count], seen[0][:, order.index])
    assert not torch.equal(seen[count], seen[0])


def test_schedules_and_sizes(tiny: Any, permutations: list[str]) -> None:
    """Dense layers and steps keep the order too, as caches of tokens need it."""
    method = Schedule(HALF, dense_first=1, dense_layers=(0,))
    sizes = [{}, {"height": 96, "width": 64}, {}]
    results = []
    for hoist in (False, True):
        pipe = dit_sparse.apply(tiny("wan"), method, hoist=hoist)
        permutations.clear()
        results.append([run(pipe, "wan", num_inference_steps=3, **size) for size in sizes])
        summary = dit_sparse.summary(pipe)
        assert summary.dense > summary.sparse > 0
    for one, other in zip(*results, strict=True):
        same(one, other)
    assert not permutations


def test_guidance_with_prompts_of_two_lengths(tiny: Any) -> None:
    """A prompt's padding is a layout of its own; the order of the picture is the same."""
    pipe = tiny("qwen_image")
    dit_sparse.apply(pipe, HALF, hoist=False)
    expected = run(pipe, "qwen_image")
    dit_sparse.apply(pipe, HALF)
    same(run(pipe, "qwen_image"), expected)


def wan_arguments(config: Any, **changes: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, config.in_channels, 3, 8, 12),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 4, config.text_dim),
    } | changes


@torch.no_grad()
def compare(transformer: nn.Module, arguments: dict[str, Any], method: Any = HALF) -> Any:
    """Summary of the hoisted forward, which gave what the other did."""
    dit_sparse.apply(transformer, method, hoist=False, steps=2)
    expected = transformer(**arguments, return_dict=False)[0]
    dit_sparse.apply(transformer, method, steps=2)
    same(transformer(**arguments, return_dict=False)[0], expected)
    return dit_sparse.summary(transformer)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_a_timestep_for_every_token(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    if name == "wan":
        tokens = 3 * 4 * 6
        arguments = wan_arguments(pipe.transformer.config)
    else:
        tokens = 3 * 4 * 6
        arguments = {
            "hidden_states": torch.randn(1, tokens, 8),
            "encoder_hidden_states": torch.randn(1, 4, 32),
            "encoder_attention_mask": torch.ones(1, 4),
            "num_frames": 3,
            "height": 4,
            "width": 6,
        }
    arguments["timestep"] = torch.linspace(0, 999, tokens)[None]
    summary = compare(pipe.transformer, arguments)
    assert summary.hoisted == summary.sparse == 2


@pytest.mark.parametrize("frames", [3, 2])
def test_vace_control(frames: int, tiny: Any) -> None:
    config = dict(tiny("wan").transformer.config) | {
        "num_layers": 2,
        "vace_layers": [0],
        "vace_in_channels": 16,
    }
    transformer = diffusers.WanVACETransformer3DModel.from_config(config)
    control = torch.randn(1, 16, frames, 8, 12)
    summary = compare(transformer, wan_arguments(transformer.config, control_hidden_states=control))
    if frames == 3:
        assert summary.hoisted == summary.sparse == 3
    else:
        assert summary.hoisted == 0
        assert summary.permuted == {"control_hidden_states have another size than the video": 3}


def test_controlnet_residuals_keep_the_order_of_the_model(tiny: Any) -> None:
    transformer = tiny("flux").transformer
    arguments = {
        "hidden_states": torch.randn(1, 24, 4),
        "encoder_hidden_states": torch.randn(1, 5, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0)),
        "txt_ids": torch.zeros(5, 3),
        "controlnet_block_samples": None,
    }
    assert compare(transformer, arguments).permuted == {}
    arguments["controlnet_block_samples"] = (torch.randn(1, 24, 32),)
    reason = "controlnet_block_samples are in the order of the model"
    assert set(compare(transformer, arguments).permuted) == {reason}


def test_hunyuan_first_frame_apart(tiny: Any, probe: Any) -> None:
    pipe = tiny("hunyuan_video")
    with probe(pipe.transformer).watching() as forwards:
        run(pipe, "hunyuan_video")
    arguments = forwards[0].arguments
    del arguments["return_dict"]
    config = dict(pipe.transformer.config) | {"image_condition_type": "token_replace"}
    del config["_use_default_values"]  # would take the condition out again
    transformer = diffusers.HunyuanVideoTransformer3DModel.from_config(config)
    reason = "the first frame's tokens are modulated apart"
    assert set(compare(transformer, arguments).permuted) == {reason}


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Scoped("call"), "method scoped plans from q and k"),
        (Scoped("layer"), "method scoped plans from each layer"),
        (
            Schedule(HALF, layers=((1, WindowMethod(window=(3, 3, 3), tile=(3, 2, 2), block=64)),)),
            "the plans of its layers differ in their order",
        ),
    ],
)
def test_what_has_no_common_order_permutes_in_the_layer(
    method: Any, reason: str, tiny: Any
) -> None:
    transformer = tiny("wan").transformer
    summary = compare(transformer, wan_arguments(transformer.config), method)
    assert (summary.hoisted, summary.permuted) == (0, {reason: 2})
    assert f"reordered in the layer 2 times: {reason}" in str(summary)


def test_layers_that_never_plan_do_not_count(tiny: Any) -> None:
    other = WindowMethod(window=(3, 3, 3), tile=(3, 2, 2), block=64)
    method = Schedule(HALF, layers=((1, other),), dense_layers=(1,))
    transformer = tiny("wan").transformer
    summary = compare(transformer, wan_arguments(transformer.config), method)
    assert (summary.sparse, summary.hoisted) == (1, 1)


def test_training_permutes_in_the_layer(tiny: Any) -> None:
    transformer = tiny("wan").transformer
    dit_sparse.apply(transformer, HALF)
    transformer(**wan_arguments(transformer.config))
    assert set(dit_sparse.summary(transformer).permuted) == {"gradients are enabled"}


@torch.no_grad()
def test_reference_images_stay_where_they_are(tiny: Any) -> None:
    transformer = tiny("qwen_image").transformer
    arguments = {
        "hidden_states": torch.randn(2, 6 * 9 + 4 * 5 + 3, 64),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 6, 9), (1, 4, 5), (1, 1, 3)]] * 2,
    }
    summary = compare(transformer, arguments)
    assert summary.hoisted == summary.sparse > 0
    config = dict(transformer.config) | {"zero_cond_t": True}  # other modulation of references
    del config["_use_default_values"]
    transformer = diffusers.QwenImageTransformer2DModel.from_config(config)
    assert transformer.zero_cond_t
    summary = compare(transformer, arguments)
    assert summary.hoisted == summary.sparse > 0


def test_consisid_faces_attend_token_by_token(tiny: Any) -> None:
    config = dict(tiny("cogvideox").transformer.config)
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels")
    names += ("time_embed_dim", "text_embed_dim", "sample_width", "sample_height", "sample_frames")
    transformer = diffusers.ConsisIDTransformer3DModel(
        **{name: config[name] for name in names}, num_layers=2, max_text_seq_length=7
    )
    arguments = {
        "hidden_states": torch.randn(1, 3, 4, 8, 12),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "timestep": torch.tensor([5]),
    }
    assert compare(transformer, arguments).hoisted == 2


def test_a_model_without_an_entrance_that_is_known(tiny: Any) -> None:
    transformer = tiny("dit").transformer
    entrance = Entrance.of(transformer, Hoist(outputs=(Tokens("rope"),)), Any, 2)  # type: ignore[arg-type]
    assert (entrance.closed, entrance.gates) == ("it has no module rope", ())
    entrance = Entrance.of(transformer, Hoist(leaves="proj"), Any, 2)  # type: ignore[arg-type]
    assert entrance.closed == "it has no module proj"


@torch.no_grad()
def test_calls_that_depend_on_places_run_in_the_order_of_the_model(tiny: Any) -> None:
    """A mask between tokens, given to one layer, in a forward whose tokens are reordered."""
    transformer = tiny("wan").transformer
    arguments = wan_arguments(transformer.config)
    mask = torch.rand(1, 1, 72, 72) < 0.5
    inside = transformer.blocks[1].attn1
    stock = type(inside).forward

    def masked(states: Tensor, text: Any, _: Any, rotary: Any) -> Tensor:
        return stock(inside, states, text, mask, rotary)

    inside.forward = masked
    summary = compare(transformer, arguments)
    assert (summary.hoisted, summary.sparse, summary.dense) == (1, 1, 1)


def test_an_interrupted_forward_leaves_nothing_behind(tiny: Any) -> None:
    pipe = dit_sparse.apply(tiny("flux"), HALF)
    expected = run(pipe, "flux")

    def stop(*_: Any) -> None:
        raise KeyError("stop")

    handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyError):
        run(pipe, "flux")
    handle.remove()
    assert installation_of(pipe.transformer).session.tokens.order is None
    x = torch.randn(1, 24, 32)
    projection = pipe.transformer.proj_out
    assert torch.equal(projection(x), projection.forward(x))
    assert torch.equal(run(pipe, "flux"), expected)


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "ltx"])
def test_adapters_loaded_after_the_method(name: str, tiny: Any) -> None:
    """An adapter takes the module's place and calls it; the hook must not stay inside."""
    targets = ["proj_out", "to_q"] + (["proj"] if name == "hunyuan_video" else [])
    config = LoraConfig(r=2, lora_alpha=64, target_modules=targets, init_lora_weights=False)
    pipe = dit_sparse.apply(tiny(name), HALF, hoist=False)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(config)
    expected = run(pipe, name)
    pipe = dit_sparse.apply(tiny(name), HALF)
    bare = run(pipe, name)
    assert (bare - expected).abs().max() > 1e-3
    torch.manual_seed(1)
    pipe.transformer.add_adapter(config)
    same(run(pipe, name), expected)
    pipe.transformer.delete_adapters("default")
    pipe.transformer.disable_lora()
    dit_sparse.remove(pipe)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_have_gates_of_their_own(clone: Any, tiny: Any) -> None:
    pipe = dit_sparse.apply(tiny("wan"), HALF)
    expected = run(pipe, "wan")
    original = pipe.transformer
    pipe.transformer = clone(original)
    dit_sparse.remove(original)
    assert not any(m._forward_hooks for m in original.modules())
    same(run(pipe, "wan"), expected)
    assert dit_sparse.summary(pipe).hoisted == 2 * dit_sparse.summary(pipe).sparse / 2
    dit_sparse.remove(pipe)
    assert not any(m._forward_hooks for m in pipe.transformer.modules())


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("hunyuan_video", "regional"),
        ("qwen_image", "regional"),
        ("flux", "whole"),
        ("sd3", "whole"),
    ],
)
def test_compiled_models(name: str, how: str, tiny: Any) -> None:
    pipe = dit_sparse.apply(tiny(name), HALF)
    expected = run(pipe, name)
    calls = dit_sparse.summary(pipe).sparse
    if how == "regional":
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    else:
        pipe.transformer.compile(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same(run(pipe, name), expected)
    assert dit_sparse.summary(pipe).hoisted == 2 * calls


@pytest.mark.usefixtures("dynamo")
def test_whole_model_compiled_before_and_after_the_method(tiny: Any) -> None:
    pipe = tiny("wan")
    expected = run(dit_sparse.apply(tiny("wan"), HALF), "wan")
    pipe.transformer.compile(backend="aot_eager")
    stock = run(pipe, "wan")
    for _ in range(2):
        dit_sparse.apply(pipe, HALF)
        same(run(pipe, "wan"), expected)
        assert dit_sparse.summary(pipe).hoisted > 0
        dit_sparse.remove(pipe)
        same(run(pipe, "wan"), stock)


def test_facts_name_things_that_exist(tiny: Any) -> None:
    for name in families():
        transformer = tiny(name).transformer
        hoist = family_of(transformer).hoist
        assert hoist is not None
        transformer.get_submodule(hoist.leaves)
        assert any(hasattr(transformer, tokens.name) for tokens in hoist.outputs) or name == "flux"


class TestTokenOrder:
    layout = TokenLayout.of(TokenGrid(2, 4, 4), 5, 3, TokenGrid(1, 2, 2))
    picture = tile(layout.grid, (1, 2, 2))
    order = lift(picture, layout)

    def test_put_and_undo(self) -> None:
        order = TokenOrder.of(self.order, self.layout)
        assert isinstance(order, TokenOrder)
        for sequence in (self.layout, self.layout.without_text()):
            x = torch.randn(2, sequence.length, 3)
            start, stop = sequence.grid_start, sequence.grid_start + 32
            y = order.put(x, 1)
            assert torch.equal(y[:, :start], x[:, :start])
            assert torch.equal(y[:, stop:], x[:, stop:])
            assert torch.equal(
                y[:, start:stop], x[:, start:stop][:, tile(self.layout.grid, (1, 2, 2)).index]
            )
            assert torch.equal(order.undo(y, 1), x)

    def test_other_lengths_are_refused(self) -> None:
        order = TokenOrder.of(self.order, self.layout)
        assert isinstance(order, TokenOrder)
        with pytest.raises(RuntimeError, match=r"Expected 44 or 36 tokens along dimension 1 .*12"):
            order.put(torch.zeros(1, 12), 1)

    def test_orders_of_heads_or_text_are_none(self) -> None:
        per_head = Permutation(torch.stack([self.order.index, torch.arange(44)]))
        assert "differs between heads" in str(TokenOrder.of(per_head, self.layout))
        moved = Permutation(torch.arange(44).roll(1))
        assert "moves tokens of text" in str(TokenOrder.of(moved, self.layout))

    def test_common_order(self) -> None:
        again = Permutation(self.order.index.clone())
        other = lift(axes(self.layout.grid, "WHF"), self.layout)
        assert isinstance(common_order([self.order, again], self.layout), TokenOrder)
        assert common_order([], self.layout) is None
        assert common_order([None, None], self.layout) is None
        assert "differ" in str(common_order([self.order, other], self.layout))
        assert "some do not" in str(common_order([self.order, None], self.layout))


class TestTokenFlow:
    order = TokenOrder({4: Permutation(torch.tensor([1, 0, 3, 2]))})

    def test_all_gates_then_inside_then_out(self) -> None:
        flow = TokenFlow()
        flow.start(self.order, {0, 1})
        assert flow.enter(1) is self.order
        with pytest.raises(RuntimeError, match="pass the modules"):
            flow.inside()
        flow.enter(0)
        assert flow.inside() is self.order
        assert flow.leave() is self.order
        assert flow.inside() is None
        flow.end()

    def test_a_result_that_never_left_is_refused(self) -> None:
        flow = TokenFlow()
        flow.start(self.order)
        with pytest.raises(RuntimeError, match="hoist=False"):
            flow.end()
        flow.end()  # and forgotten


def test_arguments_are_passed_as_they_were() -> None:
    import inspect

    def forward(self: Any, a: int, b: int = 2, *, c: int = 3) -> None: ...

    args, kwargs = replaced(inspect.signature(forward), (1,), {"c": 3}, {"a": 10, "b": 20, "c": 30})
    assert (args, kwargs) == ((10,), {"c": 30})
