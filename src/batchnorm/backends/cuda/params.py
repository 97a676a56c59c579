"""The parameters of a launch, packed as the struct Params of tiling.cu has them."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

from batchnorm.backends.cuda.launches import MAX_FACTORS, Launch, MemoryLayout, levels
from batchnorm.epilogue import KINDS, Activation

# The enum DtypeTag of values.cu: the dtypes of per-channel vectors.
DTYPE_TAGS = {None: 0, "float16": 1, "bfloat16": 2, "float32": 3, "float64": 4}


class Vector(NamedTuple):
    """A per-channel vector: the struct Vector of `values.cu`. The stride counts elements."""

    address: int = 0
    dtype_tag: int = 0
    stride: int = 0


NOTHING = Vector()


class Operands(NamedTuple):
    """Addresses of the big arrays and the weights, 0 for absent ones, in the order of the parameters."""

    x: int
    dy: int = 0
    out: int = 0
    weights: int = 0
    residual: int = 0
    dresidual: int = 0


class Vectors(NamedTuple):
    """The per-channel vectors of a pass, in the order of the parameters."""

    gamma: Vector = NOTHING
    beta: Vector = NOTHING
    n: Vector = NOTHING
    mean: Vector = NOTHING
    var: Vector = NOTHING
    low: Vector = NOTHING
    dgamma: Vector = NOTHING
    dbeta: Vector = NOTHING


VECTORS = Vectors()


# The struct Params of tiling.cu: 6 addresses; 3 + 3 strides; 3 lengths; 4 about lanes; 5 of cursors;
# 4 of tiles; the group and the phases; 8 vectors; 3 addresses and those of factors; eps; the activation
# and its slope.
_PARAMS = struct.Struct(f"=6Q 6q 3q 4q 5q 4q 2q 24q {3 + MAX_FACTORS}Q d qd")
PARAMS_BYTES = _PARAMS.size


def pack_params(
    launch: Launch,
    operands: Operands,
    weights: MemoryLayout | None,
    vectors: Vectors,
    stats: int,
    factors: tuple[int, ...],
    partial: int,
    counters: int,
    eps: float,
    activation: Activation | None = None,
) -> bytes:
    """Return the launch parameters, packed as the struct Params of `tiling.cu`."""
    layout = launch.memory_layout
    inner = layout.inner_stride * (1 if launch.across_channels else launch.vector)
    rows, row_advance = divmod(launch.lanes, launch.row)
    w = weights or MemoryLayout(0, 0, 0, 0, 0, 0)
    reducers = math.isqrt(max(0, launch.lanes - 1)) + 1
    kind, slope = activation or (None, 0.0)
    # fmt: off
    return _PARAMS.pack(
        *operands,
        layout.outer_stride, layout.channel_stride, inner,
        w.outer_stride, w.channel_stride, w.inner_stride,
        layout.channels, launch.row, launch.positions,
        launch.adjacent_lanes, launch.slice_bundles, launch.lanes, reducers,
        row_advance,
        rows * layout.outer_stride + row_advance * inner, layout.outer_stride - launch.row * inner,
        rows * w.outer_stride + row_advance * w.inner_stride,
        w.outer_stride - launch.row * w.inner_stride,
        launch.slices, launch.parts, launch.length, sum(levels(launch.parts)[1:]),
        launch.group, launch.phases,
        *(field for v in vectors for field in v),
        stats, *factors, *(0,) * (MAX_FACTORS - len(factors)), partial, counters, eps,
        KINDS.index(kind), slope,
    )
    # fmt: on
