"""The tiny pipelines are repeatable, open to attention, and able to make a video."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from dit_sparse.pipelines.tiny import prompt_embeddings, tiny_call, tiny_names, tiny_pipeline


def weights(pipe: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in pipe.transformer.parameters()])


def test_seed_decides_the_weights_and_leaves_torch_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (weights(tiny_pipeline("sd3", seed=s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", tiny_names())
def test_no_parameter_is_zero(name: str) -> None:
    for key, parameter in tiny_pipeline(name).transformer.named_parameters():
        assert parameter.any(), key


@pytest.mark.parametrize("name", tiny_names())
def test_runs_repeat(name: str, tiny: Any) -> None:
    pipe = tiny(name)
    first, again = (torch.as_tensor(pipe(**tiny_call(name, pipe))[0]) for _ in range(2))
    other = torch.as_tensor(pipe(**tiny_call(name, pipe, seed=1))[0])
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.isfinite().all()


def test_importing_does_not_import_diffusers() -> None:
    code = "import sys, dit_sparse.pipelines.tiny; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a family with a tiny pipeline .*got 'sora'"):
        tiny_pipeline("sora")
    with pytest.raises(ValueError, match="got 'sora'"):
        tiny_call("sora")


def test_wan_makes_videos_of_other_sizes_from_words(tiny: Any) -> None:
    pipe = tiny("wan")
    frames = {}
    for prompt in ("a red fox", "a blue fox"):
        size = {"height": 96, "width": 64, "num_frames": 13, "output_type": "np"}
        words = {"prompt_embeds": prompt_embeddings(prompt, 12, 32)}
        frames[prompt] = pipe(**tiny_call("wan", pipe) | words | size).frames
        assert frames[prompt].shape == (1, 13, 96, 64, 3)
    assert np.isfinite(frames["a red fox"]).all()
    assert not np.allclose(frames["a red fox"], frames["a blue fox"])


def test_both_wan22_transformers_run(tiny: Any) -> None:
    pipe = tiny("wan2.2")
    ran = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, n=name: ran.append(n))
    pipe(**tiny_call("wan2.2", pipe))
    assert ran == ["transformer"] * 2 + ["transformer_2"] * 2  # each with and without the prompt


def test_prompt_embeddings_depend_on_words_alone() -> None:
    fox = prompt_embeddings("A red  fox", 5, 8)
    assert fox.shape == (1, 5, 8)
    assert fox.dtype == torch.float32
    assert torch.equal(fox, prompt_embeddings("a red fox", 5, 8))
    cat = prompt_embeddings("a red cat", 5, 8)
    assert [bool((fox == cat)[0, i].all()) for i in range(5)] == [True, True, False, True, True]
    assert torch.equal(prompt_embeddings("a red fox", 2, 8), fox[:, :2])
    assert not torch.equal(fox[0, 0], fox[0, 1])
