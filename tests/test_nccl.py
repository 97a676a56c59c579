"""The group over NCCL, with members in threads and stand-ins for CuPy and its communicator."""

import ctypes
import importlib
import sys
import threading
import types

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data

DTYPES = {1: np.uint8, 7: np.float32, 8: np.float64}


class Data:
    def __init__(self, array):
        self.ptr = array.ctypes.data


class Array(np.ndarray):
    """An array with what the adapter asks of CuPy's."""

    data = property(Data)

    def get(self):
        return np.array(self)


class Event:
    def __init__(self, disable_timing):
        self.done = True

    def record(self, stream):
        self.done = not stream.stuck


class Stream:
    ptr, stuck = 5, False


class NcclError(RuntimeError):
    pass


class Communicator:
    """NCCL between threads: collectives take addresses, counts, numbers of dtypes, and a stream."""

    def __init__(self, shared, rank, members):
        self.shared, self.rank, self.members, self.aborted = shared, rank, members, False

    def rank_id(self):
        return self.rank

    def size(self):
        return self.members

    def check_async_error(self):
        pass

    def abort(self):
        self.aborted = True

    def _exchange(self, mine):
        parts, barrier = self.shared
        parts[self.rank] = mine.copy()
        barrier.wait()
        found = [parts[i] for i in range(self.members)]
        barrier.wait()
        return found

    def allReduce(self, send, receive, count, dtype, operation, stream):  # noqa: N802
        assert (operation, stream) == (0, Stream.ptr)
        if not Stream.stuck:
            memory(receive, count, dtype)[:] = sum(self._exchange(memory(send, count, dtype)))

    def allGather(self, send, receive, count, dtype, stream):  # noqa: N802
        assert stream == Stream.ptr
        if not Stream.stuck:
            rows = self._exchange(memory(send, count, dtype))
            memory(receive, count * self.members, dtype)[:] = np.concatenate(rows)


def memory(address, count, dtype):
    kind = np.dtype(DTYPES[dtype])
    raw = (ctypes.c_uint8 * (count * kind.itemsize)).from_address(address)
    return np.frombuffer(raw, kind)


@pytest.fixture
def cupy(monkeypatch):
    nccl = types.SimpleNamespace(
        NcclCommunicator=Communicator,
        NcclError=NcclError,
        NCCL_UINT8=1,
        NCCL_FLOAT32=7,
        NCCL_FLOAT64=8,
        NCCL_SUM=0,
    )
    module = types.ModuleType("cupy")
    module.asarray = module.ascontiguousarray = lambda a: np.ascontiguousarray(a).view(Array)
    module.empty = lambda *shape: np.empty(*shape).view(Array)
    module.empty_like = lambda a: np.empty_like(a).view(Array)
    module.uint8 = np.uint8
    module.cuda = types.ModuleType("cupy.cuda")
    module.cuda.nccl, module.cuda.Event = nccl, Event
    module.cuda.get_current_stream = Stream
    adapter = "batchnorm.distributed.over_nccl"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", module)
        patch.setitem(sys.modules, "cupy.cuda", module.cuda)
        patch.delitem(sys.modules, adapter, raising=False)
        importlib.import_module(adapter)
        # NumPy's arrays play CuPy's: from here on, nobody else should take them for such.
        patch.delitem(sys.modules, "cupy")
        yield
        sys.modules.pop(adapter)
    Stream.stuck = False


def between(members, function):
    shared = {}, threading.Barrier(members, timeout=20)
    comms = [Communicator(shared, rank, members) for rank in range(members)]
    found = [None] * members

    def run(rank):
        found[rank] = function(comms[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(f is not None for f in found)
    return found


@pytest.mark.parametrize("timeout", [20.0, None])
def test_statistics_of_the_joined_batch(cupy, timeout):
    x = data.batch((10, 3), mean=1e4)

    def member(comm):
        group = bn.distributed.nccl(comm, timeout=timeout)
        y, stats = bn.batch_norm(np.split(x, [7])[group.rank], group=group)
        return y, stats

    (first, stats), (second, _) = between(2, member)
    wide = x.astype(float)
    np.testing.assert_allclose(stats.mean, wide.mean(0), rtol=1e-14)
    wanted = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(np.concatenate([first, second]), wanted, atol=2e-6)


def test_another_number_of_channels(cupy):
    def member(comm):
        group = bn.distributed.nccl(comm)
        with pytest.raises(bn.distributed.GroupError, match=r"channels from rank \d, expected"):
            bn.batch_norm(data.batch((4, 3 + group.rank)), group=group)
        return True

    assert between(2, member) == [True, True]


class Clock:
    """Time that passes while a process sleeps, and not otherwise."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_a_device_that_waits_for_ever(cupy, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("batchnorm.distributed.members.time", clock)
    Stream.stuck = True
    comm = Communicator(({}, None), 0, 2)
    group = bn.distributed.nccl(comm, timeout=0.2)
    with pytest.raises(bn.distributed.GroupError, match=r"no answer within 0.2 s on rank 0"):
        bn.batch_norm(data.batch((4, 3)), group=group)
    assert 0.2 < clock.now - 100 < 0.21
    assert comm.aborted
    with pytest.raises(bn.distributed.GroupError, match="got a call after an error in an earlier one"):
        bn.batch_norm(data.batch((4, 3)), group=group)


def test_no_communicator(cupy):
    with pytest.raises(TypeError, match="comm: got an int, expected a cupy.cuda.nccl.NcclCommunicator"):
        bn.distributed.nccl(3)
