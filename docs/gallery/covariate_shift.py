r"""
Batch norm reduces internal covariate shift, and also learns without the reduction
==================================================================================

Internal covariate shift is the change of a layer's inputs that is caused by changes of the layers before
it (Ioffe & Szegedy, 2015, section 2). It can be measured from the inputs :math:`a` of a layer on a fixed
set of examples, and the inputs :math:`a'` after all layers before it have made a step. For unit
:math:`j`, the distance of the two distributions is

.. math::
    s_j = \frac{W_1(a_j, a'_j)}{\mathrm{std}(a_j)}
    = \frac{1}{N \, \mathrm{std}(a_j)} \sum_{i=1}^{N} \left| a_{(i)j} - a'_{(i)j} \right| ,

the mean distance between the sorted values of both (Wasserstein distance), in units of the standard
deviation of the values.

Santurkar et al. (*How Does Batch Normalization Help Optimization?*, 2018) instead measure the effect of
the shift on the layer: the distance of its gradient :math:`G` from the gradient :math:`G'` after the
step of the other layers, :math:`\lVert G - G' \rVert / \lVert G \rVert`. They also test whether the
shift matters. For that, they add random noise after batch norm, whose distribution changes at every
step, and thereby restore the shift. Likewise, the third network here has a random scale and offset for
each unit after its batch norm, drawn anew at each call.
"""

# %%
# Three networks
# --------------

import copy

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import wasserstein_distance

import batchnorm as bn
from batchnorm.demo.chain import Chain, cross_entropy
from batchnorm.demo.digits import WIDTH, batches, digits, reader
from batchnorm.progress import with_progress

HIDDEN, SCALE, RATE, STEPS, EVERY = 4, 3.0, 1.0, 200, 10


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
    """Batch norm, and jitter that restores the shift."""
    return [*batch_norm(rng), Jitter(rng)]


NETWORKS = {
    "without batch norm": nothing,
    "with batch norm": batch_norm,
    "with batch norm, then jitter": jittered,
}
COLOURS = dict(zip(NETWORKS, ("tab:orange", "tab:blue", "tab:green"), strict=True))


def build(rng, norm):
    """The layers before the last hidden one; and the remaining layers."""
    net = reader(rng, [norm(rng) for _ in range(HIDDEN)], SCALE)
    last = (len(net) - 1) // HIDDEN * (HIDDEN - 1)
    return Chain(net[:last]), Chain(net[last:])


def shift(before, after):
    """The median of s over the units."""
    distances = [wasserstein_distance(a, b) for a, b in zip(before.T, after.T, strict=True)]
    return np.median(distances / np.std(before, axis=0))


def turned(before, after, slope_of):
    """Distance of the last hidden layer's gradient from that after the step of the other layers."""
    gradients = []
    for inputs, layers in (before, after):
        layers.backward(slope_of(layers(inputs)))
        gradients.append(layers[0].weight_grad)
    return np.linalg.norm(gradients[1] - gradients[0]) / np.linalg.norm(gradients[0])


def train(seed, norm):
    """The loss at every step; the shift, and the change of the gradient, at every tenth."""
    data, rng = digits(), np.random.default_rng(seed)
    below, above = build(rng, norm)
    order, losses, shifts, turns = batches(len(data.train_x), 120, seed), [], [], []
    for step in range(STEPS):
        chosen = next(order)
        images, labels = data.train_x[chosen], data.train_y[chosen]
        seen = below(data.test_x) if step % EVERY == 0 else None
        entering = below(images)
        loss, slope = cross_entropy(above(entering), labels)
        losses.append(loss)
        below.backward(above.backward(slope))
        below.descend(RATE)
        if seen is not None:
            shifts.append(shift(seen, below(data.test_x)))
            pair = [(inputs, copy.deepcopy(above)) for inputs in (entering, below(images))]
            turns.append(turned(*pair, lambda scores, labels=labels: cross_entropy(scores, labels)[1]))
        above.descend(RATE)
    return {"losses": np.asarray(losses), "shifts": np.asarray(shifts), "turns": np.asarray(turns)}


def measure(seed):
    """Losses, shifts and turns of the three networks."""
    return {name: train(seed, norm) for name, norm in with_progress(NETWORKS.items(), "training")}


# %%
# Shift, and loss
# ---------------

found = measure(seed=0)

figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
for name, curves in found.items():
    style = {"color": COLOURS[name], "label": name}
    axes[0].semilogy(np.arange(0, STEPS, EVERY), curves["shifts"], "o-", **style)
    axes[1].semilogy(np.arange(0, STEPS, EVERY), curves["turns"], "o-", **style)
    axes[2].semilogy(np.convolve(curves["losses"], np.ones(10) / 10, "valid"), **style)
    medians = f"shift {np.median(curves['shifts']):.3f}, turn {np.median(curves['turns']):.2f}"
    print(f"{name:29}{medians}, loss {curves['losses'][-20:].mean():.3f}")
titles = ("Shift of a layer's inputs in one step", "How far its gradient turns", "Loss, ten batches")
for ax, title, label in zip(axes, titles, ("median of s over units", "|G − G′| / |G|", ""), strict=True):
    ax.set(title=title, xlabel="step", ylabel=label)
axes[2].set_ylim(0.03, 4)
axes[2].legend(fontsize="small", loc="lower left")
plt.show()

# %%
# With batch norm, the inputs of the last hidden layer shift less by an order of magnitude. This is
# expected, because mean and variance of the input of each preceding sigmoid are fixed. The gradient of
# the layer also changes less, except in the steps in which the plain network has hardly begun to learn
# (in the networks of Santurkar et al. it did not change less). The inputs of the jittered network shift
# more than those of the plain network, because each step draws the jitter anew, but the jittered network
# learns faster than the plain one.
#
# The experiment does not show *why* batch norm helps. Santurkar et al. propose a smoother loss, which is
# related to :ref:`first-order estimates that remain valid <sphx_glr_why_deep_chains.py>`. Gradients that
# :ref:`do not vanish towards the first layer <sphx_glr_why_saturation.py>` are another candidate.
# Neither explanation depends on distributions over time. One small network, at one learning rate and
# with one measure of distance, which considers each unit by itself, is not conclusive.
