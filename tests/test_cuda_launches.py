"""Launch arithmetic of the CUDA kernels, without a device."""

import collections
import itertools
import re
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda import params as params_of
from batchnorm.backends.cuda import running as cuda
from batchnorm.backends.cuda.launches import GIVEN, ORDERED, SUM, WRITE, Limits, MemoryLayout
from batchnorm.epilogue import ACTIVATIONS, KINDS, Activation

H200 = Limits(132, 60 * 2**20)
TINY = Limits(2, 2**14, 256)


def memory_layout(outer, channels, inner, last):
    if last:
        return MemoryLayout(outer * inner, channels, 1, channels, 1, 1)
    return MemoryLayout(outer, channels, inner, channels * inner, inner, 1)


def tiles(launch):
    """Yield the (channel, position) that each thread visits, as in tile_of of tiling.cu."""
    bundle = launch.vector if launch.across_channels else 1
    for task in range(launch.slices * launch.parts):
        a_slice, part = task % launch.slices, task // launch.slices
        for t in range(launches.THREADS):
            row_threads = launch.adjacent_lanes * launch.slice_bundles
            bundle_index = t % row_threads // launch.adjacent_lanes
            lane = t // row_threads * launch.adjacent_lanes + t % launch.adjacent_lanes
            c = (a_slice * launch.slice_bundles + bundle_index) * bundle
            if lane >= launch.lanes or c >= launch.memory_layout.channels:
                continue
            begin, end = part * launch.length, min((part + 1) * launch.length, launch.positions)
            for position in range(begin + lane, end, launch.lanes):
                for i in range(bundle):
                    yield c + i, position


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    outer=st.integers(1, 40),
    channels=st.integers(1, 90),
    inner=st.integers(1, 60),
    last=st.booleans(),
    dtype=st.sampled_from(list(launches.TYPES)),
    alignment=st.sampled_from([2, 4, 8, 16]),
    weighted=st.booleans(),
    phases=st.sampled_from([SUM, WRITE, SUM | WRITE, WRITE | GIVEN]),
    limits=st.sampled_from([H200, TINY, Limits(2, 2**14)]),
)
def test_each_element_is_visited_once(
    outer, channels, inner, last, dtype, alignment, weighted, phases, limits
):
    given = memory_layout(outer, channels, inner, last)
    launch = launches.launch(given, dtype, alignment, weighted, 1, phases, limits)
    seen = collections.Counter(tiles(launch))
    assert set(seen.values()) == {1}
    values = launch.vector if not launch.across_channels else 1
    assert len(seen) * values == outer * channels * inner
    assert launch.lanes * launch.slice_bundles <= launches.THREADS
    assert launch.slice_bundles <= launches.MAX_BUNDLES
    assert 1 <= launch.group <= launch.slices
    assert launch.parts == 1 or launch.phases & (ORDERED | SUM | WRITE)
    assert 1 <= launches.blocks(launch, limits) <= 2**31 - 1
    if phases == SUM | WRITE and not launch.phases & ORDERED:
        assert launch.parts == 1, "a block that sums and writes has all parts of its slices"


@hypothesis.given(
    outer=st.integers(1, 9),
    channels=st.integers(1, 40),
    inner=st.integers(1, 40),
    last=st.booleans(),
    dtype=st.sampled_from(list(launches.TYPES)),
    start=st.integers(0, 7),
)
def test_vectors_divide_every_start(outer, channels, inner, last, dtype, start):
    size = launches.TYPES[dtype][1]
    given = memory_layout(outer, channels, inner, last)
    width, across_channels = launches.vector(
        given, dtype, launches.alignment(4096 + start * size), False
    )
    assert (start * size) % (width * size) == 0 or width == 1
    starts = {
        n * given.outer_stride + c * given.channel_stride + s * given.inner_stride
        for n in range(given.outer)
        for c in range(0, channels, width if across_channels else 1)
        for s in range(0, given.inner, 1 if across_channels else width)
    }
    assert all(start % width == 0 for start in starts)
    assert width * size <= 16


def test_odd_lengths_weights_and_alignments_shorten_vectors():
    assert launches.vector(memory_layout(32, 512, 49, False), "float32", 16, False) == (1, False)
    assert launches.vector(memory_layout(32, 512, 196, False), "float32", 16, False) == (4, False)
    assert launches.vector(memory_layout(32, 512, 196, False), "float32", 8, False) == (1, False)
    assert launches.vector(memory_layout(32, 512, 49, True), "float16", 16, False) == (4, True)
    assert launches.vector(memory_layout(32, 512, 64, False), "float16", 16, False) == (8, False)
    assert launches.vector(memory_layout(32, 512, 64, False), "float16", 16, True) == (1, False)


