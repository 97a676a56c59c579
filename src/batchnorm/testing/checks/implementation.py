"""What a check calls, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from batchnorm.testing import data
from batchnorm.testing.libraries import BFLOAT16

Array = Any

FEATURES = {
    "training": "it normalizes by the batch's own statistics",
    "inference": "it normalizes by the running statistics",
    "running": "it returns new running statistics",
    "start": "running statistics that are None begin where its own layer's do",
    "where": "it takes a mask as the keyword where",
    "shards": "it takes the number of parts of the batch, normalized together, as the keyword shards",
    "axis": "it takes the channel axis as the keyword axis",
    "float16": "it takes float16",
    "bfloat16": "it takes bfloat16",
    "float64": "it takes float64",
    "float64_parameters": "float32 batches may have float64 gamma and beta",
    "mixed": "float16 and bfloat16 batches may have float32 gamma and beta",
    "large": "25 million values take less than a minute",
}
LIMIT = 16.0
"""Errors of y and of gradients that pass, in eps of the dtype times the size of the terms."""


class Implementation(NamedTuple):
    """A batch norm, as the checks call it: NumPy arrays in and out."""

    function: Callable[..., Any]
    backward: Callable[..., Any] | None
    double_backward: Callable[..., Any] | None
    set_threads: Callable[[int], Any] | None
    features: frozenset[str]
    correction: int
    """Bessel's correction of its running variance."""
    convert: Callable[[Array], Array]

    def forward(self, x: Array, vectors: tuple[Array, ...], **settings: Any) -> tuple[Array, ...]:
        """Return y, and the new running mean and variance."""
        settings = {"training": True, "momentum": 0.1, "eps": 1e-5, **settings}
        where = settings.pop("where", None)
        if where is not None:
            settings["where"] = self.convert(where)
        given = [v if v is None else self.convert(v) for v in (x, *vectors)]
        return tuple(v if v is None else as_numpy(v) for v in self.function(*given, **settings))

    def gradients(self, dy: Array, x: Array, vectors: tuple[Array, ...], eps: float = 1e-5) -> Any:
        """Return dx, dgamma and dbeta."""
        assert self.backward is not None
        given = [self.convert(v) for v in (dy, x, *vectors[:2])]
        return tuple(as_numpy(v) for v in self.backward(*given, eps=eps))

    def second(self, ddx: Array, dy: Array, x: Array, gamma: Array, eps: float = 1e-5) -> Any:
        """Return the gradients of sum(ddx * dx) to dy, x and gamma."""
        assert self.double_backward is not None
        given = [self.convert(v) for v in (ddx, dy, x, gamma)]
        return tuple(as_numpy(v) for v in self.double_backward(*given, eps=eps))

    def parameters(self, channels: int, dtype: str = "float32") -> tuple[Array, ...]:
        """Return gamma, beta, and running statistics as a new layer has them, for data of a dtype."""
        wide = dtype == "float64" or "mixed" not in self.features
        gamma, beta = data.parameters((channels,), dtype if wide else "float32")
        return gamma, beta, np.zeros(channels, gamma.dtype), np.ones(channels, gamma.dtype)


def as_numpy(v: Any) -> Array:
    """Return any library's array as NumPy's."""
    if not isinstance(v, np.ndarray) and hasattr(v, "detach"):
        v = v.detach()
    if str(v.dtype).endswith("bfloat16") and not isinstance(v, np.ndarray) and hasattr(v, "float"):
        return np.asarray(v.float()).astype(BFLOAT16)
    return np.asarray(v)


def or_an_error(call: Callable[[], Any]) -> Any:
    """Return what a call gives; None where it raises, which may be as good an answer."""
    try:
        return call()
    except Exception:  # of any framework
        return None


class Check(NamedTuple):
    """A check, and why it matters."""

    run: Callable[..., float]
    why: str
    source: str
    parameters: tuple[dict[str, Any], ...] = ({},)
    needs: frozenset[str] = frozenset({"training"})
    limit: float = LIMIT
