"""Library x shape x layout x dtype x pass: time, memory, share of a copy's speed, error."""

import multiprocessing
import statistics
import time

import numpy as np

import batchnorm as bn
from batchnorm.bench.cases import LAYOUTS, PASSES, SHAPES, case

from .libraries import LIBRARIES

OURS = [name for name in LIBRARIES if name.startswith("batchnorm")]
DTYPES = ("float32", "float16")


def ready(library, shape, layout, dtype, which, fused=False):
    """A call to time, with its arrays made and its code loaded or compiled.

    With `fused`, a residual is added and a ReLU applied in the same pass.
    """
    if dtype != "float32" and not library.startswith("batchnorm ("):
        raise NotImplementedError  # asv skips the combination
    prepare, kernels = LIBRARIES[library]
    bn.set_kernels(kernels)
    call = prepare(case(SHAPES[shape], layout, dtype, fused=fused), which)
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


def medians(*calls, rounds=9):
    """Median seconds of calls that take turns, so that a slow moment of the machine hits all."""
    seconds = [[] for _ in calls]
    repeats = []
    for call in calls:
        call()
        begin = time.perf_counter()
        call()
        repeats.append(max(1, round(5e-3 / max(1e-7, time.perf_counter() - begin))))
    for _ in range(rounds):
        for call, repeat, mine in zip(calls, repeats, seconds, strict=True):
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            mine.append((time.perf_counter() - begin) / repeat)
    return [statistics.median(mine) for mine in seconds]


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


class Gate:
    """What a change must not slow down: times of a copy that a pass takes, both measured in turns.

    A machine's slow moments hit both, so that the ratio is steadier than either time. Where memory
    lies, and which threads share a processor, differ from process to process: the median of seven.
    """

    param_names = ("kernels", "shape", "pass")
    params = (["native", "numpy"], ["ResNet-50 stage 1"], list(PASSES))
    unit = "copies"
    timeout = 300
    processes = 7
    fused = False

    def track_copies(self, kernels, shape, which):
        library = {"native": "batchnorm (native)", "numpy": "batchnorm (NumPy)"}[kernels]
        ready(library, "MLP, small", "second", "float32", which)  # loads the core before the fork
        context = multiprocessing.get_context("fork")
        with context.Pool(1, maxtasksperchild=1) as pool:
            each = [(library, shape, which, self.fused)] * self.processes
            return statistics.median(pool.starmap(copies, each, chunksize=1))


class GateOfFused(Gate):
    """The same with a residual and a ReLU."""

    params = (["native", "numpy"], ["ResNet-50 stage 1"], list(PASSES))
    fused = True


def copies(library, shape, which, fused):
    """How many times as long as a copy a pass takes."""
    call = ready(library, shape, "second", "float32", which, fused)
    copy = LIBRARIES["copy"][0](case(SHAPES[shape], "second", fused=fused), which)
    mine, limit = medians(call, copy, rounds=11)
    return mine / limit


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
