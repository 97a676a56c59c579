"""The compiled core on PyTorch's CPU tensors, with PyTorch's threads; no array of NumPy in between."""

from __future__ import annotations

from typing import Any

import torch

from batchnorm import core, outputs
from batchnorm.backends import tensors
from batchnorm.backends.native import Native

Array = Any

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _empty_like(x: Array) -> Array:
    """Return an uninitialized tensor as PyTorch's batch norm makes it; a large one from the pool."""
    if x.nbytes < outputs.SMALLEST:
        return tensors.empty_result(x)
    layout = tensors.memory_format(x)
    stride = x.stride() if x.is_contiguous(memory_format=layout) else None
    if stride is None:
        stride = tensors.empty_result(x, "meta").stride()
    made = torch.frombuffer(outputs.lease(x.nbytes), dtype=x.dtype)
    return made.as_strided_(x.shape, stride)


def _is_aligned(a: Array) -> bool:
    return bool(a.data_ptr() % a.itemsize == 0)


class NativeTensors(Native):
    """The compiled core, with forward and backward passes fused."""

    summary = "the compiled core, on the memory of tensors"

    def refuses(self, arrays: tuple[Array | None, ...]) -> str | None:
        """Return why the core cannot run on the tensors of a call, or None."""
        why = tensors.refuses(arrays, "cpu")
        if why is None:
            shape = arrays[0].shape  # type: ignore[union-attr]
            big = [a for a in arrays if a is not None and a.shape == shape and a.is_floating_point()]
            if not all(map(_is_aligned, big)):
                why = "values are not aligned in memory"
        return why

    def weights(self, w: Array | None) -> Array | None:
        """Return weights in a dtype that the core reads; integers become float64."""
        if w is None or w.dtype is torch.bool:
            return w
        if w.dtype in _FLOATS:
            return w if _is_aligned(w) else w.clone()
        return w.to(torch.float64)

    def vector(self, v: Any) -> Any:
        """Return a per-channel vector: the core reads all that are valid."""
        return v

    def dense(self, v: Array) -> Array:
        """Return a vector of a kernel as the core reads it."""
        v = v.contiguous()
        return v if _is_aligned(v) else v.clone()


def _use() -> None:
    kinds = torch.Tensor, torch.nn.Parameter
    core.load().use_tensors(*kinds, tensors.exchange(), _empty_like)


_use()
NATIVE_TENSORS = NativeTensors()
