"""Training in two processes, against one that averages the gradients of both."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from scripts.training.buckets import parse_buckets, pick
from scripts.training.clock import Clock
from scripts.training.loop import Plan, Task, _randomness
from tests.scripts.training_process import (
    COUNTED,
    VAE_SIZES,
    VAE_STEPS,
    Noisy,
    build,
    optimizer_of,
)

SCRIPT = Path(__file__).with_name("training_process.py")
CPU = torch.device("cpu")


def two_processes(mode: str, out: Path, *, devices: str = "") -> list[list]:
    """What each of two processes has left in `out`; fails if they hang.

    Args:
        mode: of `training_process`.
        out: folder for results.
        devices: numbers of the GPUs to use, none by default.
    """
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices}
    process = subprocess.Popen(
        [*launcher, str(SCRIPT), mode, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=100)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher then ends what it has started
        pytest.fail(f"The processes hang:\n{process.communicate()[0]}")
    assert process.returncode == 0, output
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def averaged(model: nn.Module, task: Task, plan: Plan) -> tuple[dict, list[float]]:
    """Weights and mean losses of one process that makes the steps of two."""
    optimizer, losses = optimizer_of(model), []
    for step in range(plan.clock.steps):
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * plan.clock.rate(step)
        sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
        losses.append(0.0)
        for rank in (0, 1):
            optimizer.zero_grad()
            batch = task.batch(
                pick(plan.buckets, plan.seed, step), _randomness(plan.seed, step, rank, CPU)
            )
            loss = task.loss(model, batch, _randomness(plan.seed, step, rank, CPU))
            loss.backward()
            losses[-1] += float(loss.detach()) / 2
            for total, parameter in zip(sums, model.parameters(), strict=True):
                if parameter.grad is not None:
                    total += parameter.grad / 2
        for total, parameter in zip(sums, model.parameters(), strict=True):
            if parameter.grad is not None:
                parameter.grad = total
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict(), losses


def assert_same(weights: list[dict[str, torch.Tensor]]) -> None:
    """To the last bit."""
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    return two_processes("recorded", tmp_path_factory.mktemp("learnt"))


def test_two_processes_learn_what_one_does_from_both_batches(learnt):
    torch.manual_seed(0)
    weights, losses = averaged(build().to(CPU), Noisy(CPU), COUNTED)
    for counted, _ in learnt:
        torch.testing.assert_close(counted["weights"], weights, atol=1e-6, rtol=1e-5)
        means = torch.tensor(losses).view(-1, COUNTED.log_every).mean(1).tolist()
        assert counted["losses"] == pytest.approx(means, rel=1e-5)


def test_the_main_clock_ends_all_processes_with_the_same_weights(learnt):
    """The learning rate falls with time, so that weights of clocks of their own would differ."""
    (counted, timed), (other_counted, other_timed) = learnt
    assert_same([counted["weights"], other_counted["weights"]])
    assert_same([timed["weights"], other_timed["weights"]])
    assert timed["steps"] == other_timed["steps"] > 10
    assert timed["steps"] % 10 == 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The folder of a run of two stages, and the weights of both in each process."""
    pytest.importorskip("diffusers")
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("stages")
    (out / "prompts.txt").write_text("a red circle\n")
    return out / "toy", two_processes("stages", out)


def test_a_vae_learns_from_the_batches_of_both_processes(stages):
    from scripts.training.autoencoder import Reconstruction
    from scripts.training.source import Shapes
    from scripts.training.tasks import Reconstructing
    from scripts.training.tiny_video import TOY

    clock = Clock(1e6, VAE_STEPS, warmup=200, cooldown=TOY.stages["vae"].cooldown)
    plan = Plan(parse_buckets(VAE_SIZES, TOY), lr=0.01, clock=clock)
    torch.manual_seed(0)
    model = Reconstruction(TOY.build_vae(), TOY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights, _ = averaged(model, Reconstructing(Shapes(CPU), TOY), plan)
    assert any(not torch.equal(before[name], weights[name]) for name in before)
    for vae, _ in stages[1]:
        torch.testing.assert_close(vae, weights, atol=1e-7, rtol=1e-5)


def test_a_run_of_two_processes_leaves_one_whole_folder(stages):
    from scripts.training.checkpoint import open_checkpoint

    folder, weights = stages
    for part in zip(*weights, strict=True):
        assert_same(list(part))
    checkpoint = open_checkpoint(folder, "toy")
    assert checkpoint.steps == {"vae": VAE_STEPS, "denoiser": 4}
    assert [record["processes"] for record in checkpoint.runs] == [2, 2]
    assert [record["samples"] for record in checkpoint.runs] == [4 * VAE_STEPS, 16]
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 1, 2, 3, 4]


@pytest.mark.gpu
def test_recorded_exchanges_equal_those_run_kernel_by_kernel(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    runs = two_processes("recorded", tmp_path, devices="0,1")
    for recorded, other in zip(*runs, strict=True):
        assert recorded["steps"] == other["steps"] > 10
        assert_same([recorded["weights"], other["weights"]])
    eager = two_processes("eager", tmp_path, devices="0,1")[0][0]
    recorded = runs[0][0]
    torch.testing.assert_close(recorded["weights"], eager["weights"])
    assert recorded["losses"] == pytest.approx(eager["losses"], rel=1e-5)
