r"""
Without γ and β, a sigmoid stays in its linear part
===================================================

After normalization without γ and β, the input of the sigmoid has a mean of 0 and a variance of 1 for any
weights. In this range, the sigmoid is almost a straight line: of the variance of :math:`\sigma(x)` with
:math:`x \sim \mathcal N(0, 1)`, the best line :math:`\alpha x + \tfrac12` explains

.. math::
    R^2 = \frac{\mathrm{Cov}(x, \sigma(x))^2}{\mathrm{Var}(x)\,\mathrm{Var}(\sigma(x))}
        = \frac{E[\sigma'(x)]^2}{\mathrm{Var}(\sigma(x))} \approx 98\,\%

(:math:`\mathrm{Cov}(x, \sigma(x)) = E[\sigma'(x)]` is Stein's lemma). With :math:`\gamma` and
:math:`\beta`, each unit can use its own part of the curve. (Ioffe & Szegedy, 2015, section 3.)
"""

# %%
# Linearity of the sigmoid
# ------------------------

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear, sigmoid
from batchnorm.demo.digits import WIDTH, learn, reader
from batchnorm.progress import with_progress

GAMMAS = (1.0, 2.0, 5.0, 10.0)


def straightness(rng, gamma, beta):
    """How much of the variance of σ(γ·x + β) a line explains, x of a standard normal distribution."""
    x = rng.standard_normal((100_000, 1))
    y, _ = bn.batch_norm(x, np.full(1, gamma), np.full(1, beta))
    return np.corrcoef(x[:, 0], sigmoid()(y)[:, 0])[0, 1] ** 2


# %%
# Effect on a network
# -------------------
# A network with one input, 30 sigmoids and one output is trained to represent :math:`\sin(3 u)`. All
# units have the same input :math:`u`. Normalization without γ and β removes the biases and scales in
# which the units differ, so they become equal except for the sign. With γ and β, each unit can shift and
# scale its own sigmoid, even if all units start at γ = 1 and β = 0. The fit is better if γ and β start
# at different values.


def target(u):
    """The curve to learn."""
    return np.sin(3 * u)


def fit(seed, affine, spread=0.0, steps=2000, rate=0.1):
    """Train; the inputs, the learned curve, and the share of the variance that it explains."""
    rng = np.random.default_rng(seed)
    u = np.linspace(-2, 2, 128)[:, None]  # (N, 1)
    norm = bn.BatchNorm(30, eps=1e-12, affine=affine, track_running_stats=False)
    if affine:
        norm.gamma, norm.beta = rng.normal(1, spread, 30), rng.normal(0, spread, 30)
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


def read_digits(seed, affine, steps=150, rate=1.0):
    """The loss of three hidden layers on the digits, mean of the last 30 of 150 steps."""
    norms = [[bn.BatchNorm(WIDTH, affine=affine, track_running_stats=False)] for _ in range(3)]
    net = reader(np.random.default_rng(seed), norms, bias=False)
    return np.mean(list(learn(net, rate, 120, steps, seed))[-30:])


FITS = {"without γ and β": (False,), "γ and β from 1 and 0": (True,), "γ and β from apart": (True, 4.0)}


def measure(seed):
    """How straight the sigmoid is, three fits of the curve, and the losses on the digits."""
    rng = np.random.default_rng(seed)
    return {
        "straightness": {gamma: straightness(rng, gamma, 0.0) for gamma in GAMMAS},
        "fits": {name: fit(seed, *how) for name, how in with_progress(FITS.items(), "fitting")},
        "bound": best_of_one_sigmoid(),
        "digits": {affine: read_digits(seed, affine) for affine in (False, True)},
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
for (name, (u, learned, share)), colour in zip(
    found["fits"].items(), ("tab:orange", "tab:cyan", "tab:blue"), strict=True
):
    axes[1].plot(u, learned, color=colour, label=f"{name}: {share:.1%} of the variance")
axes[1].plot(u, target(u), "k:", label="sin 3u")
axes[1].set(title="What 30 units learn", xlabel="u", ylim=(-1.2, 2.2))
axes[1].legend(fontsize="small", loc="upper right")
plt.show()

print(f"best multiple of one sigmoid: {found['bound']:.1%} of the variance")
print("loss on the digits: {:.3f} without γ and β, {:.3f} with".format(*found["digits"].values()))

# %%
# Without γ and β, thirty units are equivalent to one: their fit is that of the best multiple of a single
# sigmoid, which is close to a line. A single input is an extreme case. With many inputs, units differ in
# the directions of their weights, and the next layer can use the small curvature of the sigmoids. On the
# digits, a network with three hidden layers also learns without γ and β, but to a higher loss.
