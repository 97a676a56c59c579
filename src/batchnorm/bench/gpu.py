"""GPU benchmark: this package on CuPy and PyTorch, PyTorch's own kernels, cuDNN's, and a copy.

Times are measured by device events.
"""

from __future__ import annotations

import csv
import importlib
import itertools
import math
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import batchnorm as bn
from batchnorm.bench.cases import LAYOUTS, SHAPES
from batchnorm.bench.cases import PASSES as PLAIN
from batchnorm.bench.report import geometric

Array = Any
Timed = Callable[[], Any]
EPS = 1e-5
DTYPES = ("float32", "float16")
BATCHES = (32, 256)
# With a residual and a ReLU in the same pass; peers add and apply theirs in place, after the norm.
FUSED = ("fused forward", "fused backward")
PASSES = (*PLAIN, *FUSED)
# The least memory traffic of each pass, in copies of x: x is read twice and y written once; dy and x are
# read twice and dx written once; x is read and y written. Fused, z is read too; and of a backward pass
# dy, x and y are read, the residual's gradient is written, that and x are read again, and dx is written.
FLOOR = {
    "forward": 1.5,
    "backward": 2.5,
    "inference": 1.0,
    "fused forward": 2.0,
    "fused backward": 3.5,
}
# Each contestant is timed in this many rounds, of this many seconds.
ROUNDS, ROUND_SECONDS = 5, 4e-3
# At most so many arrays are used in turn, so that none is in the cache from the previous call.
SETS = 12


class Case(NamedTuple):
    """Tensors of one problem, with channels second as in PyTorch."""

    x: Array
    dy: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    z: Array
    """The residual of fused passes."""


class Result(NamedTuple):
    """One measurement."""

    shape: str
    layout: str
    dtype: str
    which: str
    contestant: str
    seconds: float
    megabytes: float
    error: float
    """The largest error of y or dx against float64, in eps of its dtype; NaN for a copy."""


def shapes() -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the CPU benchmark, at batch sizes of 32 and 256."""
    yield from SHAPES.values()
    larger = ((256, *shape[1:]) for shape in SHAPES.values() if shape[0] == 32)
    yield from itertools.filterfalse(set(SHAPES.values()).__contains__, larger)


def cases(shape: tuple[int, ...], layout: str, dtype: str, device: str, count: int) -> list[Case]:
    """Return problems of normally distributed data, with a mean of 3 for x."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    stored = shape if layout == "second" else (shape[0], *shape[2:], shape[1])

    def data(mean: float) -> Array:
        a = torch.randn(stored, device=device).add_(mean).to(getattr(torch, dtype))
        return a if layout == "second" else a.movedim(-1, 1)

    channels = shape[1]
    gamma, beta = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    mean, var = torch.full_like(gamma, 3.0), torch.ones_like(gamma)
    return [Case(data(3.0), data(0.0), gamma, beta, mean, var, data(0.5)) for _ in range(count)]


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * (4 if dtype == "float32" else 2)


