"""Sparse attention on stock pipelines: same pictures, nothing left behind, no silent failure."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import logging
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

import dit_sparse
from dit_sparse.forward import hides_only_padding
from dit_sparse.grid import TokenLayout
from dit_sparse.methods import create
from dit_sparse.methods.schedule import Schedule
from dit_sparse.pipelines.mapping import SparseAttnProcessor
from dit_sparse.pipelines.tiny import tiny_call

FAMILIES = ("wan", "hunyuan_video", "flux", "sd3")
ALL = create("window", {"density": 1.0})
HALF = create("window", {"density": 0.5})


def run(pipe: Any, family: str, **changes: Any) -> Tensor:
    with torch.no_grad():
        return pipe(**(tiny_call(family, pipe) | changes))[0]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=3e-5, rtol=0)


def differs(a: Tensor, b: Tensor) -> None:
    assert a.isfinite().all()
    assert (a - b).abs().max() > 1e-3


def processors(transformer: Any) -> dict[str, Any]:
    found = {n: getattr(m, "processor", None) for n, m in transformer.named_modules()}
    return {name: processor for name, processor in found.items() if processor is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_and_remove(family: str, tiny: Any) -> None:
    pipe = tiny(family)
    stock = run(pipe, family)
    before = processors(pipe.transformer)
    assert dit_sparse.apply(pipe, ALL) is pipe
    same(run(pipe, family), stock)
    full = dit_sparse.summary(pipe)
    assert full.sparse > 0
    assert (full.dense, full.backends) == (0, ("reference",))
    dit_sparse.apply(pipe, "window", options={"density": 0.5})  # again: another method
    differs(run(pipe, family), stock)
    half = dit_sparse.summary(pipe)
    assert (half.sparse, half.dense) == (full.sparse, 0)
    assert half.density < full.density
    assert dit_sparse.remove(pipe) is pipe
    assert processors(pipe.transformer) == before  # the same objects
    assert not pipe.transformer._forward_pre_hooks
    assert not [name for name in vars(pipe.transformer) if "sparse" in name]
    assert torch.equal(run(pipe, family), stock)
    dit_sparse.remove(pipe)


def test_other_modules_keep_their_processors(tiny: Any) -> None:
    pipe = tiny("hunyuan_video")
    before = processors(pipe.transformer)
    dit_sparse.apply(pipe, ALL)
    after = processors(pipe.transformer)
    kept = {name for name in before if after[name] is before[name]}
    assert kept
    assert all("refiner" in name for name in kept)


@pytest.mark.parametrize("family", ["wan", "sd3"])
def test_state_dict_and_saved_files_are_stock(family: str, tiny: Any, tmp_path: Any) -> None:
    pipe = tiny(family)
    keys = set(pipe.transformer.state_dict())
    dit_sparse.apply(pipe, ALL)
    run(pipe, family)
    assert set(pipe.transformer.state_dict()) == keys
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path)
    assert not any("Sparse" in type(p).__name__ for p in processors(again).values())


def test_bare_transformer_counts_steps_by_timestep(tiny: Any) -> None:
    pipe = tiny("flux")
    stock = run(pipe, "flux", num_inference_steps=4)
    dit_sparse.apply(pipe.transformer, Schedule(ALL, dense_first=1, dense_last=0.5), steps=4)
    same(run(pipe, "flux", num_inference_steps=4), stock)
    row = dit_sparse.summary(pipe.transformer).rows[0]
    assert (row.sparse, row.reasons) == (1, {"dense_first=1": 1, "dense_last=0.5": 2})
    assert row.transformer == "FluxTransformer2DModel"


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
def test_schedule_knows_the_steps_of_the_pipeline(family: str, tiny: Any) -> None:
    pipe = tiny(family)
    dit_sparse.apply(pipe, Schedule(HALF, dense_first=0.25, dense_last=1))
    for _ in range(2):
        run(pipe, family, num_inference_steps=4)
        summary = dit_sparse.summary(pipe)
        assert summary.sparse == summary.dense
        assert set(summary.reasons) == {"dense_first=0.25", "dense_last=1"}


@pytest.mark.parametrize("finished", [False, True])
def test_schedule_in_a_loop_of_ones_own(finished: bool, tiny: Any) -> None:
    pipe = tiny("wan")
    dit_sparse.apply(pipe, Schedule(HALF, dense_first=1, dense_last=1), steps=3)
    latents = torch.randn(1, pipe.transformer.config.in_channels, 2, 8, 8)
    text = torch.randn(1, 4, pipe.transformer.config.text_dim)
    if finished:
        run(pipe, "wan", num_inference_steps=3)
    before = dit_sparse.summary(pipe)
    for _ in range(2):
        for timestep in (900, 500, 100):
            with torch.no_grad():
                pipe.transformer(latents, torch.tensor([timestep]), text)
    summary = dit_sparse.summary(pipe)
    layers = len(summary.rows)
    assert summary.sparse - before.sparse == 2 * layers
    assert summary.dense - before.dense == 2 * 2 * layers


def test_two_transformers_together_and_apart(tiny: Any) -> None:
    pipe = tiny("wan2.2")
    stock = run(pipe, "wan2.2")
    dit_sparse.apply(pipe, ALL)
    same(run(pipe, "wan2.2"), stock)
    rows = dit_sparse.summary(pipe).rows
    assert {row.transformer for row in rows} == {"transformer", "transformer_2"}
    assert all(row.sparse and not row.dense for row in rows)
    dit_sparse.remove(pipe)
    dit_sparse.apply(pipe, {"transformer_2": HALF})
    differs(run(pipe, "wan2.2"), stock)
    assert {row.transformer for row in dit_sparse.summary(pipe).rows} == {"transformer_2"}


def test_method_per_layer(tiny: Any) -> None:
    pipe = tiny("wan")
    dit_sparse.apply(pipe, {0: "window", "default": "dense"})
    run(pipe, "wan")
    first, second = dit_sparse.summary(pipe).rows
    assert (first.sparse, first.dense) == (4, 0)
    assert (second.sparse, second.dense) == (0, 4)


def test_dictionary_for_the_stock_set_attn_processor(tiny: Any) -> None:
    pipe = tiny("hunyuan_video")
    stock = run(pipe, "hunyuan_video")
    before = processors(pipe.transformer)
    ours = SparseAttnProcessor(pipe.transformer, "window", options={"density": 1.0})
    assert set(ours) == set(pipe.transformer.attn_processors)
    assert processors(pipe.transformer) == before  # no effect before it is set
    assert torch.equal(run(pipe, "hunyuan_video"), stock)
    for _ in range(2):  # not consumed
        pipe.transformer.set_attn_processor(ours)
        same(run(pipe, "hunyuan_video"), stock)
    summary = dit_sparse.summary(pipe)
    assert summary.sparse == 2 * 2 * len(summary.rows)
    dit_sparse.remove(pipe)
    assert processors(pipe.transformer) == before


@pytest.mark.parametrize(("ran", "compiled"), [(False, False), (True, False), (False, True)])
def test_processors_of_another_transformer_are_refused(
    ran: bool, compiled: bool, tiny: Any
) -> None:
    one, other = tiny("wan"), tiny("wan")
    ours = SparseAttnProcessor(one.transformer, ALL)
    other.transformer.set_attn_processor(ours)
    if ran:
        run(one, "wan")
    if compiled:
        other.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=r"SparseAttnProcessor.* for each transformer"):
        run(other, "wan")
    run(one, "wan")
    assert dit_sparse.summary(one).sparse == 8 * (1 + ran)


@pytest.mark.parametrize("family", FAMILIES)
def test_deep_copies_are_independent(family: str, tiny: Any) -> None:
    pipe = tiny(family)
    dit_sparse.apply(pipe, Schedule(ALL, dense_last=1))
    stock = run(pipe, family)
    other = copy.deepcopy(pipe)
    dit_sparse.remove(pipe)
    same(run(other, family), stock)
    summary = dit_sparse.summary(other)
    assert summary.sparse == summary.dense  # the copy counts the steps of its own scheduler
    dit_sparse.remove(other)
    assert not other.transformer._forward_pre_hooks
    assert not any("Sparse" in type(p).__name__ for p in processors(other.transformer).values())


def test_transformer_survives_pickle(tiny: Any) -> None:
    pipe = tiny("wan")
    stock = run(pipe, "wan")
    dit_sparse.apply(pipe, ALL)
    pipe.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    same(run(pipe, "wan"), stock)
    assert dit_sparse.summary(pipe).sparse == 8


def test_two_pipelines_at_once(tiny: Any) -> None:
    one, other = tiny("wan"), tiny("wan")
    stock = run(one, "wan")
    dit_sparse.apply(one, ALL)
    dit_sparse.apply(other, HALF)
    steps = []

    def interleave(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(run(other, "wan"))
        return tensors

    same(run(one, "wan", callback_on_step_end=interleave), stock)
    differs(steps[0], stock)
    assert torch.equal(steps[0], steps[1])
    assert dit_sparse.summary(one).density == 1.0
    assert dit_sparse.summary(other).density < 1.0
    assert dit_sparse.summary(other).sparse == 2 * dit_sparse.summary(one).sparse


@pytest.mark.parametrize(
    ("family", "size"), [("wan", (96, 64)), ("flux", (24, 16)), ("sd3", (32, 16))]
)
def test_resolution_changes_between_calls(family: str, size: tuple[int, int], tiny: Any) -> None:
    pipe = tiny(family)
    height, width = size
    call = tiny_call(family, pipe)
    sizes = [{}, {"height": height, "width": width}, {}]
    assert (call["height"], call["width"]) != size
    stock = [run(pipe, family, **s) for s in sizes]
    dit_sparse.apply(pipe, ALL)
    for s, expected in zip(sizes, stock, strict=True):
        same(run(pipe, family, **s), expected)
    assert dit_sparse.summary(pipe).dense == 0


def test_guidance_on_and_off(tiny: Any) -> None:
    for family in ("wan", "sd3"):  # separate calls; one batched call
        pipe = tiny(family)
        stock = [run(pipe, family, guidance_scale=g) for g in (1.0, 4.0)]
        dit_sparse.apply(pipe, ALL)
        for guidance, expected in zip((1.0, 4.0), stock, strict=True):
            same(run(pipe, family, guidance_scale=guidance), expected)
        assert dit_sparse.summary(pipe).dense == 0


def test_interrupted_run_leaves_no_trace(tiny: Any) -> None:
    pipe = tiny("wan")
    dit_sparse.apply(pipe, Schedule(HALF, dense_first=1))
    expected = run(pipe, "wan", num_inference_steps=4)

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return tensors

    with pytest.raises(KeyboardInterrupt):
        run(pipe, "wan", num_inference_steps=4, callback_on_step_end=stop)
    assert torch.equal(run(pipe, "wan", num_inference_steps=4), expected)


@pytest.mark.parametrize("order", ["lora first", "lora last"])
def test_lora(order: str, tiny: Any) -> None:
    def with_lora(pipe: Any) -> Any:
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)
        return pipe

    stock = run(with_lora(tiny("wan")), "wan")
    pipe = tiny("wan")
    differs(run(pipe, "wan"), stock)
    if order == "lora first":
        dit_sparse.apply(with_lora(pipe), ALL)
    else:
        with_lora(dit_sparse.apply(pipe, ALL))
    same(run(pipe, "wan"), stock)
    assert dit_sparse.summary(pipe).sparse == 8


def test_prompts_of_other_padding_in_the_next_call(tiny: Any) -> None:
    pipe = tiny("hunyuan_video")
    mask = tiny_call("hunyuan_video", pipe)["prompt_attention_mask"]
    masks = [mask, torch.ones_like(mask)]
    stock = [run(pipe, "hunyuan_video", prompt_attention_mask=m) for m in masks]
    differs(stock[0], stock[1])
    for method in (ALL, "dense"):
        dit_sparse.apply(pipe, method)
        for m, expected in zip(masks, stock, strict=True):
            same(run(pipe, "hunyuan_video", prompt_attention_mask=m), expected)


def test_mask_that_is_no_length_runs_dense_and_says_so(tiny: Any, caplog: Any) -> None:
    pipe = tiny("hunyuan_video")
    mask = tiny_call("hunyuan_video", pipe)["prompt_attention_mask"].clone()
    mask[:] = 1
    mask[:, 0] = 0
    stock = run(pipe, "hunyuan_video", prompt_attention_mask=mask)
    dit_sparse.apply(pipe, ALL)
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        assert torch.equal(run(pipe, "hunyuan_video", prompt_attention_mask=mask), stock)
    summary = dit_sparse.summary(pipe)
    assert summary.sparse == 0
    assert any("ran no sparse attention" in message for message in caplog.messages)


def test_mask_of_the_caller_may_change_between_forwards(tiny: Any) -> None:
    transformer = tiny("flux").transformer
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    config = transformer.config
    inputs = {
        "hidden_states": torch.randn(1, 16, config.in_channels),
        "encoder_hidden_states": torch.randn(1, 5, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }
    masks = [torch.ones(1, 1, 1, 21, dtype=torch.bool) for _ in range(2)]
    masks[1][..., :3] = False

    def forwards() -> list[Tensor]:
        with torch.no_grad():
            return [
                transformer(**inputs, joint_attention_kwargs={"attention_mask": mask})[0]
                for mask in masks
            ]

    stock = forwards()
    differs(*stock)
    dit_sparse.apply(transformer, ALL)
    for out, expected in zip(forwards(), stock, strict=True):
        same(out, expected)
    summary = dit_sparse.summary(transformer)
    assert summary.sparse == summary.dense > 0
    assert "another mask" in next(iter(summary.reasons))


@pytest.mark.parametrize("family", ["hunyuan_video", "qwen_image"])
def test_masks_that_the_transformer_makes_are_read_once(
    family: str, tiny: Any, monkeypatch: Any
) -> None:
    read = []

    def counted(mask: Tensor, layout: TokenLayout) -> bool:
        read.append(layout)
        return hides_only_padding(mask, layout)

    monkeypatch.setattr("dit_sparse.session.hides_only_padding", counted)
    pipe = dit_sparse.apply(tiny(family), ALL)
    run(pipe, family, num_inference_steps=3)
    assert len(read) == len(set(read)) == 1
    assert dit_sparse.summary(pipe).dense == 0


def test_fused_projections(tiny: Any) -> None:
    flux = tiny("flux")
    stock = run(flux, "flux")
    dit_sparse.apply(flux, ALL)
    flux.transformer.fuse_qkv_projections()  # keeps processors
    same(run(flux, "flux"), stock)
    assert dit_sparse.summary(flux).dense == 0
    for family in ("sd3", "cogvideox", "pixart"):  # replaces all of them
        pipe = dit_sparse.apply(tiny(family), ALL)
        pipe.transformer.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match=r"got Fused.* fuse_qkv_projections"):
            run(pipe, family)
        with pytest.raises(RuntimeError, match="got Fused"):
            dit_sparse.summary(pipe)
        with pytest.raises(ValueError, match=r"Expected a processor of class .* got Fused"):
            dit_sparse.apply(pipe, ALL)
        pipe.transformer.unfuse_qkv_projections()
        assert dit_sparse.remove(pipe)


def test_attention_backend_of_the_user_outlives_the_method(tiny: Any) -> None:
    def backends() -> set[Any]:
        return {p._attention_backend for p in processors(transformer).values()}

    transformer = tiny("wan").transformer
    dit_sparse.apply(transformer, ALL)
    for module in transformer.modules():
        if hasattr(module, "set_attention_backend") and module is not transformer:
            module.set_attention_backend("_native_math")
    assert backends() == {"_native_math"}
    dit_sparse.apply(transformer, HALF)
    assert backends() == {"_native_math"}
    dit_sparse.remove(transformer)
    assert backends() == {"_native_math"}


def test_context_parallel_is_refused(tiny: Any) -> None:
    pipe = tiny("wan")
    config = SimpleNamespace(context_parallel_config=object(), tensor_parallel_config=None)
    dit_sparse.apply(pipe, ALL)
    pipe.transformer._parallel_config = config
    with pytest.raises(NotImplementedError, match="context parallelism"):
        run(pipe, "wan")
    with pytest.raises(NotImplementedError, match="context parallelism"):
        dit_sparse.apply(pipe, HALF)
    pipe.transformer._parallel_config = None
    run(pipe, "wan")  # the refused method has changed nothing
    assert dit_sparse.summary(pipe).density == 1.0


def test_refusals_change_nothing(tiny: Any) -> None:
    pipe = tiny("wan2.2")
    before = processors(pipe.transformer)
    for bad, message in [
        (("windoww",), "window"),
        (({"transformer": "window", "transformer_3": "window"},), "transformer_3"),
        (({"transformer": "window", 0: "window"},), "keys"),
        (({"transformer": "window", "transformer_2": "nothing"},), "nothing"),
        (({99: "window"},), "layer numbers from -2 to 1, got 99"),
        (({0: "dense", -2: "window"},), "one method per layer, got 0 and -2"),
        ((Schedule(ALL, dense_layers=(2,)),), "layer numbers from -2 to 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            dit_sparse.apply(pipe, *bad)
    with pytest.raises(ValueError, match=r"Expected an attention backend among .* got 'fast'"):
        dit_sparse.apply(pipe, ALL, backend="fast")
    with pytest.raises(ValueError, match="options"):
        dit_sparse.apply(pipe, ALL, options={"density": 0.5})
    for steps in (0, -1, "a", 2.0, True):
        with pytest.raises(
            ValueError, match=f"steps to be an integer of at least 1, got {steps!r}"
        ):
            dit_sparse.apply(pipe, ALL, steps=steps)
        with pytest.raises(ValueError, match="steps to be an integer of at least 1"):
            SparseAttnProcessor(pipe.transformer, ALL, steps=steps)
    assert processors(pipe.transformer) == before
    for target, message in [
        (object(), "pipeline or transformer, got object"),
        (torch.nn.Linear(1, 1), "got Linear"),
        (SimpleNamespace(components={"unet": torch.nn.Linear(1, 1)}), "with unet"),
    ]:
        with pytest.raises(ValueError, match=message):
            dit_sparse.apply(target)
    with pytest.raises(ValueError, match=r"Call dit_sparse\.apply"):
        dit_sparse.summary(pipe)


def test_foreign_processors_are_refused(tiny: Any) -> None:
    class MyProcessor:
        pass

    pipe = tiny("flux")
    pipe.transformer.transformer_blocks[1].attn.processor = MyProcessor()
    with pytest.raises(ValueError, match=r"FluxAttnProcessor on transformer_blocks.1.attn, got My"):
        dit_sparse.apply(pipe, ALL)


def test_named_backend_is_the_only_one(tiny: Any) -> None:
    pipe = dit_sparse.apply(tiny("wan"), ALL, backend="flex")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="GPU"):
            run(pipe, "wan")


def test_summary_prints_and_serialises(tiny: Any) -> None:
    pipe = dit_sparse.apply(tiny("wan"), Schedule(HALF, dense_first=1))
    run(pipe, "wan")
    summary = dit_sparse.summary(pipe)
    lines = str(summary).splitlines()
    assert lines[0].split()[:4] == ["layer", "module", "method", "backend"]
    assert "transformer.blocks.0.attn1" in lines[1]
    assert "dense 4 times: dense_first=1" in lines
    read = json.loads(json.dumps(summary.to_dict()))
    assert (read["sparse"], read["dense"], read["backends"]) == (4, 4, ["reference"])
    assert read["layers"][1]["reasons"] == {"dense_first=1": 2}
    assert 0 < read["density"] < 1


def test_pipeline_is_freed_without_a_garbage_collection(tiny: Any) -> None:
    pipe = dit_sparse.apply(tiny("wan"), ALL)
    weights = weakref.ref(pipe.transformer.blocks[0].attn1.to_q.weight)
    gc.collect()
    gc.disable()
    try:
        del pipe
        assert weights() is None
    finally:
        gc.enable()


def test_signatures_have_no_catch_all() -> None:
    for function in (dit_sparse.apply, dit_sparse.remove, dit_sparse.summary, SparseAttnProcessor):
        kinds = {p.kind for p in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
