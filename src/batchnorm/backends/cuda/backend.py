"""The four kernels, and the forward and backward passes fused, in CUDA C++ for any array library.

The kernels are in the `.cu` files, the arithmetic of single channels in `coefficients.h` and the
activations in `activations.h`, both of which the native core has too, and the launch arithmetic in
`launches.py`. This module prepares the launches: it brings arrays into one memory layout and allocates
results; `running.py` packs the parameters. A `Device` has the operations that depend on the array
library; `devices.py` makes those of CuPy and PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from batchnorm.backends.base import Backend, to_out
from batchnorm.backends.cuda.arrangement import Device, arrange, result_like
from batchnorm.backends.cuda.launches import GIVEN, RAW, SUM, WRITE
from batchnorm.backends.cuda.running import rows, run
from batchnorm.backends.generic import GENERIC
from batchnorm.epilogue import Epilogue, gradient_dtype
from batchnorm.layout import Layout
from batchnorm.moments import Moments

Array = Any


def _read_by(epilogue: Epilogue | None) -> tuple[Array, ...]:
    """Return the big array that is read for an epilogue, z or y, if there is one."""
    if epilogue is None:
        return ()
    given = epilogue.residual if epilogue.y is None else epilogue.y
    return () if given is None else (given,)


def _active(pass_: Callable[..., Any]) -> Any:
    """Return the method, called with its device as the current one."""

    @functools.wraps(pass_)
    def call(self: Cuda, *arguments: Any, **named: Any) -> Any:
        with self.device.active():
            return pass_(self, *arguments, **named)

    return call


class Cuda(Backend):
    """The CUDA kernels on the arrays of one device."""

    name = "cupy"

    def __init__(self, summary: str, device: Device) -> None:
        self.summary, self.device = summary, device

    @_active
    def forward(
        self,
        x: Array,
        w: Array | None,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, Moments]:
        """Return y and the moments of the batch."""
        if w is not None:  # the counts are checked before y is written
            return super().forward(x, w, gamma, beta, eps, layout, epilogue=epilogue, out=out)
        device = self.device
        arranged = arrange(device, layout, None, x, *_read_by(epilogue))
        y = result_like(device, layout, arranged, out)
        given = {"gamma": gamma, "beta": beta}
        table = run(
            device,
            layout,
            "forward",
            SUM | WRITE,
            arranged,
            out=y,
            epilogue=epilogue,
            vectors=given,
            eps=eps,
            table=(4, layout.wide),
        )
        return to_out(layout, y, x.dtype, out), Moments(*rows(layout, table, layout.channels))

    @_active
    def backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: float,
        layout: Layout,
        *,
        beta: Array | None = None,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> tuple[Array, ...]:
        """Return dx, dgamma and dbeta in the dtype of gamma, and with a residual dresidual."""
        if epilogue is None or epilogue.activation is None or dy.dtype != x.dtype or 0 in x.shape:
            given: dict[str, Any] = {"beta": beta, "epilogue": epilogue, "out": out}
            return super().backward(dy, x, w, stats, gamma, eps, layout, **given)
        return self._fused_backward(dy, x, w, stats, gamma, beta, eps, layout, epilogue, out)

    @_active
    def norm_backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        eps: float,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return dx, and dgamma and dbeta in the dtype of gamma, of the norm alone."""
        if dy.dtype != x.dtype or 0 in x.shape:
            return super().norm_backward(dy, x, w, stats, gamma, eps, layout, out=out)
        dx, dgamma, dbeta = self._fused_backward(dy, x, w, stats, gamma, None, eps, layout, None, out)
        return dx, dgamma, dbeta

    def _fused_backward(
        self,
        dy: Array,
        x: Array,
        w: Array | None,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        epilogue: Epilogue | None,
        out: Array | None,
    ) -> tuple[Array, ...]:
        """Run a backward pass in one launch."""
        device = self.device
        arranged = arrange(device, layout, w, x, dy, *_read_by(epilogue))
        dx = result_like(device, layout, arranged, out)
        wanted = epilogue is not None and epilogue.gradient
        dresidual = result_like(device, layout, arranged, None) if wanted else None
        given = dict(zip(("n", "mean", "var", "low"), stats, strict=True), gamma=gamma, beta=beta)
        dtype = layout.compute if gamma is None else gamma.dtype
        table = run(
            device,
            layout,
            "backward",
            SUM | WRITE,
            arranged,
            out=dx,
            dresidual=dresidual,
            epilogue=epilogue,
            vectors=given,
            eps=eps,
            table=(2, dtype),
        )
        dgamma, dbeta = rows(layout, table, layout.channels)
        found = to_out(layout, dx, x.dtype, out), dgamma, dbeta
        return (*found, dresidual) if wanted else found

    @_active
    def inference(
        self,
        x: Array,
        stats: Moments,
        gamma: Array | None,
        beta: Array | None,
        eps: float,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return y, normalized by given statistics."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        if stats.mean_lo is not None:  # the kernel takes no residual of the mean
            return super().inference(x, stats, gamma, beta, eps, layout, epilogue=epilogue, out=out)
        arranged = arrange(self.device, layout, None, x, *_read_by(epilogue))
        y = result_like(self.device, layout, arranged, out)
        vectors = {"mean": stats.mean, "var": stats.var, "gamma": gamma, "beta": beta}
        run(
            self.device,
            layout,
            "normalize",
            WRITE,
            arranged,
            out=y,
            epilogue=epilogue,
            vectors=vectors,
            eps=eps,
        )
        return to_out(layout, y, x.dtype, out)

    @_active
    def moments(self, x: Array, w: Array | None, layout: Layout) -> tuple[Array, Array, Array, Array]:
        """Return count, mean as a high and a low part, and population variance of each channel."""
        if 0 in x.shape:
            return GENERIC.moments(x, w, layout)
        arranged = arrange(self.device, layout, w, x)
        table = run(self.device, layout, "forward", SUM, arranged, table=(4, layout.wide))
        count, mean, var, low = rows(layout, table, layout.broadcast)
        return count, mean, low, var

    def scale_shift(
        self, x: Array, m: Array, a: Array, b: Array, layout: Layout, *, out: Array | None = None
    ) -> Array:
        """Return y = a·(x − m) + b."""
        return self.output(x, m, a, b, layout, out=out)

    @_active
    def output(
        self,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        layout: Layout,
        *,
        epilogue: Epilogue | None = None,
        out: Array | None = None,
    ) -> Array:
        """Return y = act(a·(x − m) + b + z)."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        arranged = arrange(self.device, layout, None, x, *_read_by(epilogue))
        y = result_like(self.device, layout, arranged, out)
        run(
            self.device,
            layout,
            "normalize",
            WRITE | GIVEN,
            arranged,
            out=y,
            epilogue=epilogue,
            factors=(m, a, b),
        )
        return y

    @_active
    def activation_gradient(
        self, dy: Array, x: Array, m: Array, a: Array, b: Array, epilogue: Epilogue, layout: Layout
    ) -> Array:
        """Return g = act'(a·(x − m) + b + z)·dy."""
        same = dy.dtype == x.dtype == gradient_dtype(layout, dy)  # the kernel writes what it reads
        if not same or 0 in x.shape:
            return super().activation_gradient(dy, x, m, a, b, epilogue, layout)
        arranged = arrange(self.device, layout, None, x, dy, *_read_by(epilogue))
        g = result_like(self.device, layout, arranged, None)
        run(  # a backward pass without dx: the b and c of that are not used
            self.device,
            layout,
            "backward",
            WRITE | GIVEN,
            arranged,
            dresidual=g,
            epilogue=epilogue,
            factors=(m, a, b, b, b),
        )
        return g

    @_active
    def grad_sums(
        self, dy: Array, x: Array, m: Array, w: Array | None, layout: Layout
    ) -> tuple[Array, Array]:
        """Return Σdy and Σdy·(x − m) of each channel."""
        if 0 in x.shape:
            return GENERIC.grad_sums(dy, x, m, w, layout)
        arranged = arrange(self.device, layout, w, x, dy)
        table = run(
            self.device,
            layout,
            "backward",
            SUM | RAW | GIVEN,
            arranged,
            factors=(m,),
            table=(2, layout.wide),
        )
        sum_dy, sum_dy_d = rows(layout, table, layout.broadcast)
        return sum_dy, sum_dy_d

    @_active
    def grad_input(
        self,
        dy: Array,
        x: Array,
        m: Array,
        a: Array,
        b: Array,
        c: Array,
        w: Array | None,
        layout: Layout,
        *,
        out: Array | None = None,
    ) -> Array:
        """Return dx = a·(dy + w·(b·(x − m) + c))."""
        if 0 in x.shape:
            return layout.xp.empty_like(x) if out is None else out
        arranged = arrange(self.device, layout, w, x, dy)
        dx = result_like(self.device, layout, arranged, out)
        run(self.device, layout, "backward", WRITE | GIVEN, arranged, out=dx, factors=(m, a, b, c))
        return dx
