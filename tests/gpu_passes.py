"""Every CUDA kernel once or twice, on small arrays of each arrangement: what the checkers of CUDA run.

compute-sanitizer --tool memcheck python tests/gpu_passes.py
"""

import cupy
import numpy as np

import batchnorm as bn

SHAPES = {
    "one block for each channel": ((64, 100), 1),
    "groups in order": ((4, 3, 40_000), 1),
    "channels last": ((3000, 24), 1),
    "rows of odd length": ((7, 5, 33), 1),
    "several axes": ((6, 4, 9, 3), (1, 3)),
}


def main():
    rng = np.random.default_rng(0)
    for name, (shape, axis) in SHAPES.items():
        axes = axis if isinstance(axis, tuple) else (axis,)
        channels = tuple(shape[i] for i in axes)
        for dtype in (np.float32, np.float16):
            x, dy, z = (cupy.asarray(rng.standard_normal(shape).astype(dtype)) for _ in range(3))
            gamma, beta = (cupy.asarray(rng.standard_normal(channels, dtype=np.float32)) for _ in "ab")
            where = cupy.asarray(rng.random(shape) > 0.2)
            for settings in ({}, {"where": where}, {"residual": z, "activation": "relu"}):
                y, stats = bn.batch_norm(x, gamma, beta, axis=axis, **settings)
                assert bn.kernels_for(x).name == "cupy"
                if "activation" in settings:
                    settings = {"residual": True, "y": y, "activation": "relu"}
                bn.batch_norm_backward(dy, x, stats, gamma, beta, axis=axis, **settings)
            bn.normalize(x, stats.mean, stats.var, gamma, beta, axis=axis)
            bn.moments(x, axis=axis)
        print(name)
    cupy.cuda.Device().synchronize()


if __name__ == "__main__":
    main()
