"""Groups over real engines: members in processes get what one process gets from the joined batch."""

import importlib.util
import pickle
import re
import sys

import numpy as np
import pytest
from members import recalibrating
from members.faulty import GONE, LATE, TIMEOUT
from members.launch import MPIEXEC, launch, results
from members.problems import STEPS, cases

from batchnorm.testing import verdict
from batchnorm.testing.oracle import Problem

missing = {
    "mpi": None if MPIEXEC and importlib.util.find_spec("mpi4py") else "mpi4py or mpiexec is missing",
    "gloo": None if importlib.util.find_spec("torch") else "torch is missing",
    "jax": None if importlib.util.find_spec("jax") else "jax is missing",
}
ENGINES = [("mpi", "numpy"), ("gloo", "numpy"), ("gloo", "torch"), ("mpi", "torch"), ("jax", "jax")]


def share(wanted, *cases):
    """Cases, of which all but the wanted are slow: in each member PyTorch or JAX is imported first."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(*case, marks=marks[bool(wanted(*case))]) for case in cases]


def judge(members, cases):
    for case in cases:
        gamma, beta = case.parameters()
        mean, var = 0.0, 1.0
        for step in range(STEPS):
            x, dy, where = case.batch(step)
            found = [member[case.name][0][step] for member in members]
            expected = Problem(x, gamma, beta, where=where)
            y = np.concatenate([f[0] for f in found])
            dx = np.concatenate([f[5] for f in found])
            verdict.forward(y, expected, case.dtype)
            for f in found:
                verdict.moments(_Stats(*f[1:4]), expected)
                grads = expected.backward(dy)
                verdict.backward((dx, f[6], f[7]), grads, case.dtype, case.dtype)
                assert f[8:] == [1, 1], "one reduction forward and one backward"
                for mine, first in zip(f[1:5], found[0][1:5], strict=True):
                    np.testing.assert_array_equal(mine, first)  # to the bit
            n, batch_mean, batch_var = (
                expected.flat(v).astype(float) for v in (expected.n, expected.mean, expected.var)
            )
            mean = 0.9 * mean + 0.1 * batch_mean
            var = 0.9 * var + 0.1 * batch_var * n / (n - 1)
        for member in members:
            running = member[case.name][1]
            np.testing.assert_allclose(running[0], mean, rtol=1e-13)
            np.testing.assert_allclose(running[1], var, rtol=1e-13)
            for mine, first in zip(running, members[0][case.name][1], strict=True):
                np.testing.assert_array_equal(mine, first)  # to the bit


class _Stats:
    def __init__(self, count, mean, var):
        self.count, self.mean, self.var = count, mean, var


@pytest.mark.parametrize(
    ("engine", "kind", "size"),
    share(
        lambda engine, kind, size: (
            (engine, kind, size) in (("mpi", "numpy", 3), ("gloo", "torch", 2), ("jax", "jax", 2))
        ),
        *((engine, kind, size) for engine, kind in ENGINES for size in (1, 2, 3, 4)),
    ),
)
def test_as_one_process(engine, kind, size, tmp_path):
    if missing[engine]:
        pytest.skip(missing[engine])
    if engine == "mpi" and sys.platform == "win32":
        pytest.skip("another launcher")
    program = "members.in_jax" if engine == "jax" else "members.worker"
    arguments = (size,) if engine == "jax" else (engine, kind)
    processes = 1 if engine == "jax" else size
    found = results(engine, processes, program, *arguments, folder=tmp_path)
    jax = engine == "jax"
    judge(found[0] if jax else found, cases(size, brief=jax))


# What the members that did nothing wrong are told, by fault; and in how many processes it is tried.
ON_RANK_1 = r"group: got an error on rank 1 \({}.*\), expected all members to take part"
MISSING = "group: got .*, expected all 3 members to answer"
TOLD = {
    "killed": MISSING,
    "hangs": MISSING,
    "channels": r"group: got batch_norm of float32 with \(6,\) channels from rank 1, expected batch_norm"
    r" of float32 with \(4,\) channels, as on this rank",
    "dtype": r"group: got batch_norm of float64 with \(4,\) channels from rank 1, expected batch_norm of"
    r" float32 with \(4,\) channels",
    "raises": ON_RANK_1.format("TypeError: x: got dtype int64"),
    "backward": ON_RANK_1.format(r"ValueError: dy: got shape \(5, 4\)"),
    "refuses and stays away": ON_RANK_1.format("ValueError: axis: got 1, expected"),
    "no kernels": ON_RANK_1.format("TypeError: kernels: got 'cupy' asked for"),
    "no memory": ON_RANK_1.format("MemoryError: no room for this"),
    "no memory of many channels": ON_RANK_1.format("MemoryError: no room for this"),
    "no memory, backward": ON_RANK_1.format("MemoryError: no room for this"),
    # After the sum that the others needed: they learn of it in their next call.
    "no memory for y": ON_RANK_1.format("MemoryError: no room for this"),
    "lazy": ON_RANK_1.format("TypeError: group: got a lazy array of dask.array"),
    "interrupted": ON_RANK_1.format("TimeoutError: waited for long enough"),
    "eps": ON_RANK_1.format("TypeError: eps: got 'a', expected a number"),
    "out of order": ON_RANK_1.format("RuntimeError: backward: got no forward pass to go back from"),
}


@pytest.mark.parametrize(
    ("engine", "fault"),
    share(
        lambda engine, fault: engine == "mpi" or fault == "killed",
        *((engine, fault) for engine in ("mpi", "gloo") for fault in TOLD),
    ),
)
def test_a_member_goes_wrong(engine, fault, tmp_path):
    """The others are told within the timeout, and hold what was committed last."""
    if missing[engine]:
        pytest.skip(missing[engine])
    if fault == "lazy":
        pytest.importorskip("dask")
    said, _ = launch(engine, 3, "members.faulty", engine, fault, tmp_path)
    assert "nobody gave up" not in said
    members = {
        rank: pickle.loads(path.read_bytes())
        for rank in range(3)
        if (path := tmp_path / f"{rank}.pickle").exists()
    }
    assert {0, 2} <= set(members), said
    for rank in (0, 2):
        found = members[rank]
        assert found["step"] == 2
        assert re.search("GroupError: " + TOLD[fault], found["error"]), found["error"]
        assert found["batches"] == 2
        assert found["unchanged"]
        assert fault in LATE or found["seconds"] < TIMEOUT - 1
        if fault not in GONE:
            count, error = found["again"]
            assert count == 24, "the group works again"
            assert error < 1e-15
    if fault not in GONE:
        assert members[1]["unchanged"] or fault in ("channels", "lazy")
        assert not members[1]["error"].startswith("GroupError") or fault in ("channels", "dtype")


@pytest.mark.parametrize(
    ("engine", "size"),
    share(
        lambda engine, size: engine == "mpi" and size == 2,
        *((engine, size) for engine in ("mpi", "gloo") for size in (2, 4)),
    ),
)
def test_random_faults(engine, size, tmp_path):
    """In each of many calls, all members get the right numbers or all get an error."""
    if missing[engine]:
        pytest.skip(missing[engine])
    steps = 120
    members = results(engine, size, "members.random_faults", engine, steps, size, folder=tmp_path)
    outcomes = {"right": 0, "wrong": 0}
    for each in zip(*members, strict=True):
        which, found = each[0][0], [said for _, said in each]
        assert len({said == "right" for said in found}) == 1, (which, found)
        outcomes["right" if found[0] == "right" else "wrong"] += 1
        if found[0] == "right":
            assert which in (None, "merge")
    assert min(outcomes.values()) > 20


RECALIBRATED = {
    "": "",
    "no batches": "",
    "never called": r"ValueError: layers\[1\]: got no input from any batch, expected a layer that",
    "another order": r"group: got recalibrate of 2 layers with \[\(4,\), \(6,\)\] channels from",
    "one layer less": r"group: got recalibrate of 1 layers with \[\(6,\)\] channels from rank 1",
    "no layer": ON_RANK_1.format("TypeError: layers: got 3, expected a BatchNorm"),
    "raises": ON_RANK_1.format("RuntimeError: a batch that nobody can read"),
    "nothing": "ValueError: batches: got none, expected at least one",
    # Another layer of the network joins the batches as it goes.
    "joined, raises": ON_RANK_1.format(r"OSError: cannot read caf\?.npy"),
    "joined, uneven": "GroupError: group: got ",
}


@pytest.mark.parametrize(
    ("engine", "kind", "case"),
    share(
        lambda engine, kind, case: (engine, kind) == ("mpi", "numpy"),
        *(
            (engine, kind, case)
            for engine, kind in (("mpi", "numpy"), ("gloo", "numpy"), ("mpi", "jax"))
            for case in (RECALIBRATED if kind == "numpy" else ("", "no batches"))
        ),
    ),
)
def test_recalibration(engine, kind, case, tmp_path):
    if missing[engine] or (kind == "jax" and missing["jax"]):
        pytest.skip(missing[engine] or missing["jax"])
    found = results(engine, 3, "members.recalibrating", engine, kind, case, folder=tmp_path)
    for rank, (error, state, counts, again) in enumerate(found):
        assert again == 12, "the group works again"
        if RECALIBRATED[case] and (rank == 0 or case in ("never called", "nothing")):
            assert re.search(RECALIBRATED[case], error), error
        if RECALIBRATED[case]:
            assert error
            assert counts == [0, 0], "as they were"
            continue
        assert not error, error
        used = [n for n in range(5) if not (case == "no batches" and n % 3 == 2)]
        assert counts == [len(used)] * 2
        x = np.concatenate([recalibrating.batches()[n] for n in used]).astype(float)
        np.testing.assert_allclose(state[0], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(state[1], x.var(0, ddof=1), rtol=1e-5)
        if kind == "numpy":
            for mine, other in zip(state, found[0][1], strict=True):
                np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
def test_autograd_over_a_group(tmp_path):
    """A converted model in four processes against PyTorch's own on the joined batch."""
    if missing["gloo"]:
        pytest.skip(missing["gloo"])
    import torch
    from members import in_torch

    net = in_torch.model()
    wanted, state = in_torch.train(net, slice(None))
    members = results("gloo", 4, "members.in_torch", folder=tmp_path)
    names = 2 + len(list(net.parameters()))
    for i, expected in enumerate(wanted):
        parts = [found[i] for (found, _), *_ in members]
        joined = torch.cat(parts) if i % names < 2 else sum(parts)
        torch.testing.assert_close(joined, expected, rtol=1e-9, atol=1e-10)
    for (_, own), counted, refused, y in members:
        assert counted == 3 * 2 * 2, "two layers, forward and backward, three steps"
        for mine, expected in zip(own, state, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)
        for mine, other in zip(own, members[0][0][1], strict=True):
            assert torch.equal(mine, other)
        assert "trying to differentiate twice" in refused[0]
        assert "group: got tensors to sum, and PyTorch differentiates" in refused[1]
        assert "group: got tensors to sum, and torch.func transforms" in refused[2]
        torch.testing.assert_close(y, net.eval()(in_torch.batches()[0][0]), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["auto", "explicit"])
def test_arrays_of_jax_on_several_devices(mesh):
    """No group is named: JAX's compiler adds up what is spread; vectors are on all devices."""
    if missing["jax"] or not importlib.util.find_spec("flax"):
        pytest.skip("jax or flax is missing")
    assert launch("one process", 1, "members.sharded", mesh) == ("", [0])


def test_communicators_are_not_used_up():
    """MPI has 2,048 of them; a group takes one for each communicator, and gives it back with that."""
    if missing["mpi"]:
        pytest.skip(missing["mpi"])
    assert launch("mpi", 2, "members.many_groups") == ("", [0])


def test_messages_under_way_when_a_program_ends():
    """MPI still writes to their memory then."""
    if missing["mpi"]:
        pytest.skip(missing["mpi"])
    assert launch("mpi", 2, "members.leaving") == ("", [0])
