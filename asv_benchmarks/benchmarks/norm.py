"""Library x shape x layout x dtype x pass: time, memory, share of a copy's speed, error."""

import numpy as np

import batchnorm as bn
from batchnorm.bench.cases import LAYOUTS, PASSES, SHAPES, case

from .copies import medians
from .libraries import LIBRARIES

OURS = [name for name in LIBRARIES if name.startswith("batchnorm")]
DTYPES = ("float32", "float16")


def ready(library, shape, layout, dtype, which):
    """A call to time, with its arrays made and its code loaded or compiled."""
    if dtype != "float32" and not library.startswith("batchnorm ("):
        raise NotImplementedError  # asv skips the combination
    prepare, kernels = LIBRARIES[library]
    bn.set_kernels(kernels)
    call = prepare(case(SHAPES[shape], layout, dtype), which)
    if call is None:
        raise NotImplementedError
    call()
    return call


class Passes:
    """Seconds of one pass."""

    param_names = ("library", "shape", "layout", "dtype", "pass")
    params = (list(LIBRARIES), list(SHAPES), list(LAYOUTS), list(DTYPES), list(PASSES))
    rounds = 1
    repeat = (3, 9, 0.5)
    sample_time = 0.01
    warmup_time = 0.02
    timeout = 120

    def setup(self, library, shape, layout, dtype, which):
        self.call = ready(library, shape, layout, dtype, which)

    def time_pass(self, library, shape, layout, dtype, which):
        self.call()


class Memory:
    """Peak memory of a process that does one pass of the largest shape."""

    param_names = ("library", "pass")
    params = (OURS, list(PASSES))

    def setup(self, library, which):
        self.call = ready(library, "ResNet-50 stem", "second", "float32", which)

    def peakmem_pass(self, library, which):
        self.call()


class ShareOfCopy:
    """How fast a pass is, as a share of the speed at which the same bytes are copied."""

    param_names = ("library", "shape", "layout", "pass")
    params = (OURS, list(SHAPES), list(LAYOUTS), list(PASSES))
    unit = "share"
    timeout = 120

    def track_share_of_copy(self, library, shape, layout, which):
        call = ready(library, shape, layout, "float32", which)
        copy = LIBRARIES["copy"][0](case(SHAPES[shape], layout), which)
        mine, limit = medians(call, copy)
        return limit / mine


class Error:
    """The largest error of y, in eps of max(1, |gamma * x_hat| + |beta|), against float64."""

    param_names = ("library", "layout", "mean")
    params = (OURS, list(LAYOUTS), [0.0, 1e4, 1e6])
    unit = "eps"

    def track_error(self, library, layout, mean):
        prepare, kernels = LIBRARIES[library]
        bn.set_kernels(kernels)
        given = case((32, 64, 28, 28), layout)
        given = given._replace(x=(given.x + np.float32(mean)).astype(np.float32))
        y = np.asarray(prepare(given, "forward")()[0])
        axes = tuple(i for i in range(4) if i != given.axis % 4)
        x = given.x.astype(np.float64)
        mu = x.mean(axes, keepdims=True)
        d = x - mu
        scaled = d / np.sqrt((d * d).mean(axes, keepdims=True) + 1e-5)
        gamma, beta = (np.expand_dims(v.astype(np.float64), axes) for v in (given.gamma, given.beta))
        size = np.maximum(1, abs(gamma * scaled) + abs(beta))
        return float((abs(y - (gamma * scaled + beta)) / size).max() / np.finfo(np.float32).eps)