@pytest.mark.parametrize(
    ("shape", "channel_axes", "strides", "expected"),
    [
        ((4, 3, 5, 6), (1,), (90, 30, 6, 1), MemoryLayout(4, 3, 30, 90, 30, 1)),
        (
            (4, 3, 5, 6),
            (1,),
            (90, 1, 18, 3),
            MemoryLayout(120, 3, 1, 3, 1, 0),
        ),  # channels last in memory
        ((4, 5, 6, 3), (3,), (90, 18, 3, 1), MemoryLayout(120, 3, 1, 3, 1, 0)),
        ((5, 70), (0,), (70, 1), MemoryLayout(1, 5, 70, 0, 70, 1)),
        ((37,), (), (1,), MemoryLayout(1, 1, 37, 0, 0, 1)),
        ((2, 4, 3, 3), (1, 2), (36, 9, 3, 1), MemoryLayout(2, 12, 3, 36, 3, 1)),
        ((2, 4, 3, 3), (1, 3), (36, 9, 3, 1), None),  # two channel axes that cannot be merged
    ],
)
def test_memory_layouts(shape, channel_axes, strides, expected):
    found = launches.memory_layouts(shape, channel_axes, (strides,))
    assert (found and found[0]) == expected


def test_a_broadcast_mask_has_the_lengths_of_the_data():
    x, w = launches.memory_layouts((8, 16, 10, 12), (1,), ((1920, 120, 12, 1), (1, 0, 0, 0)))
    assert x == MemoryLayout(8, 16, 120, 1920, 120, 1)
    assert w == MemoryLayout(8, 16, 120, 1, 0, 0)


def test_dense():
    assert launches.dense((4, 3, 5), (15, 5, 1))
    assert launches.dense((4, 3, 5), (1, 20, 4))
    assert launches.dense((4, 1, 5), (5, 77, 1))
    assert not launches.dense((4, 3, 5), (30, 10, 2))
    assert not launches.dense((4, 3), (0, 1))
    assert not launches.dense((4,), (-1,))


def test_groups_of_large_arrays_fit_the_cache():
    launch = launches.launch(
        memory_layout(32, 256, 56 * 56, False), "float32", 16, False, 1, SUM | WRITE, H200
    )
    assert launch.phases & ORDERED
    group = launch.group * launch.positions * launch.vector * launch.slice_bundles * 4
    assert 2 * group <= H200.cache / 2
    running = launches.RESIDENT * H200.processors
    assert 0.9 * running <= launch.group * launch.parts <= running, "a tile for each block that runs"


def test_small_arrays_need_no_counters():
    for shape in ((64, 100, 1), (256, 1024, 1), (32, 512, 49)):
        launch = launches.launch(
            memory_layout(*shape, shape[2] == 1), "float32", 16, False, 1, SUM | WRITE, H200
        )
        assert not launch.phases & ORDERED
        assert launches.scratch(launch, "forward", "float32").total == 0


