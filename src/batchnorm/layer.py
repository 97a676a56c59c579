"""BatchNorm: parameters, running statistics, training and inference, state in and out."""

from __future__ import annotations

import contextlib
import operator
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple, Self

import array_api_compat as compat

from batchnorm import groups, optimistic
from batchnorm.arguments import (
    validate_axis,
    validate_bool,
    validate_choice,
    validate_dtype,
    validate_group,
    validate_number,
)
from batchnorm.arrays import library_name, same_shape
from batchnorm.degenerate import CHOICES
from batchnorm.epilogue import Activation, kept_for_backward, validate_activation, validate_epilogue
from batchnorm.errors import describe, fail
from batchnorm.functional import batch_norm_backward, moments, normalize, normalize_backward
from batchnorm.layout import Layout, has_float64
from batchnorm.moments import Moments, update_running
from batchnorm.overlap import same_memory
from batchnorm.presets import PRESETS
from batchnorm.renormalization import update_renorm
from batchnorm.state import cast_like, validate_state
from batchnorm.tracing import is_jax_tracer, jax_trace
from batchnorm.training import (
    NONFINITE,
    Running,
    Way,
    guarded,
    limits_at,
    moments_of,
    validate_renorm,
    validate_size,
    validate_together,
    way_of,
)
from batchnorm.validation import validate_input, validate_out, validate_vectors, validate_weights

Array = Any

PARAMETERS = ("gamma", "beta")
RUNNING = ("running_mean", "running_var")


class _Pass(NamedTuple):
    """What backward needs of a forward pass."""

    x: Array
    stats: Moments
    by_batch: bool
    gamma: Array | None
    where: Array | None
    group: Any
    pending: Moments | None
    activation: Any
    beta: Array | None
    residual: Array | bool | None
    y: Array | None
    way: Any = None
    """How the batch was normalized: see `training`."""


