r"""
A bias before batch norm has no effect, and β replaces it
=========================================================

A bias :math:`b` shifts all values of a channel, and therefore their mean, by the same amount, which is
then subtracted. The variance does not depend on the bias. Values and gradients are therefore

.. math::
    \mathrm{BN}(W u + b) = \mathrm{BN}(W u), \qquad
    \frac{\partial L}{\partial b} = \sum_i \frac{\partial L}{\partial x_i} = 0, \qquad
    \frac{\partial L}{\partial \beta} = \sum_i \frac{\partial L}{\partial y_i} .

The sum over :math:`\partial L / \partial x_i` vanishes because :math:`y` does not change when all
:math:`x_i` are shifted by the same amount. (Ioffe & Szegedy, 2015, section 3.2; the sum is worked out in
the :doc:`derivation </derivation>`.)
"""

# %%
# Values and gradients
# --------------------
# A layer of 16 units is applied to 256 inputs in float64, without a bias and with biases as large as a
# million.

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear, accuracy, sigmoid
from batchnorm.demo.digits import digits, learn

SIZES = (1e0, 1e2, 1e4, 1e6)


def gradients(seed, size):
    """Output, and gradients of W, b and β, of a layer with biases up to some size."""
    rng = np.random.default_rng(seed)
    u, weight, dy = (rng.standard_normal(shape) for shape in ((256, 8), (8, 16), (256, 16)))
    gamma, beta = rng.standard_normal((2, 16))
    bias = size * rng.uniform(-1, 1, 16)
    x = u @ weight + bias
    y, stats = bn.batch_norm(x, gamma, beta)
    dx, _, dbeta = bn.batch_norm_backward(dy, x, stats, gamma)
    return {"y": y, "dW": u.T @ dx, "db": np.sum(dx, axis=0), "dβ": dbeta, "Σdy": np.sum(dy, axis=0)}


def largest(a):
    """The largest absolute value."""
    return np.max(np.abs(a))


def differences(seed):
    """Largest changes by the bias, in units of the largest value, for each size of the bias."""
    plain, rows = gradients(seed, 0.0), []
    for size in SIZES:
        biased = gradients(seed, size)
        rows.append([largest(biased[name] - plain[name]) / largest(plain[name]) for name in ("y", "dW")])
        rows[-1].append(largest(biased["db"]) / largest(biased["dβ"]))
        rows[-1].append(largest(biased["dβ"] - biased["Σdy"]) / largest(biased["Σdy"]))
    return np.asarray(rows).T


# %%
# In training
# -----------
# Two networks are trained on the digits, one with biases before batch norm and one without. They have
# the same initial weights and the same batches, and remain equal.


def train(seed, bias, steps=100, rate=1.0):
    """Training loss over the steps, the network's biases and β at the end, and its accuracy."""
    data, rng = digits(), np.random.default_rng(seed)
    net = Chain([Linear(64, 50, rng, bias=bias), bn.BatchNorm(50), sigmoid(), Linear(50, 10, rng)])
    losses = np.asarray(list(learn(net, rate, 60, steps, seed)))
    net[1].eval()
    return losses, net[0].bias, net[1].beta, accuracy(net(data.test_x), data.test_y)


def measure(seed):
    """Both experiments."""
    return {"differences": differences(seed), "with": train(seed, True), "without": train(seed, False)}


found = measure(seed=0)

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
labels = (
    "y with the bias against without",
    "∂L/∂W likewise",
    "∂L/∂b against ∂L/∂β",
    "∂L/∂β against ∂L/∂b without norm",
)
for row, label in zip(found["differences"], labels, strict=True):
    axes[0].loglog(SIZES, np.maximum(row, 1e-18), "o-", label=label)
axes[0].axhline(np.finfo(float).eps, color="grey", linewidth=0.8, label="eps of float64")
axes[0].set(xlabel="size of the bias", ylabel="largest difference", title="Rounding, and nothing else")
axes[0].legend()
losses, bias, beta, _ = found["with"]
axes[1].plot(bias, ".", color="tab:orange", label="b, trained")
axes[1].plot(beta, ".", color="tab:blue", label="β, trained")
axes[1].set(xlabel="unit", title="Both begin at 0: which of them learns")
axes[1].legend()
plt.show()

gap = largest(losses - found["without"][0])
print(f"100 steps: losses with and without a bias differ by {gap:.1g} at most")
print(f"largest trained b {largest(bias):.1g}, largest trained β {largest(beta):.2f}")
print(f"test accuracy with b {found['with'][3]:.1%}, without {found['without'][3]:.1%}")

# %%
# The remaining effect of the bias is rounding: adding a bias of :math:`10^6` loses as many digits of the
# value before batch norm is applied. A layer before batch norm should therefore have no bias.
# :func:`batchnorm.fold_linear` adds one when it folds batch norm into the layer.
