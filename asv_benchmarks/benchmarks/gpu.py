"""On a GPU, by the device's events: this package, PyTorch with and without cuDNN, a copy."""

from batchnorm.bench import gpu
from batchnorm.bench.cases import LAYOUTS

SHAPES = [" x ".join(map(str, shape)) for shape in gpu.shapes()]


def measured(contestant, shape, layout, dtype, which):
    """Seconds of a pass, and the arrays it was measured with."""
    import torch

    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sizes = tuple(map(int, shape.split(" x ")))
    given = gpu.cases(sizes, layout, dtype, "cuda", gpu.sets(sizes, dtype, cache))
    calls = [gpu.CONTESTANTS[contestant](case, which) for case in given]
    return gpu.device_seconds(calls), given[0], calls[0]


class OnDevice:
    """Skipped, all of them, where there is no NVIDIA GPU with CuPy and PyTorch."""

    timeout = 120

    def setup(self, *_):
        if gpu.missing() is not None:
            raise NotImplementedError(gpu.missing())


class DevicePasses(OnDevice):
    param_names = ("contestant", "shape", "layout", "dtype", "pass")
    params = (list(gpu.CONTESTANTS), SHAPES, list(LAYOUTS), list(gpu.DTYPES), list(gpu.PASSES))
    unit = "seconds"

    def track_seconds(self, contestant, shape, layout, dtype, which):
        return measured(contestant, shape, layout, dtype, which)[0]


class DeviceShareOfFloor(OnDevice):
    """The least traffic that a pass cannot do without, at the copy's speed, over the pass's time."""

    param_names = ("contestant", "shape", "layout", "dtype", "pass")
    params = (list(gpu.OURS), SHAPES, list(LAYOUTS), list(gpu.DTYPES), list(gpu.PASSES))
    unit = "share"

    def track_share_of_floor(self, contestant, shape, layout, dtype, which):
        mine = measured(contestant, shape, layout, dtype, which)[0]
        return gpu.FLOOR[which] * measured("copy", shape, layout, dtype, which)[0] / mine


class DeviceError(OnDevice):
    """The largest error of y or dx, in eps of its dtype."""

    param_names = ("contestant", "layout", "pass", "mean")
    params = (list(gpu.CONTESTANTS)[:-1], list(LAYOUTS), list(gpu.PASSES), [0.0, 1e4, 1e6])
    unit = "eps"

    def track_error(self, contestant, layout, which, mean):
        (case,) = gpu.cases((32, 64, 56, 56), layout, "float32", "cuda", 1)
        case.x.add_(mean)
        return gpu.error(gpu.CONTESTANTS[contestant](case, which)(), case, which)
