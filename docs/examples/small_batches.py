"""Times of batch renormalization and of virtual batches, as multiples of batch norm and of a copy."""

import time

import numpy as np

import batchnorm as bn

SHAPES = [(256, 64, 56, 56), (256, 256, 28, 28), (256, 512, 14, 14), (256, 1024, 7, 7)]
SIZE = 32  # of a virtual batch


def once(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def medians(calls, repeats=15):
    """Median seconds of each call, which take turns."""
    for call in calls * 2:
        call()
    return [
        np.median(times)
        for times in zip(*([once(c) for c in calls] for _ in range(repeats)), strict=True)
    ]


def layer_pass(layer, x, dy):
    def forward():
        layer(x)

    def both():
        layer(x)
        layer.backward(dy)

    return forward, both


if __name__ == "__main__":
    print(f"{'float32, milliseconds':24}{'copy':>9}{'forward':>9}{'renorm':>9}{'virtual':>9}", end="")
    print(f"{'both':>12}{'renorm':>9}{'virtual':>9}")
    ratios = []
    for shape in SHAPES:
        rng = np.random.default_rng(0)
        x = rng.standard_normal(shape, dtype=np.float32)
        dy = rng.standard_normal(shape, dtype=np.float32)
        layers = [
            bn.BatchNorm(shape[1], **settings)
            for settings in ({}, {"renorm": (3.0, 5.0)}, {"virtual_batch_size": SIZE})
        ]
        passes = [layer_pass(layer, x, dy) for layer in layers]
        target = np.empty_like(x)
        calls = [lambda t=target, v=x: np.copyto(t, v), *(f for f, _ in passes), *(b for _, b in passes)]
        copy, *found = medians(calls)
        cells = "".join(f"{1e3 * v:>9.1f}" for v in [copy, *found[:3]])
        more = "".join(f"{1e3 * v:>{w}.1f}" for v, w in zip(found[3:], (12, 9, 9), strict=True))
        print(f"{' x '.join(map(str, shape)):24}{cells}{more}")
        ratios.append(
            [found[1] / found[0], found[2] / found[0], found[4] / found[3], found[5] / found[3]]
        )
    means = np.exp(np.log(ratios).mean(0))
    names = ("renorm, forward", "virtual, forward", "renorm, both", "virtual, both")
    for name, mean, worst in zip(names, means, np.max(ratios, 0), strict=True):
        print(f"{name}: {mean:.2f} times batch norm (worst {worst:.2f})")
