"""One optimizer step, recorded as a CUDA graph where that is possible.

A small model's step is a thousand short kernels: launched one by one the device mostly waits for
the host. Replayed from a graph it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scripts.training.peers import Peers
from scripts.training.prefetch import Batch, Prefetch
from scripts.training.state import Trained

if TYPE_CHECKING:
    from scripts.training.loop import Randomness, Task

#: Steps of a batch's size that run kernel by kernel before one is recorded: they compile, choose
#: algorithms and make the optimizer's state.
_EAGER = 3


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A graph, the batch that it reads and the results that it writes."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    results: tuple[Tensor, Tensor]


class Step:
    """Makes optimizer steps.

    Args:
        peers: whose gradients are averaged.
        model: `trained.model`, prepared.
        trained: what changes.
        task: gives the loss. It must not wait for the device.
        batches: paused while a graph is recorded.
    """

    def __init__(
        self, peers: Peers, model: nn.Module, trained: Trained, task: Task, batches: Prefetch
    ) -> None:
        self._peers, self._model, self._task = peers, model, task
        self._trained, self._batches = trained, batches
        device = peers.device
        self._recordable = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._recordable else None
        # Nothing of a replay is needed in the next, so all graphs may use the same memory.
        self._pool = torch.cuda.graph_pool_handle() if self._recordable else None
        # Between processes, a thread of NCCL's keeps asking how earlier exchanges are doing.
        self._mode = "global" if peers.count == 1 else "thread_local"
        self._rate = torch.zeros((), device=device)
        for group in trained.optimizer.param_groups:
            group["lr"] = self._rate
            group["capturable"] = device.type == "cuda"
        self._seen: dict[tuple[torch.Size, ...], int] = {}
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}

    def __call__(self, batch: Batch, draws: Randomness, rate: float) -> tuple[Tensor, Tensor]:
        """Learns from a batch; returns loss and gradient norm on the device, valid till the next.

        They are those of the mean over all processes.

        Args:
            batch: tensors on the device.
            draws: whose `noise` generator is the same object in all calls, seeded for this step.
            rate: learning rate.
        """
        self._rate.fill_(rate)
        size = tuple(tensor.shape for tensor in batch)
        if size in self._recorded:
            results = self._replay(self._recorded[size], batch)
        else:
            self._seen[size] = self._seen.get(size, 0) + 1
            if self._recordable and self._seen[size] > _EAGER:
                self._recorded[size] = self._record(batch, draws)
                results = self._replay(self._recorded[size], batch)
            else:
                results = self._run_aside(batch, draws)
        self._trained.average.update(self._trained.model)
        return results

    def close(self) -> None:
        """Frees the graphs, which must be done before the exchange between processes ends."""
        self._recorded.clear()

    def _run(self, batch: Batch, draws: Randomness) -> tuple[Tensor, Tensor]:
        self._trained.optimizer.zero_grad(set_to_none=True)
        loss = self._task.loss(self._model, batch, draws)
        loss.backward()
        loss = loss.detach()
        parameters = list(self._trained.model.parameters())
        self._peers.average([*(p.grad for p in parameters if p.grad is not None), loss])
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        self._trained.optimizer.step()
        return loss, norm.detach()

    def _run_aside(self, batch: Batch, draws: Randomness) -> tuple[Tensor, Tensor]:
        """Runs on the stream that records, as graphs demand of what prepares them."""
        if self._side is None:
            return self._run(batch, draws)
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            results = self._run(batch, draws)
        current.wait_stream(self._side)
        for tensor in batch:
            tensor.record_stream(self._side)
        return results

    def _record(self, batch: Batch, draws: Randomness) -> _Recorded:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(draws.noise)
        self._trained.optimizer.zero_grad(set_to_none=True)
        kept = tuple(tensor.clone() for tensor in batch)
        with self._batches.paused():
            torch.cuda.synchronize()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode=self._mode
            ):
                results = self._run(kept, draws)
        return _Recorded(graph, kept, results)

    @staticmethod
    def _replay(recorded: _Recorded, batch: Batch) -> tuple[Tensor, Tensor]:
        torch._foreach_copy_(list(recorded.batch), list(batch))
        recorded.graph.replay()
        return recorded.results
