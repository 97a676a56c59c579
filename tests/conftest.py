"""All tests of this repository: which cases are slow."""

import os
import re

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # other workers have the other cores

# Slow cases that are not marked where they are; each has a fast one beside it.
SLOW = re.compile(
    r"test_cuda_compiles\.py::test_every_instance\[(?!90-float32\])"
    r"|test_cuda_on_host\.py::test_the_conformance_suite_passes"
    r"|test_cuda_on_host\.py::test_any_alignment\[(?!0-float32|1-float16)"
    r"|test_cuda_on_host\.py::test_a_planted_fault_is_caught\[(?!the wrong part|no barrier before sums)"
    r"|test_cuda_on_host\.py::test_no_access_outside_of_arrays"
    r"|test_cuda_epilogues\.py::test_a_planted_fault_is_caught\[(?!y added)"
)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
