r"""
Batch norm keeps sigmoids out of their flat parts
=================================================

The derivative of a sigmoid :math:`a = 1 / (1 + e^{-y})` is :math:`a (1 - a)`, which is at most 1/4 and
vanishes on both sides. In a network with layers :math:`a_k = \sigma(a_{k-1} W_k)`, the gradient is
multiplied by such a factor at every layer,

.. math::
    \frac{\partial L}{\partial a_{k-1}}
    = \left( \frac{\partial L}{\partial a_k} \, a_k (1 - a_k) \right) W_k^\mathsf{T},

so it vanishes towards the first layers, unless the weights are large. If the weights are large, most
sigmoids are saturated, and only the few others contribute to the gradient. Batch norm between
:math:`W_k` and the sigmoid sets the scale of the sigmoid's input for any weights. (Ioffe & Szegedy,
2015, sections 1 and 3.3.)
"""

# %%
# Gradients, layer by layer
# -------------------------
# The network has eight hidden layers of 50 sigmoids and is not trained. The figure shows the root mean
# square of :math:`\partial L / \partial W` of each layer, for weights with standard deviations of
# scale/√inputs.

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import Activation, accuracy, cross_entropy
from batchnorm.demo.digits import WIDTH, digits, learn, reader
from batchnorm.progress import with_progress

DATA = digits()
SCALES = (0.3, 1.0, 3.0, 10.0)
COLOURS = {False: "tab:orange", True: "tab:blue"}


def network(rng, normalized, scale, hidden):
    """Hidden layers of 50 sigmoids, and ten scores."""
    norms = [
        [bn.BatchNorm(WIDTH, track_running_stats=False)] if normalized else [] for _ in range(hidden)
    ]
    return reader(rng, norms, scale, bias=not normalized)


def gradients(seed, normalized, scale, hidden=8):
    """Root mean square of each hidden layer's gradient."""
    net = network(np.random.default_rng(seed), normalized, scale, hidden)
    _, slope = cross_entropy(net(DATA.train_x[:300]), DATA.train_y[:300])
    net.backward(slope)
    return [np.sqrt(np.mean(g**2)) for _, name, g in net.gradients() if name == "weight"][:-1]


figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
for ax, normalized in zip(axes, (False, True), strict=True):
    for scale in SCALES:
        ax.semilogy(range(1, 9), gradients(0, normalized, scale), "o-", label=f"scale {scale}")
    ax.set(xlabel="layer", title="with batch norm" if normalized else "without batch norm")
axes[0].set_ylabel("gradient of the weights")
axes[1].legend()
plt.show()

# %%
# With batch norm, all layers have about the same gradient, which is proportional to 1/scale;
# :ref:`another example <sphx_glr_why_no_undoing.py>` gives the reason. The following code counts the
# flat sigmoids, whose derivative is less than a fifth of the maximum:


def flat(seed, normalized, scale, hidden=8):
    """The share of sigmoids with a derivative of less than 1/20."""
    net = network(np.random.default_rng(seed), normalized, scale, hidden)
    net(DATA.train_x[:300])
    return np.mean([layer.slope(layer.y) < 0.05 for layer in net if isinstance(layer, Activation)])


for scale in SCALES:
    shares = [f"{flat(0, normalized, scale):5.1%}" for normalized in (False, True)]
    print(f"scale {scale:4}: {shares[0]} flat without batch norm, {shares[1]} with")

# %%
# Learning rates that train
# -------------------------
# A network with three hidden layers is trained on the digits for 150 steps, at learning rates from 0.03
# to 100.

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
GOAL = 0.8


def train(seed, normalized, scale, rate, steps=150):
    """Accuracy on the training data, after some steps."""
    net = network(np.random.default_rng(seed), normalized, scale, hidden=3)
    for _ in learn(net, rate, 60, steps, seed):
        pass
    return accuracy(net(DATA.train_x), DATA.train_y)


def measure(seed):
    """Gradients of layers, flat sigmoids, and accuracies over rates, by batch norm and scale."""
    cases = [(normalized, scale) for normalized in (False, True) for scale in (1.0, 3.0, 10.0)]
    return {
        "gradients": {(n, s): gradients(seed, n, s) for n in (False, True) for s in SCALES},
        "flat": {(n, s): flat(seed, n, s) for n in (False, True) for s in SCALES},
        "accuracies": {
            case: np.asarray([train(seed, *case, rate) for rate in RATES])
            for case in with_progress(cases, "training")
        },
    }


found = measure(seed=0)

figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
for (normalized, scale), reached in found["accuracies"].items():
    label = f"{'with' if normalized else 'without'} batch norm, scale {scale}"
    style = {1.0: "o-", 3.0: "s--", 10.0: "^:"}[scale]
    axes.semilogx(RATES, reached, style, color=COLOURS[normalized], label=label)
    trained = [f"{rate:g}" for rate, r in zip(RATES, reached, strict=True) if r >= GOAL]
    print(f"{label}: trains at {', '.join(trained) or 'none'}")
axes.axhline(GOAL, color="grey", linewidth=0.8)
axes.set(xlabel="learning rate", ylabel="training accuracy after 150 steps", ylim=(0, 1.02))
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()

# %%
# Without batch norm, networks with weights of scale 1 do not learn in 150 steps at any of these rates.
# Networks with larger weights learn at some rates: the scale has to be suitable for the network, and the
# rate for the scale. With batch norm, networks learn at rates from 0.3 to 10 for every scale.
