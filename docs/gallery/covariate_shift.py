r"""
Batch norm reduces internal covariate shift, and learns without that too
========================================================================

Internal covariate shift is the change of a layer's inputs because the layers before it change
(Ioffe & Szegedy, 2015, section 2). It can be measured: take the inputs :math:`a` of a layer on a
fixed set of examples, let all layers before it make their step, and take the inputs :math:`a'`
again. For unit :math:`j`, the distance of the two distributions is

.. math::
    s_j = \frac{W_1(a_j, a'_j)}{\mathrm{std}(a_j)}
    = \frac{1}{N \, \mathrm{std}(a_j)} \sum_{i=1}^{N} \left| a_{(i)j} - a'_{(i)j} \right| ,

the mean way that a value has to go from one to the other (both sorted; Wasserstein's distance) in
units of the values' own spread.

Whether this is *why* batch norm helps is asked as Santurkar et al. (*How Does Batch Normalization Help
Optimization?*, 2018) did: bring the shift back, by random scales and offsets behind batch norm that are
drawn anew at each call, and look whether the network still learns.
"""

# %%
# Three networks
# --------------

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import wasserstein_distance

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear, cross_entropy, sigmoid
from batchnorm.demo.digits import batches, digits
from batchnorm.progress import shown

HIDDEN, WIDTH, SCALE, RATE, STEPS, EVERY = 4, 50, 3.0, 1.0, 200, 10


class Jitter:
    """A random scale and offset for each unit, drawn anew at each call."""

    def __init__(self, rng, amount=0.5):
        self.rng, self.amount = rng, amount

    def __call__(self, x):
        logarithm, offset = self.amount * self.rng.standard_normal((2, x.shape[1]))
        self.scale = np.exp(logarithm)
        return self.scale * x + offset

    def backward(self, dy):
        return self.scale * dy


def nothing(rng):
    """No layers."""
    return []


def batch_norm(rng):
    """Batch norm by the batch's own statistics."""
    return [bn.BatchNorm(WIDTH, track_running_stats=False)]


def jittered(rng):
    """Batch norm, and the shift brought back."""
    return [*batch_norm(rng), Jitter(rng)]


NETWORKS = {
    "without batch norm": nothing,
    "with batch norm": batch_norm,
    "with batch norm, then jitter": jittered,
}
COLOURS = dict(zip(NETWORKS, ("tab:orange", "tab:blue", "tab:green"), strict=True))


def build(rng, norm):
    """The layers before the last hidden one; and the rest, which takes their output."""
    data = digits()
    below, above, inputs = Chain(), Chain(), data.train_x.shape[1]
    for i in range(HIDDEN):
        part = below if i < HIDDEN - 1 else above
        part += [Linear(inputs, WIDTH, rng, SCALE), *norm(rng), sigmoid()]
        inputs = WIDTH
    above.append(Linear(inputs, 10, rng))
    return below, above


def shift(before, after):
    """The median of s over the units."""
    distances = [wasserstein_distance(a, b) for a, b in zip(before.T, after.T, strict=True)]
    return np.median(distances / np.std(before, axis=0))


def train(seed, norm):
    """The loss at every step, and the shift at every tenth."""
    data, rng = digits(), np.random.default_rng(seed)
    below, above = build(rng, norm)
    order, losses, shifts = batches(len(data.train_x), 120, seed), [], []
    for step in range(STEPS):
        before = below(data.test_x) if step % EVERY == 0 else None
        chosen = next(order)
        loss, slope = cross_entropy(above(below(data.train_x[chosen])), data.train_y[chosen])
        below.backward(above.backward(slope))
        below.descend(RATE)
        if before is not None:
            shifts.append(shift(before, below(data.test_x)))
        above.descend(RATE)
        losses.append(loss)
    return np.asarray(losses), np.asarray(shifts)


def measure(seed):
    """Losses and shifts of the three networks."""
    return {name: train(seed, norm) for name, norm in shown(NETWORKS.items(), "training")}


# %%
# Shift, and loss
# ---------------

found = measure(seed=0)

figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, (losses, shifts) in found.items():
    axes[0].semilogy(np.arange(0, STEPS, EVERY), shifts, "o-", color=COLOURS[name], label=name)
    smooth = np.convolve(losses, np.ones(10) / 10, "valid")
    axes[1].semilogy(smooth, color=COLOURS[name], label=name)
    print(f"{name}: shift {np.median(shifts):.3f}, loss {losses[-20:].mean():.3f}")
axes[0].set(title="Shift of the last hidden layer's inputs in one step", xlabel="step", ylabel="s")
axes[1].set(title="Loss, mean of ten batches", xlabel="step")
axes[1].legend()
plt.show()

# %%
# What this says: batch norm does reduce the shift, by an order of magnitude. And the jittered
# network, whose inputs shift more than those of the plain one, learns faster than it all the same.
#
# What it does not say: what batch norm's help *is*. The other examples are candidates, a
# first-order estimate that :ref:`stays true <sphx_glr_why_deep_chains.py>` and gradients that
# :ref:`reach the first layer <sphx_glr_why_saturation.py>` among them; none of them needs a word
# about distributions over time. Nor does one small network settle it, or one measure of distance:
# this one looks at each unit by itself.