def test_more_than_2_to_the_31_elements():
    """The parameters of a launch on 9 GB are exact, and none exceeds its type."""
    given = memory_layout(3, 64, 12_000_000, False)
    launch = launches.launch(given, "float32", 16, False, 1, SUM | WRITE, H200)
    assert launch.positions * launch.vector * 64 == 3 * 64 * 12_000_000 > 2**31
    assert launch.length * launch.parts >= launch.positions > launch.length * (launch.parts - 1)
    params = params_of.pack_params(
        launch, params_of.Operands(1, 0, 2, 0), None, params_of.VECTORS, 3, (), 4, 5, 1e-5
    )
    outer, channel, inner = struct.unpack_from("=3q", params, 48)
    assert (outer, channel, inner) == (64 * 12_000_000, 12_000_000, 4)
    sequence_numbers = 2 * -(-launch.slices // launch.group) * launch.group * launch.parts
    assert sequence_numbers < 2**32


def test_an_epilogue_is_packed():
    """In the places that the fields have in the source, with the number that the enum has there."""
    given = memory_layout(3, 8, 5, False)
    launch = launches.launch(given, "float32", 16, False, 2, WRITE, H200)
    operands = params_of.Operands(1, 2, 3, 4, residual=5, dresidual=6)
    last = (params_of.VECTORS, 7, (11, 12, 13, 14, 15), 8, 9, 1e-5, Activation("leaky_relu", 0.25))
    packed = params_of.pack_params(launch, operands, None, *last)
    assert struct.unpack_from("=6Q", packed) == (1, 2, 3, 4, 5, 6)
    fields = struct.unpack_from("=8Q dqd", packed, params_of.PARAMS_BYTES - 11 * 8)
    assert fields == (7, 11, 12, 13, 14, 15, 8, 9, 1e-5, KINDS.index("leaky_relu"), 0.25)
    names = re.search(r"enum Activation \{(.*?)\}", cuda.source()).group(1).lower().split(", ")
    assert [n.strip() for n in names] == ["identity", *ACTIVATIONS, "activations"]


@pytest.mark.parametrize("dtype", launches.TYPES)
def test_factors_lie_in_the_working_memory(dtype):
    """They are as many as a pass has, aligned, and do not overlap each other or the partial sums."""
    for channels in (1, 3, 64, 101):
        given = memory_layout(64, channels, 10_000, False)
        launch = launches.launch(given, dtype, 16, False, 1, SUM | WRITE, TINY)
        scratch = launches.scratch(launch, "backward", dtype)
        assert launch.phases & ORDERED
        found = launches.factor_addresses(4096, scratch, launch, dtype)
        size = 8 if dtype == "float64" else 4
        assert len(found) == launches.MAX_FACTORS
        assert all(b - a == channels * size for a, b in itertools.pairwise(found))
        assert found[-1] + channels * size <= 4096 + scratch.factors
        assert scratch.factors % 8 == 0


def test_the_source_needs_no_files():
    """NVRTC compiles one text: a header that includes another comes after it."""
    text = cuda.source()
    for name in re.findall(r'#include "(\w+)\.h"', text):
        guard = f"BATCHNORM_{name.upper()}_H"
        before = text[: text.index(f'#include "{name}.h"')]
        assert f"#define {guard}" in before
        assert before.rstrip().rpartition("\n")[2].startswith(f"#ifndef {guard}")


def test_the_parameters_have_the_size_of_the_struct():
    """Python packs as many bytes as the fields in the source have."""
    body = re.search(r"struct Params \{(.*?)\};", cuda.source(), re.S).group(1)
    body = re.sub(r"//.*", "", body)
    size = 0
    for type_, names in re.findall(
        r"(const void\*|void\*|long long|Vector|double\*|unsigned\*|double)\s+([^;]+);", body
    ):
        for name in names.split(","):
            count = re.search(r"\[(\d+)\]", name.replace("MAX_FACTORS", str(launches.MAX_FACTORS)))
            size += (24 if type_ == "Vector" else 8) * (int(count.group(1)) if count else 1)
    assert size == params_of.PARAMS_BYTES


def test_phases_and_dtype_tags_are_those_of_the_source():
    phases = re.search(r"enum Phase \{(.*?)\}", cuda.source()).group(1)
    for name, value in re.findall(r"(\w+) = (\d+)", phases):
        assert getattr(launches, name) == int(value)
    tags = re.search(r"enum DtypeTag \{(.*?)\}", cuda.source()).group(1).replace(" ", "").split(",")
    named = {None: "NOTHING", "float16": "HALF", "bfloat16": "BFLOAT16", "float32": "SINGLE"}
    assert [named.get(dtype, "DOUBLE") for dtype in params_of.DTYPE_TAGS] == tags
    for name in ("THREADS", "MAX_BUNDLES", "FAN", "MAX_FACTORS"):
        found = re.search(rf"const int {name} = (\d+);", cuda.source()).group(1)
        assert getattr(launches, name) == int(found)


def test_every_launch_has_an_instance():
    known = set(launches.instances())
    both = (False, True)  # without an epilogue and with one
    for dtype in launches.TYPES:
        for weights in (None, "bool", "float64"):
            for channels, inner, last in ((64, 64, False), (64, 9, True), (7, 3, False), (6, 4, True)):
                for alignment in (2, 4, 8, 16):
                    for kernel, epilogue in itertools.product(launches.KERNELS[:2], both):
                        given = memory_layout(3, channels, inner, last)
                        launch = launches.launch(
                            given, dtype, alignment, weights is not None, 1, SUM | WRITE, H200
                        )
                        if not weights or kernel in launches.WEIGHTED[epilogue]:
                            name = launches.instance(kernel, launch, dtype, weights, epilogue)
                            assert name in known
                    plain = launches.launch(given, dtype, alignment, False, 1, WRITE, H200)
                    for epilogue in both:
                        assert launches.instance("normalize", plain, dtype, None, epilogue) in known
    assert len(known) == len(launches.instances())
