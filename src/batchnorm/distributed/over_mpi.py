"""Processes of an MPI communicator, through mpi4py."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from batchnorm.distributed.members import Members, Rows, from_host, seconds, to_host
from batchnorm.errors import describe_type, fail

Array = Any

# MPI writes to buffers until a request is through, maybe when the interpreter has ended: what is not
# through by then (after an error, say) must never be freed.
_hold = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
_let_go = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_DecRef", ctypes.pythonapi))


class _Duplicate:
    """A communicator's duplicate, so that messages do not meet others."""

    def __init__(self, comm: Any, request: Any) -> None:
        self.comm, self.request, self.broken = comm, request, False


@functools.cache
def _attribute(mpi: Any) -> Any:
    """The key under which a communicator keeps its duplicate."""

    def free(comm: Any, key: int, found: _Duplicate) -> None:
        if not found.broken:
            found.comm.Free()

    return mpi.Comm.Create_keyval(delete_fn=free)


class Mpi(Members):
    """See `batchnorm.distributed.mpi`. Nothing blocks: MPI itself knows no timeout."""

    def __init__(self, comm: Any, timeout: float | None) -> None:
        super().__init__()
        try:
            from mpi4py import MPI
        except ModuleNotFoundError as error:
            hint = "pip install 'batchnorm[mpi]'"
            raise ModuleNotFoundError(f"mpi4py is not installed: {hint}", name="mpi4py") from error
        comm = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(comm, MPI.Intracomm):
            fail(TypeError, "comm", describe_type(comm), "an mpi4py.MPI.Intracomm")
        self.timeout = seconds(timeout)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._error = MPI.Exception
        # MPI has some 2,000 communicators: one duplicate serves all groups of a communicator, and is
        # freed with it. After an error messages may be under way in it: then another is made.
        found: Any = comm.Get_attr(_attribute(MPI))
        if found is None or found.broken:
            found = _Duplicate(*comm.Idup())
            self._duplicate = found
            self._finish(found.request)
            found.comm.Set_errhandler(MPI.ERRORS_RETURN)
            comm.Set_attr(_attribute(MPI), found)
        self._duplicate = found
        self._comm = found.comm

    def _break(self, why: object) -> NoReturn:
        self._duplicate.broken = True
        super()._break(why)

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        rows = np.empty((self.size, len(row)), np.uint8)
        request = self._begin("Iallgather", row, rows)

        def wait() -> Rows:
            self._finish(request, row, rows)
            return rows

        return wait

    def _vector(self, array: Array) -> Array:
        return np.ravel(to_host(array))

    def _zeros(self, size: int, dtype: str) -> Array:
        return np.zeros(size, dtype)

    def _sum(self, vector: Array) -> Array:
        total = np.empty_like(vector)
        self._finish(self._begin("Iallreduce", vector, total), vector, total)
        return total

    def _back(self, vector: Array, like: Array) -> Array:
        return from_host(vector.reshape(like.shape), like)

    def _begin(self, collective: str, *buffers: Array) -> Any:
        for buffer in buffers:
            _hold(buffer)
        try:
            return getattr(self._comm, collective)(*buffers)
        except self._error as error:
            self._break(error)

    def _finish(self, request: Any, *buffers: Array) -> None:
        try:
            self._await(request.Test)
        except self._error as error:
            self._break(error)
        for buffer in buffers:
            _let_go(buffer)
