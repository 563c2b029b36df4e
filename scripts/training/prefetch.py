"""Batches made ahead of time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]

#: Batches. Several are made from one composition, see `replay.Replay`: it takes longer than a step.
_AHEAD = 8
_POLL_SECONDS = 0.5


class Prefetch:
    """Makes the batches of consecutive steps in a thread, on a CUDA stream of its own.

    Composing a batch copies small arrays to the device and waits for them; on the training stream
    that would wait for the training too.

    Args:
        make: the batch of a step, which must depend on nothing else.
        first: step of the first batch.
        device: on which batches are made.
    """

    def __init__(self, make: Callable[[int], Batch], first: int, device: torch.device) -> None:
        self._make = make
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._closed = threading.Event()
        self._working = threading.Lock()
        self._thread = threading.Thread(target=self._work, args=(first,), daemon=True)
        self._thread.start()

    def next(self) -> Batch:
        """The next batch, ready for the current stream.

        Raises:
            Exception: whatever making it raised.
        """
        made = self._ready.get()
        if isinstance(made, Exception):
            raise made
        batch, event = made
        if event is not None:
            current = torch.cuda.current_stream()
            current.wait_event(event)
            for tensor in batch:
                tensor.record_stream(current)  # or its memory could be reused too early
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Makes nothing meanwhile, so that the thread does not use the device."""
        with self._working:
            yield

    def close(self) -> None:
        """Ends the thread."""
        self._closed.set()
        self._thread.join()

    def _work(self, step: int) -> None:
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with stream:
                while not self._closed.is_set():
                    with self._working:
                        batch = self._make(step)
                        event = None if self._stream is None else self._stream.record_event()
                    self._put((batch, event))
                    step += 1
        except Exception as error:  # it is raised where the batch is wanted
            self._put(error)

    def _put(self, made: Any) -> None:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._ready.put(made, timeout=_POLL_SECONDS)
                return
