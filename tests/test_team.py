"""PyTorch's own threads, which run the loops for its tensors."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data
from batchnorm.testing.libraries import kernels

torch = pytest.importorskip("torch")
pytest.importorskip("batchnorm._core")
from batchnorm.backends.compiled import openmp as team  # noqa: E402
from batchnorm.backends.compiled import pool as crew  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="another OpenMP runtime")


@pytest.fixture(autouse=True)
def compiled():
    before = torch.get_num_threads()
    with kernels("native"):
        yield
    bn.set_num_threads(None)
    torch.set_num_threads(before)


@pytest.fixture
def teams(monkeypatch):
    """How many threads each run on a team was given."""
    entrance, seen = team._entrance(), []

    def run(loop, job, count):
        seen.append(min(count, torch.get_num_threads()))
        entrance(loop, job, count)

    monkeypatch.setattr(team, "_entrance", lambda: run)
    return seen


def passes(x, dy):
    y, stats = bn.batch_norm(x)
    dx, *grads = bn.batch_norm_backward(dy, x, stats)
    return [np.asarray(v) for v in (y, dx, *stats, *grads)]


@pytest.mark.parametrize("count", [2, 3])
def test_tensors_run_on_pytorchs_threads(monkeypatch, teams, count):
    """Never on helpers, and with the bits that NumPy arrays have on helpers."""
    x, dy = data.batch((16, 24, 2000), seed=1), data.batch((16, 24, 2000), seed=2)
    bn.set_num_threads(count)
    torch.set_num_threads(count)
    wanted = passes(x, dy)
    assert not teams

    def never(wanted):
        raise AssertionError("a helper was asked for")

    monkeypatch.setattr(crew, "boxes", never)
    found = passes(torch.from_numpy(x), torch.from_numpy(dy))
    assert set(teams) == {count}
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_as_many_as_pytorch_uses(teams):
    bn.set_num_threads(3)
    torch.set_num_threads(1)
    x = data.batch((16, 24, 2000))
    np.testing.assert_array_equal(np.asarray(bn.batch_norm(torch.from_numpy(x))[0]), bn.batch_norm(x)[0])
    assert set(teams) == {1}


def test_callers_on_many_threads(teams):
    bn.set_num_threads(2)
    arrays = [data.batch((16, 24, 500 + 700 * (i % 3)), mean=i, seed=i) for i in range(6)]
    wanted = [passes(x, x) for x in arrays]

    def work(i):
        for _ in range(5):
            x = torch.from_numpy(arrays[i])
            for a, b in zip(passes(x, x), wanted[i], strict=True):
                np.testing.assert_array_equal(a, b)
        return i

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6), timeout=300)) == list(range(6))
    assert teams


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*fork.*:RuntimeWarning")
def test_a_forked_child_has_no_team(teams):
    """The runtime would wait for ever for threads that the child has not got."""
    x = torch.from_numpy(data.batch((16, 24, 2000)))
    bn.set_num_threads(2)
    wanted = passes(x, x)
    assert teams
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(30)
        same = all((a == b).all() for a, b in zip(passes(x, x), wanted, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
