"""What joining statistics costs per call: by a model, and measured between MPI processes.

python docs/examples/reduction_cost.py                   # the model
mpiexec -n 4 python docs/examples/reduction_cost.py --measure
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np

import batchnorm as bn
from batchnorm import groups

LATENCY, BANDWIDTH = 20e-6, 10e9  # seconds, bytes per second: MPI over a fast network
CHANNELS = (64, 256, 1024, 2048)


def all_reduce(members: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds of a good all-reduce: log2 of the members in steps, each byte sent and received once."""
    if members == 1:
        return 0.0
    steps = math.ceil(math.log2(members))
    return steps * latency + 2 * size * (members - 1) / members / bandwidth


def model(members: int, channels: int, latency: float, bandwidth: float) -> tuple[float, float, float]:
    """Seconds of a forward pass's one vector, of its two sums, and of a backward pass."""
    one = all_reduce(members, 32 * channels * members, latency, bandwidth)
    sums = all_reduce(members, 16 * channels, latency, bandwidth)
    return one, 2 * sums, sums


def table(latency: float, bandwidth: float) -> None:
    print(f"latency {latency * 1e6:g} us, bandwidth {bandwidth / 1e9:g} GB/s; microseconds per call")
    print(f"{'members':>8} {'channels':>9} {'one vector':>11} {'two sums':>9} {'taken':>11} {'back':>5}")
    for members in (2, 8, 64, 512):
        for channels in CHANNELS:
            one, two, back = (1e6 * v for v in model(members, channels, latency, bandwidth))
            taken = "one vector" if 32 * channels * members <= groups.ONE_VECTOR else "two sums"
            print(f"{members:>8} {channels:>9} {one:>11.0f} {two:>9.0f} {taken:>11} {back:>5.0f}")


def measure(repeats: int) -> None:
    """Join moments over the members of MPI.COMM_WORLD both ways."""
    group = bn.distributed.mpi()

    class Plain:
        """The same group, which does not tell how many it is."""

        all_reduce = staticmethod(group.all_reduce)

    if group.rank == 0:
        print(f"{group.size} members; microseconds per call, median of {repeats}")
        print(f"{'channels':>9} {'one vector':>11} {'two sums':>9}")
    for channels in CHANNELS:
        own = bn.Moments(*(np.full(channels, float(group.rank + i)) for i in range(1, 5)))
        seconds = {}
        for name, members in (("one", group), ("two", Plain())):
            sums = tuple(groups.moments_sums(members, (channels,)))
            spent = []
            for _ in range(repeats):
                group.all_reduce(np.zeros(1))  # all begin together
                start = time.perf_counter()
                group.announce(f"moments of {channels} channels", sums, "float64")
                groups.allreduce_moments(members, own)
                spent.append(time.perf_counter() - start)
            seconds[name] = 1e6 * float(np.median(spent))
        if group.rank == 0:
            print(f"{channels:>9} {seconds['one']:>11.0f} {seconds['two']:>9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="under mpiexec")
    parser.add_argument("--latency", type=float, default=LATENCY, help="seconds of one step")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes per second")
    parser.add_argument("--repeats", type=int, default=300)
    chosen = parser.parse_args()
    if chosen.measure:
        measure(chosen.repeats)
    else:
        table(chosen.latency, chosen.bandwidth)


if __name__ == "__main__":
    main()
