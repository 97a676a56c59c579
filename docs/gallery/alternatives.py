r"""
Alternatives to batch norm: penalties, periodic normalization, full whitening
=============================================================================

Other methods have been used to control the mean and variance of activations:

- a **penalty** on the moments, :math:`L + \lambda \sum_c \left( \mu_c^2 + (\sigma_c^2 - 1)^2
  \right)`, which favours a mean of 0 and a variance of 1 without enforcing them;
- **normalizing every k steps**, with statistics that are constants in between, also for the gradient;
- full **whitening**, :math:`\hat x = \Sigma^{-1/2} (x - \mu)` with the covariance :math:`\Sigma`
  of the batch (ZCA), which also removes the correlations between channels, and whose gradient includes
  the dependence on :math:`\Sigma^{-1/2}`.

Goodfellow, Bengio & Courville (*Deep Learning*, 2016, section 8.7.1) name the first two. Ioffe & Szegedy
(2015, sections 2 and 3) reject periodic normalization because it counteracts the gradient step, and full
whitening because it is costly and not differentiable everywhere. Here, one network is trained with each
of these methods.
"""

# %%
# The methods
# -----------
# Each method is a layer that replaces batch norm, with its own gradient. Layers that normalize have γ
# and β.

import time

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.digits import WIDTH, learn, reader
from batchnorm.progress import with_progress


class Penalty:
    """The identity; backward adds the gradient of the penalty to that of the loss."""

    def __init__(self, strength):
        self.strength = strength

    def __call__(self, x):
        self.x = x
        return x

    def backward(self, dy):
        stats = bn.moments(self.x)
        slope = 2 * stats.mean + 4 * (stats.var - 1) * (self.x - stats.mean)
        return dy + self.strength * slope / len(dy)


class Every:
    """Normalization by mean and variance of every k-th batch, as constants, with γ and β."""

    def __init__(self, k, width):
        self.k, self.calls = k, 0
        self.gamma, self.beta = np.ones(width), np.zeros(width)

    def __call__(self, x):
        if self.calls % self.k == 0:
            stats = bn.moments(x)
            self.mean, self.var = stats.mean, stats.var
        self.calls += 1
        self.x = x
        return bn.normalize(x, self.mean, self.var, self.gamma, self.beta)

    def backward(self, dy):
        grads = bn.normalize_backward(dy, self.x, self.mean, self.var, self.gamma)
        dx, self.gamma_grad, self.beta_grad = grads
        return dx


class Whitening:
    r"""ZCA, with :math:`\gamma, \beta` and the gradient through :math:`\Sigma = U \Lambda U^\mathsf{T}`.

    A function :math:`f` of a symmetric matrix has the differential
    :math:`U (K \circ U^\mathsf{T} d\Sigma\, U) U^\mathsf{T}` with
    :math:`K_{ij} = (f(\lambda_i) - f(\lambda_j)) / (\lambda_i - \lambda_j)` (Daleckii & Krein,
    1965); for :math:`f = \lambda^{-1/2}` that is
    :math:`-1 / (\sqrt{\lambda_i \lambda_j} (\sqrt{\lambda_i} + \sqrt{\lambda_j}))`.
    """

    def __init__(self, width, eps=1e-3):
        self.eps, self.gamma, self.beta = eps, np.ones(width), np.zeros(width)

    def __call__(self, x):
        self.d = x - np.mean(x, axis=0)  # (N, C)
        covariance = self.d.T @ self.d / len(x) + self.eps * np.eye(len(self.gamma))  # (C, C)
        values, self.vectors = np.linalg.eigh(covariance)  # (C,), (C, C)
        self.roots = np.sqrt(values)
        self.whiten = (self.vectors / self.roots) @ self.vectors.T  # (C, C)
        self.white = self.d @ self.whiten  # (N, C)
        return self.gamma * self.white + self.beta

    def backward(self, dy):
        self.gamma_grad, self.beta_grad = np.sum(dy * self.white, axis=0), np.sum(dy, axis=0)
        dy = dy * self.gamma
        u, r = self.vectors, self.roots
        slope = self.d.T @ dy  # (C, C)
        k = -1 / (np.outer(r, r) * (r[:, None] + r))
        dcovariance = u @ (k * (u.T @ (slope + slope.T) @ u) / 2) @ u.T  # (C, C)
        dd = dy @ self.whiten + 2 * self.d @ dcovariance / len(dy)  # (N, C)
        return dd - np.mean(dd, axis=0)


