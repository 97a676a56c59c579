"""Exact population statistics in the place of running averages, from one more pass over a data set."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import array_api_compat as compat

from batchnorm import groups
from batchnorm.arguments import validate_bool, validate_callable, validate_group, validate_iterable
from batchnorm.arrays import on_host
from batchnorm.errors import describe_type, fail, fail_on_all_members
from batchnorm.layer import BatchNorm, channels
from batchnorm.moments import Moments, update_running
from batchnorm.progress import with_progress
from batchnorm.state import cast_like

Array = Any


def recalibrate(
    layers: BatchNorm | Iterable[BatchNorm],
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    group: Any = None,
    progress: bool = True,
) -> None:
    r"""Replace the running statistics of layers by those of a whole data set.

    The network runs in training: each layer normalizes by the batch's own statistics, and the moments
    of its inputs are merged over all batches. Afterwards

    .. math::
        \text{running mean} = \mu, \qquad
        \text{running variance} = \frac{n}{n - \text{correction}} \, \sigma^2

    with the mean and variance of all n values that a channel had, in all batches and places. (The paper
    averages the batches' variances, and so leaves out how their means differ.)

    Parameters
    ----------
    layers : BatchNorm, or iterable of them
        The layers to recalibrate, with running statistics. Others in the network stay as they are.
    forward : callable
        Called with each batch; runs the network, and so the layers. What it returns is not used.
    batches : iterable
        The data set. With Dask, batches of Dask arrays: nothing is computed before the last one.
    group : optional
        The members, each with batches of its own, as many as it has. Within a batch each goes by its
        own statistics. Left out, layers that have a group of their own normalize over it, as they do in
        training, and all members then need the same number of batches.
    progress : bool, default True
        Whether to show a progress bar on standard error, where rich is installed.

    Raises
    ------
    TypeError
        Something among `layers` is not a `BatchNorm`, or an argument is of a wrong kind.
    ValueError
        No layers, no batches, a layer without running statistics, or one that `forward` does not call.

    Notes
    -----
    An error, or an interrupt by the user, leaves the layers as they were before.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, steps 7 to 10.
    """
    validate_group(group)
    with groups.call(group, "recalibrate") as call:
        if not isinstance(layers, BatchNorm):
            validate_iterable("layers", layers, "a BatchNorm, or an iterable of them")
        chosen = [layers] if isinstance(layers, BatchNorm) else list(layers)
        _check(chosen)
        validate_callable("forward", forward, "a function of a batch")
        validate_iterable("batches", batches, "an iterable of batches")
        progress = validate_bool("progress", progress)
        with contextlib.ExitStack() as stack:
            alone = group is not None
            collected = [stack.enter_context(layer._collecting(alone=alone)) for layer in chosen]
            count, totals = _totals(collected, forward, batches, progress)
            if call is not None:
                count, totals = _of_all_members(chosen, count, totals, call)
            new = _statistics(chosen, count, totals)
    for layer, statistics in zip(chosen, new, strict=True):
        layer._commit(*statistics)


def _check(layers: Sequence[Any]) -> None:
    if not layers:
        fail(ValueError, "layers", "none", "at least one BatchNorm")
    for i, layer in enumerate(layers):
        if not isinstance(layer, BatchNorm):
            fail(TypeError, f"layers[{i}]", describe_type(layer), "a BatchNorm")
        if not layer.track_running_stats:
            got = "a layer with track_running_stats=False"
            fail(ValueError, f"layers[{i}]", got, "one with running statistics")


def _totals(
    collected: list[list[Moments]], forward: Callable[[Any], Any], batches: Iterable[Any], progress: bool
) -> tuple[int, list[Moments | None]]:
    """Run all batches; return their number, and the moments of each layer's inputs."""
    stacks: list[list[tuple[int, Moments]]] = [[] for _ in collected]
    count = 0
    for batch in with_progress(batches, "recalibrating") if progress else batches:
        forward(batch)
        count += 1
        for moments, stack in zip(collected, stacks, strict=True):
            for own in moments:
                _push(stack, own)
            moments.clear()
    for i, stack in enumerate(stacks):
        if count and not stack:
            got = "no input from any batch"
            fail(ValueError, f"layers[{i}]", got, "a layer that `forward` calls")
    return count, [Moments.merge(*(m for _, m in stack)) if stack else None for stack in stacks]


def _push(stack: list[tuple[int, Moments]], own: Moments) -> None:
    """Push moments of one batch; merge those of equally many, so that errors grow with the log."""
    size = 1
    while stack and stack[-1][0] == size:
        _, other = stack.pop()
        own, size = Moments.merge(other, own), 2 * size
    stack.append((size, own))


def _of_all_members(
    layers: list[BatchNorm], count: int, totals: list[Moments | None], call: groups.Call
) -> tuple[int, list[Moments | None]]:
    """Return the number of all members' batches, and the moments of each layer's inputs on all of them.

    They are merged as NumPy's float64, whatever a layer's arrays are: a member without batches does not
    know what these will be.
    """
    import numpy as np

    shapes = [channels(layer.num_features) for layer in layers]
    sums = [shape for c in shapes for shape in groups.moments_sums(call.group, c)]
    call.announce(f"{len(layers)} layers with {shapes} channels", [*sums, (1, 1)], "float64")
    found: list[Moments | None] = []
    for layer, shape, total in zip(layers, shapes, computed(totals), strict=True):
        nothing = Moments(*np.zeros((4, *shape)))
        joined = call.allreduce_moments(
            nothing if total is None else Moments(*(np.asarray(on_host(v), np.float64) for v in total)),
        )
        found.append(Moments(*(cast_like("batches", v, layer.running_mean) for v in joined)))
    (batches,) = call.all_reduce(np.asarray([float(count)]))
    return int(batches[0]), found


def _statistics(
    layers: list[BatchNorm], count: int, totals: list[Moments | None]
) -> list[tuple[Array, Array, int]]:
    """Return the new running mean and variance of each layer, and the number of batches."""
    if count == 0:
        fail_on_all_members(ValueError, "batches", "none", "at least one")  # of all members
    found: list[Any] = []
    for layer, total in zip(layers, totals, strict=True):
        assert total is not None  # or there would be no batches
        old: Any = layer.running_mean, layer.running_var
        xp, n = compat.array_namespace(total.mean), total.count
        # From nothing: what is there may be NaN, which no momentum would take away.
        mean, var = map(xp.zeros_like, old)
        new = update_running(mean, var, total, momentum=1, correction=layer.correction)
        found.append((*(xp.where(n > 0, v, o) for v, o in zip(new, old, strict=True)), count))
    return computed(found)


def computed(found: list[Any]) -> list[Any]:
    """Return statistics; those of lazy arrays computed, all at once."""
    if any(compat.is_dask_array(v) for item in found if item is not None for v in item):
        dask: Any = importlib.import_module("dask")
        (found,) = dask.persist(found)
        dask.compute(found)  # a cluster's client does not wait for what it persists
    return found
