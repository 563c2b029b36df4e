"""Variants as words, and the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dit_sparse.commands.methods import Wording
from dit_sparse.commands.models import Model
from dit_sparse.evaluation.spec import read_config, spec_of
from dit_sparse.evaluation.store import slug
from dit_sparse.evaluation.variants import BASELINES, baselines_of, variants_of
from dit_sparse.methods.pisa import PisaMethod
from dit_sparse.methods.schedule import Schedule
from dit_sparse.methods.window import WindowMethod
from dit_sparse.pipelines.defaults import method_for
from dit_sparse.pipelines.tiny import tiny_pipeline


def test_values_are_combined() -> None:
    found = variants_of(["window:density=0.2|0.3:block=64|128, pisa:density=0.1"])
    assert [v.label for v in found] == [
        "window density=0.2 block=64",
        "window density=0.2 block=128",
        "window density=0.3 block=64",
        "window density=0.3 block=128",
        "pisa density=0.1",
    ]
    assert found[1].method == WindowMethod(density=0.2, block=128)
    assert found[-1].method == PisaMethod(density=0.1)


def test_what_stays_dense_is_an_option_too_and_overrides_the_common_one() -> None:
    shared, own, none = variants_of(
        ["window", "window:dense_first=2:dense-layers=0+-1", "window:dense_first=0"],
        {"dense_first": "0.25"},
    )
    assert shared.method == Schedule(WindowMethod(), dense_first=0.25)
    assert own.method == Schedule(WindowMethod(), dense_first=2, dense_layers=(0, -1))
    assert none.method == WindowMethod()
    assert own.words == (
        *("--method", "window", "--dense-first", "2"),
        *("--dense-layers", "0,-1"),
    )


def test_labels_have_the_last_part_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wording, "method", lambda _: WindowMethod())  # there is no calibration
    (found,) = variants_of(["paro:path=/models/wan/calibrated-0.3/:tail=none"])
    assert found.label == "paro path=calibrated-0.3 tail=none"
    assert "path=/models/wan/calibrated-0.3/" in found.words
    with pytest.raises(ValueError, match="'paro path=b' twice"):
        variants_of(["paro:path=a/b|c/b"])


def test_layer_0_is_a_layer_and_none_is_nothing() -> None:
    one, nothing = variants_of(["window:dense_layers=0|none"])
    assert one.method == Schedule(WindowMethod(), dense_layers=(0,))
    assert (nothing.label, nothing.method) == ("window", WindowMethod())


def test_the_family_of_the_model_completes_a_method() -> None:
    model = Model("tiny:wan", tiny_pipeline("wan"), lambda *_: {})
    words = "window:density=0.5,psa,pisa:density=0.5,pisa:dense_first=0:dense_layers=none"
    window, psa, some, own = (variant.on(model) for variant in variants_of([words]))
    assert window == variants_of(["window:density=0.5"])[0]
    assert psa.label == "psa allocation=mass ends=0.4,0.5,0.6,0.8 least=1 dense_first=0.3"
    assert psa.method == method_for("wan", "psa", layers=2)
    assert psa.words[-4:] == ("--option", "least=1", "--dense-first", "0.3")
    assert some.label == "pisa density=0.5 dense_first=0.2 dense_layers=0"
    assert own.label == "pisa density=0.125 least=1"
    assert own.words[-4:] == ("--dense-first", "0", "--dense-layers", "none")
    assert own.method == PisaMethod(density=0.125, least=1)
    assert variants_of(["psa"])[0].on(model).on(model) == psa


def test_a_precision_is_no_option_of_the_method() -> None:
    found = variants_of(["window:precision=bf16|fp8"])
    assert [v.label for v in found] == ["window", "window precision=fp8"]
    assert [v.precision for v in found] == ["bf16", "fp8"]
    assert found[0].method == found[1].method
    assert found[1].words == ("--method", "window", "--precision", "fp8")
    with pytest.raises(ValueError, match=r"a precision among bf16, fp8, int8, got 'fp9'.*'fp8'"):
        variants_of(["window:precision=fp9"])


def test_mappings_say_the_same_as_text() -> None:
    text = variants_of(["window:density=0.2|0.3:stride=2", "pisa"])
    mapping = variants_of([{"window": {"density": [0.2, 0.3], "stride": 2}}, {"pisa": None}])
    assert text == mapping


def test_the_words_of_a_variant_are_those_of_sample() -> None:
    from dit_sparse.commands.methods import Wording

    (variant,) = variants_of(["window:density=0.2:block=64:dense_first=0.2"])
    words = dict(zip(variant.words[::2], variant.words[1::2], strict=True))
    options = [
        w for flag, w in zip(variant.words, variant.words[1:], strict=False) if flag == "--option"
    ]
    assert words["--method"] == "window"
    schedule = {"dense_first": words["--dense-first"]}
    assert Wording("window", tuple(options), schedule=schedule).method() == variant.method


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ([], "at least one method"),
        (["windw"], "Did you mean 'window'"),
        (["window:density"], "name:option=value"),
        (["window:density="], "name:option=value"),
        (["window:densty=0.1"], "Did you mean 'density'"),
        (["window:density=2"], "density"),
        (["window,window"], "twice"),
        (["window:density=0.1|0.1"], "twice"),
        (["window:min_tokens=x"], "number of tokens"),
        ([3], "as text or as a mapping"),
        ([{"window": [1]}], "as a mapping"),
    ],
)
def test_wrong_methods_are_refused(entries: list[Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        variants_of(entries)


def test_stock_comes_first_among_baselines() -> None:
    found = baselines_of(["dense", "cudnn", "dense"])
    assert [v.label for v in found] == ["stock", "dense", "cudnn"]
    assert all(v.is_baseline for v in found)
    assert found[2].kernel == "_native_cudnn"
    assert {v.label for v in baselines_of(BASELINES)} == set(BASELINES)
    with pytest.raises(ValueError, match="Did you mean 'cudnn'"):
        baselines_of(["cudn"])


def test_labels_become_different_file_names() -> None:
    names = [slug(text) for text in ("a b=1", "a b=1/2", "a b=1:2", "a" * 200, "a" * 201)]
    assert len({*names}) == len(names)
    assert all("/" not in name and len(name) < 120 for name in names)


class TestSpec:
    def given(self, **more: Any) -> dict[str, Any]:
        return {"model": "tiny:wan", "methods": ["window"], "device": "cpu", **more}

    def test_defaults(self) -> None:
        spec = spec_of(self.given())
        assert [v.label for v in spec.variants] == ["stock", "dense", "window"]
        assert (spec.seeds, spec.rounds, spec.dtype) == ((0,), 5, torch.float32)

    def test_no_baseline_beside_stock(self) -> None:
        spec = spec_of(self.given(baselines=[]))
        assert [v.label for v in spec.variants] == ["stock", "window"]

    def test_a_size_is_height_and_width_or_frames_too(self) -> None:
        still, clip = (spec_of(self.given(size=text)) for text in ("64x96", "9x64x96"))
        assert (still.frames, still.height, still.width) == (None, 64, 96)
        assert (clip.frames, clip.height, clip.width) == (9, 64, 96)

    def test_a_file_gives_the_same_as_words(self, tmp_path: Path) -> None:
        path = tmp_path / "sweep.yaml"
        path.write_text(
            "model: tiny:wan\nmethods:\n  - window: {density: [0.2, 0.3]}\n  - pisa\n"
            "seeds: [0, 7]\nframes: 9\nguidance: 4\ndense_first: 0.2\nprompts: [a cat, a dog]\n"
            "probe_at: []\ndevice: cpu\n"
        )
        words = self.given(
            methods=["window:density=0.2|0.3,pisa"],
            seeds=["0", "7"],
            frames=9,
            guidance=4.0,
            dense_first="0.2",
            prompts=["a cat", "a dog"],
            probe_at=[],
        )
        assert spec_of(read_config(path)) == spec_of(words)

    @pytest.mark.parametrize(
        ("more", "sentence"),
        [
            ({"steps": 0}, "--steps"),
            ({"size": "480"}, "such as 480x832"),
            ({"size": "480x832", "width": 832}, "--size or --width"),
            ({"steps": "many"}, "an integer for steps"),
            ({"guidance": "high"}, "a number for guidance"),
            ({"seeds": [-1]}, "seeds from 0"),
            ({"seeds": [1, 1]}, "different seeds"),
            ({"metrics": ["psrn"]}, "Did you mean 'psnr'"),
            ({"probe_at": [2.0]}, "from 0 to 1"),
            ({"prompts": ["a", "a"]}, "different prompts"),
            ({"methods": ["dense"]}, "'dense' twice"),
            ({"dtype": "float12"}, "dtype"),
            ({"rounds": -1}, "--rounds"),
            ({"target_psnr": float("nan")}, "finite"),
        ],
    )
    def test_wrong_values_are_refused(self, more: dict[str, Any], sentence: str) -> None:
        with pytest.raises(ValueError, match=sentence):
            spec_of(self.given(**more))

    def test_output_may_not_be_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("")
        with pytest.raises(ValueError, match="a folder for --output"):
            spec_of(self.given(output=tmp_path / "x"))

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("methds: [window]", "Did you mean 'methods'"),
            ("- window", "option: value"),
            ("a: [", "YAML"),
        ],
    )
    def test_wrong_files_are_refused(self, tmp_path: Path, text: str, sentence: str) -> None:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_config(path)
        with pytest.raises(ValueError, match="YAML"):
            read_config(tmp_path / "none.yaml")
