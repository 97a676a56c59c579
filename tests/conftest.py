"""What is common to all tests of this repository: compiled loops are kept from one process to the next."""

import os
import shutil
import tempfile

KEPT = "BATCHNORM_CACHE_COMPILED", "NUMBA_CACHE_DIR"

# Numba compiles a loop for a second, and its loops for a minute: in each worker, and in each program that a
# test starts. So each loop is compiled once in a run, and read by the others; what is read is never older
# than the run. Set before anything imports the loops; workers have the environment of who starts them.
_folder = None
if not any(name in os.environ for name in KEPT):
    _folder = tempfile.mkdtemp(prefix="batchnorm-compiled-")
    os.environ.update(zip(KEPT, ("1", _folder), strict=True))


def pytest_unconfigure():
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
