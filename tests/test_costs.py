"""What a call and an import cost: memory, and the time of an import."""

import os
import subprocess
import sys

import pytest

MB = 2**20

PEAK = """
import sys
import numpy as np
import batchnorm as bn

kernels, layout, which, masked = sys.argv[1:]
bn.set_kernels(kernels)
rng = np.random.default_rng(0)
shape, axis = ((16, 64, 112, 112), 1) if layout == "second" else ((16, 112, 112, 64), -1)


def run(x):
    where = None if mask is None else mask[: len(x)]
    if which == "forward":
        return bn.batch_norm(x, axis=axis, where=where)
    return bn.batch_norm_backward(x, x, stats, axis=axis, where=where)


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


spatial = (16, 1, 112, 112) if layout == "second" else (16, 112, 112, 1)
mask = {
    "no mask": None,
    "mask": np.ones(shape, bool),
    "broadcast mask": np.ones(spatial, bool),
    "broadcast weights": np.ones(spatial, np.float32),
}[masked]
stats = bn.Moments(2.0, np.zeros(64), np.ones(64))
run(rng.standard_normal((2, *shape[1:])).astype(np.float32))  # loads the core, starts threads
x = np.empty(shape, np.float32)
x[...] = 1
x[::2] = 2
with open("/proc/self/clear_refs", "w") as clear:
    clear.write("5")  # the peak starts anew
before = resident("VmRSS")
result = run(x)
print(resident("VmHWM") - before - result[0].nbytes)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["second", "last"])
@pytest.mark.parametrize(
    ("kernels", "masked"),
    [
        ("native", "no mask"),
        ("numpy", "no mask"),
        ("numpy", "broadcast weights"),
        *(
            pytest.param(kernels, masked, marks=pytest.mark.slow)
            for kernels, masked in (
                ("native", "mask"),
                ("native", "broadcast mask"),
                ("native", "broadcast weights"),
                ("numpy", "mask"),
                ("numpy", "broadcast mask"),
            )
        ),
    ],
)
def test_peak_memory_is_the_output_and_little_more(kernels, layout, which, masked):
    if kernels == "native":
        pytest.importorskip("batchnorm._core")
    command = [sys.executable, "-c", PEAK, kernels, layout, which, masked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 8 * MB, f"{int(done.stdout) / MB:.1f} MB beside the output"


CALLS = """
import sys

count = 0


def counted(frame, what, argument):
    global count
    count += what in ("call", "c_call")


sys.setprofile(counted)
import {}
sys.setprofile(None)
print(count)
"""


def calls(module):
    """How many functions an import calls in a fresh interpreter, its own and Python's."""
    command = [sys.executable, "-c", CALLS.format(module)]
    found = [
        int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(2)  # the first compiles sources whose bytecode is not there
    ]
    return min(found)


def test_an_import_costs_no_more_than_numpys():
    """In function calls, which no other program slows down; NumPy is a part of both."""
    assert calls("batchnorm") <= 1.3 * calls("numpy")


def test_nothing_is_loaded_before_it_is_needed():
    code = """
import sys
import numpy as np
import batchnorm as bn

bn.set_kernels("numpy")
bn.batch_norm(np.ones((4, 3), np.float32))
assert "batchnorm._core" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
