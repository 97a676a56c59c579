r"""
Without γ and β, a sigmoid stays in its linear part
===================================================

What enters the sigmoid after a bare normalization has a mean of 0 and a variance of 1, whatever
the weights. There the sigmoid is almost a straight line: of the variance of :math:`\sigma(x)` with
:math:`x \sim \mathcal N(0, 1)`, the best line :math:`\alpha x + \tfrac12` explains

.. math::
    R^2 = \frac{\mathrm{Cov}(x, \sigma(x))^2}{\mathrm{Var}(x)\,\mathrm{Var}(\sigma(x))}
        = \frac{E[\sigma'(x)]^2}{\mathrm{Var}(\sigma(x))} \approx 98\,\%

(:math:`\mathrm{Cov}(x, \sigma(x)) = E[\sigma'(x)]` is Stein's lemma). :math:`\gamma` and
:math:`\beta` give each unit its own part of the curve back. (Ioffe & Szegedy, 2015, section 3.)
"""

# %%
# How straight the sigmoid is
# ---------------------------

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear, sigmoid

GAMMAS = (1.0, 2.0, 5.0, 10.0)


def straightness(rng, gamma, beta):
    """How much of the variance of σ(γ·x + β) a line explains, x of a standard normal distribution."""
    x = rng.standard_normal((100_000, 1))
    y, _ = bn.batch_norm(x, np.full(1, gamma), np.full(1, beta))
    return np.corrcoef(x[:, 0], sigmoid()(y)[:, 0])[0, 1] ** 2


# %%
# What a network loses
# --------------------
# One input, 30 sigmoids and an output are to learn :math:`\sin(3 u)`. All units see the same
# :math:`u`, so bare normalization makes them equal but for the sign: the biases and scales in which they
# differed are what it takes away. γ and β, drawn at random at first, let each unit place its own step.


def target(u):
    """The curve to learn."""
    return np.sin(3 * u)


def fit(seed, affine, steps=2000, rate=0.1):
    """Train; the inputs, what was learned, and the share of the variance that it explains."""
    rng = np.random.default_rng(seed)
    u = np.linspace(-2, 2, 128)[:, None]  # (N, 1)
    norm = bn.BatchNorm(30, eps=1e-12, affine=affine, track_running_stats=False)
    if affine:
        norm.gamma, norm.beta = rng.normal(0, 4, 30), rng.normal(0, 4, 30)
    net = Chain([Linear(1, 30, rng, bias=False), norm, sigmoid(), Linear(30, 1, rng)])
    for _ in range(steps):
        difference = net(u) - target(u)
        net.backward(difference / len(u))
        net.descend(rate)
    learned = net(u)
    return u[:, 0], learned[:, 0], 1 - np.mean((learned - target(u)) ** 2) / np.var(target(u))


def best_of_one_sigmoid():
    """The variance that α·σ(x̂) + c explains with the best α and c, by least squares."""
    u = np.linspace(-2, 2, 128)
    unit = 1 / (1 + np.exp(-u / np.std(u)))
    return np.corrcoef(unit, target(u))[0, 1] ** 2


def measure(seed):
    """Both experiments."""
    rng = np.random.default_rng(seed)
    return {
        "straightness": {gamma: straightness(rng, gamma, 0.0) for gamma in GAMMAS},
        "fits": {affine: fit(seed, affine) for affine in (False, True)},
        "bound": best_of_one_sigmoid(),
    }


found = measure(seed=0)
for gamma, share in found["straightness"].items():
    print(f"γ = {gamma:4}: a line explains {share:.1%} of the sigmoid's variance")

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
x = np.linspace(-3, 3, 200)
for gamma in GAMMAS:
    axes[0].plot(x, sigmoid()(gamma * x), label=f"γ = {gamma:g}")
axes[0].axvspan(-1, 1, color="grey", alpha=0.2)
axes[0].set(title="The sigmoid, and where two thirds of its inputs lie", xlabel="x̂", ylabel="σ(γ x̂)")
axes[0].legend()
for affine, colour in ((False, "tab:orange"), (True, "tab:blue")):
    u, learned, share = found["fits"][affine]
    name = f"{'with' if affine else 'without'} γ and β: {share:.1%} of the variance"
    axes[1].plot(u, learned, color=colour, label=name)
axes[1].plot(u, target(u), "k:", label="sin 3u")
axes[1].set(title="What 30 units learn", xlabel="u", ylim=(-1.2, 1.9))
axes[1].legend(fontsize="small", loc="upper right")
plt.show()

# %%
# Without γ and β, thirty units are one: they get no further than the best multiple of a single sigmoid,
# which is close to a line.

print(f"best multiple of one sigmoid: {found['bound']:.1%} of the variance")
