r"""
In a deep chain a step does not do what its gradient promises
=============================================================

One step of gradient descent changes all layers at once, and the gradient of each says what happens if
the others stay as they are. For a chain of :math:`l` weights, :math:`y = x \, w_1 w_2 \cdots w_l`, and a
step that lowers :math:`y` itself, :math:`w_i \leftarrow w_i - \varepsilon g_i` with
:math:`g_i = \partial y / \partial w_i`, the new output is

.. math::
    x \prod_{i=1}^{l} (w_i - \varepsilon g_i) = y
    - \varepsilon \sum_i g_i^2
    + \varepsilon^2 \sum_{i<j} \frac{y}{w_i w_j} \, g_i g_j
    - \cdots
    + (-\varepsilon)^l \, x \prod_i g_i .

The first-order term is the promise. There are :math:`\binom{l}{k}` terms of order :math:`k`, each
a product of the :math:`l - k` weights that it leaves out, so that with weights above 1 a deep
chain is ruled by its highest orders (Goodfellow, Bengio & Courville, *Deep Learning*, 2016,
section 8.7.1). With batch norm between the layers a later layer's scale does not multiply an
earlier layer's change."""

# %%
# Orders of one chain
# -------------------
# With all weights equal to :math:`w` and :math:`x = 1`, each gradient is :math:`w^{l-1}`, and all
# terms of order :math:`k` together are :math:`\binom{l}{k} (-\varepsilon)^k w^{l - k} w^{(l-1)
# k}`.

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import comb

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear


def orders(depth, weight, rate):
    """The terms of order 1 to depth of the change of y."""
    k = np.arange(1, depth + 1)
    return comb(depth, k) * (-rate) ** k * weight ** (depth - k + (depth - 1.0) * k)


depth, rate = 20, 0.01
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for weight in (0.8, 1.0, 1.2, 1.5):
    terms = orders(depth, weight, rate)
    axes.semilogy(range(1, depth + 1), np.abs(terms / terms[0]), "o-", label=f"weights {weight}")
axes.axhline(1, color="grey", linewidth=0.8)
axes.set(
    xlabel="order k",
    xticks=range(1, depth + 1),
    ylabel="terms of order k / terms of order 1",
    ylim=(1e-12, 1e30),
    title=f"{depth} weights in a row, a step of {rate}",
)
axes.legend()
plt.show()

# %%
# Chains of layers
# ----------------
# The same with layers of 32 units, linear, so that nothing but the product of layers is seen. The
# loss is a random linear function of the output, the step the same everywhere, and weights are
# drawn with a standard deviation of scale/√32.

DEPTHS = (1, 2, 4, 8, 16)
SCALES = (0.5, 1.0, 1.5, 2.0)


def changes(seed, normalized, scale, width=32, batch=256, rate=0.01):
    """True change of the loss in a step, and its first-order estimate, for each of the depths."""
    found = []
    for depth in DEPTHS:
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((batch, width))
        slope = rng.standard_normal((batch, width)) / np.sqrt(batch * width)
        net = Chain()
        for _ in range(depth):
            net.append(Linear(width, width, rng, scale, bias=False))
            if normalized:
                net.append(bn.BatchNorm(width))
        before = np.sum(slope * net(x))
        net.backward(slope)
        promised = -rate * sum(np.sum(gradient**2) for *_, gradient in net.gradients())
        net.descend(rate)
        found.append((np.sum(slope * net(x)) - before, promised))
    return np.asarray(found).T


def measure(seed):
    """True change over promised change, by whether there is batch norm, scale and depth."""
    return {
        normalized: {s: np.divide(*changes(seed, normalized, s)) for s in SCALES}
        for normalized in (False, True)
    }


found = measure(seed=0)

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for scale in SCALES:
    axes[0].loglog(DEPTHS, np.abs(found[False][scale]), "o-", label=f"scale {scale}")
    axes[1].semilogx(DEPTHS, found[True][scale], "o-", label=f"scale {scale}")
axes[0].set(title="without batch norm: size", ylabel="true change / promised change")
axes[1].set(title="with batch norm", ylim=(0, 1.1))
for ax in axes:
    ax.axhline(1, color="grey", linewidth=0.8)
    ax.set(xlabel="layers", xticks=DEPTHS, xticklabels=DEPTHS)
    ax.minorticks_off()
axes[0].legend()
plt.show()

for normalized, ratios in found.items():
    worst = max(abs(ratio[-1]) for ratio in ratios.values())
    word = "with   " if normalized else "without"
    print(f"{DEPTHS[-1]} layers, {word} batch norm: at most {worst:.3g} times the promised change")

# %%
# Without batch norm the step of a chain of 16 layers goes off by orders of magnitude, and not even
# its sign is the promised one. With batch norm a step never does more than it promises: the output
# is bounded by its normalization, and where a step is too long it falls short. (With small weights
# it is: the gradient grows as the weights shrink, see :ref:`the example of γ and β
# <sphx_glr_why_no_undoing.py>`.)
