"""Pipelines from the loader: `pipe.set_attn_processor(...)`, stock in every other respect."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import dit_sparse
from dit_sparse.methods import create
from dit_sparse.pipelines.load import with_set_attn_processor
from dit_sparse.pipelines.tiny import tiny_call

PARTS = {"text_encoder": None, "tokenizer": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    from dit_sparse.pipelines.tiny import tiny_pipeline

    path = tmp_path_factory.mktemp("tiny") / "wan"
    tiny_pipeline("wan").save_pretrained(path)
    return path


def run(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(**tiny_call("wan", pipe))[0]


def test_loaded_pipeline_can_be_made_sparse(folder: Path, tiny: Any) -> None:
    pipe = dit_sparse.load(folder, components=PARTS, device="cpu", local_files_only=True)
    stock = run(tiny("wan"))
    # Weights from a file lie elsewhere in memory, which some CPUs' sums depend on.
    torch.testing.assert_close(run(pipe), stock, atol=3e-5, rtol=0)
    full = create("window", {"density": 1.0})
    for method in (full, {0: full, 1: full}):
        assert pipe.set_attn_processor(method) is pipe
        torch.testing.assert_close(run(pipe), stock, atol=3e-5, rtol=0)
        assert dit_sparse.summary(pipe).dense == 0
    pipe.set_attn_processor("window", {"density": 0.5})
    assert (run(pipe) - stock).abs().max() > 1e-3


def test_dtype_and_bad_paths(folder: Path, tmp_path: Path) -> None:
    pipe = dit_sparse.load(folder, components=PARTS, dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    with pytest.raises(OSError, match=r"model_index\.json|no file named"):
        dit_sparse.load(tmp_path, local_files_only=True)


def test_class_is_stock_by_name_and_in_files(tiny: Any, tmp_path: Path) -> None:
    pipe = with_set_attn_processor(tiny("wan"))
    assert isinstance(pipe, WanPipeline)
    assert type(pipe).__name__ == "WanPipeline"
    assert not hasattr(WanPipeline, "set_attn_processor")
    pipe.set_attn_processor("window")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert with_set_attn_processor(pipe) is pipe


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_keep_the_method(clone: Any, tiny: Any) -> None:
    pipe = with_set_attn_processor(tiny("wan"))
    pipe.set_attn_processor("window")
    other = clone(pipe)
    assert type(other) is type(pipe)
    assert torch.equal(run(other), run(pipe))
    assert dit_sparse.summary(other).sparse == dit_sparse.summary(pipe).sparse == 8
