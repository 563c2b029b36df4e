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


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 4))


def problem(number: int, size: int, device: torch.device):
    """The batch of a step, which gets larger, and its learning rate."""
    inputs = (
        torch.randn(size, 4, generator=torch.Generator().manual_seed(number)) * (number + 1) / 4
    )
    return (inputs.to(device), inputs.flip(1).to(device)), 1e-3 * (number + 1)


def learnt(device: torch.device, sizes: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses and gradient norms, and final weights of a few steps, batch sizes alternating."""
    accelerator = Accelerator(cpu=device.type == "cpu")
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    trained = Trained(model, Average(model), optimizer)
    batches = Prefetch(lambda step: (torch.full((2,), step),), 0, device)
    try:
        learn = steps.Step(join(accelerator), accelerator.prepare(model), trained, Noisy(), batches)
        noise, results = torch.Generator(device), []
        for number, size in enumerate(sizes):
            noise.manual_seed(number)
            batch, rate = problem(number, size, device)
            draws = Randomness(torch.Generator(), random.Random(), noise)
            results.append(torch.stack(learn(batch, draws, rate=rate)).cpu())
    finally:
        batches.close()
    weights = [*trained.model.parameters(), *trained.average.model.parameters()]
    return torch.stack(results), weights


def by_hand(sizes: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What `learnt` is to give, written out."""
    model = network()
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters)
    results = []
    for number, size in enumerate(sizes):
        (inputs, targets), rate = problem(number, size, torch.device("cpu"))
        noise = torch.randn(size, 4, generator=torch.Generator().manual_seed(number))
        loss = (model(inputs + 0.1 * noise) - targets).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / max(1.0, float(norm))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        decay = min(0.999, (2 + number) / (11 + number))
        average = [decay * a + (1 - decay) * p for a, p in zip(average, parameters, strict=True)]
        results.append(torch.stack([loss.detach(), norm]))
    return torch.stack(results), [*parameters, *average]


def test_steps_on_the_cpu_are_those_written_out():
    sizes = [8, 16] * 4
    results, weights = learnt(torch.device("cpu"), sizes)
    expected, expected_weights = by_hand(sizes)
    norms = expected[:, 1]
    assert float(norms.min()) < 1 < float(norms.max())  # some are clipped
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.gpu
def test_recorded_steps_equal_steps_run_kernel_by_kernel(monkeypatch):
    device, sizes = torch.device("cuda"), [8, 16] * 8
    recorded, weights = learnt(device, sizes)
    monkeypatch.setattr(steps, "_EAGER", len(sizes))
    eager, expected = learnt(device, sizes)
    torch.testing.assert_close(recorded, eager, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights, expected)
