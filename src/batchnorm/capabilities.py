"""The table of supported combinations of library, device, dtype and operation.

`LIBRARIES` lists the tested libraries, and `GAPS` the combinations that do not work, with the reasons;
all others work. The conformance suite expects the failures that are listed here (an entry that works is
an error), and the documentation and `python -m batchnorm info` print the tables.
"""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.layout import FLOATS

OPERATIONS = {
    "forward": "batch_norm",
    "inference": "normalize",
    "backward": "batch_norm_backward, normalize_backward",
    "derivatives": "batch_norm_jvp, batch_norm_double_backward",
    "moments": "moments, Moments.merge, update_running",
    "where": "masks and weights",
    "degenerate": "channels of fewer than two values",
    "renorm": "batch_renorm, batch_renorm_backward, update_renorm",
    "virtual": "virtual batches of a layer",
    "epilogue": "residual=, activation=",
    "layer": "BatchNorm",
    "fold": "fold, fold_linear, fold_conv",
    "out": "writing into out=",
    "large": "25 million values",
    "errors": "an error for a wrong call, before anything is changed",
    "shape-errors": "an error for a shape that does not fit",
    "complex-errors": "an error for complex input",
}


class Library(NamedTuple):
    """An array library that this package is tested with."""

    module: str
    """The module that users import."""
    devices: tuple[str, ...]
    """The devices and modes that the conformance suite runs on."""
    extra: str
    """The extra (or the package) to install; empty for a dependency of this package."""
    note: str = ""
    """A remark for users."""


LIBRARIES = {
    "numpy": Library(
        "numpy", ("native", "numpy", "generic"), "", "each backend; bfloat16 from ml_dtypes"
    ),
    "array_api_strict": Library(
        "array_api_strict",
        ("CPU_DEVICE", "device1", "device2", "no_float64", "no_x64"),
        "test",
        "with boolean indexing and data-dependent shapes off",
    ),
    "torch": Library(
        "torch",
        ("cpu-native", "cpu-numpy", "cpu-generic", "cuda-cupy", "cuda-generic"),
        "torch",
        "cuda: not run yet",
    ),
    "jax": Library(
        "jax.numpy",
        ("eager", "eager-x64", "jit", "jit-x64", "jit-x64-jax"),
        "jax",
        "jit-x64-jax: array code, as on GPUs and TPUs",
    ),
    "dask": Library("dask.array", ("lazy",), "dask", "`compute` is never called"),
    "cupy": Library(
        "cupy", ("cupy", "generic"), "cupy-cuda13x", "not run yet: its kernels only as executed on a CPU"
    ),
    "ndonnx": Library(
        "ndonnx", ("static", "dynamic"), "test", "traces to an ONNX graph, static or dynamic in shape"
    ),
    "dpnp": Library("dpnp", ("default",), "dpnp (not an extra)", "run by hand, on a CPU"),
    "sparse": Library("sparse", ("cpu",), "test", "results are dense in fact, if sparse in type"),
}


class Gap(NamedTuple):
    """Combinations that do not work; "*" matches every value."""

    library: str
    device: str
    dtype: str
    operation: str
    why: str
    tried: bool = True
    """Whether the suite runs it, to detect when it starts to work."""

    def covers(self, library: str, device: str, dtype: str | None, operation: str | None) -> bool:
        """Return whether a case is in this gap."""
        mine = (self.library, self.device, self.dtype, self.operation)
        case = (library, device, dtype, operation)
        return all(a in ("*", b) for a, b in zip(mine, case, strict=True))


GAPS = (
    Gap("jax", "*", "*", "out", "JAX arrays are immutable"),
    Gap("dask", "*", "*", "out", "Dask arrays are lazy"),
    Gap("ndonnx", "*", "*", "out", "ndonnx arrays are lazy"),
    Gap("sparse", "*", "*", "out", "sparse arrays are immutable"),
    Gap("sparse", "*", "*", "virtual", "results of unlike fill values cannot be joined", tried=False),
    Gap("sparse", "*", "*", "large", "takes minutes, with dense data in coordinate format", tried=False),
    Gap("sparse", "*", "bfloat16", "*", "sparse has no bfloat16"),
    Gap("array_api_strict", "*", "float16", "*", "the standard has no float16"),
    Gap("array_api_strict", "*", "bfloat16", "*", "the standard has no bfloat16"),
    Gap("array_api_strict", "no_float64", "float64", "*", "a device without float64"),
    Gap("array_api_strict", "no_x64", "float64", "*", "a device without float64"),
    Gap("jax", "eager", "float64", "*", "needs jax_enable_x64"),
    Gap("jax", "jit", "float64", "*", "needs jax_enable_x64"),
    Gap("ndonnx", "*", "*", "complex-errors", "ndonnx has no complex numbers"),
    Gap("ndonnx", "dynamic", "*", "shape-errors", "the shape is not known before the graph runs"),
    Gap(
        "ndonnx", "dynamic", "*", "virtual", "the number of examples is not known before the graph runs"
    ),
    Gap("dpnp", "*", "bfloat16", "*", "dpnp has no bfloat16"),
    Gap("ndonnx", "*", "bfloat16", "*", "ndonnx has no bfloat16"),
)


def gap(library: str, device: str, dtype: str | None, operation: str | None) -> Gap | None:
    """Return the gap that a case is in, or None if the case works."""
    return next((g for g in GAPS if g.covers(library, device, dtype, operation)), None)


def works(library: str, device: str) -> tuple[list[str], list[str]]:
    """Return the dtypes and the operations that work on a device of a library."""
    dtypes = [d for d in FLOATS if gap(library, device, d, None) is None]
    operations = [op for op in OPERATIONS if gap(library, device, None, op) is None]
    return dtypes, operations
