"""First and second derivatives of a batch norm of JAX, for the adapters of its frameworks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Array = Any


def derivatives(y: Callable[..., Array]) -> dict[str, Callable[..., Any]]:
    """Return `backward` and `double_backward` of `check_batch_norm`, from y(x, gamma, beta, eps)."""
    import jax
    import jax.numpy as jnp

    def dx(dy: Array, x: Array, gamma: Array, eps: float) -> Array:
        return jax.vjp(lambda x: y(x, gamma, jnp.zeros_like(gamma), eps), x)[1](dy)[0]

    @partial(jax.jit, static_argnames="eps")
    def backward(dy: Array, x: Array, gamma: Array, beta: Array, *, eps: float) -> Any:
        return jax.vjp(lambda *given: y(*given, eps), x, gamma, beta)[1](dy)

    @partial(jax.jit, static_argnames="eps")
    def double_backward(ddx: Array, dy: Array, x: Array, gamma: Array, *, eps: float) -> Any:
        def along(dy: Array, x: Array, gamma: Array) -> Array:
            return (ddx * dx(dy, x, gamma, eps)).sum()

        return jax.grad(along, (0, 1, 2))(dy, x, gamma)

    return {"backward": backward, "double_backward": double_backward}
