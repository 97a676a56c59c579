"""Fork 200 children off a process whose threads run, and hold its locks; each normalizes a batch.

python -m forks {native,numpy}

A program of its own, since a test process of some GB takes a tenth of a second per fork.
"""

import os
import sys
import threading
import time

import numpy as np

import batchnorm as bn
from batchnorm.testing import data


def main(kernels):
    bn.set_kernels(kernels)
    bn.set_num_threads(2)
    x = data.batch((16, 24, 2000), mean=5.0)
    wanted, _ = bn.batch_norm(x)
    stop = threading.Event()

    def keep_busy():
        while not stop.is_set():
            bn.batch_norm(x)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for i in range(200):
            child = os.fork()
            if child == 0:
                good = np.array_equal(bn.batch_norm(x)[0], wanted)
                os._exit(0 if good else 1)
            _wait(child, i, 60)
    finally:
        stop.set()
        busy.join()


def _wait(child, i, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, f"child {i}"
            return
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise TimeoutError(f"child {i} hangs")


if __name__ == "__main__":
    main(sys.argv[1])
