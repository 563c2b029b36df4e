"""Attention in 8 bits on a pipeline, emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dit_sparse
from dit_sparse.methods import create
from dit_sparse.pipelines.mapping import SparseAttnProcessor
from dit_sparse.pipelines.tiny import tiny_call


def test_a_pipeline_says_what_ran(tiny: Any):
    pipe = tiny("wan")

    def run(**options: Any) -> Tensor:
        dit_sparse.apply(pipe, create("window", {"density": 0.5}), **options)
        with torch.no_grad():
            return pipe(**tiny_call("wan", pipe))[0]

    exact, rounded = run(), run(precision="fp8")
    assert dit_sparse.summary(pipe).backends == ("reference fp8",)
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.05
    with pytest.raises(ValueError, match="Expected a precision among"):
        dit_sparse.apply(pipe, "window", precision="int4")
    assert torch.equal(run(precision="bf16"), exact)
    dit_sparse.remove(pipe)
    method = create("window", {"density": 0.5})
    ours = SparseAttnProcessor(pipe.transformer, method, precision="fp8")
    pipe.transformer.set_attn_processor(ours)
    with torch.no_grad():
        assert torch.equal(pipe(**tiny_call("wan", pipe))[0], rounded)
    with pytest.raises(ValueError, match="Expected a precision among"):
        SparseAttnProcessor(pipe.transformer, method, precision="int4")
