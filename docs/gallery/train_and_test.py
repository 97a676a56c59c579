r"""
Statistics at test time, and the effect of momentum
===================================================

In training, each value is normalized by its batch, so the output for an example depends on the other
examples of the batch. At test time, there are three choices:

- **batch statistics**, as in training, which need a large batch and give each example an output that
  depends on the others;
- **running averages** of the batches of the training, :math:`\mu \leftarrow (1 - m) \mu + m \mu_B`
  with momentum :math:`m`, which cost nothing and lag slightly behind, because they average over past
  states of the network;
- **population statistics** of the trained network, from one more pass over the training data
  (:func:`batchnorm.recalibrate`, after Algorithm 2 of Ioffe & Szegedy, 2015, which averages over
  batches).

An average with momentum depends on about the last :math:`1/m` batches. With a large :math:`m`, it has
the noise of a few batches; with a small :math:`m`, it depends on outdated states of the network.
"""

# %%
# The same network, tested three ways
# -----------------------------------
# The network has three hidden layers of 50 sigmoids and is trained on the digits, with 400 batches of
# only 8.

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import cross_entropy
from batchnorm.demo.digits import WIDTH, digits, learn, reader
from batchnorm.progress import with_progress

DATA = digits()
SIZES = (2, 4, 8, 20, 60, 180, 360)
MOMENTA = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def train(seed, momentum=0.1, batch=8, steps=400, rate=0.3):
    """A network, and its batch norms."""
    norms = [bn.BatchNorm(WIDTH, momentum=momentum) for _ in range(3)]
    net = reader(np.random.default_rng(seed), [[norm] for norm in norms], bias=False)
    for _ in learn(net, rate, batch, steps, seed):
        pass
    return net, norms


def by_statistics_given(net, norms):
    """Test loss with the statistics that the layers hold."""
    for norm in norms:
        norm.eval()
    return cross_entropy(net(DATA.test_x), DATA.test_y)[0]


def scores_by_batches(net, norms, size, order):
    """Scores of the test examples, normalized in batches of some size, in some order."""
    for norm in norms:
        norm.batch_statistics, norm.update_statistics = True, False
    scores = np.empty((len(order), 10))
    for rows in order.reshape(-1, size):
        scores[rows] = net(DATA.test_x[rows])
    return scores


def by_batches(net, norms, size):
    """Test loss with batch statistics; share of predictions that change with the other examples."""
    rng = np.random.default_rng(0)
    first, second = (
        scores_by_batches(net, norms, size, rng.permutation(len(DATA.test_x))) for _ in range(2)
    )
    changed = np.mean(first.argmax(axis=1) != second.argmax(axis=1))
    return cross_entropy(first, DATA.test_y)[0], changed


def three_ways(seed, batch=8):
    """Test losses with statistics of test batches, of running averages and of the population."""
    net, norms = train(seed, batch=batch)
    losses, changed = zip(*(by_batches(net, norms, size) for size in SIZES), strict=True)
    running = by_statistics_given(net, norms)
    bn.recalibrate(norms, net, [DATA.train_x], progress=False)
    population = by_statistics_given(net, norms)
    return {"batch": losses, "changed": changed, "running": running, "population": population}


# %%
# Momentum
# --------
# The training is repeated with other momenta, and with the cumulative average of all batches
# (``momentum=None``). The distance of the running statistics from the population statistics is the root
# mean square over units of :math:`(\mu_\text{running} - \mu) / \sigma`.


def behind(seed, momentum):
    """Distances of running means and deviations from the population's; the test loss."""
    net, norms = train(seed, momentum)
    loss = by_statistics_given(net, norms)
    running = [(norm.running_mean.copy(), norm.running_var.copy()) for norm in norms]
    bn.recalibrate(norms, net, [DATA.train_x], progress=False)
    means, deviations = [], []
    for (mean, var), norm in zip(running, norms, strict=True):
        means.append((mean - norm.running_mean) / np.sqrt(norm.running_var))
        deviations.append(np.log(var / norm.running_var) / 2)
    return *(np.sqrt(np.mean(np.square(found))) for found in (means, deviations)), loss


def measure(seed):
    """The three ways after training on batches of three sizes; momenta, the cumulative one as None."""
    return {
        "ways": {batch: three_ways(seed, batch) for batch in (4, 8, 60)},
        "momenta": {m: behind(seed, m) for m in with_progress((*MOMENTA, None), "training")},
    }


found = measure(seed=0)
ways, momenta = found["ways"], found["momenta"]
print("trained on batches of 8, test loss and predictions that change with the company:")
for size, loss, changed in zip(SIZES, ways[8]["batch"], ways[8]["changed"], strict=True):
    print(f"  statistics of test batches of {size:>3}: {loss:.3f} {changed:5.0%}")
for batch, of in ways.items():
    losses = f"running averages {of['running']:.3f}, population {of['population']:.3f}"
    print(f"trained on batches of {batch:>2}, test loss with {losses}")

figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained")
axes[0].semilogx(SIZES, ways[8]["batch"], "o-", label="batch statistics")
axes[0].axhline(ways[8]["running"], color="tab:orange", label="running averages, m = 0.1")
axes[0].axhline(ways[8]["population"], color="tab:green", label="population statistics")
axes[0].set(title="Test loss", xlabel="size of test batches", xticks=SIZES, xticklabels=SIZES, ylim=0)
axes[0].minorticks_off()
axes[0].legend()
for i, name in enumerate(("means", "log of deviations")):
    axes[1].loglog(MOMENTA, [momenta[m][i] for m in MOMENTA], "o-", color=f"C{3 + i}", label=name)
    axes[1].axhline(momenta[None][i], color=f"C{3 + i}", linestyle="--")
axes[1].set(title="Distance from the population", xlabel="m")
axes[2].semilogx(MOMENTA, [momenta[m][2] for m in MOMENTA], "o-", color="tab:orange", label="momentum m")
axes[2].axhline(momenta[None][2], color="grey", linestyle="--", label="cumulative average")
axes[2].axhline(ways[8]["population"], color="tab:green", label="population statistics")
axes[2].set(title="Test loss", xlabel="m", ylim=0)
for ax in axes[1:]:
    ax.legend()
plt.show()

# %%
# With batch statistics, the test loss grows as the test batches become smaller, and the prediction for
# an example changes with the other examples of its batch. Population statistics are about as good as
# those of large test batches, without this dependence, and cost one pass over the training data. Running
# averages come close if the momentum is suitable for the training: 400 batches are too few for 0.001, so
# that the averages still depend on their initial values 0 and 1, and with 1 the statistics are those of
# the last eight digits. The dashed lines are the cumulative average of all batches. The advantage of
# population statistics is larger for smaller training batches.
