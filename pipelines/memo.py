"""Facts read from a tensor's values, read once: reading them waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


def once_per_tensor(read: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """Makes `read(tensor)` remember its answer for as long as the tensor lives unchanged.

    A pipeline passes the same mask or id tensor to every forward of a generation, so its values
    cross to the host once. An in-place change of the tensor is noticed by its version counter;
    inference-mode tensors have none, so they are read anew each time.
    """
    answers = WeakTensorKeyDictionary()

    @wraps(read)
    def remembered(tensor: Tensor) -> T:
        if tensor.is_inference():
            return read(tensor)
        known = answers.get(tensor)
        if known is None or known[0] != tensor._version:
            known = answers[tensor] = (tensor._version, read(tensor))
        return known[1]

    return remembered