class BatchNorm(groups.Shared):
    r"""Batch normalization with parameters and running statistics.

    .. math::
        y = \operatorname{act}\left(
        \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + z \right)

    In training, :math:`\mu, \sigma^2` are the batch's own; in inference, the running ones.

    The running statistics move in a step of its own: a forward pass in training only keeps the
    batch's moments, and `backward` (or `update`, where there is no backward pass) commits the last
    ones. A forward pass that is repeated before that, be it recomputation or a retry after an
    error, is therefore counted once.

    Parameters
    ----------
    num_features : int or tuple of ints
        The number of channels C; a tuple where `axis` is one.
    axis : int or tuple of ints, default 1
        The channel axis (or axes): 1 for channels second, -1 for channels last.
    eps : float, default 1e-5
        Added to the variance.
    momentum : float or None, default 0.1
        The weight of the new batch in the running statistics; None for the cumulative average.
    correction : float, default 1
        Bessel's correction of the running variance: 1 unbiased, 0 population.
    affine : bool, default True
        Whether there are gamma and beta.
    track_running_stats : bool, default True
        Whether there are running statistics. Without, inference uses the batch's own too.
    activation : {"relu", "relu6", "leaky_relu", "silu"}, ("leaky_relu", slope) or None
        Applied in the same pass, as in `batch_norm`; an attribute that may be assigned to.
    degenerate : {"raise", "shift"}
        What becomes of a channel with fewer than two values in training, as in `batch_norm`.
    renorm : tuple (r_max, d_max), optional
        Batch renormalization, with the limits of `batch_renorm`: numbers, None for none, or functions
        that return them from `num_batches_tracked`. The running variance is then moved as by
        `update_renorm`.
    virtual_batch_size : int, optional
        Training batches are normalized in parts of so many examples (ghost batches, Hoffer et al. 2017),
        each by statistics of its own; a last part may be smaller. The running statistics are moved by
        those of the whole batch.
    nonfinite : {"propagate", "raise", "skip"}
        What becomes of a batch whose mean or variance is NaN or infinite, when its statistics are to be
        committed: they reach the running ones; it is an error that names the channels, and nothing
        changes; or the batch is left out. Where values cannot be looked at, "raise" is "skip".
    group : optional
        The members over which batches are joined, as in `batch_norm`; a call may name another.
    xp : module, optional
        The array API namespace of the layer's arrays. Left out, they are NumPy's until the first
        input, whose library and device they then take.
    device : optional
        The device of the layer's arrays; only with `xp`.
    dtype : optional
        The dtype of gamma and beta; float32 where it is left out, or float64 if the first input is.

    Attributes
    ----------
    gamma, beta : array, shape (C,), or None
        The parameters; assign to them to train.
    gamma_grad, beta_grad : array, shape (C,), or None
        Their gradients from the last `backward`.
    running_mean, running_var : array, shape (C,), or None
        In float64 where the device has it, so that a large mean keeps its digits.
    num_batches_tracked : int
        How many batches were committed.
    batch_statistics : bool
        First switch: whether the batch's own statistics normalize, or the running ones.
    update_statistics : bool
        Second switch: whether the running statistics are updated.
    trainable : bool
        Third switch, which `train` and `eval` leave alone: whether `backward` gives gradients of
        gamma and beta.

    Raises
    ------
    TypeError, ValueError
        An argument that is out of its range. A call that raises changes nothing in the layer.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> layer = bn.BatchNorm(3)
    >>> x = np.arange(12.0).reshape(4, 3)
    >>> y = layer(x)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.num_batches_tracked
    1
    """

    gamma: Array | None
    beta: Array | None
    running_mean: Array | None
    running_var: Array | None

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        axis: int | tuple[int, ...] = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        correction: float = 1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: Any = None,
        degenerate: str = "raise",
        renorm: tuple[Any, Any] | None = None,
        virtual_batch_size: int | None = None,
        nonfinite: str = "propagate",
        group: Any = None,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        shape = channels(num_features)
        kept = validate_axis(axis)
        if len(kept) != len(shape):
            got, expected = f"{len(kept)} axes", f"{len(shape)}, one per number in num_features"
            fail(ValueError, "axis", got, expected)
        eps = validate_number("eps", eps, 0)
        correction = validate_number("correction", correction, 0)
        if momentum is not None:
            momentum = validate_number("momentum", momentum, 0, 1)
        affine = validate_bool("affine", affine)
        track_running_stats = validate_bool("track_running_stats", track_running_stats)
        if renorm is not None and not track_running_stats:
            fail(ValueError, "renorm", "one without running statistics", "track_running_stats=True")
        if dtype is not None:
            validate_dtype("dtype", dtype)
        if device is not None and xp is None:
            fail(ValueError, "device", repr(device), "xp beside it, the library of the device")
        validate_group(group)
        self.degenerate = validate_choice("degenerate", degenerate, CHOICES)
        self.nonfinite = validate_choice("nonfinite", nonfinite, NONFINITE)
        self.renorm = validate_renorm(renorm)
        self.virtual_batch_size = validate_size(virtual_batch_size)
        validate_together(renorm, virtual_batch_size, degenerate, None)

        self.num_features, self.axis, self.eps = num_features, axis, eps
        self.momentum, self.correction = momentum, correction
        self.affine, self.track_running_stats = affine, track_running_stats
        self.activation: Any = validate_activation(activation)
        self.group, self.dtype = group, dtype
        self.num_batches_tracked: Any = 0
        self.gamma_grad: Array | None = None
        self.beta_grad: Array | None = None
        self.trainable = True
        self._saved: _Pass | None = None
        self._pending: Moments | None = None
        self._collected: list[Moments] | None = None  # of passes, while `recalibrate` collects them
        self._bound = False
        self._trace = jax_trace()  # of JAX, in which it was made, or its state was loaded
        self.train()

        import numpy as np  # at home in every environment, yet not needed to import this package

        self.gamma, self.running_var = np.ones(shape), np.ones(shape)
        self.beta, self.running_mean = np.zeros(shape), np.zeros(shape)
        if not affine:
            self.gamma = self.beta = None
        if not track_running_stats:
            self.running_mean = self.running_var = None
        if xp is not None:
            xp = _namespace(xp, device)
            self._bind(self._cast(xp, device, dtype or xp.float32))

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: not the group, nor the transformation of JAX around the layer."""
        return {name: v for name, v in super().__getstate__().items() if name != "_trace"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, group=None, _trace=jax_trace())

    @classmethod
    def like(cls, framework: str, num_features: int | tuple[int, ...], **settings: Any) -> Self:
        """Make a layer with another framework's defaults.

        Parameters
        ----------
        framework : {"pytorch", "keras", "flax", "chainer", "onnx", "haiku", "equinox", "tensorflow", \
"mxnet", "mlx", "tinygrad"}
            Sets `axis`, `eps`, `momentum` and `correction`.
        num_features : int or tuple of ints
            The number of channels.
        **settings
            Arguments of `BatchNorm`, which take precedence.

        Returns
        -------
        BatchNorm
            In this package's conventions: Keras's ``momentum=0.99`` is ``momentum=0.01`` here.

        Raises
        ------
        ValueError
            A framework that is not in the table.
        """
        validate_choice("framework", framework, PRESETS)
        return cls(num_features, **{**PRESETS[framework].settings(), **settings})

    def train(self, mode: bool = True) -> Self:
        """Normalize by the batch's statistics and update the running ones; or, with False, neither."""
        mode = validate_bool("mode", mode)
        self.batch_statistics = mode or not self.track_running_stats
        self.update_statistics = mode and self.track_running_stats
        return self

    def eval(self) -> Self:
        """Normalize by the running statistics, and leave them alone."""
        return self.train(False)

    def __call__(
        self,
        x: Array,
        *,
        where: Array | None = None,
        group: Any = None,
        residual: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize x.

        Parameters
        ----------
        x : array, shape (..., C, ...)
            float16, bfloat16, float32 or float64.
        where, group, residual, out
            As in `batch_norm`; `where` and `group` matter to the batch's statistics only. Left out,
            `group` is the layer's. With `x` itself as `out`, there is no `backward` from this call, nor
            with the residual where its values are needed ("silu"). With a residual and an activation,
            `backward` reads y, which must not have been changed.

        Returns
        -------
        array
            y, of the shape, dtype, library and device of `x`.

        Raises
        ------
        TypeError, ValueError
            As `batch_norm`; and an `x` of another library than the layer's arrays.
        RuntimeError
            JAX traces a training pass of a layer that was made outside of the traced function.
        """
        group = self.group if group is None else group
        if self._bound and where is None and group is None and out is None:
            done = self._whole_call(x, residual)
            if done is not None:
                return done
        validate_group(group)
        if not (self.batch_statistics or self.update_statistics):
            group = None  # there is nothing to join
        with groups.call(group, "BatchNorm"):
            layout, state = self._validated(x)
            if not self.batch_statistics:
                validate_weights(layout, x, where)
                validate_out(layout, x, out)
                validate_epilogue(layout, x, residual, self.activation)

        gamma, beta = state["gamma"], state["beta"]
        mean, var = state["running_mean"], state["running_var"]
        settings: dict[str, Any] = {"axis": self.axis, "eps": self.eps, "out": out}
        settings |= {"residual": residual, "activation": self.activation}
        pending = None
        way = None
        if self.batch_statistics:
            way = self._way(mean, var, group)
            members = {} if group is None else {"group": group}
            y, stats = way.forward(x, gamma, beta, where=where, **members, **settings)
            pending = moments_of(stats) if self.update_statistics else None
        else:
            if self.update_statistics:
                pending = self._moments(layout, x, where, group)
            else:
                self._warn_if_never_committed()
            stats = Moments(1, mean, var)
            y = normalize(x, mean, var, gamma, beta, **settings)

        # What JAX traces would leak from inference, and from a training pass of a layer made elsewhere.
        if pending is not None or not any(map(is_jax_tracer, state.values())):
            if pending is not None and is_jax_tracer(pending.mean) and self._trace != jax_trace():
                got = "a training pass that JAX traces, of a layer that was made outside"
                expected = "its state in and out: load_state_dict before the pass, state_dict() after it"
                fail(RuntimeError, "BatchNorm", got, expected)
            self._bind(state)
        if pending is not None:
            pending = _detached(pending)
            if self._collected is None:
                self._pending = pending
            else:
                self._collected.append(pending)
        # Where y took the place of x there is nothing left to go back from, and what JAX traces is no
        # longer there when the trace has ended.
        gone = same_memory(out, x) or (is_jax_tracer(y) and self._trace != jax_trace())
        last = self._kept_of_epilogue(beta, residual, y)
        if residual is not None and last[2] is residual:
            gone = gone or same_memory(out, residual)
        saved = _Pass(x, stats, self.batch_statistics, gamma, where, group, pending, *last, way)
        self._saved = None if gone else saved
        return y

    def _kept_of_epilogue(
        self, beta: Array | None, residual: Array | None, y: Array
    ) -> tuple[Activation | None, Array | None, Array | bool | None, Array | None]:
        """Return the activation, and what `backward` needs of beta, the residual and y."""
        activation = validate_activation(self.activation)
        name = None if activation is None else activation.name
        beta, z, y = kept_for_backward(name, beta, residual, y)
        return activation, beta, True if z is None and residual is not None else z, y

    def backward(self, dy: Array, *, out: Array | None = None) -> Array | tuple[Array, Array]:
        """Back-propagate through the last call, and commit its statistics.

        Sets `gamma_grad` and `beta_grad` (where there are parameters and they are `trainable`), and
        does what `update` does for this pass. One forward pass serves one backward pass.

        Parameters
        ----------
        dy : array, shape (..., C, ...)
            Gradient of the loss with respect to y.
        out : array, optional
            Where to write dx; may be `dy`.

        Returns
        -------
        dx : array
            Of the shape, dtype, library and device of `x`.
        dresidual : array
            As dx; only if the call had a residual.

        Raises
        ------
        RuntimeError
            There was no forward pass, or its backward pass is done.
        TypeError, ValueError
            As `batch_norm_backward`.
        """
        if self._saved is None:
            with groups.call(self.group if self.batch_statistics else None, "backward"):
                got = "no forward pass to go back from"
                fail(RuntimeError, "backward", got, "a call of the layer first")
        x, stats, by_batch, gamma, where, group, pending, *epilogue, way = self._saved
        running = None
        # Statistics of another pass are not this one's to commit, nor those that were committed.
        if pending is not None and pending is self._pending:
            with groups.call(group if by_batch else None, "backward"):
                running = self._updated(pending)
        settings: dict[str, Any] = {"axis": self.axis, "eps": self.eps, "out": out}
        activation, beta, residual, y = epilogue
        settings |= {"residual": residual, "activation": activation, "y": y}
        if by_batch:
            backward = batch_norm_backward if way is None else way.backward
            settings |= {} if group is None else {"group": group}
            grads = backward(dy, x, stats, gamma, beta, where=where, **settings)
        else:
            grads = normalize_backward(dy, x, stats.mean, stats.var, gamma, beta, **settings)
        dx, dgamma, dbeta, *dresidual = grads
        if running is not None:
            self._commit(*running)
        trained = self.affine and self.trainable
        self.gamma_grad, self.beta_grad = (dgamma, dbeta) if trained else (None, None)
        self._saved = None
        return (dx, dresidual[0]) if dresidual else dx

    def update(self) -> None:
        """Commit the moments of the last training pass to the running statistics, once.

        Does nothing where there is nothing to commit: `backward` calls it, and whoever runs training
        passes without `backward` calls it after each.
        """
        if self._pending is not None:
            self._commit(*self._updated(self._pending))

    def state_dict(self) -> dict[str, Any]:
        """Return the arrays of the layer (not copies) and the number of committed batches, by name."""
        state = {name: v for name, v in self._arrays().items() if v is not None}
        return (
            {**state, "num_batches_tracked": self.num_batches_tracked}
            if self.track_running_stats
            else state
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state, whole or not at all.

        Parameters
        ----------
        state : mapping
            With the keys of `state_dict`. Arrays of the layer's library, or NumPy's; a layer that
            has seen no input takes the library of the state.

        Raises
        ------
        TypeError
            An array of another library, or one that is not floating.
        ValueError
            Missing or unknown keys, a shape that does not fit, a variance below zero.
        """
        arrays, count = validate_state(state, self.state_dict())
        target = {name: self._arrays()[name] for name in arrays}
        ordered = (arrays[name] for name in PARAMETERS + RUNNING if name in arrays)
        first = next((v for v in ordered if not compat.is_numpy_array(v)), None)
        if not self._bound and first is not None:
            layout = validate_input(first, tuple(range(first.ndim)))
            moved = self._cast(layout.xp, layout.device, self.dtype or layout.compute)
            target = {name: moved[name] for name in arrays}
        new = {name: cast_like(name, v, target[name]) for name, v in arrays.items()}

        for name, v in new.items():
            setattr(self, name, v)
        self._bound = self._bound or first is not None
        if any(map(is_jax_tracer, new.values())):
            self._trace = jax_trace()
        if self.track_running_stats:
            self.num_batches_tracked = count
        self._saved = self._pending = None

    def __repr__(self) -> str:
        names: tuple[str, ...] = ("axis", "eps", "momentum", "correction", "affine")
        names += ("track_running_stats",)
        defaults = {"activation": None, "degenerate": "raise", "renorm": None}
        defaults |= {"virtual_batch_size": None, "nonfinite": "propagate"}
        names += tuple(name for name, value in defaults.items() if getattr(self, name) != value)
        settings = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"{type(self).__name__}({self.num_features}, {settings})"

    def _whole_call(self, x: Array, residual: Array | None) -> Array | None:
        """Run a call in compiled code, which reads arrays as they are; None if it declines the call."""
        state = self.gamma, self.beta, self.running_mean, self.running_var
        fast = optimistic.for_array(x)
        by_batch, updates = self.batch_statistics, self.update_statistics
        special = self.renorm is not None or self.virtual_batch_size is not None
        if (
            (updates and (not by_batch or self.running_mean is None))
            or (by_batch and (special or self.degenerate != "raise"))
            or self._collected is not None
            or not fast.fits(x, self.axis, *state)
        ):
            return None
        gamma, beta, mean, var = state
        last = residual, self.activation, None, False
        if by_batch:
            found = fast.forward(x, gamma, beta, self.axis, self.eps, None, *last)
        else:
            if mean is None or self._pending is not None:  # which may be a reason for a warning
                return None
            y = fast.inference(x, mean, var, None, gamma, beta, self.axis, self.eps, *last)
            found = None if y is None else (y, Moments(1, mean, var))
        if found is None:
            return None
        y, stats = found
        if gamma is None and mean is None and stats.mean.shape != channels(self.num_features):
            return None
        pending = None
        if updates:
            pending = self._pending = _detached(stats)
        kept = self._kept_of_epilogue(beta, residual, y)
        self._saved = _Pass(x, stats, by_batch, gamma, None, None, pending, *kept)
        return y

    def _validated(self, x: Array) -> tuple[Layout, dict[str, Array | None]]:
        """Check an input; its layout, and the layer's arrays in its library."""
        layout = validate_input(x, self.axis)
        expected = channels(self.num_features)
        if not same_shape(layout.channels, expected):
            got, axis = f"shape {tuple(x.shape)}", f"{expected} channels at axis {self.axis}"
            fail(ValueError, "x", got, axis)
        state = self._arrays()
        if not self._bound:
            state = self._cast(layout.xp, layout.device, self.dtype or layout.compute)
        validate_vectors(layout, **state)
        if self.running_mean is None and (self.update_statistics or not self.batch_statistics):
            switch = "update_statistics" if self.update_statistics else "batch_statistics"
            got = repr(getattr(self, switch))
            fail(ValueError, switch, got, "a layer with track_running_stats=True for that")
        return layout, state

    def _moments(self, layout: Layout, x: Array, where: Array | None, group: Any) -> Moments:
        """Return the moments of a batch, or of all members' batches."""
        if group is None:
            return moments(x, axis=self.axis, where=where)
        with groups.call(group, "moments") as call:
            call.announce_forward(layout, x)
            own = _detached(moments(x, axis=self.axis, where=where))
            joined: Moments = call.allreduce_moments(own)
            return joined

    def _arrays(self) -> dict[str, Array | None]:
        return {name: getattr(self, name) for name in PARAMETERS + RUNNING}

    def _cast(self, xp: ModuleType, device: Any, dtype: Any) -> dict[str, Array | None]:
        """Return the layer's arrays in a library: parameters in `dtype`, statistics in its widest."""
        wide = xp.float64 if has_float64(xp, device) else xp.float32
        dtype = getattr(xp, validate_dtype("dtype", dtype), dtype)  # the library's own of that name
        moved: dict[str, Array | None] = {}
        for name, v in self._arrays().items():
            kind = dtype if name in PARAMETERS else wide
            moved[name] = v  # None, or assigned by the user and checked with the rest
            if v is not None and compat.is_numpy_array(v):
                moved[name] = xp.asarray(v.tolist(), dtype=kind, device=device)
        return moved

    def _updated(self, pending: Moments) -> tuple[Array, Array, Any]:
        """Return the running statistics and their count once pending ones are committed."""
        before: Running = self.running_mean, self.running_var, self.num_batches_tracked
        count = before[2] + 1
        momentum = 1 / count if self.momentum is None else self.momentum
        old = before[0], before[1], pending
        if self.renorm is None:
            moved = update_running(*old, momentum=momentum, correction=self.correction)
        else:
            moved = update_renorm(*old, momentum=momentum, eps=self.eps)
        return guarded(self.nonfinite, before, (*moved, count), pending)

    def _way(self, mean: Array, var: Array, group: Any) -> Way:
        """Return how a batch is normalized in training."""
        size, renorm = self.virtual_batch_size, limits_at(self.renorm, self.num_batches_tracked)
        validate_together(renorm, size, self.degenerate, group)
        return way_of(size, renorm, (mean, var), self.degenerate)

    @contextlib.contextmanager
    def _collecting(self, *, alone: bool) -> Iterator[list[Moments]]:
        """Normalize by the batch's own statistics, and collect the moments of passes in a list.

        Afterwards the layer's switches, group and pending statistics are as they were; after an error,
        everything is. With `alone`, the layer's group is left out.
        """
        before = dict(vars(self))
        self.batch_statistics = self.update_statistics = True
        collected: list[Moments] = []
        self._collected = collected
        if alone:
            self.group = None
        try:
            yield collected
        except BaseException:
            vars(self).update(before)
            raise
        names = ("batch_statistics", "update_statistics", "group", "_saved", "_pending", "_collected")
        for name in names:  # a layer that had seen no input keeps the library that it has now
            setattr(self, name, before[name])

    def _commit(self, mean: Array, var: Array, count: Any) -> None:
        """Replace the running statistics and the number of batches; nothing is pending then."""
        self.running_mean, self.running_var, self.num_batches_tracked = mean, var, count
        self._pending = None

    def _bind(self, state: dict[str, Array | None]) -> None:
        """Make a state the layer's own; from now on its library is fixed."""
        for name, v in state.items():
            setattr(self, name, v)
        self._bound = True

    def _warn_if_never_committed(self) -> None:
        count = self.num_batches_tracked
        if self._pending is not None and isinstance(count, int) and count == 0:
            warnings.warn(
                "inference with running statistics that were never updated, though a training pass "
                "was made: call backward() or update() after each training pass",
                UserWarning,
                stacklevel=3,
            )


def channels(num_features: Any) -> tuple[int, ...]:
    """Return the shape of gamma."""
    given = num_features if isinstance(num_features, tuple) else (num_features,)
    try:
        shape = tuple(operator.index(n) for n in given if not isinstance(n, bool))
    except TypeError:
        shape = ()
    if len(shape) != len(given) or not all(0 < n <= sys.maxsize for n in shape):
        got = describe(num_features)
        fail(ValueError, "num_features", got, "a positive int, or a tuple of them")
    return shape


def _namespace(xp: Any, device: Any) -> ModuleType:
    """Return the array API namespace of a module, and check that it knows the device."""
    try:
        found: ModuleType = compat.array_namespace(xp.zeros(()))
    except (AttributeError, TypeError):
        fail(TypeError, "xp", describe(xp), "the module of an array API library")
    try:
        found.zeros((), device=device)
    except Exception as error:  # each library has errors of its own for a device that it does not know
        got = f"{describe(device)} ({type(error).__name__})"
        fail(ValueError, "device", got, f"a device of {library_name(found)}")
    return found


def _detached(stats: Moments) -> Moments:
    """Cut statistics out of PyTorch's graph: running ones have no gradient."""
    if not hasattr(stats.mean, "detach"):
        return stats
    fields: tuple[Any, ...] = stats
    return Moments(*(v.detach() if hasattr(v, "detach") else v for v in fields))
