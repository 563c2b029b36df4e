"""Processes that train one model together, each on a device of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Value = TypeVar("Value")

#: How long processes wait for each other: one may compile, the main one draw samples.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True, eq=False)
class Peers:
    """The processes of a run as one of them sees them.

    All of them must make the same calls in the same order.

    Args:
        device: of this process.
        rank: its number; the main process has 0.
        count: of processes.
        hosts: group in which they talk without their devices; `None` for a process alone.
    """

    device: torch.device
    rank: int = 0
    count: int = 1
    hosts: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def agree(self, value: Value) -> Value:
        """The main process's value, any that can be pickled. No device is waited for."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def align(self, model: nn.Module) -> None:
        """Gives every process the parameters and buffers of the main one."""
        if self.count > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors by their means over the processes, in one exchange.

        A CUDA graph may record it, if the same was done before without one.

        Args:
            tensors: floating point, of the same shapes in every process.
        """
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = flat.div_(self.count).split([tensor.numel() for tensor in tensors])
        shaped = [mean.view(tensor.shape) for mean, tensor in zip(means, tensors, strict=True)]
        torch._foreach_copy_(list(tensors), shaped)

    def wait(self) -> None:
        """Waits until all processes have come here. No device is waited for."""
        if self.count > 1:
            dist.barrier(group=self.hosts)


def join(accelerator: Any) -> Peers:
    """The processes of an `accelerate.Accelerator`."""
    device, count = accelerator.device, accelerator.num_processes
    if count == 1:
        return Peers(device)
    hosts = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Peers(device, accelerator.process_index, count, hosts)


def leave() -> None:
    """Ends the exchange between processes, if there is one.

    No CUDA graph that recorded an exchange may be left: NCCL would wait for its end for ever.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
