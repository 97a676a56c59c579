"""All tests of this repository: compiled loops are kept from one process to the next."""

import os
import re
import shutil
import tempfile

import pytest

KEPT = "BATCHNORM_CACHE_COMPILED", "NUMBA_CACHE_DIR"

# Numba compiles a loop for a second and all loops for a minute, in each worker and in each program that
# a test starts. So each loop is compiled once in a run, and read by the others; what is read is never
# older than the run. Set before anything imports the loops; workers have the environment of who starts
# them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # other workers have the other cores
_folder = None
if not any(name in os.environ for name in KEPT):
    _folder = tempfile.mkdtemp(prefix="batchnorm-compiled-")
    os.environ.update(zip(KEPT, ("1", _folder), strict=True))


# Slow cases that are not marked where they are; each has a fast one beside it.
SLOW = re.compile(
    r"test_cuda_compiles\.py::test_every_instance\[(?!90-float32\])"
    r"|test_cuda_on_host\.py::test_the_conformance_suite_passes"
    r"|test_cuda_on_host\.py::test_any_alignment\[(?!0-float32|1-float16)"
    r"|test_cuda_on_host\.py::test_a_planted_fault_is_caught\[(?!the wrong part|no barrier before sums)"
    r"|test_cuda_on_host\.py::test_no_access_outside_of_arrays"
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


def pytest_unconfigure():
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
