"""The layout a family reads is the sequence that the attention core sees, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.grid import TextSpan
from dit_sparse.pipelines.family import families
from dit_sparse.pipelines.lengths import NotALength
from dit_sparse.pipelines.tiny import tiny_call

# Per family: sizes to generate in turn with one pipeline, and the token grid each must give.
SIZES: dict[str, list[tuple[dict[str, int], tuple[int, int, int]]]] = {
    "wan": [({}, (3, 4, 6)), ({"height": 48, "width": 112, "num_frames": 13}, (4, 3, 7))],
    "hunyuan_video": [({}, (3, 4, 6)), ({"height": 48, "width": 112, "num_frames": 5}, (2, 3, 7))],
    "cogvideox": [({}, (3, 4, 6)), ({"height": 80, "width": 48, "num_frames": 17}, (5, 5, 3))],
    "ltx": [({}, (3, 8, 16)), ({"height": 96, "width": 32, "num_frames": 1}, (1, 24, 8))],
    "flux": [({}, (1, 8, 12)), ({"height": 26, "width": 18}, (1, 13, 9))],
    "sd3": [({}, (1, 8, 12)), ({"height": 26, "width": 18}, (1, 13, 9))],
    "pixart": [({}, (1, 8, 12)), ({"height": 24, "width": 8}, (1, 12, 4))],
    "dit": [({}, (1, 8, 8))],
    "qwen_image": [({}, (1, 8, 12)), ({"height": 52, "width": 36}, (1, 13, 9))],
}
TEXT_FIRST, TEXT_LAST = ("flux", "cogvideox", "qwen_image"), ("hunyuan_video", "sd3")


def bump(
    pipe: Any, set_patch: Any, hidden: Tensor, grid: tuple[int, int, int], at: tuple[int, int, int]
) -> Tensor:
    """Ones under one token of the picture, zeros elsewhere, in the form the transformer takes.

    Packed forms are made by the pipeline's own packing, so that the token's place is not assumed.
    """
    name, batch = type(pipe).__name__, hidden.shape[0]
    frames, rows, columns = grid
    if hidden.ndim == 3:
        packed_patch = 1 if name == "LTXPipeline" else 2
        channels = hidden.shape[2] // packed_patch**2
        size = (rows * packed_patch, columns * packed_patch)
        video = torch.zeros(batch, channels, frames, *size)
        set_patch(video, (1, packed_patch, packed_patch), at)
        if name == "LTXPipeline":
            return pipe._pack_latents(video, 1, 1)
        return pipe._pack_latents(video[:, :, 0], batch, channels, *size)
    out = torch.zeros_like(hidden)
    if hidden.ndim == 4:
        set_patch(out.unsqueeze(2), (1, 2, 2), at)
    elif name == "CogVideoXPipeline":
        set_patch(out.transpose(1, 2), (1, 2, 2), at)
    else:
        set_patch(out, (1, 2, 2), at)
    return out


def twice(call: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a call for two prompts instead of one."""
    return {k: torch.cat([v, v]) for k, v in call.items() if torch.is_tensor(v)}


