r"""
Trained on batches, tested on populations: which statistics, and what momentum does
===================================================================================

In training each value is normalized by its batch, so that what comes out depends on who else is in
it. At test time there are three ways to go on:

- **batch statistics**, as in training, which need a large batch and give each example an output
  that depends on the others;
- **running averages** of the batches seen in training, :math:`\mu \leftarrow (1 - m) \mu + m
  \mu_B` with momentum :math:`m`: free, and always a little behind, because they average over
  networks of the past;
- **population statistics** of the trained network, from one more pass over the training data
  (:func:`batchnorm.recalibrate`; Ioffe & Szegedy, 2015, Algorithm 2).

An average with momentum remembers about :math:`1/m` batches. A large :math:`m` keeps the noise of
a few batches, a small one remembers a network that is no more."""

# %%
# The same network, tested three ways
# -----------------------------------
# Three hidden layers of 50 sigmoids on the digits, trained on 400 batches of only 8.

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import Chain, Linear, cross_entropy, sigmoid
from batchnorm.demo.digits import batches, digits
from batchnorm.progress import shown

DATA = digits()
SIZES = (2, 4, 8, 20, 60, 180, 360)
MOMENTA = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def train(seed, momentum=0.1, batch=8, steps=400, rate=0.3):
    """A network, and its batch norms."""
    rng = np.random.default_rng(seed)
    net, norms, inputs = Chain(), [], DATA.train_x.shape[1]
    for _ in range(3):
        norms.append(bn.BatchNorm(50, momentum=momentum))
        net += [Linear(inputs, 50, rng, bias=False), norms[-1], sigmoid()]
        inputs = 50
    net.append(Linear(inputs, 10, rng))
    order = batches(len(DATA.train_x), batch, seed)
    for _ in range(steps):
        chosen = next(order)
        _, slope = cross_entropy(net(DATA.train_x[chosen]), DATA.train_y[chosen])
        net.backward(slope)
        net.descend(rate)
    return net, norms


def by_statistics_given(net, norms):
    """Test loss with the statistics that the layers hold."""
    for norm in norms:
        norm.eval()
    return cross_entropy(net(DATA.test_x), DATA.test_y)[0]


def by_batches(net, norms, size):
    """Test loss with those of test batches of some size."""
    for norm in norms:
        norm.batch_statistics, norm.update_statistics = True, False
    order = np.random.default_rng(0).permutation(len(DATA.test_x)).reshape(-1, size)
    return np.mean([cross_entropy(net(DATA.test_x[rows]), DATA.test_y[rows])[0] for rows in order])


def three_ways(seed):
    """Test losses with statistics of batches, of running averages and of the population."""
    net, norms = train(seed)
    found = {
        "batch": [by_batches(net, norms, size) for size in SIZES],
        "running": by_statistics_given(net, norms),
    }
    bn.recalibrate(norms, net, [DATA.train_x], progress=False)
    return found | {"population": by_statistics_given(net, norms)}


# %%
# Momentum
# --------
# The same training with other momenta, and with the cumulative average of all batches
# (``momentum=None``). How far the running statistics are from the population's: the root mean
# square over units of :math:`(\mu_\text{running} - \mu) / \sigma`.


def behind(seed, momentum):
    """Distance of the running means from the population's, and the test loss with them."""
    net, norms = train(seed, momentum)
    loss = by_statistics_given(net, norms)
    running = [norm.running_mean.copy() for norm in norms]
    bn.recalibrate(norms, net, [DATA.train_x], progress=False)
    distances = [
        (mean - norm.running_mean) / np.sqrt(norm.running_var)
        for mean, norm in zip(running, norms, strict=True)
    ]
    return np.sqrt(np.mean(np.square(distances))), loss


def measure(seed):
    """Both experiments; the cumulative average is under the momentum None."""
    return {
        "ways": three_ways(seed),
        "momenta": {m: behind(seed, m) for m in shown((*MOMENTA, None), "training")},
    }


found = measure(seed=0)
ways, momenta = found["ways"], found["momenta"]
for name in ("running", "population"):
    print(f"{name} statistics: test loss {ways[name]:.3f}")
for size, loss in zip(SIZES, ways["batch"], strict=True):
    print(f"statistics of test batches of {size:>3}: test loss {loss:.3f}")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
axes[0].semilogx(SIZES, ways["batch"], "o-", label="batch statistics")
axes[0].axhline(ways["running"], color="tab:orange", label="running averages, m = 0.1")
axes[0].axhline(ways["population"], color="tab:green", label="population statistics")
axes[0].set(title="Test loss", xlabel="size of test batches", xticks=SIZES, xticklabels=SIZES, ylim=0)
axes[0].minorticks_off()
axes[0].legend()
for ax, i, title in zip(axes[1:], (0, 1), ("Distance from the population", "Test loss"), strict=True):
    ax.semilogx(MOMENTA, [momenta[m][i] for m in MOMENTA], "o-", color="tab:orange", label="momentum m")
    ax.axhline(momenta[None][i], color="grey", linestyle="--", label="cumulative average")
    ax.set(title=title, xlabel="m", ylim=0)
axes[2].axhline(ways["population"], color="tab:green", label="population statistics")
axes[2].legend()
plt.show()

# %%
# Statistics of small test batches are the worst by far, and they make each prediction a matter of
# luck. The population's are the best at no other cost than a pass over the training data. Running
# averages come close where the momentum suits the training: 400 batches are too few for 0.001,
# which has not even forgotten its beginning at 0 and 1, and with 1 the statistics are those of the
# last eight digits.
