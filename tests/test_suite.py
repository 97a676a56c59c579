"""The conformance suite itself: it runs on a library it has never seen, and it can fail."""

import os
import pathlib
import re
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


# Where each fault of `unseen` is to be seen, in short; the whole suite sees it there too.
SEEN = {
    "sum": (
        "test_values or test_nist or test_merge or test_training_step",
        "forward backward where layer",
    ),
    "broadcast": ("test_values", "forward backward inference where"),
    "reshape": ("test_layouts or test_vectors.py", "forward backward vectors"),
    "integers": ("test_integers", "where"),
    "astype": ("test_a_loaded_state_is_a_copy", "layer"),
    "comparisons": ("test_weights_that_are_none", "errors"),
    "maximum": ("test_nan_stays", "moments"),
}


FEW = ("sum",)


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=() if fault in FEW else pytest.mark.slow) for fault in SEEN]
)
def test_a_broken_library_fails(fault, tmp_path):
    chosen, files = SEEN[fault]
    arguments = ("--array-library", "unseen", "-m", "not large", "-k", chosen)
    done = run_suite(*arguments, cwd=tmp_path, UNSEEN_BREAKS=fault)
    assert done.returncode == 1, done.stdout[-3000:]
    for name in files.split():
        assert f"FAILED {name}" in done.stdout or f"test_{name}.py::" in done.stdout, name


def test_every_fault_is_tried():
    import unseen

    assert set(SEEN) == set(unseen.FAULTS)


WRAPPER = """
from numpy import *
from numpy import __array_namespace_info__


def sum(x, **options):
    return 0
"""


def test_a_module_that_makes_another_library_s_arrays(tmp_path):
    """Its own functions would never run: with NumPy's arrays, NumPy is what is tested."""
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    done = run_suite(
        "--array-library", "wrapper", "-k", "test_values", cwd=tmp_path, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode != 0
    assert "its arrays are numpy's, whose functions would be tested" in done.stdout + done.stderr


def test_masked_arrays_are_judged_as_such(tmp_path):
    done = run_suite("--array-library", "numpy.ma", "-k", "test_values", cwd=tmp_path)
    assert done.returncode == 1
    assert "x: got a MaskedArray" in done.stdout
    assert " passed" not in done.stdout.splitlines()[-1]


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


MODULES = {
    "nonesuch": "not installed",
    "": "not the name of a module",
    "../x": "not the name of a module",
    "raises": "RuntimeError: not today",
    "leaves": "SystemExit: 3",
    "no_python": "SyntaxError: ",
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_that_cannot_be_imported_is_one_line(name, tmp_path):
    (tmp_path / "raises.py").write_text("raise RuntimeError('not today\\nnor tomorrow')")
    (tmp_path / "leaves.py").write_text("raise SystemExit(3)")
    (tmp_path / "no_python.py").write_text("def (")
    done = run_suite("--array-library", name, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    (said,) = (done.stdout + done.stderr).strip().splitlines()
    expected = (
        f"--array-library: got {name!r}, expected a usable library ({name}[default]: {MODULES[name]}"
    )
    assert expected in said


@pytest.mark.slow  # it imports every library
def test_what_was_not_there_is_listed(tmp_path):
    done = run_suite("-k", "test_constant_channel and numpy", cwd=tmp_path)
    if "cupy" not in sys.modules and not _installed("cupy"):
        assert "array libraries that were not there" in done.stdout
        assert "cupy[cupy]: not installed" in done.stdout


@pytest.mark.slow
def test_what_runs_by_default(tmp_path):
    """Every case of a library, or each test's first on some devices; all where it is asked for."""
    from batchnorm.testing.libraries import PARTS

    listed = ("--collect-only", "-k", "test_forward.py", "-m")
    done = run_suite(*listed, "not slow", cwd=tmp_path)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names, done.stdout

    def cases(library, device="", of=names):
        return [name for name in of if re.search(rf"[\[-]{library}\[{device}", name)]

    every, tests = cases("numpy", "numpy"), {name.partition("[")[0] for name in names}
    assert len(every) > 5 * len(tests)
    for library, part in PARTS.items():
        for device in part.devices if _installed(library) else ():
            assert len(cases(library, rf"{device}\]")) == len(tests)
        assert len(cases(library)) in (0, len(tests) * len(part.devices))
    if _installed("dask"):
        done = run_suite(*listed, "not slow", "--array-library", "dask", cwd=tmp_path)
        asked = [line for line in done.stdout.splitlines() if "::" in line]
        assert len(cases("dask", of=asked)) == len(every)


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
    assert gap("numpy", "native", "float16", "forward") is None
    assert works("array_api_strict", "no_float64")[0] == ["float32"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_every_library_has_its_way_to_run(name):
    from batchnorm.testing.libraries import OWN_WAY, targets

    assert name in OWN_WAY
    assert [t.device_name for t in targets(LIBRARIES[name].module)] == list(LIBRARIES[name].devices)
