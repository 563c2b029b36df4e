"""Layouts of models that belong to a family but differ from its tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from dit_sparse.grid import TextSpan, TokenGrid, TokenLayout
from dit_sparse.pipelines.apply import apply, summary
from dit_sparse.pipelines.family import families
from dit_sparse.pipelines.lengths import NotALength
from dit_sparse.pipelines.tiny import tiny_call


def assert_sparse_equals_stock(target: Any, call: Callable[[], Tensor]) -> None:
    """All self-attention through the sparse kernel at density 1 gives what the stock model does."""
    with torch.no_grad():
        stock = call()
        apply(target, "window", options={"density": 1.0})
        torch.testing.assert_close(call(), stock, atol=3e-5, rtol=0)
    rows = summary(target).rows
    assert rows
    assert all(row.sparse and not row.dense for row in rows)


def test_cogvideox_1_5_patches_time(probe: Any) -> None:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=1,
        patch_size=2,
        patch_size_t=2,
        sample_width=12,
        sample_height=8,
        sample_frames=17,
        max_text_seq_length=7,
        use_rotary_positional_embeddings=True,
    )
    watch = probe(transformer)
    base = watch.run(
        {
            "hidden_states": torch.randn(1, 6, 4, 8, 12),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": torch.tensor([5]),
        }
    )
    assert base.layout == TokenLayout.of(TokenGrid(3, 4, 6), text_first=7)
    one = torch.zeros(1, 6, 4, 8, 12)
    watch.set_patch(one.transpose(1, 2), (2, 2, 2), (1, 2, 4))
    assert watch.changed(base, "hidden_states", one) == [7 + (1 * 4 + 2) * 6 + 4]


def test_consisid_is_laid_out_as_cogvideox(probe: Any) -> None:
    transformer = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=32,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=7,
    )
    base = probe(transformer).run(
        {
            "hidden_states": torch.randn(1, 3, 4, 8, 12),
            "encoder_hidden_states": torch.randn(1, 7, 32),
            "timestep": torch.tensor([5]),
        }
    )
    assert base.layout == TokenLayout.of(TokenGrid(3, 4, 6), text_first=7)
    assert [q.shape[2] for _, q, _ in base.calls] == [base.layout.length] * 2


@pytest.mark.parametrize("condition", ["latent_concat", "token_replace"])
def test_hunyuan_image_to_video(condition: str, tiny: Any, probe: Any) -> None:
    pipe = tiny("hunyuan_video")
    with probe(pipe.transformer).watching() as forwards:
        pipe(**tiny_call("hunyuan_video", pipe))
    arguments = forwards[0].arguments
    config = dict(pipe.transformer.config) | {"image_condition_type": condition}
    del config["_use_default_values"]  # would take the condition out again
    transformer = diffusers.HunyuanVideoTransformer3DModel.from_config(config)
    assert transformer.config.image_condition_type == condition
    watch = probe(transformer)
    base = watch.run(arguments)
    one = torch.zeros_like(arguments["hidden_states"])
    watch.set_patch(one, (1, 2, 2), (2, 1, 3))
    assert watch.changed(base, "hidden_states", one) == [(2 * 4 + 1) * 6 + 3]
    assert base.layout.segments == (TokenGrid(3, 4, 6), TextSpan(7, (5,)))
    assert_sparse_equals_stock(transformer, lambda: transformer(**arguments)[0])


def test_vace_control_blocks_share_the_grid(tiny: Any, probe: Any) -> None:
    config = dict(tiny("wan").transformer.config) | {
        "num_layers": 2,
        "vace_layers": [0],
        "vace_in_channels": 16,
    }
    transformer = diffusers.WanVACETransformer3DModel.from_config(config)
    arguments = {
        "hidden_states": torch.randn(1, 16, 3, 8, 12),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": torch.randn(1, 7, 32),
        "control_hidden_states": torch.randn(1, 16, 3, 8, 12),
    }
    base = probe(transformer).run(arguments)
    assert base.layout == TokenLayout.of(TokenGrid(3, 4, 6))
    names = {name for name, _, _ in base.calls}
    assert names == {"blocks.0.attn1", "blocks.1.attn1", "vace_blocks.0.attn1"}
    assert {q.shape[2] for _, q, _ in base.calls} == {base.layout.length}
    assert_sparse_equals_stock(transformer, lambda: transformer(**arguments).sample)


def test_wan_image_to_video(tiny: Any, probe: Any) -> None:
    """Channels are concatenated and image keys are cross-attended: the sequence is the same."""
    parts = tiny("wan").components
    config = dict(parts["transformer"].config) | {"in_channels": 36}
    parts["transformer"] = diffusers.WanTransformer3DModel.from_config(config)
    pipe = diffusers.WanImageToVideoPipeline(**parts, image_encoder=None, image_processor=None)
    image = torch.rand(1, 3, 64, 96)
    pipe.set_progress_bar_config(disable=True)
    with probe(pipe.transformer).watching() as forwards:
        pipe(image=image, **tiny_call("wan", pipe))
    assert forwards[0].layout == TokenLayout.of(TokenGrid(3, 4, 6))
    assert forwards[0].q.shape[2] == forwards[0].layout.length
    assert_sparse_equals_stock(pipe, lambda: pipe(image=image, **tiny_call("wan", pipe)).frames)


def test_kontext_reference_follows_the_picture(tiny: Any, probe: Any) -> None:
    pipe = diffusers.FluxKontextPipeline(**tiny("flux").components)
    pipe.set_progress_bar_config(disable=True)
    extra = {"image": torch.rand(1, 3, 10, 14), "max_area": 16 * 24, "_auto_resize": False}
    with probe(pipe.transformer).watching() as forwards:
        pipe(**extra, **tiny_call("flux", pipe))
    base = forwards[0]
    picture, reference = TokenGrid(1, 8, 12), TokenGrid(1, 5, 7)
    assert base.layout == TokenLayout((TextSpan(7), picture, reference))
    assert base.q.shape[2] == base.layout.length
    assert_sparse_equals_stock(pipe, lambda: pipe(**extra, **tiny_call("flux", pipe)).images)


def test_qwen_edit_images_follow_the_picture(tiny: Any, probe: Any) -> None:
    transformer = tiny("qwen_image").transformer
    arguments = {
        "hidden_states": torch.randn(2, 6 * 9 + 4 * 5 + 3, 64),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 6, 9), (1, 4, 5), (1, 1, 3)]] * 2,
    }
    base = probe(transformer).run(arguments)
    grids = TokenGrid(1, 6, 9), TokenGrid(1, 4, 5), TokenGrid(1, 1, 3)
    assert base.layout == TokenLayout((TextSpan(7), *grids))
    assert base.q.shape[2] == base.layout.length
    assert_sparse_equals_stock(transformer, lambda: transformer(**arguments).sample)


@pytest.mark.parametrize(
    "shapes", [[[(1, 6, 9)], [(1, 9, 6)]], [[(1, 6, 8)]]], ids=["batch differs", "wrong sum"]
)
def test_qwen_refuses_shapes_that_are_not_the_sequence(shapes: Any, tiny: Any) -> None:
    arguments = {
        "hidden_states": torch.randn(2, 54, 64),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_hidden_states_mask": None,
        "img_shapes": shapes,
    }
    with pytest.raises(ValueError, match="same img_shapes of 54 image tokens"):
        families()["qwen_image"].layout(tiny("qwen_image").transformer, arguments)


def test_qwen_controlnet_shapes_without_inner_list(tiny: Any) -> None:
    arguments = {
        "hidden_states": torch.randn(2, 54, 64),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_hidden_states_mask": None,
        "img_shapes": [(1, 6, 9)] * 2,
    }
    layout = families()["qwen_image"].layout(tiny("qwen_image").transformer, arguments)
    assert layout == TokenLayout.of(TokenGrid(1, 6, 9), text_first=7)


@pytest.mark.parametrize("extents", [(None, None, None), (1, 1, 1)])
def test_ltx_tokens_placed_by_coordinates_are_refused(extents: Any, tiny: Any) -> None:
    names = dict(zip(("num_frames", "height", "width"), extents, strict=True))
    with pytest.raises(ValueError, match=r"of the 384 latent tokens, got .*video_coords"):
        families()["ltx"].layout(
            tiny("ltx").transformer, {"hidden_states": torch.zeros(1, 384, 8)} | names
        )


def test_pixart_refuses_a_mask_over_the_image(tiny: Any) -> None:
    arguments = {"hidden_states": torch.zeros(1, 4, 8, 8), "attention_mask": torch.ones(1, 16)}
    with pytest.raises(NotALength, match="no attention_mask over image tokens"):
        families()["pixart"].layout(tiny("pixart").transformer, arguments)