def some_tokens(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    frames, rows, columns = grid
    return [
        (0, 0, 0),
        (0, 0, columns - 1),
        (frames - 1, 0, 1),
        (frames // 2, rows - 1, 0),
        (frames - 1, rows - 1, columns - 1),
    ]


@pytest.mark.parametrize("name", families())
def test_every_token_stands_where_the_layout_says(name: str, tiny: Any, probe: Any) -> None:
    pipe = tiny(name)
    watch = probe(pipe.transformer)
    assert name in SIZES, "Add sizes and grids of the new family to SIZES."
    for size, grid in SIZES[name]:  # one pipeline: the resolution changes between calls
        with watch.watching() as forwards:
            pipe(**tiny_call(name, pipe) | size)
        base = forwards[0]
        layout = base.layout
        assert layout.grid.shape == grid
        for at in some_tokens(grid):
            f, r, c = at
            expected = layout.grid_start + (f * grid[1] + r) * grid[2] + c
            one = bump(pipe, watch.set_patch, base.arguments["hidden_states"], grid, at)
            assert watch.changed(base, "hidden_states", one) == [expected], (size, at)


@pytest.mark.parametrize("name", families())
def test_lengths_are_those_the_core_sees(name: str, tiny: Any, probe: Any) -> None:
    pipe = tiny(name)
    with probe(pipe.transformer).watching() as forwards:
        pipe(**tiny_call(name, pipe))
    assert len(forwards) >= 2
    for forward in forwards:
        modules = [n for n, _ in pipe.transformer.named_modules() if families()[name].attends(n)]
        assert [n for n, _, _ in forward.calls] == modules
        for module, q, _ in forward.calls:
            image_only = name == "sd3" and module.endswith("attn2")
            layout = forward.layout.without_text() if image_only else forward.layout
            assert q.shape[2] == layout.length


@pytest.mark.parametrize("name", families())
def test_text_stands_where_the_layout_says(name: str, tiny: Any, probe: Any) -> None:
    pipe = tiny(name)
    watch = probe(pipe.transformer)
    with watch.watching() as forwards:
        pipe(**tiny_call(name, pipe))
    base = forwards[0]
    assert [s.length for s in base.layout.text] == [7] * (name in TEXT_FIRST + TEXT_LAST)
    if not base.layout.text:
        return
    start = next(start for start, s in base.layout.spans() if isinstance(s, TextSpan))
    assert start == (0 if name in TEXT_FIRST else base.layout.grid.length)
    for word in (0, 3):
        one = torch.zeros_like(base.arguments["encoder_hidden_states"])
        one[:, word] = 1.0
        changed = watch.changed(base, "encoder_hidden_states", one)
        if name == "hunyuan_video":  # its refiner mixes the words before the first block
            assert start + word in changed
            assert set(changed) <= set(range(start, start + 7))
        else:
            assert changed == [start + word]


@pytest.mark.parametrize("name", ["hunyuan_video", "qwen_image"])
def test_padding_is_what_the_stock_mask_hides(name: str, tiny: Any, probe: Any) -> None:
    pipe = tiny(name)
    call = tiny_call(name, pipe)
    mask_name = "prompt_attention_mask" if name == "hunyuan_video" else "prompt_embeds_mask"
    batch = twice(call)
    batch[mask_name] = (torch.arange(7) < torch.tensor([[7], [3]])).long()
    with probe(pipe.transformer).watching() as forwards:
        pipe(**call | batch)
    forward = forwards[0]
    assert forward.layout.text[0].valid == (7, 3)
    for _, q, mask in forward.calls:
        assert mask is not None
        keys = mask.expand(2, 1, 1, q.shape[2])[:, 0, 0]
        for entry in range(2):
            real = torch.zeros(q.shape[2], dtype=torch.bool)
            for start, stop in forward.layout.valid_ranges(entry):
                real[start:stop] = True
            assert torch.equal(keys[entry], real)


@pytest.mark.parametrize("name", ["hunyuan_video", "qwen_image"])
def test_mask_that_is_not_a_length_is_refused(name: str, tiny: Any, probe: Any) -> None:
    pipe = tiny(name)
    call = tiny_call(name, pipe)
    mask_name = "prompt_attention_mask" if name == "hunyuan_video" else "prompt_embeds_mask"
    call[mask_name] = torch.tensor([[1, 0, 1, 1, 1, 1, 1]])
    with (
        probe(pipe.transformer).watching(),
        pytest.raises(NotALength, match=r"real tokens followed by padding.*Pad prompts"),
    ):
        pipe(**call)


@pytest.mark.parametrize("name", families())
def test_batches_and_guidance_keep_the_layout(name: str, tiny: Any, probe: Any) -> None:
    pipe = tiny(name)
    call = tiny_call(name, pipe)
    watch = probe(pipe.transformer)
    with watch.watching() as forwards:
        pipe(**call)
    single = forwards[0]
    two = {"class_labels": [1, 2]} if name == "dit" else twice(call)
    with watch.watching() as forwards:
        pipe(**tiny_call(name, pipe) | two)
    for forward in forwards:
        assert forward.q.shape[0] == 2 * single.q.shape[0]
        assert forward.layout.grid == single.layout.grid
        assert forward.layout.length == single.layout.length == forward.q.shape[2]
        assert forward.layout.batch in (None, forward.q.shape[0])


@pytest.mark.parametrize("name", families())
def test_layout_reads_no_tensor_values(name: str, tiny: Any, probe: Any) -> None:
    """Reading a value waits for the device; only masks and ids are read, and once."""
    pipe = tiny(name)
    with probe(pipe.transformer).watching() as forwards:
        pipe(**tiny_call(name, pipe))
    base = forwards[0]
    meta = {
        k: v.to("meta") if torch.is_tensor(v) and not ("mask" in k or k == "img_ids") else v
        for k, v in base.arguments.items()
    }
    assert families()[name].layout(pipe.transformer, meta) == base.layout
