"""A norm with fixed statistics is a scale and a shift: fold it into what stands before it."""

from __future__ import annotations

from typing import Any

from batchnorm import checks

Array = Any


def fold(
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    r"""The scale and shift that `normalize` amounts to.

    .. math::
        \text{scale} = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
        \text{shift} = \beta - \mu \, \text{scale}

    Parameters
    ----------
    mean, var : array, shape (C,)
        The running statistics.
    gamma, beta : array, shape (C,), optional
        1 and 0 where they are left out.
    eps : float, default 1e-5
        Added to the variance.

    Returns
    -------
    scale, shift : array, shape (C,)
        In the dtype of `mean`. ``scale * x + shift`` cancels digits where ``|mean|`` is large against
        the standard deviation; `normalize` does not.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.
    """
    at = checks.subject(mean, tuple(range(getattr(mean, "ndim", 0))), "mean")
    checks.vectors(at, var=var, gamma=gamma, beta=beta)
    checks.scalar("eps", eps, 0)
    scale = 1 / at.xp.sqrt(at.vector(var) + eps)
    if gamma is not None:
        scale = at.vector(gamma) * scale
    shift = -at.vector(mean) * scale
    if beta is not None:
        shift = at.vector(beta) + shift
    return tuple(at.xp.astype(v, mean.dtype, copy=False) for v in (scale, shift))


def fold_linear(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "OI",
) -> tuple[Array, Array]:
    r"""Weights of a linear layer that does the norm behind it as well.

    .. math:: W' = \text{scale} \cdot W, \qquad b' = (b - \mu) \, \text{scale} + \beta

    Parameters
    ----------
    weight : array
        W, with the axes that `layout` names.
    bias : array, shape (O,), or None
        b; None for 0. The norm makes it superfluous in training.
    mean, var, gamma, beta, eps
        Of the norm, as in `fold`; shape (O,).
    layout : str, default "OI"
        The axes of `weight`, O for outputs and I for inputs: "OI" (PyTorch) or "IO" (Keras, Flax).

    Returns
    -------
    weight, bias : array
        In the shape and dtype of `weight`; the bias of shape (O,).

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; and a layout that does not fit.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> weight, bias = bn.fold_linear(np.eye(2), None, np.asarray([1.0, 2.0]), np.ones(2), eps=0.0)
    >>> bias
    array([-1., -2.])
    """
    return _fold_weight(weight, bias, mean, var, gamma, beta, eps, layout)


def fold_conv(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    layout: str = "OIHW",
) -> tuple[Array, Array]:
    """Weights of a convolution that does the norm behind it as well.

    Parameters
    ----------
    weight : array
        W, with the axes that `layout` names.
    bias, mean, var, gamma, beta, eps
        As in `fold_linear`.
    layout : str, default "OIHW"
        The axes of `weight`, O for outputs, I for inputs and any other letters for space: "OIHW"
        (PyTorch), "HWIO" (Keras, Flax), "OHWI", "IOHW" (PyTorch's transposed convolution without
        groups), "OIDHW", "OIL". In a grouped convolution I is the inputs of one group.

    Returns
    -------
    weight, bias : array
        In the shape and dtype of `weight`; the bias of shape (O,).

    Raises
    ------
    TypeError, ValueError
        As `fold_linear`.
    """
    return _fold_weight(weight, bias, mean, var, gamma, beta, eps, layout)


def _fold_weight(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    layout: str,
) -> tuple[Array, Array]:
    checks.namespace("weight", weight)
    if (
        not isinstance(layout, str)
        or len(set(layout)) != weight.ndim
        or len(layout) != weight.ndim
        or not {"O", "I"} <= set(layout)
    ):
        expected = f"{weight.ndim} different letters, O and I among them"
        checks.fail(ValueError, "layout", repr(layout), f"{expected}, for {weight.ndim}-d weights")
    at = checks.subject(weight, layout.index("O"), "weight")
    checks.vectors(at, bias=bias, mean=mean, var=var, gamma=gamma, beta=beta)
    checks.scalar("eps", eps, 0)
    scale, _ = fold(at.xp.astype(mean, at.wide), at.xp.astype(var, at.wide), gamma, eps=eps)
    folded = at.vector(scale) * at.xp.astype(weight, at.wide)
    centred = -at.xp.astype(mean, at.wide)
    if bias is not None:
        centred = at.xp.astype(bias, at.wide) + centred
    shift = centred * scale
    if beta is not None:
        shift = shift + at.xp.astype(beta, at.wide)
    return tuple(at.xp.astype(v, weight.dtype, copy=False) for v in (folded, shift))