def batch_norm(width=WIDTH):
    """Batch norm by the batch's own statistics."""
    return bn.BatchNorm(width, track_running_stats=False)


METHODS = {
    "nothing": None,
    "penalty, λ = 0.01": lambda: Penalty(0.01),
    "penalty, λ = 0.1": lambda: Penalty(0.1),
    "every step, as constants": lambda: Every(1, WIDTH),
    "every 10 steps": lambda: Every(10, WIDTH),
    "whitening (ZCA)": lambda: Whitening(WIDTH),
    "batch norm": batch_norm,
}
RATES = (0.1, 0.3, 1.0, 3.0, 10.0)

# %%
# Comparison
# ----------
# The network has three hidden layers of 50 sigmoids and is trained on the digits with 150 batches of
# 120. The figure shows each method at the best learning rate, by the mean loss of the last 30 batches.


def train(seed, make, rate, steps=150, hidden=3):
    """The loss over the steps, and milliseconds per step."""
    net = reader(np.random.default_rng(seed), [[make()] if make else [] for _ in range(hidden)])
    start = time.perf_counter()
    with np.errstate(over="ignore", invalid="ignore"):  # a penalty can end in NaN
        losses = np.asarray(list(learn(net, rate, 120, steps, seed)))
    return losses, 1e3 * (time.perf_counter() - start) / steps


def best(seed, make):
    """Final losses at all learning rates; the best rate, its losses, and milliseconds per step."""
    runs = [train(seed, make, rate) for rate in RATES]
    ends = np.nan_to_num([np.mean(losses[-30:]) for losses, _ in runs], nan=np.inf)
    chosen = int(np.argmin(ends))
    return ends, RATES[chosen], *runs[chosen]


def cost(width, batch=256, calls=5):
    """Milliseconds of whitening and of batch norm, forward and backward, at some width."""
    x = np.random.default_rng(0).standard_normal((batch, width))
    found = []
    for layer in (Whitening(width), batch_norm(width)):
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            layer.backward(layer(x))
            times.append(1e3 * (time.perf_counter() - start))
        found.append(min(times))
    return found


WIDTHS = (32, 64, 128, 256)


def measure(seed):
    """Each method at its best rate; times of whitening and batch norm, over the number of channels."""
    return {
        "methods": {name: best(seed, make) for name, make in with_progress(METHODS.items(), "training")},
        "costs": np.asarray([cost(width) for width in WIDTHS]).T,
    }


found = measure(seed=0)
print(f"{'final loss at a rate of':<26}", *(f"{rate:>7}" for rate in RATES), " ms/step")
for name, (ends, _, _, ms) in found["methods"].items():
    print(f"{name:<26}", *(f"{end:7.3f}" if end < 100 else "      -" for end in ends), f"{ms:8.2f}")

figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for i, (name, (_, rate, losses, _)) in enumerate(found["methods"].items()):
    smooth = np.convolve(losses, np.ones(10) / 10, "valid")
    style = {"color": f"C{i}", "linestyle": (":", "--", "-.")[i] if i < 3 else "-"}
    axes[0].semilogy(smooth, label=f"{name}, rate {rate}", **style)
axes[0].set(xlabel="step", title="Loss at the best rate, mean of ten batches", ylim=(0.002, 9))
axes[0].legend(fontsize="small", loc="lower left", ncols=2)
for times, name in zip(found["costs"], ("whitening (ZCA)", "batch norm"), strict=True):
    axes[1].loglog(WIDTHS, times, "o-", color=f"C{list(METHODS).index(name)}", label=name)
axes[1].set(xlabel="channels", title="ms for a batch of 256, both passes")
axes[1].set(xticks=WIDTHS, xticklabels=WIDTHS)
axes[1].minorticks_off()
axes[1].legend()
plt.show()

# %%
# The penalty brings the moments close to 0 and 1, but slowly: it is of fourth order in the weights,
# which excludes the learning rates at which the other methods learn. Statistics that are constants in
# the gradient are far better than no normalization, and fail at the learning rate that is best for batch
# norm (:ref:`another example <sphx_glr_why_drifting_bias.py>` gives the reason). Whitening learns at the
# same rates as batch norm, but does not reach its loss. One reason may be that a batch of 120 gives good
# estimates of the variances of 50 channels, but less accurate estimates of their 1,225 covariances. The
# cost of the eigenvectors grows with the cube of the number of channels, and the cost of the vectors of
# batch norm grows linearly.
