"""python -m batchnorm audit: each peer in a process of its own, whatever the peer does."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from batchnorm.audit.adapters import FOLDERS, AdapterError, find, known, load
from batchnorm.testing import CHECKS

PEER = '''
"""A batch norm in NumPy."""

import os
import time

import numpy as np

PEERS = {{"mine": "A batch norm in NumPy"}}


def peer(name):
    {before}

    def function(x, gamma, beta, mean, var, *, training, momentum, eps):
        {inside}
        shape, axes = (1, -1) + (1,) * (x.ndim - 2), (0, *range(2, x.ndim))
        m, v = mean.reshape(shape), var.reshape(shape)
        if training and x.size:
            n = x.size // x.shape[1]
            m = x.mean(axes, keepdims=True, dtype=np.float64)
            v = x.var(axes, keepdims=True, dtype=np.float64)
            mean = (mean + momentum * (m.ravel() - mean)).astype(mean.dtype)
            var = (var + momentum * (v.ravel() * n / max(1, n - 1) - var)).astype(var.dtype)
        y = gamma.reshape(shape) * ((x - m) / np.sqrt(v + eps)) + beta.reshape(shape)
        return y.astype(x.dtype), mean, var

    return {{"function": function, "versions": {{"numpy": np.__version__}}, **{more}}}
'''
DOCS = pathlib.Path(__file__).parents[1] / "docs"
EMPTY = "x.size == 0"
"""True in one check only, empty_batch."""


def adapter(folder, before="pass", inside="pass", more="{}"):
    path = folder / "mine.py"
    path.write_text(PEER.format(before=before, inside=inside, more=more))
    return str(path)


def audit(folder, *arguments):
    command = [sys.executable, "-m", "batchnorm", "audit", *arguments, "--json", "found.json"]
    columns = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=columns)
    path = folder / "found.json"
    found = json.loads(path.read_text()) if path.exists() else None
    return done, found


def test_a_right_one(tmp_path):
    done, found = audit(tmp_path, adapter(tmp_path))
    assert done.returncode == 0, done.stderr
    (peer,) = found["peers"]
    assert peer["peer"] == "mine"
    assert peer["status"] == "audited"
    assert {r["check"] for r in peer["records"]} < set(CHECKS)
    assert all(r["passed"] for r in peer["records"])
    assert f"{len(peer['records'])}/{len(peer['records'])}" in done.stdout
    assert "y_at_mean 1e+06" in done.stdout
    assert found["batchnorm"]
    assert found["day"]


@pytest.mark.parametrize(
    ("inside", "why"),
    [
        (f"if {EMPTY}: os.abort()", "the process was ended by SIGABRT"),
        (f"if {EMPTY}: time.sleep(600)", "took more than 5 s"),
        (f"if {EMPTY}: os._exit(3)", "the process ended with status 3"),
    ],
)
def test_a_lost_process_costs_a_cell(tmp_path, inside, why):
    begun = time.monotonic()
    done, found = audit(tmp_path, adapter(tmp_path, inside=inside), "--limit", "5")
    assert time.monotonic() - begun < 120
    assert done.returncode == 1
    failed = [r for r in found["peers"][0]["records"] if not r["passed"]]
    assert [(r["check"], r["raised"]) for r in failed] == [("empty_batch", why)]
    assert why in done.stdout


def test_one_that_always_crashes(tmp_path):
    done, found = audit(tmp_path, adapter(tmp_path, inside="os.abort()"))
    assert done.returncode == 1
    records = found["peers"][0]["records"]
    assert not any(r["passed"] for r in records)
    assert records[4]["raised"] == "not run, after 4 processes were lost"


def test_expected_failures(tmp_path):
    known = '{"expected_failures": {"y_of_float64": "it returns float32", "empty_batch": "?"}}'
    inside = "x = x if x.size else x.ravel()\n        x = x.astype(np.float32)"
    done, found = audit(tmp_path, adapter(tmp_path, inside=inside, more=known))
    records = {r["check"]: r for r in found["peers"][0]["records"]}
    assert records["y_of_float64"]["expected"] == "it returns float32"
    assert done.returncode == 1  # the running mean of float64, which nobody expects
    assert any("running_mean_of_float64" in line for line in found["peers"][0]["surprises"])
    assert not any("y_of_float64" in line for line in found["peers"][0]["surprises"])
    stale = '{"expected_failures": {"y_at_mean": "E[x²] − E[x]²"}}'
    done, found = audit(tmp_path, adapter(tmp_path, more=stale))
    assert done.returncode == 1
    assert "y_at_mean: expected to fail" in "".join(found["peers"][0]["surprises"])


@pytest.mark.parametrize(
    ("before", "status"),
    [
        ("import a_framework_that_is_not_there", "not installed"),
        ("raise RuntimeError('no such device')", "cannot be run"),
        ("os._exit(7)", "cannot be run"),
    ],
)
def test_one_that_is_not_there(tmp_path, before, status):
    done, found = audit(tmp_path, adapter(tmp_path, before=before))
    (peer,) = found["peers"]
    assert peer["status"] == status
    assert peer["why"]
    assert done.returncode == 1  # it was asked for by name
    assert f"mine: {status}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no_such_peer"], "argument PEER: got 'no_such_peer', expected the path of a .py file, or one"),
        (["nowhere.py"], "argument PEER: no file nowhere.py"),
        (["--limit", "0"], "argument --limit: got '0', expected a number of seconds above 0"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, said):
    done, found = audit(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert found is None


def test_a_file_that_is_no_adapter(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("x = 1")
    with pytest.raises(AdapterError, match="has no dict PEERS and function peer"):
        find([str(path)])
    path.write_text("1 / 0")
    with pytest.raises(AdapterError, match="raises ZeroDivisionError"):
        load(path)


def test_every_failure_that_is_published_is_a_confirmed_finding(monkeypatch):
    """And the other way round: what the adapters expect is what the page shows."""
    monkeypatch.syspath_prepend(str(DOCS))
    from audited import results
    from findings import FINDINGS
    from reproduce import confirmed

    run, printed = results()
    assert {a.name for a in known()} == {peer["peer"] for peer in run["peers"]}
    assert sum(peer["status"] == "audited" for peer in run["peers"]) >= 10
    for name, lines in printed.items():
        assert all(confirmed(line, FINDINGS[name].at_least) for line in lines.values())
    for peer in run["peers"]:
        assert peer["surprises"] == []
        covered = {
            check
            for name, finding in FINDINGS.items()
            if peer["peer"] in printed.get(name, {})
            for check in finding.checks
        }
        failed = {r["check"]: r["expected"] for r in peer["records"] if not r["passed"]}
        assert set(failed) <= covered
        assert set(failed.values()) <= {finding.title for finding in FINDINGS.values()}
        for name in printed:
            if peer["peer"] in printed[name]:
                assert set(FINDINGS[name].checks) & set(failed)


def test_the_adapters_of_this_package():
    adapters = known()
    names = [a.name for a in adapters]
    assert len(names) == len(set(names))
    assert names[0] == "batchnorm-numpy"
    assert {"torch-compiled", "keras-jax", "flax-linen", "onnxruntime-inference"} <= set(names)
    assert [a.name for a in find(["torch-compiled"])] == ["torch-compiled"]
    assert {a.name for a in find(["flax"])} == {n for n in names if n.startswith("flax-")}
    assert adapters[0].file.parent in FOLDERS
