"""Groups of the GPUs of an NCCL communicator, with CuPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nccl

from batchnorm.distributed.members import Members, Rows, validate_timeout
from batchnorm.errors import describe_type, fail

Array = Any

# Names of dtypes in NCCL, by their names in NumPy.
_DTYPES = {"uint8": "NCCL_UINT8", "float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64"}


class Nccl(Members):
    """A group of `batchnorm.distributed.nccl`. NCCL has no timeout, so the host polls an event."""

    def __init__(self, comm: Any, timeout: float | None) -> None:
        super().__init__()
        if not isinstance(comm, nccl.NcclCommunicator):
            got = describe_type(comm)
            fail(TypeError, "comm", got, "a cupy.cuda.nccl.NcclCommunicator")
        self.timeout = validate_timeout(timeout)
        self.rank, self.size = comm.rank_id(), comm.size()
        self._comm = comm
        self.unchecked = timeout is None  # the host would have to wait for the announcements

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        mine = cupy.asarray(row)
        rows = cupy.empty((self.size, row.size), cupy.uint8)
        done = self._run("allGather", mine, rows)

        def wait() -> Rows:
            self._finish(done)
            host: Rows = rows.get()
            return host

        return wait

    def _to_vector(self, array: Array) -> Array:
        return array.reshape(-1)

    def _zeros(self, size: int, dtype: str) -> Array:
        return cupy.asarray(np.zeros(size, dtype))

    def _sum(self, vector: Array) -> Array:
        vector = cupy.ascontiguousarray(vector)
        total = cupy.empty_like(vector)
        done = self._run("allReduce", vector, total, nccl.NCCL_SUM)
        if self.timeout is not None:
            self._finish(done)
        return total

    def _from_vector(self, vector: Array, like: Array) -> Array:
        return vector.reshape(like.shape)

    def _run(self, collective: str, mine: Array, result: Array, *operation: int) -> Any:
        """Enqueue a collective on the current stream, and return an event that is recorded after it."""
        dtype = _DTYPES.get(mine.dtype.name)
        if dtype is None:
            fail(TypeError, "array", f"dtype {mine.dtype}", "float32 or float64")
        stream = cupy.cuda.get_current_stream()
        kind = getattr(nccl, dtype)
        pointers = mine.data.ptr, result.data.ptr
        try:
            getattr(self._comm, collective)(*pointers, mine.size, kind, *operation, stream.ptr)
        except nccl.NcclError as error:
            self._break(error)
        done = cupy.cuda.Event(disable_timing=True)
        done.record(stream)
        return done

    def _finish(self, done: Any) -> None:
        def arrived() -> bool:
            self._comm.check_async_error()
            return bool(done.done)

        try:
            self._poll(arrived)
        except nccl.NcclError as error:
            self._break(error)

    def _break(self, why: object) -> Any:
        """Make the group unusable, and abort the communicator so that the device does not wait."""
        self._comm.abort()
        super()._break(why)
