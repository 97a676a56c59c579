"""Processes of an MPI communicator, through mpi4py."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from batchnorm import checks
from batchnorm.distributed.members import Members, Rows, from_host, seconds, to_host

Array = Any

# MPI writes to buffers until a request is through, maybe when the interpreter has ended: what is not
# through by then (after an error, say) must never be freed.
_hold = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
_let_go = ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_DecRef", ctypes.pythonapi))


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
            checks.fail(TypeError, "comm", checks.kind(comm), "an mpi4py.MPI.Intracomm")
        self.timeout = seconds(timeout)
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._error = MPI.Exception
        self._comm, request = comm.Idup()
        self._finish(request)
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        rows = np.empty((self.size, len(row)), np.uint8)
        request = self._begin("Iallgather", row, rows)

        def wait() -> Rows:
            self._finish(request, row, rows)
            return rows

        return wait

    def _sum(self, array: Array) -> Array:
        mine = np.ascontiguousarray(to_host(array))
        total = np.empty_like(mine)
        self._finish(self._begin("Iallreduce", mine, total), mine, total)
        return from_host(total, array)

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
