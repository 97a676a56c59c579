r"""
In a deep chain, the effect of a step differs from what its gradient promises
=============================================================================

One step of gradient descent changes all layers at once, but the gradient of each layer describes the
effect of changing that layer alone. For a chain of :math:`l` weights,
:math:`y = x \, w_1 w_2 \cdots w_l`, and a step that lowers :math:`y` itself,
:math:`w_i \leftarrow w_i - \varepsilon g_i` with :math:`g_i = \partial y / \partial w_i`, the new output
is

.. math::
    x \prod_{i=1}^{l} (w_i - \varepsilon g_i) = y
    - \varepsilon \sum_i g_i^2
    + \varepsilon^2 \sum_{i<j} \frac{y}{w_i w_j} \, g_i g_j
    - \cdots
    + (-\varepsilon)^l \, x \prod_i g_i .

The first-order term is called the promised change below. There are :math:`\binom{l}{k}` terms of order
:math:`k`, each a product of :math:`k` gradients, of :math:`l - 1` weights each, and of the other
:math:`l - k` weights. With weights above 1, the higher orders therefore dominate in a deep chain
(Goodfellow, Bengio & Courville, *Deep Learning*, 2016, section 8.7.1). With batch norm between the
layers, the scale of a later layer does not multiply the change of an earlier layer.
"""

# %%
# Orders of one chain
# -------------------
# With all weights equal to :math:`w` and :math:`x = 1`, each gradient is :math:`w^{l-1}`, and all terms
# of order :math:`k` together are :math:`\binom{l}{k} (-\varepsilon)^k w^{l - k} w^{(l-1) k}`.

import itertools

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import comb

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear
from batchnorm.progress import with_progress


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
# The next experiment has layers of 32 units. They are linear, to isolate the effect of the product of
# layers. The loss is a random linear function of the output, and weights are drawn with a standard
# deviation of scale/√32. The figures show the ratio of the true change of the loss to the promised
# change for one learning rate, and the largest rate up to which the two are within a tenth of each
# other.

DEPTHS = (2, 4, 8, 16)
SCALES = (0.5, 1.0, 1.5, 2.0)
RATES = np.logspace(-8, 10, 37)
ONE_RATE = 0.01


def chain(seed, normalized, scale, depth, width=32, batch=256):
    """The change of a chain's loss as a function of the rate of one step; and its promised slope."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, width))
    slope = rng.standard_normal((batch, width)) / np.sqrt(batch * width)
    net = Chain()
    for i in range(depth):
        net.append(Linear(width, width, rng, scale, bias=False))
        if normalized and i < depth - 1:
            net.append(bn.BatchNorm(width, track_running_stats=False))
    before = np.sum(slope * net(x))
    net.backward(slope)
    start = [(layer, name, getattr(layer, name), g) for layer, name, g in net.gradients()]

    def change(rate):
        for layer, name, value, gradient in start:
            setattr(layer, name, value - rate * gradient)
        return np.sum(slope * net(x)) - before

    return change, -sum(np.sum(gradient**2) for *_, gradient in start)


def largest_rate(change, slope):
    """The largest of the rates up to which the true and the promised change agree within a tenth."""
    for smaller, rate in itertools.pairwise(RATES):
        if not abs(change(rate) / (rate * slope) - 1) < 0.1:
            return smaller
    return RATES[-1]


def measure(seed):
    """Ratios at one rate, promises and usable rates, by batch norm, scale and depth."""
    found = {"ratios": {}, "promises": {}, "rates": {}}
    for case in with_progress([(n, s) for n in (False, True) for s in SCALES], "chains"):
        chains = [chain(seed, *case, depth) for depth in DEPTHS]
        promises = np.asarray([ONE_RATE * slope for _, slope in chains])
        found["promises"][case] = promises
        found["ratios"][case] = np.asarray([change(ONE_RATE) for change, _ in chains]) / promises
        found["rates"][case] = np.asarray([largest_rate(*each) for each in chains])
    return found


found = measure(seed=0)

figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for (normalized, scale), ratios in found["ratios"].items():
    style = {"color": f"C{SCALES.index(scale)}", "marker": "o"}
    style["linestyle"] = "-" if normalized else "--"
    label = f"{'with' if normalized else 'without'} batch norm, scale {scale}"
    axes[0].loglog(DEPTHS, np.abs(ratios), label=label, **style)
    axes[1].loglog(DEPTHS, found["rates"][normalized, scale], **style)
axes[0].set(title=f"|true change / promised change| at a rate of {ONE_RATE}")
axes[1].set(title="Largest rate at which a step keeps its promise")
for ax in axes:
    ax.set(xlabel="layers", xticks=DEPTHS, xticklabels=DEPTHS)
    ax.minorticks_off()
axes[0].legend(fontsize="small")
plt.show()

for (normalized, scale), ratios in found["ratios"].items():
    name = f"{DEPTHS[-1]} layers, scale {scale}, {'with' if normalized else 'without'} batch norm"
    promise, usable = (found[key][normalized, scale][-1] for key in ("promises", "rates"))
    print(f"{name:42} promised {promise:9.1e}, true {ratios[-1] * promise:9.1e}, usable {usable:.0e}")

# %%
# At one learning rate, the promised change of a plain chain of 16 layers is almost zero with small
# weights. With large weights, the true change differs from the promised one by orders of magnitude, in
# either direction. A smaller rate avoids this, but the necessary rate depends exponentially on depth and
# scale. With batch norm, the usable rates of all scales are within an order of magnitude. If a step is
# too long, the true change is smaller than the promised one, most of all with small weights, whose
# gradient is larger (:ref:`the example of γ and β <sphx_glr_why_no_undoing.py>` gives the reason).
