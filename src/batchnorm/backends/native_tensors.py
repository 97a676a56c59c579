"""The compiled core on PyTorch's CPU tensors, with PyTorch's threads; no array of NumPy in between."""

from __future__ import annotations

from typing import Any

import torch

from batchnorm import core
from batchnorm.backends import tensors
from batchnorm.backends.native import Native

Array = Any

# By the core's tags of dtypes.
_DTYPES = {1: torch.float16, 2: torch.bfloat16, 3: torch.float32, 4: torch.float64}


def _empty_tensors(count: int, shape: tuple[int, ...], tag: int) -> tuple[Array, ...]:
    """Return uninitialized tensors, each with memory of its own."""
    return tuple(torch.empty(shape, dtype=_DTYPES[tag]) for _ in range(count))


class NativeTensors(Native):
    """The compiled core, with forward and backward passes fused."""

    summary = "the compiled core, on the memory of tensors"

    def refuses(self, arrays: tuple[Array | None, ...]) -> str | None:
        """Return why the core cannot run on the tensors of a call, or None."""
        return tensors.refuses(arrays, "cpu")

    def weights(self, w: Array | None) -> Array | None:
        """Return weights in a dtype that the core reads; integers become float64."""
        if w is None or w.dtype is torch.bool or w.dtype in _DTYPES.values():
            return w
        return w.to(torch.float64)

    def vector(self, v: Any) -> Any:
        """Return a per-channel vector: the core reads all that are valid."""
        return v

    def dense(self, v: Array) -> Array:
        """Return a vector of a kernel as the core reads it."""
        return v.contiguous()


def _use() -> None:
    kinds = torch.Tensor, torch.nn.Parameter
    core.load().use_tensors(*kinds, tensors.exchange(), tensors.empty_result, _empty_tensors)


_use()
NATIVE_TENSORS = NativeTensors()
