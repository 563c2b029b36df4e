"""Metrics against formulas of their own."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.evaluation import quality
from dit_sparse.evaluation.clip_score import clip_scorer
from dit_sparse.evaluation.distances import clip_features, frechet_distance, kernel_distance
from dit_sparse.evaluation.features import EXTRACTOR
from dit_sparse.evaluation.inception import INCEPTION, load_inception
from dit_sparse.evaluation.lpips import _network, load_lpips
from dit_sparse.evaluation.metrics import Clip, Metrics, features, psnr, temporal
from dit_sparse.evaluation.store import Store, Task
from tests.toy_model import _tokenizer

CPU = torch.device("cpu")


def frames(seed: int, count: int = 5, height: int = 20, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


def clip(array: np.ndarray) -> Clip:
    return Clip.of(array, "a cat")


def test_psnr_is_that_of_the_whole_clip_and_of_each_frame() -> None:
    a, b = frames(0), frames(1)
    found = psnr(clip(a), clip(b))
    errors = ((a / 255.0 - b / 255.0) ** 2).mean((1, 2, 3))
    assert found["psnr"] == pytest.approx(-10 * math.log10(errors.mean()), abs=1e-4)
    assert found["psnr_frames"] == pytest.approx([-10 * math.log10(e) for e in errors], abs=1e-4)
    assert not found["identical"]


def test_psnr_of_a_clip_with_itself_is_infinite() -> None:
    a, b = frames(0), frames(0)
    b[2] = frames(1)[2]
    assert psnr(clip(a), clip(a)) == {
        "psnr": None,
        "psnr_frames": [None] * 5,
        "identical": True,
    }
    assert [value is None for value in psnr(clip(a), clip(b))["psnr_frames"]] == [
        *(True, True, False, True, True)
    ]


def test_ssim_is_the_published_one() -> None:
    smooth = np.linspace(0, 255, 20 * 24).reshape(1, 20, 24, 1).repeat(3, -1).astype(np.uint8)
    noisy = (smooth * 0.7 + frames(1, 1) * 0.3).astype(np.uint8)
    found = Metrics.open(["ssim"], CPU).compare(clip(noisy), clip(smooth))
    assert found["ssim"] == pytest.approx(_ssim(clip(noisy).frames, clip(smooth).frames), abs=2e-3)
    assert found["ssim_frames"] == [found["ssim"]]


def _ssim(x: Tensor, y: Tensor) -> float:
    """Wang 2004, a Gaussian window of 11 and sigma 1.5, pictures mirrored at the borders."""
    at = torch.arange(11.0) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(3, 1, 11, 11)

    def mean(z: Tensor) -> Tensor:
        return F.conv2d(F.pad(z, (5, 5, 5, 5), mode="reflect"), window, groups=3)

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    map_ = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return float(map_.mean())


def test_ssim_of_frames_that_are_too_small_is_a_gap() -> None:
    metrics = Metrics.open(["psnr", "ssim"], CPU)
    found = metrics.compare(clip(frames(0, height=8)), clip(frames(1, height=8)))
    assert "ssim" not in found
    assert "psnr" in found
    assert "11 pixels" in metrics.unsuited["ssim"]


def test_temporal_statistics() -> None:
    still = np.full((4, 12, 12, 3), 100, np.uint8)
    steady = still + np.arange(4, dtype=np.uint8)[:, None, None, None] * 10
    jumpy = still + np.array([0, 20, 0, 20], np.uint8)[:, None, None, None]
    found = temporal(clip(jumpy), clip(steady))
    assert found["motion"] == pytest.approx(2.0, rel=1e-5)
    error = np.mean([((20 - 10) / 255) ** 2, ((-20 - 10) / 255) ** 2, ((20 - 10) / 255) ** 2])
    assert found["temporal_psnr"] == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert temporal(clip(still), clip(steady))["motion"] == 0.0
    assert temporal(clip(still), clip(still)) == {"temporal_psnr": None, "motion": None}
    assert temporal(clip(still[:1]), clip(steady[:1])) == {}


def test_clips_of_different_sizes_are_refused() -> None:
    metrics = Metrics.open(["psnr"], CPU)
    with pytest.raises(ValueError, match="frames like the dense ones"):
        metrics.compare(clip(frames(0, count=4)), clip(frames(0)))


def test_feature_distance_is_one_minus_cosine() -> None:
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[2.0, 0], [3, 0]])
    pair = [Clip(torch.zeros(2, 3, 4, 4), "", found) for found in (a, b)]
    assert features(*pair) == {"cosine_EfficientNetLite0": pytest.approx(0.5)}


def test_what_has_no_weights_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    metrics = Metrics.open(["psnr", "lpips", "clip"], CPU)
    assert set(metrics.measures) == {"psnr"}
    assert "--lpips-weights" in metrics.gaps["lpips"]
    assert "--clip-model" in metrics.gaps["clip"]


class TestLpips:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        torch.manual_seed(0)
        state = {f"features.{k}": v for k, v in _network().state_dict().items()}
        path = tmp_path / "alexnet.pth"
        torch.save(state | {"classifier.1.bias": torch.zeros(2)}, path)
        return path

    def test_it_is_that_of_torchmetrics(
        self, weights: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchmetrics.functional.image import lpips as theirs

        network = _network()
        state = torch.load(weights, weights_only=True)
        network.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("features.")})
        monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: network)
        oracle = theirs._LPIPS(net="alex")
        ours = load_lpips(weights)
        x, y = torch.rand(2, 2, 3, 64, 72)
        wanted = oracle(x, y, normalize=True).flatten()
        torch.testing.assert_close(ours(x, y), wanted)
        assert (wanted > 0).all()
        assert ours(x, x).abs().max() == 0

    def test_other_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.pth"
        for content in (b"nothing", b""):
            path.write_bytes(content)
            with pytest.raises(ValueError, match="torchvision's AlexNet"):
                load_lpips(path)
        torch.save({"features.0.weight": torch.zeros(1)}, path)
        with pytest.raises(ValueError, match="torchvision's AlexNet"):
            load_lpips(path)


class TestClipScore:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        from transformers import CLIPConfig, CLIPModel

        small = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=small
                | {"vocab_size": 300, "max_position_embeddings": 20, "eos_token_id": 1},
                vision_config=small | {"image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
        model.save_pretrained(tmp_path / "clip")
        _tokenizer().save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    def test_it_is_the_cosine_of_the_models_own_embeddings(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        score = clip_scorer(str(folder))
        pictures = torch.rand(3, 3, 16, 16)
        model = CLIPModel.from_pretrained(folder).eval()
        words = AutoTokenizer.from_pretrained(folder)("a cat", return_tensors="pt")
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        with torch.no_grad():
            found = model(
                input_ids=words["input_ids"],
                attention_mask=words["attention_mask"],
                pixel_values=(pictures - mean) / std,
            )
        cosine = (found.image_embeds @ found.text_embeds.T).flatten()
        wanted = float(100 * cosine.clamp_min(0).mean())
        assert score(pictures, "a cat") == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert score(pictures, "a dog " * 50) >= 0  # longer than the model reads

    def test_large_pictures_are_shrunk_and_cut(self, folder: Path) -> None:
        assert 0 <= clip_scorer(str(folder))(torch.rand(1, 3, 40, 64), "a cat") <= 100

    def test_folders_without_a_model_are_refused(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "none"):
            with pytest.raises(ValueError, match="CLIP model"):
                clip_scorer(str(folder))


@pytest.mark.parametrize("shape", [(200, 4), (9, 30), (30, 30)])
def test_frechet_distance_is_that_of_torchmetrics(shape: tuple[int, int]) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    torch.manual_seed(0)
    mix = torch.randn(shape[1], shape[1], dtype=torch.float64)
    x, y = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64) @ mix
    as_they_are = torch.nn.Identity()
    as_they_are.num_features = shape[1]  # type: ignore[assignment]
    oracle = FrechetInceptionDistance(as_they_are).set_dtype(torch.float64)
    oracle.update(x, real=True)
    oracle.update(y, real=False)
    assert frechet_distance(x, y) == pytest.approx(float(oracle.compute()), rel=1e-4)


def test_frechet_distance_of_shifted_sets_is_the_shift() -> None:
    x = torch.randn(200, 4, dtype=torch.float64)
    assert frechet_distance(x, x + 2) == pytest.approx(16, rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert math.isnan(frechet_distance(x, x / 0))


class Stand(torch.nn.Module):
    """Takes and gives what the TorchScript module of Inception does."""

    def forward(self, pictures: Tensor, return_features: bool = False) -> Tensor:
        found = pictures.float().mean((2, 3))
        return found if return_features else found * 0


class TestInception:
    def test_features_are_those_of_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "inception.pt"
        torch.jit.script(Stand()).save(str(path))
        metrics = Metrics.open(["inception"], CPU, inception_weights=path)
        array = frames(0)
        found = metrics.features_of(clip(array))[INCEPTION]
        np.testing.assert_allclose(found, array.mean((1, 2)), rtol=1e-5)
        assert metrics.compare(clip(array), clip(array)) == {}

    @pytest.mark.parametrize(
        ("content", "sentence"),
        [(None, "--inception-weights"), (b"nothing", "another file"), ({}, "torch-fidelity")],
    )
    def test_other_files_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, sentence: str
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not there
        path = tmp_path / "weights.pth"
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        given = None if content is None else path
        gaps = Metrics.open(["inception"], CPU, inception_weights=given).gaps
        assert sentence in gaps["inception"]
        assert (
            "no such file"
            in Metrics.open(["inception"], CPU, inception_weights=tmp_path / "none").gaps[
                "inception"
            ]
        )

    def test_weights_of_torch_fidelity_give_its_features(self, tmp_path: Path) -> None:
        fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
            patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: None)
            network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        pictures = torch.rand(2, 3, 40, 48)
        ours = load_inception(tmp_path / "weights.pth", CPU)(pictures)
        (theirs,) = network((pictures * 255).round().to(torch.uint8))
        torch.testing.assert_close(ours, theirs)


def test_kernel_distance_is_the_unbiased_mmd() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3) + 1
    total = 0.0
    for i in range(5):
        for j in range(5):
            k = [float((a[i] @ b[j] / 3 + 1) ** 3) for a, b in ((x, x), (y, y), (x, y))]
            total += (k[0] + k[1]) / 20 * (i != j) - 2 * k[2] / 25
    assert kernel_distance(x, y) == pytest.approx(total, rel=1e-5)


def test_sets_of_different_sizes_are_refused() -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="equally many"):
            distance(torch.zeros(3, 2), torch.zeros(4, 2))


def test_features_of_clips_hold_their_motion() -> None:
    still, moving = torch.ones(1, 4, 2), torch.tensor([[[0.0, 1], [2, 1], [0, 1], [2, 1]]])
    both = clip_features(torch.cat([still, moving]))
    torch.testing.assert_close(both, torch.tensor([[1.0, 1, 0, 0], [1, 1, 2, 0]]))
    assert clip_features(still[:, :1]).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(("count", "video"), [(1, False), (3, True)])
def test_pictures_have_no_distance_of_clips(
    monkeypatch: pytest.MonkeyPatch, count: int, video: bool
) -> None:
    ours, dense = torch.randn(2, 4, count, 8, generator=torch.Generator().manual_seed(0))

    def known(store: Store, label: str, tasks: list[Task], extractor: str) -> Any:
        return (ours, dense) if extractor == EXTRACTOR else None

    monkeypatch.setattr(quality, "_features", known)
    found = quality.set_distances(Store(Path("nowhere")), "window", [Task("a", 0), Task("b", 0)])
    kinds = ("FD", "KD", "video_KD") if video else ("FD", "KD")
    assert set(found) == {f"{kind}_{EXTRACTOR}" for kind in kinds}
