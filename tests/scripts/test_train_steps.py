"""Training steps: whole clips through the VAE, and steps recorded as CUDA graphs."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from accelerate import Accelerator

from scripts.training import step as steps
from scripts.training import whole
from scripts.training.ema import Average
from scripts.training.loop import Randomness
from scripts.training.peers import join
from scripts.training.prefetch import Prefetch
from scripts.training.state import Trained
from scripts.training.tiny_video import TOY


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return TOY.build_vae().eval().requires_grad_(False)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_a_whole_clip_is_encoded_as_the_stock_vae_does(vae, frames):
    video = torch.rand(2, 3, frames, 16, 24) * 2 - 1
    expected = vae.encode(video).latent_dist.parameters
    torch.testing.assert_close(whole.encode(vae, video).parameters, expected)


@pytest.mark.parametrize("latents", [1, 2, 5])
def test_a_whole_clip_is_decoded_as_the_stock_vae_does(vae, latents):
    z = torch.randn(2, vae.z_dim, latents, 4, 6)
    made = whole.decode(vae, z)
    assert made.shape == (2, 3, 2 * latents - 1, 16, 24)
    torch.testing.assert_close(made.clamp(-1, 1), vae.decode(z).sample)


class Noisy:
    """Regression with noise, so that a graph must draw new numbers in every replay."""

    def loss(self, model, batch, draws):
        noise = torch.randn(batch[0].shape, generator=draws.noise, device=batch[0].device)
        return F.mse_loss(model(batch[0] + 0.1 * noise), batch[1])


def learnt(device: torch.device, sizes: list[int]) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and final weights of a few steps, batch sizes alternating."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=device.type == "cpu")
    model = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 4)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    trained = Trained(model, Average(model), optimizer)
    batches = Prefetch(lambda step: (torch.full((2,), step),), 0, device)
    try:
        learn = steps.Step(join(accelerator), accelerator.prepare(model), trained, Noisy(), batches)
        noise, losses = torch.Generator(device), []
        for number, size in enumerate(sizes):
            noise.manual_seed(number)
            inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(number))
            batch = (inputs.to(device), inputs.flip(1).to(device))
            draws = Randomness(torch.Generator(), random.Random(), noise)
            losses.append(float(learn(batch, draws, rate=1e-3 * (number + 1))[0]))
    finally:
        batches.close()
    return losses, [*trained.model.parameters(), *trained.average.model.parameters()]


def test_a_step_learns_on_the_cpu():
    losses, _ = learnt(torch.device("cpu"), [8] * 30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.gpu
def test_recorded_steps_equal_steps_run_kernel_by_kernel(monkeypatch):
    device, sizes = torch.device("cuda"), [8, 16] * 8
    recorded, weights = learnt(device, sizes)
    monkeypatch.setattr(steps, "_EAGER", len(sizes))
    eager, expected = learnt(device, sizes)
    assert recorded == pytest.approx(eager, rel=1e-5)
    torch.testing.assert_close(weights, expected)
