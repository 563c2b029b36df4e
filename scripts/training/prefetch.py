"""Batches made ahead of time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]

#: Threads that make batches (PyTorch works outside Python's lock), and batches ready or in the
#: making.
_WORKERS = 4
_AHEAD = 8


@dataclass(frozen=True, eq=False)
class _Worker:
    """What a thread has of its own: a CUDA stream, and a lock that it holds while it works."""

    stream: torch.cuda.Stream | None
    working: threading.Lock = field(default_factory=threading.Lock)


class Prefetch:
    """Makes the batches of consecutive steps in threads, on CUDA streams of their own.

    Composing a batch copies small arrays to the device and waits for them; on the training stream
    that would wait for the training too.

    Args:
        make: the batch of a step, which must depend on nothing else; called from several threads.
        first: step of the first batch.
        device: on which batches are made.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, device: torch.device) -> None:
        self._make = make
        self._step = first
        self._mine = threading.local()
        cuda = device.type == "cuda"
        self._workers = [
            _Worker(torch.cuda.Stream(device) if cuda else None) for _ in range(_WORKERS)
        ]
        self._idle = deque(self._workers)
        self._pool = ThreadPoolExecutor(_WORKERS, initializer=self._begin)
        self._made: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()
        for _ in range(_AHEAD):
            self._order()

    def next(self) -> Batch:
        """The next batch, ready for the current stream.

        Raises:
            Exception: whatever making it raised.
        """
        batch, event = self._made.popleft().result()
        self._order()
        if event is not None:
            current = torch.cuda.current_stream()
            current.wait_event(event)
            for tensor in batch:
                tensor.record_stream(current)  # or its memory could be reused too early
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Makes nothing meanwhile, so that no other thread uses the device."""
        with ExitStack() as stack:
            for worker in self._workers:
                stack.enter_context(worker.working)
            yield

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _order(self) -> None:
        self._made.append(self._pool.submit(self._work, self._step))
        self._step += 1

    def _begin(self) -> None:
        self._mine.worker = self._idle.popleft()

    def _work(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        worker: _Worker = self._mine.worker
        stream = nullcontext() if worker.stream is None else torch.cuda.stream(worker.stream)
        with worker.working, stream:
            batch = self._make(step)
            return batch, None if worker.stream is None else worker.stream.record_event()
