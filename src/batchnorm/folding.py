"""Folding of a norm with fixed statistics into the layer before it."""

from __future__ import annotations

from typing import Any

from batchnorm.arguments import validate_number
from batchnorm.arrays import namespace
from batchnorm.coefficients import rstd_and_scale
from batchnorm.errors import fail
from batchnorm.layout import Layout
from batchnorm.validation import validate_input, validate_vectors

Array = Any


def fold(
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    r"""Return the scale and shift that are equivalent to `normalize`.

    .. math::
        \text{scale} = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \qquad
        \text{shift} = \beta - \mu \, \text{scale}

    Parameters
    ----------
    mean, var : array, shape (C,)
        The running statistics.
    gamma, beta : array, shape (C,), optional
        Scale and shift; 1 and 0 by default.
    eps : float, default 1e-5
        Added to the variance.

    Returns
    -------
    scale, shift : array, shape (C,)
        Vectors in the dtype of `mean`. Unlike `normalize`, ``scale * x + shift`` loses digits by
        cancellation if ``|mean|`` is large compared with the standard deviation.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy (2015), Algorithm 2, step 11.
    """
    array_layout = validate_input(mean, tuple(range(getattr(mean, "ndim", 0))), "mean")
    validate_vectors(array_layout, var=var, gamma=gamma, beta=beta)
    eps = validate_number("eps", eps, 0)
    scale, shift = _fold(array_layout, None, mean, var, gamma, beta, eps)
    return array_layout.xp.astype(scale, mean.dtype, copy=False), array_layout.xp.astype(
        shift, mean.dtype, copy=False
    )


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
    r"""Fold a norm into the weights of the linear layer before it.

    .. math:: W' = \text{scale} \cdot W, \qquad b' = (b - \mu) \, \text{scale} + \beta

    Parameters
    ----------
    weight : array
        W, with the axes that `layout` names.
    bias : array, shape (O,), or None
        b; None for 0. In training with a norm after the layer, a bias has no effect.
    mean, var, gamma, beta, eps
        Arguments of the norm, as in `fold`; vectors have the shape (O,).
    layout : str, default "OI"
        The axes of `weight`, O for outputs and I for inputs: "OI" (PyTorch) or "IO" (Keras, Flax).

    Returns
    -------
    weight, bias : array
        Arrays in the dtype of `weight`: weights of the same shape, and a bias of shape (O,).

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`; or the layout does not fit the weights.

    Examples
    --------
    >>> import numpy as np, batchnorm as bn
    >>> weight, bias = bn.fold_linear(np.eye(2), None, np.asarray([1.0, 2.0]), np.ones(2), eps=0.0)
    >>> bias
    array([-1., -2.])
    """
    namespace("weight", weight)
    letters = set(layout) if isinstance(layout, str) else set()
    if len(letters) != weight.ndim or len(layout) != weight.ndim or not {"O", "I"} <= letters:
        expected = f"different letters, O and I among them, for the axes of {weight.ndim}-d weights"
        fail(ValueError, "layout", repr(layout), expected)
    array_layout = validate_input(weight, layout.index("O"), "weight")
    validate_vectors(array_layout, bias=bias, mean=mean, var=var, gamma=gamma, beta=beta)
    eps = validate_number("eps", eps, 0)
    scale, shift = _fold(array_layout, bias, mean, var, gamma, beta, eps)
    folded = scale * array_layout.xp.astype(weight, array_layout.wide)
    shift = array_layout.squeeze(shift)
    return array_layout.xp.astype(folded, weight.dtype, copy=False), array_layout.xp.astype(
        shift, weight.dtype, copy=False
    )


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
    """Fold a norm into the weights of the convolution before it.

    Parameters
    ----------
    weight : array
        W, with the axes that `layout` names.
    bias, mean, var, gamma, beta, eps
        As in `fold_linear`.
    layout : str, default "OIHW"
        The axes of `weight`, O for outputs, I for inputs and any other letters for space: "OIHW"
        (PyTorch), "HWIO" (Keras, Flax), "OHWI", "IOHW" (PyTorch's transposed convolution without
        groups), "OIDHW", "OIL". In a grouped convolution, I is the number of inputs of one group.

    Returns
    -------
    weight, bias : array
        Arrays in the dtype of `weight`: weights of the same shape, and a bias of shape (O,).

    Raises
    ------
    TypeError, ValueError
        As `fold_linear`.
    """
    # The weights of a convolution are those of a linear layer with axes for space.
    return fold_linear(weight, bias, mean, var, gamma, beta, eps=eps, layout=layout)


def _fold(
    array_layout: Layout,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
) -> tuple[Array, Array]:
    """Return scale and (bias - mean)·scale + beta in the wide dtype and broadcast shape."""
    _, scale = rstd_and_scale(array_layout, var, gamma, eps)
    bias_minus_mean = (
        -array_layout.vector(mean)
        if bias is None
        else array_layout.vector(bias) - array_layout.vector(mean)
    )
    shift = bias_minus_mean * scale
    return scale, shift if beta is None else shift + array_layout.vector(beta)
