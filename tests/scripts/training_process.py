"""What each process does that `test_train_processes` starts."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started by path, as the script is

from scripts.training import step as steps
from scripts.training.buckets import Bucket
from scripts.training.clock import Clock
from scripts.training.ema import Average
from scripts.training.loop import Hooks, Plan, Randomness, train
from scripts.training.peers import Peers, join, leave
from scripts.training.prefetch import Batch
from scripts.training.state import Trained

COUNTED = Plan(
    buckets=(Bucket(1, 16, 16, 4), Bucket(1, 16, 16, 6)),
    lr=0.01,
    clock=Clock(1e6, steps=16, warmup=3, cooldown=0.5),
    log_every=4,
)

VAE_SIZES = "5x16x16:2"
VAE_STEPS = 3


@dataclass(frozen=True)
class Noisy:
    """Regression with noise of the device."""

    device: torch.device

    def batch(self, bucket: Bucket, draws: Randomness) -> Batch:
        inputs = torch.randn(bucket.batch, 4, generator=draws.data)
        return inputs.to(self.device), inputs.flip(1).to(self.device)

    def loss(self, model: nn.Module, batch: Batch, draws: Randomness) -> Tensor:
        noise = torch.randn(batch[0].shape, generator=draws.noise, device=self.device)
        return F.mse_loss(model(batch[0] + 0.1 * noise), batch[1])


def build() -> nn.Module:
    """With an unused parameter, which never has a gradient."""
    model = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4))
    model.register_parameter("unused", nn.Parameter(torch.randn(3)))
    model.register_buffer("number", torch.randn(2))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=fused)


def learn(peers: Peers, plan: Plan) -> dict[str, Any]:
    """Weights, steps and logged losses of a run that starts differently in every process."""
    torch.manual_seed(peers.rank)
    model = build().to(peers.device)
    peers.align(model)
    trained = Trained(model, Average(model), optimizer_of(model))
    lines: list[dict[str, Any]] = []
    hooks = Hooks(lines.append, lambda _: None, lambda _: None)
    record = train(peers, model, trained, Noisy(peers.device), plan, hooks, 0)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return {
        "weights": weights,
        "steps": record["steps"],
        "losses": [line["loss"] for line in lines],
    }


def learn_twice(out: Path) -> None:
    """A run counted in steps, and one by clocks of which all but the first have run out."""
    peers = join(Accelerator(cpu=not torch.cuda.is_available()))
    counted = learn(peers, COUNTED)
    clock = Clock(0.02, cooldown=0.9, started=time.monotonic() - 5 * peers.rank)
    timed = learn(peers, replace(COUNTED, clock=clock))
    torch.save([counted, timed], out / f"{peers.rank}.pt")
    leave()


def run_stages(out: Path) -> None:
    """A VAE and a denoiser of the toy recipe; the trained weights of each go into a file."""
    from scripts.train import parser, request_of
    from scripts.training import run
    from scripts.training.parts import train_part

    trained_weights = []

    def spy(peers: Peers, model: nn.Module, trained: Trained, *rest: Any) -> dict[str, Any]:
        record = train(peers, model, trained, *rest)
        trained_weights.append(trained.model.state_dict())
        torch.save(trained_weights, out / f"{peers.rank}.pt")
        return record

    run.train = spy
    prompts = out / "prompts.txt"
    same = f"--recipe toy --data shapes --minutes 1e6 --log-every 1 --out {out / 'toy'}"
    vae = f"vae --sizes {VAE_SIZES} --shown 5x16x16 --steps {VAE_STEPS} --lr 0.01"
    stills = f"stills --sizes 1x32x32:2,5x16x16:2 --shown 1x16x16 --steps 4 --prompts {prompts}"
    for stage in (vae, stills):
        train_part(request_of(parser().parse_args(f"{stage} {same}".split())))
    leave()


def main() -> None:
    mode, out = sys.argv[1], Path(sys.argv[2])
    if mode == "stages":
        run_stages(out)
    else:
        if mode == "eager":
            steps._EAGER = 10**9
        learn_twice(out)


if __name__ == "__main__":
    main()
