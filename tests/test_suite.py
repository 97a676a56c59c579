"""The conformance suite itself: it runs on a library it has never seen, and it can fail."""

import os
import pathlib
import subprocess
import sys

import pytest

from batchnorm.capabilities import GAPS, LIBRARIES, OPERATIONS, gap, works

HERE = pathlib.Path(__file__).parent


def run_suite(*arguments, cwd, **environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "batchnorm.testing",
    ]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def test_an_unseen_library(tmp_path):
    done = run_suite("--array-library", "unseen", "-m", "not large", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_a_broken_library_fails(tmp_path):
    chosen = "test_values or test_nist or test_merge or test_training_step"
    done = run_suite(
        "--array-library", "unseen", "-m", "not large", "-k", chosen, cwd=tmp_path, UNSEEN_BREAKS="sum"
    )
    assert done.returncode == 1
    for case in ("forward", "backward", "moments", "where", "layer"):
        assert f"test_{case}.py" in done.stdout, case


def test_a_stale_gap_fails(tmp_path):
    plugin = tmp_path / "stale.py"
    plugin.write_text(
        "import batchnorm.capabilities as c\n"
        "c.GAPS += (c.Gap('numpy', '*', '*', 'fold', 'stale on purpose'),)\n"
    )
    done = run_suite(
        "--array-library",
        "numpy",
        "-k",
        "test_fold",
        "-p",
        "stale",
        cwd=tmp_path,
        PYTHONPATH=str(tmp_path),
    )
    assert done.returncode == 1
    assert "XPASS(strict)" in done.stdout


def test_a_name_that_cannot_be_imported(tmp_path):
    done = run_suite("--array-library", "nonesuch", cwd=tmp_path)
    assert done.returncode != 0
    assert (
        "--array-library: got 'nonesuch', expected a usable library (nonesuch[default]: not installed)"
        in done.stdout + done.stderr
    )


def test_what_was_not_there_is_listed(tmp_path):
    done = run_suite("-k", "test_constant_channel", cwd=tmp_path)
    if "cupy" not in sys.modules and not _installed("cupy"):
        assert "array libraries that were not there" in done.stdout
        assert "cupy[cupy]: not installed" in done.stdout


def _installed(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def test_the_table_speaks_of_what_exists():
    for row in GAPS:
        assert row.library in LIBRARIES
        assert row.device in ("*", *LIBRARIES[row.library].devices)
        assert row.operation in ("*", *OPERATIONS)
    found = gap("jax", "jit", "float32", "out")
    assert found is not None
    assert "immutable" in found.why
    assert gap("numpy", "numba", "float16", "forward") is None
    assert works("array_api_strict", "no_float64")[0] == ["float32"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_has_its_way_to_run(name):
    from batchnorm.testing.libraries import OWN_WAY, targets

    assert name in OWN_WAY
    assert [t.device_name for t in targets(LIBRARIES[name].module)] == list(LIBRARIES[name].devices)
