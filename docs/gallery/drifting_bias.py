r"""
Without the gradient through the statistics, a bias drifts indefinitely
=======================================================================

This experiment shows why the gradient has to include the dependence of the batch's mean on the input.
Consider a layer that adds a bias and subtracts the mean,

.. math:: \hat x = x - E[x], \qquad x = u + b,

and a gradient step that treats :math:`E[x]` as a constant, :math:`b \leftarrow b + \Delta b` with
:math:`\Delta b = -\varepsilon \, E[\partial L / \partial \hat x]`. Then

.. math:: u + (b + \Delta b) - E[u + (b + \Delta b)] = u + b - E[u + b] :

the step changes neither the output nor the loss, so the next gradient and the next step are the same.
The bias grows indefinitely. (Ioffe & Szegedy, 2015, section 2, who add that the effect can be stronger
if activations are scaled as well, and that the model diverged in their first experiments.)
"""

# %%
# The bias alone
# --------------
# The targets have a mean of 1, which no output with a mean of 0 can have:
# :math:`L = E[(\hat x - t)^2] / 2`. ``bn.normalize_backward`` treats the statistics as constants. With
# ``stats_grad=True`` it also returns the gradient of the mean; the missing part of the gradient is this
# value divided by the number of values of which the mean is taken.

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.digits import WIDTH, learn, reader
from batchnorm.progress import with_progress

STEPS, RATE = 300, 0.1
UNIT = np.ones(1)


def centred(x):
    """A batch (N, 1) minus its mean, with its scale unchanged; and its statistics."""
    stats = bn.moments(x)
    return bn.normalize(x, stats.mean, UNIT, eps=0), stats


def drift(seed, through):
    """The bias and the loss over the steps, with and without the gradient through the mean."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((100, 1))  # (N, 1)
    target = u + 1 + 0.1 * rng.standard_normal((100, 1))
    b, biases, losses = 0.0, [], []
    for _ in range(STEPS):
        y, stats = centred(u + b)
        biases.append(b)
        losses.append(np.mean((y - target) ** 2) / 2)
        dy = (y - target) / len(u)
        dx, *_, dmean, _ = bn.normalize_backward(dy, u + b, stats.mean, UNIT, eps=0, stats_grad=True)
        if through:  # the mean depends on each of its N values
            dx = dx + dmean / len(u)
        b = b - RATE * np.sum(dx)
    return np.asarray(biases), np.asarray(losses)


# %%
# A network
# ---------
# Networks with three hidden layers are trained on the digits in batches of 60, at three learning rates.
# One network has batch norm. The other has the same forward pass, with a gradient that treats mean and
# variance as constants.


class Outside(bn.BatchNorm):
    """Batch norm with the gradient of inference, which treats the statistics as constants."""

    def __call__(self, x):
        self.x, stats = x, bn.moments(x)
        self.mean, self.var = stats.mean, stats.var
        return bn.normalize(x, self.mean, self.var, eps=self.eps)

    def backward(self, dy):
        dx, *_ = bn.normalize_backward(dy, self.x, self.mean, self.var, eps=self.eps)
        return dx


def train(seed, norm, rate):
    """Loss, largest bias and size of the first layer's weights, at every step."""
    norms = [[norm(WIDTH, affine=False, track_running_stats=False)] for _ in range(3)]
    net = reader(np.random.default_rng(seed), norms)
    rows = [
        (loss, np.max(np.abs(net[0].bias)), np.linalg.norm(net[0].weight))
        for loss in learn(net, rate, 60, STEPS, seed)
    ]
    return np.asarray(rows).T


NETWORK_RATES = (0.3, 1.0, 3.0)


def measure(seed):
    """Both experiments, with the gradient outside and through the statistics."""
    norms = {False: Outside, True: bn.BatchNorm}
    cases = [(through, rate) for through in norms for rate in NETWORK_RATES]
    return {
        "bias": {through: drift(seed, through) for through in (False, True)},
        "network": {
            (through, rate): train(seed, norms[through], rate)
            for through, rate in with_progress(cases, "training")
        },
    }


found = measure(seed=0)
NAMES = {False: "statistics outside the gradient", True: "gradient through the statistics"}
COLOURS = {False: "tab:orange", True: "tab:blue"}

figure, axes = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for through, (biases, losses) in found["bias"].items():
    axes[0].plot(biases, color=COLOURS[through], label=NAMES[through])
    axes[1].plot(losses, "--" if through else "-", color=COLOURS[through], label=NAMES[through])
axes[0].set(title="Bias", xlabel="steps")
axes[1].set(title="Loss", xlabel="steps", ylim=(0, 1))
axes[0].legend()
plt.show()

# %%
# With the gradient through the mean, the gradient of the bias is zero, and the bias does not change. The
# loss is the same, because a bias before the subtraction of the mean has no effect on the output.

figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
for through in (False, True):
    ends = [np.mean(found["network"][through, rate][0][-50:]) for rate in NETWORK_RATES]
    axes[0].loglog(NETWORK_RATES, ends, "o-", color=COLOURS[through], label=NAMES[through])
    _, biases, weights = found["network"][through, NETWORK_RATES[-1]]
    axes[1].plot(biases, color=COLOURS[through])
    axes[2].plot(weights, color=COLOURS[through])
axes[0].set(title="Loss after 300 steps", xlabel="learning rate", ylim=(0.05, 100))
axes[0].set(xticks=NETWORK_RATES, xticklabels=NETWORK_RATES)
axes[0].minorticks_off()
axes[0].axhline(np.log(10), color="grey", linewidth=0.8)
axes[0].legend(fontsize="small", loc="upper left")
axes[1].set(title="Largest bias of the first layer, at a rate of 3", xlabel="steps")
axes[2].set(title="Size of its weights, at a rate of 3", xlabel="steps")
plt.show()

for (through, rate), (losses, biases, weights) in found["network"].items():
    end = f"loss {losses[-50:].mean():5.2f}, bias {biases[-1]:7.2g}, weights {weights[-1]:3.0f}"
    print(f"{NAMES[through]}, rate {rate}: {end}")

# %%
# At small rates, the network without the gradient through the statistics still learns, but more slowly,
# while its weights and biases drift. At the rate that is best for batch norm, it diverges: equal
# probabilities for all ten classes give a loss of :math:`\ln 10 = 2.3`, and its loss stays at several
# times that value while the weights continue to grow. The same forward pass with the gradient through
# the statistics learns.
