"""Test a network on handwritten digits that are corrupted, and adapt its batch norms without labels.

The network is trained on clean digits. Its running statistics are then those of the wrong data. They are
replaced by the statistics of the batch that is tested, or by those of other corrupted digits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import batchnorm as bn
from batchnorm.demo.chain import Chain, accuracy, cross_entropy
from batchnorm.demo.digits import WIDTH, batches, digits, reader

Array = Any
BATCH = 60
STEPS = 1000
RATE = 0.5
SIZES = (2, 5, 10, 20, 60, 360)
UNLABELLED = 360  # of the 1,437 digits for training: neither trained on nor tested


def _contrast(x: Array, rng: Any) -> Array:
    return 0.3 * x


def _brightness(x: Array, rng: Any) -> Array:
    return np.minimum(x + 0.5, 1)  # the brightest pixels become white


def _noise(x: Array, rng: Any) -> Array:
    return x + 0.3 * rng.standard_normal(x.shape)


def _blur(x: Array, rng: Any) -> Array:
    image = x.reshape(-1, 8, 8)
    for axis in (1, 2):
        edges = [(0, 0), (0, 0), (0, 0)]
        edges[axis] = (1, 1)
        padded = np.pad(image, edges)
        parts = [np.take(padded, range(i, i + 8), axis) for i in range(3)]
        image = 0.25 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2]
    return image.reshape(x.shape)


CORRUPTIONS: dict[str, Callable[[Array, Any], Array]] = {
    "contrast": _contrast,
    "brightness": _brightness,
    "noise": _noise,
    "blur": _blur,
}


class Accuracies(NamedTuple):
    running: float
    batch: float
    recalibrated: float


def norms(net: Chain) -> list[bn.BatchNorm]:
    return [layer for layer in net if isinstance(layer, bn.BatchNorm)]


def trained(seed: int) -> Chain:
    """A network with two hidden layers, trained on clean digits."""
    data = digits()
    rng = np.random.default_rng(seed)
    net = reader(rng, [[bn.BatchNorm(WIDTH)] for _ in range(2)], bias=False)
    x, labels = data.train_x[UNLABELLED:], data.train_y[UNLABELLED:]
    order = batches(len(x), BATCH, seed)
    for _ in range(STEPS):
        chosen = next(order)
        _, gradient = cross_entropy(net(x[chosen]), labels[chosen])
        net.backward(gradient)
        net.descend(RATE)
    for layer in norms(net):
        layer.eval()
    return net


def score(net: Chain, x: Array, labels: Array, size: int = BATCH) -> float:
    """Accuracy, in batches of a size."""
    return accuracy(np.concatenate([net(x[i : i + size]) for i in range(0, len(x), size)]), labels)


def by_batch(net: Chain, x: Array, labels: Array, size: int = BATCH) -> float:
    """Accuracy with the statistics of each batch; the running ones stay as they are."""
    for layer in norms(net):
        layer.batch_statistics = True
    found = score(net, x, labels, size)
    for layer in norms(net):
        layer.batch_statistics = False
    return found


def recalibrated(net: Chain, unlabelled: Array, x: Array, labels: Array) -> float:
    """Accuracy with the running statistics of unlabelled digits; afterwards they are the old ones."""
    before = [layer.state_dict() for layer in norms(net)]
    bn.recalibrate(norms(net), net, np.split(unlabelled, len(unlabelled) // BATCH), progress=False)
    found = score(net, x, labels)
    for layer, state in zip(norms(net), before, strict=True):
        layer.load_state_dict(state)
    return found


def measure(seed: int) -> dict[str, Accuracies]:
    """Accuracies on the clean digits and with each corruption."""
    data, net = digits(), trained(seed)
    found = {}
    for name, corrupt in {"clean": lambda x, rng: x, **CORRUPTIONS}.items():
        rng = np.random.default_rng([seed, 1])
        unlabelled, x = corrupt(data.train_x[:UNLABELLED], rng), corrupt(data.test_x, rng)
        found[name] = Accuracies(
            score(net, x, data.test_y),
            by_batch(net, x, data.test_y),
            recalibrated(net, unlabelled, x, data.test_y),
        )
    return found


def by_size(seed: int) -> list[float]:
    """Accuracies on low contrast with the statistics of batches of some sizes."""
    data, net = digits(), trained(seed)
    x = CORRUPTIONS["contrast"](data.test_x, np.random.default_rng([seed, 1]))
    return [by_batch(net, x, data.test_y, size) for size in SIZES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="of networks, over which the mean is taken")
    seeds = range(parser.parse_args().seeds)
    found = [measure(seed) for seed in seeds]
    print(f"test accuracy, mean of {len(seeds)} seeds, batches of {BATCH}")
    print(f"{'digits':<12}{'running':>9}{'batch':>9}{'recalibrated':>15}")
    for name in found[0]:
        running, batch, recalibrated = np.mean([one[name] for one in found], axis=0)
        print(f"{name:<12}{running:>9.1%}{batch:>9.1%}{recalibrated:>15.1%}")
    print("\nlow contrast, by the batch")
    print(f"{'batch':<12}" + "".join(f"{size:>8}" for size in SIZES))
    means = np.mean([by_size(seed) for seed in seeds], axis=0)
    print(f"{'accuracy':<12}" + "".join(f"{mean:>8.1%}" for mean in means))


if __name__ == "__main__":
    main()
