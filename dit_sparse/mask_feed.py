"""Masks of a calibration on their way to a device: one layer is there before it is asked for.

The masks of all segments and layers of a large model are hundreds of megabytes. They stay in the
host's pinned memory; two buffers on the device hold the layer that is planned and the one after it,
which a stream of its own copies while the first is computed with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_sparse.calibration import Calibration, unpack

_Key = tuple[int, int]


class MaskFeed:
    """Gives the masks of a calibration, and fetches the next one.

    The order of the calls is guessed, not relied on: every buffer knows the segment and layer that
    it holds, and what is not there is copied when it is asked for.

    Args:
        calibration: which stays on the host.
        device: where masks go.
    """

    @torch.inference_mode(False)  # buffers that are written again must serve training too
    def __init__(self, calibration: Calibration, device: torch.device) -> None:
        self._calibration, self._device = calibration, device
        gpu = device.type == "cuda"
        self._packed = {s: m.pin_memory() if gpu else m for s, m in calibration.masks.items()}
        shape = next(iter(self._packed.values())).shape[1:]
        self._buffers = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(2)]
        self._holds: list[_Key | None] = [None, None]
        self._side = torch.cuda.Stream(device) if gpu else None
        self._ready, self._used = ([torch.cuda.Event() for _ in range(2 * gpu)] for _ in range(2))
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(device))  # the buffers' memory is free
            for buffer in self._buffers:
                buffer.record_stream(self._side)

    def __reduce__(self) -> tuple[Any, ...]:
        return MaskFeed, (self._calibration, self._device)  # a copy has buffers of its own

    def take(self, segment: int, layer: int) -> Tensor:
        """bool `[H, n, n]` on the device, which the host does not wait for.

        Raises:
            ValueError: no step of this segment was calibrated.
        """
        self._calibration.check_segment(segment)
        key = (segment, layer)
        number = self._holds.index(key) if key in self._holds else 0
        if self._holds[number] != key:
            self._bring(key, number)
        if self._side is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._ready[number])
            current.wait_event(self._used[number])  # so that the last reader's end is everyone's
        mask = unpack(self._buffers[number], self._calibration.blocks)
        if self._side is not None:
            self._used[number].record(torch.cuda.current_stream(self._device))
        following = self._following(key)
        if following not in self._holds:
            self._bring(following, 1 - number)
        return mask

    def _bring(self, key: _Key, number: int) -> None:
        """Begins to copy a mask into a buffer, when what is there has been read."""
        segment, layer = key
        self._holds[number] = key
        if self._side is None:
            self._buffers[number].copy_(self._packed[segment][layer])
            return
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._used[number])  # not recorded at first: no wait
            self._buffers[number].copy_(self._packed[segment][layer], non_blocking=True)
            self._ready[number].record(self._side)

    def _following(self, key: _Key) -> _Key:
        """The next layer; after the last one the first of the next segment, or of a new run."""
        segment, layer = key
        if layer + 1 < self._calibration.layers:
            return segment, layer + 1
        later = [s for s in self._packed if s > segment]
        return min(later or self._packed), 0