def sets(shape: tuple[int, ...], dtype: str, cache: int) -> int:
    """Return how many arrays to use in turn, so that none is in the cache from the previous call."""
    return min(SETS, -(-3 * cache // _bytes(shape, dtype)))


# Contestants: each prepares one pass and returns the function to time.


def package(convert: Callable[[Array], Array]) -> Callable[[Case, str], Timed]:
    """Return a contestant that runs this package on converted tensors."""

    def prepare(case: Case, which: str) -> Timed:
        x, dy, gamma, beta, mean, var, z = (convert(a) for a in case)
        settings: dict[str, Any] = {"eps": EPS}
        if which in FUSED:
            settings |= {"residual": z, "activation": "relu"}
        if which.endswith("forward"):
            return lambda: bn.batch_norm(x, gamma, beta, **settings)[0]
        if which == "inference":
            return lambda: bn.normalize(x, mean, var, gamma, beta, eps=EPS)
        y, stats = bn.batch_norm(x, gamma, beta, **settings)
        if which in FUSED:
            settings |= {"residual": True, "beta": beta, "y": y}
        return lambda: bn.batch_norm_backward(dy, x, stats, gamma, **settings)[0]

    return prepare


def _to_cupy(a: Array) -> Array:
    return importlib.import_module("cupy").from_dlpack(a)


Peer = Callable[..., Any]


def _peer(forward: Peer, backward: Peer) -> Callable[[Case, str], Timed]:
    """Return a contestant of two operators of PyTorch, with addition and ReLU after or before them."""

    def prepare(case: Case, which: str) -> Timed:
        aten = importlib.import_module("torch").ops.aten
        x, dy, gamma, beta, mean, var, z = case
        if which == "inference":
            return lambda: forward(aten, x, gamma, beta, mean, var, False)[0]
        if which == "forward":
            return lambda: forward(aten, x, gamma, beta, None, None, True)[0]
        if which == "fused forward":
            return lambda: forward(aten, x, gamma, beta, None, None, True)[0].add_(z).relu_()
        y, *saved = forward(aten, x, gamma, beta, None, None, True)
        if which == "backward":
            return lambda: backward(aten, dy, x, gamma, *saved)[0]
        y = y.add_(z).relu_()
        relu = aten.threshold_backward
        return lambda: backward(aten, relu(dy, y, 0), x, gamma, *saved)[0]

    return prepare


def _native(aten: Any, *given: Any) -> Any:
    """Run PyTorch's own kernel."""
    return aten.native_batch_norm(*given, 0.1, EPS)


def _native_backward(aten: Any, dy: Array, x: Array, gamma: Array, m: Array, rstd: Array) -> Any:
    masks = [True, True, True]
    return aten.native_batch_norm_backward(dy, x, gamma, None, None, m, rstd, True, EPS, masks)


def _cudnn(aten: Any, *given: Any) -> Any:
    """Run PyTorch's call of cuDNN."""
    return aten.cudnn_batch_norm(*given, 0.1, EPS)


def _cudnn_backward(
    aten: Any, dy: Array, x: Array, gamma: Array, m: Array, rstd: Array, reserve: Array
) -> Any:
    return aten.cudnn_batch_norm_backward(x, dy, gamma, None, None, m, rstd, EPS, reserve)


def _copy(case: Case, which: str) -> Timed:
    """Prepare a copy of x on the device, which bounds the speed of every pass."""
    target = case.x.clone()
    return lambda: target.copy_(case.x)


CONTESTANTS: dict[str, Callable[[Case, str], Timed]] = {
    "batchnorm on CuPy": package(_to_cupy),
    "batchnorm on PyTorch": package(lambda a: a),
    "PyTorch": _peer(_native, _native_backward),
    "PyTorch, cuDNN": _peer(_cudnn, _cudnn_backward),
    "copy": _copy,
}
OURS, PEERS = tuple(CONTESTANTS)[:2], tuple(CONTESTANTS)[2:4]


def missing() -> str | None:
    """Return why nothing can be measured here, or None."""
    for name in ("torch", "cupy"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if not importlib.import_module("torch").cuda.is_available():
        return "PyTorch finds no CUDA device"
    from batchnorm.backends.cuda import devices

    return devices.unusable()


def device_seconds(calls: list[Timed]) -> float:
    """Return the median seconds per call by device events, with the calls made in turn."""
    torch = importlib.import_module("torch")
    turn = itertools.cycle(calls)

    def elapsed(repeats: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            next(turn)()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    once = elapsed(len(calls))
    repeats = max(len(calls), round(ROUND_SECONDS / max(once, 1e-6)))
    return statistics.median(elapsed(repeats) for _ in range(ROUNDS))


def expected(case: Case, which: str) -> tuple[Array, Array]:
    """Return y or dx in float64, and the magnitude of its terms, to which errors are relative."""
    torch = importlib.import_module("torch")
    x, dy, gamma, beta, mean, var, z = (a.double() for a in case)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    axes = tuple(i for i in range(x.ndim) if i != 1)
    if which != "inference":
        mean = x.mean(axes)
        var = (x - mean.reshape(shape)).square().mean(axes)
    scaled = (x - mean.reshape(shape)) / (var + EPS).sqrt().reshape(shape)
    y = gamma.reshape(shape) * scaled + beta.reshape(shape)
    if which in FUSED:
        y = y + z
    if not which.endswith("backward"):
        size = (gamma.reshape(shape) * scaled).abs() + beta.abs().reshape(shape)
        if which in FUSED:
            y, size = y.clamp(min=0), size + z.abs()
        return y, torch.clamp(size, min=1)
    near = torch.zeros_like(y, dtype=torch.bool)
    if which in FUSED:  # so near to the kink, the derivative is as y was rounded: any is right
        near = y.abs() < 4 * torch.finfo(case.x.dtype).eps * (1 + scaled.abs() + z.abs())
        dy = torch.where(y > 0, dy, 0.0)
    a = (gamma / (var + EPS).sqrt()).reshape(shape)
    n = x.numel() // x.shape[1]
    sums = dy.sum(axes).reshape(shape), (dy * scaled).sum(axes).reshape(shape)
    size = (a.abs().max() * dy.abs().max()).expand_as(x)
    return a * (dy - (sums[0] + scaled * sums[1]) / n), torch.where(near, math.inf, size)


def error(result: Array, case: Case, which: str) -> float:
    """Return the largest error, in eps of the dtype."""
    torch = importlib.import_module("torch")
    result = torch.from_dlpack(result)
    reference, size = expected(case, which)
    worst: float = ((result.double() - reference).abs() / size).max().item()
    eps: float = torch.finfo(result.dtype).eps
    return worst / eps


def measure(shape: tuple[int, ...], layout: str, dtype: str, cache: int) -> Iterator[Result]:
    """Yield the results of all contestants and passes at one shape."""
    torch = importlib.import_module("torch")
    given = cases(shape, layout, dtype, "cuda", sets(shape, dtype, cache))
    megabytes = _bytes(shape, dtype) / 1e6
    for which in PASSES:
        for name, prepare in CONTESTANTS.items():
            try:
                calls = [prepare(case, which) for case in given]
                first = calls[0]()
            except RuntimeError as problem:  # a layout or a size that a library refuses
                if name in OURS or isinstance(problem, torch.cuda.OutOfMemoryError):
                    raise
                continue
            largest = math.nan if name == "copy" else error(first, given[0], which)
            del first
            seconds = device_seconds(calls)
            yield Result(_text(shape), layout, dtype, which, name, seconds, megabytes, largest)
    torch.cuda.empty_cache()


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def run(everything: bool, output: Path) -> int:
    """Measure, write all results to a file, print a summary and return the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    torch = importlib.import_module("torch")
    properties = torch.cuda.get_device_properties(0)
    wanted = list(shapes())
    wanted = wanted if everything else wanted[:: len(wanted) // 8]
    todo = list(itertools.product(wanted, LAYOUTS, DTYPES))
    results: list[Result] = []
    stopped = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit: report the results so far
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(todo))
        try:
            for shape, layout, dtype in todo:
                results += measure(shape, layout, dtype, properties.L2_cache_size)
                progress.update(task, advance=1, description=f"{_text(shape)}, {dtype}")
        except KeyboardInterrupt:
            stopped = True
    device = f"{properties.name}, PyTorch {torch.__version__}"
    cache = properties.L2_cache_size / 1e6
    with output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Result._fields, "device", "cache"))
        writer.writerows((*result, device, cache) for result in results)
    print(f"{device}, {len(wanted)} shapes, by device events")
    print("\n".join(summary(results, cache)))
    print(f"every time: {output}" + (", STOPPED before the last shape" if stopped else ""))
    return int(stopped)


def read(path: Path) -> tuple[list[Result], str, float]:
    """Return the results in a file that `run` wrote, the device, and the MB of its cache."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds: dict[str, Callable[[str], Any]] = {"seconds": float, "megabytes": float, "error": float}
    results = [Result(*(kinds.get(n, str)(row[n]) for n in Result._fields)) for row in rows]
    return results, rows[0]["device"], float(rows[0]["cache"])


class Comparison(NamedTuple):
    """A contestant of this package with its peers, over all shapes of a pass, dtype and layout."""

    name: str
    which: str
    dtype: str
    layout: str
    won: list[tuple[float, float]]
    """How many times as fast as the better peer, and at how many MB."""
    shares: list[float]
    """Shares of the floor's speed, of large arrays."""
    errors: tuple[float, float]
    """The largest of this package, and of PyTorch."""


def by_case(results: list[Result]) -> dict[tuple[str, ...], dict[str, Result]]:
    """Return the contestants of each shape, layout, dtype and pass."""
    rows: dict[tuple[str, ...], dict[str, Result]] = {}
    for r in results:
        rows.setdefault((r.shape, r.layout, r.dtype, r.which), {})[r.contestant] = r
    return rows


def compared(results: list[Result], large: float) -> Iterator[Comparison]:
    """Yield comparisons where a peer was measured; `large` arrays have more MB."""
    rows = by_case(results)
    for name, which, dtype, layout in itertools.product(OURS, PASSES, DTYPES, LAYOUTS):
        chosen = [row for key, row in rows.items() if key[1:] == (layout, dtype, which) and name in row]
        won = [
            (min(row[p].seconds for p in PEERS if p in row) / row[name].seconds, row[name].megabytes)
            for row in chosen
            if any(p in row for p in PEERS)
        ]
        if not won:
            continue
        shares = [
            FLOOR[which] * row["copy"].seconds / row[name].seconds
            for row in chosen
            if row[name].megabytes > large and "copy" in row
        ]
        own, theirs = (max(row[n].error for row in chosen if n in row) for n in (name, PEERS[0]))
        yield Comparison(name, which, dtype, layout, won, shares, (own, theirs))


def summary(results: list[Result], cache: float) -> list[str]:
    """Return a table with a line for each contestant of this package, pass, dtype and layout."""
    heading = ("", "times the better of PyTorch", "of the floor", "largest error, eps")
    lines = [f"{heading[0]:52}{heading[1]:30}{heading[2]:26}{heading[3]}"]
    lines += [f"{'':52}{'mean (worst, at MB)':30}{'beyond cache: mean (worst)':26}ours, PyTorch's"]
    for c in compared(results, cache):
        worst, megabytes = min(c.won)
        text = f"{c.name:22}{c.which:10} {c.dtype:9} {c.layout:8}"
        mean = f"{geometric([r for r, _ in c.won]):.2f} ({worst:.2f}, {megabytes:.1f})"
        floor = f"{geometric(c.shares):.2f} ({min(c.shares):.2f})" if c.shares else "-"
        lines.append(f"{text:52}{mean:30}{floor:26}{c.errors[0]:.2f}, {c.errors[1]:.2g}")
    return lines
