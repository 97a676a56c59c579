"""Groups of the processes of a `torch.distributed` process group."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import array_api_compat as compat
import numpy as np
import torch
import torch.distributed as dist

from batchnorm.arrays import on_host
from batchnorm.distributed.members import (
    Members,
    Rows,
    from_host,
    to_host,
    validate_not_recorded,
    validate_timeout,
)
from batchnorm.errors import describe_type, fail

Array = Any


class Torch(Members):
    """A group of `batchnorm.distributed.torch`."""

    def __init__(self, process_group: Any, timeout: float | None, check: bool | None) -> None:
        super().__init__()
        if not dist.is_available() or not dist.is_initialized():
            got = "no process groups"
            fail(RuntimeError, "process_group", got, "a call of init_process_group first")
        group: Any = dist.group.WORLD if process_group is None else process_group
        if not isinstance(group, dist.ProcessGroup):
            got = describe_type(group)
            fail(TypeError, "process_group", got, "a torch.distributed.ProcessGroup with this rank")
        self.timeout = validate_timeout(timeout)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        backend = dist.get_backend(group)
        self._device = "cuda" if backend == "nccl" else "cpu"
        self.unchecked = backend == "nccl" if check is None else not check

    # On the CPU, buffers are NumPy arrays: a tensor made during a transform of torch.func has no memory.

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        rows = np.empty((self.size, len(row)), np.uint8)
        mine, *theirs = (torch.from_numpy(r).to(self._device) for r in (row, *rows))
        work = self._begin(lambda: dist.all_gather(theirs, mine, group=self._group, async_op=True))

        def wait() -> Rows:
            self._finish(work)
            return rows if self._device == "cpu" else np.stack([on_host(r) for r in theirs])

        return wait

    def _to_vector(self, array: Array) -> Array:
        if self._device == "cpu":
            return np.ravel(to_host(array))
        own: Any = array if compat.is_torch_array(array) else self._tensor(array)
        return validate_not_recorded(own).detach().to(self._device).reshape(-1)

    def _zeros(self, size: int, dtype: str) -> Array:
        if self._device == "cpu":
            return np.zeros(size, dtype)
        return torch.zeros(size, dtype=getattr(torch, dtype), device=self._device)

    def _sum(self, vector: Array) -> Array:
        total = vector.copy() if self._device == "cpu" else vector.clone()  # the sum is written to it
        tensor = torch.as_tensor(total)  # shares the memory of `total`
        self._finish(self._begin(lambda: dist.all_reduce(tensor, group=self._group, async_op=True)))
        return total

    def _from_vector(self, vector: Array, like: Array) -> Array:
        total = vector.reshape(tuple(like.shape))
        if compat.is_torch_array(like):
            return torch.as_tensor(total).to(like.device)
        if compat.is_cupy_array(like) and self._device != "cpu":
            return compat.array_namespace(like).from_dlpack(total.to(f"cuda:{like.device.id}"))
        return from_host(on_host(total), like)

    def _tensor(self, array: Array) -> Array:
        """Return an array of another library as a tensor."""
        if compat.is_cupy_array(array):
            return torch.utils.dlpack.from_dlpack(array)
        return torch.tensor(to_host(array))

    def _begin(self, collective: Callable[[], Any]) -> Any:
        try:
            return collective()
        except RuntimeError as error:
            self._break(error)

    def _finish(self, work: Any) -> None:
        try:
            if self.timeout is None:
                work.wait()
            else:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            self._break(error)
