"""Launch arithmetic of the CUDA kernels, without a device: every value once, within every limit."""

import collections
import re
import struct

import hypothesis
import hypothesis.strategies as st
import pytest

from batchnorm.backends.cuda import backend as cuda
from batchnorm.backends.cuda import launches
from batchnorm.backends.cuda.launches import GIVEN, ORDERED, SUM, WRITE, Form, Limits

H200 = Limits(132, 60 * 2**20)
TINY = Limits(2, 2**14, 256)


def form(outer, channels, inner, last):
    if last:
        return Form(outer * inner, channels, 1, channels, 1, 1)
    return Form(outer, channels, inner, channels * inner, inner, 1)


def tiles(at):
    """What each thread of each block visits: (channel, position), as tile_of in lanes.cu has it."""
    bundle = at.vector if at.columns else 1
    for task in range(at.slices * at.parts):
        a_slice, part = task % at.slices, task // at.slices
        for t in range(launches.THREADS):
            wide = at.lane_run * at.lane_channels
            column = t % wide // at.lane_run
            lane = t // wide * at.lane_run + t % at.lane_run
            c = (a_slice * at.lane_channels + column) * bundle
            if lane >= at.lanes or c >= at.form.channels:
                continue
            begin, end = part * at.length, min((part + 1) * at.length, at.positions)
            for position in range(begin + lane, end, at.lanes):
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
def test_every_value_is_visited_once(
    outer, channels, inner, last, dtype, alignment, weighted, phases, limits
):
    given = form(outer, channels, inner, last)
    at = launches.launch(given, dtype, alignment, weighted, 1, phases, limits)
    seen = collections.Counter(tiles(at))
    assert set(seen.values()) == {1}
    values = at.vector if not at.columns else 1
    assert len(seen) * values == outer * channels * inner
    assert at.lanes * at.lane_channels <= launches.THREADS
    assert at.lane_channels <= launches.MOST
    assert 1 <= at.group <= at.slices
    assert at.parts == 1 or at.phases & (ORDERED | SUM | WRITE)
    assert 1 <= launches.blocks(at, limits) <= 2**31 - 1
    if phases == SUM | WRITE and not at.phases & ORDERED:
        assert at.parts == 1, "a block that sums and writes has all of its slices' values"


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
    given = form(outer, channels, inner, last)
    width, columns = launches.vector(given, dtype, launches.alignment(4096 + start * size), False)
    assert (start * size) % (width * size) == 0 or width == 1
    starts = {
        n * given.outer_step + c * given.channel_step + s * given.inner_step
        for n in range(given.outer)
        for c in range(0, channels, width if columns else 1)
        for s in range(0, given.inner, 1 if columns else width)
    }
    assert all(at % width == 0 for at in starts)
    assert width * size <= 16


def test_an_odd_plane_and_a_cut_array_are_read_value_by_value():
    assert launches.vector(form(32, 512, 49, False), "float32", 16, False) == (1, False)
    assert launches.vector(form(32, 512, 196, False), "float32", 16, False) == (4, False)
    assert launches.vector(form(32, 512, 196, False), "float32", 8, False) == (1, False)
    assert launches.vector(form(32, 512, 49, True), "float16", 16, False) == (4, True)
    assert launches.vector(form(32, 512, 64, False), "float16", 16, False) == (8, False)
    assert launches.vector(form(32, 512, 64, False), "float16", 16, True) == (1, False)


@pytest.mark.parametrize(
    ("shape", "kept", "steps", "expected"),
    [
        ((4, 3, 5, 6), (1,), (90, 30, 6, 1), Form(4, 3, 30, 90, 30, 1)),
        ((4, 3, 5, 6), (1,), (90, 1, 18, 3), Form(120, 3, 1, 3, 1, 0)),  # channels last in memory
        ((4, 5, 6, 3), (3,), (90, 18, 3, 1), Form(120, 3, 1, 3, 1, 0)),
        ((5, 70), (0,), (70, 1), Form(1, 5, 70, 0, 70, 1)),
        ((37,), (), (1,), Form(1, 1, 37, 0, 0, 1)),
        ((2, 4, 3, 3), (1, 2), (36, 9, 3, 1), Form(2, 12, 3, 36, 3, 1)),
        ((2, 4, 3, 3), (1, 3), (36, 9, 3, 1), None),  # two kept axes that cannot be merged
    ],
)
def test_forms(shape, kept, steps, expected):
    found = launches.forms(shape, kept, (steps,))
    assert (found and found[0]) == expected


def test_a_mask_shares_the_walk_of_the_data():
    x, w = launches.forms((8, 16, 10, 12), (1,), ((1920, 120, 12, 1), (1, 0, 0, 0)))
    assert x == Form(8, 16, 120, 1920, 120, 1)
    assert w == Form(8, 16, 120, 1, 0, 0)


def test_dense():
    assert launches.dense((4, 3, 5), (15, 5, 1))
    assert launches.dense((4, 3, 5), (1, 20, 4))
    assert launches.dense((4, 1, 5), (5, 77, 1))
    assert not launches.dense((4, 3, 5), (30, 10, 2))
    assert not launches.dense((4, 3), (0, 1))
    assert not launches.dense((4,), (-1,))


def test_large_arrays_come_in_groups_that_the_cache_holds():
    at = launches.launch(form(32, 256, 56 * 56, False), "float32", 16, False, 1, SUM | WRITE, H200)
    assert at.phases & ORDERED
    group = at.group * at.positions * at.vector * at.lane_channels * 4
    assert 2 * group <= H200.cache / 2
    running = launches.RESIDENT * H200.processors
    assert 0.9 * running <= at.group * at.parts <= running, "a tile for each block that runs"


def test_small_arrays_are_one_launch_without_counters():
    for shape in ((64, 100, 1), (256, 1024, 1), (32, 512, 49)):
        at = launches.launch(form(*shape, shape[2] == 1), "float32", 16, False, 1, SUM | WRITE, H200)
        assert not at.phases & ORDERED
        assert launches.scratch(at, "forward", "float32").total == 0


def test_more_values_than_32_bits_count():
    """9 GB: the numbers that a job packs are right, and none is cut."""
    given = form(3, 64, 12_000_000, False)
    at = launches.launch(given, "float32", 16, False, 1, SUM | WRITE, H200)
    assert at.positions * at.vector * 64 == 3 * 64 * 12_000_000 > 2**31
    assert at.length * at.parts >= at.positions > at.length * (at.parts - 1)
    job = launches.job(at, launches.Operands(1, 0, 2, 0), None, launches.VECTORS, 3, (), 4, 5, 1e-5)
    outer, channel, inner = struct.unpack_from("=3q", job, 32)
    assert (outer, channel, inner) == (64 * 12_000_000, 12_000_000, 4)
    tickets = 2 * -(-at.slices // at.group) * at.group * at.parts
    assert tickets < 2**32


def test_the_job_is_the_struct_of_the_source():
    """Its fields, counted in the source: Python packs as many bytes."""
    body = re.search(r"struct Job \{(.*?)\};", cuda.source(), re.S).group(1)
    body = re.sub(r"//.*", "", body)
    size = 0
    for kind, names in re.findall(
        r"(const void\*|void\*|long long|Vector|double\*|unsigned\*|double)\s+([^;]+);", body
    ):
        for name in names.split(","):
            many = re.search(r"\[(\d+)\]", name)
            size += (24 if kind == "Vector" else 8) * (int(many.group(1)) if many else 1)
    assert size == launches.JOB_BYTES


def test_phases_and_kinds_are_those_of_the_source():
    phases = re.search(r"enum Phase \{(.*?)\}", cuda.source()).group(1)
    for name, value in re.findall(r"(\w+) = (\d+)", phases):
        assert getattr(launches, name) == int(value)
    kinds = re.search(r"enum Kind \{(.*?)\}", cuda.source()).group(1).replace(" ", "").split(",")
    named = {None: "NOTHING", "float16": "HALF", "bfloat16": "BFLOAT16", "float32": "SINGLE"}
    assert [named.get(k, "DOUBLE") for k in launches.KINDS] == kinds
    for name in ("THREADS", "MOST", "FAN"):
        found = re.search(rf"const int {name} = (\d+);", cuda.source()).group(1)
        assert getattr(launches, name) == int(found)


def test_every_launch_has_an_instance():
    known = set(launches.instances())
    for dtype in launches.TYPES:
        for weights in (None, "bool", "float64"):
            for channels, inner, last in ((64, 64, False), (64, 9, True), (7, 3, False), (6, 4, True)):
                for alignment in (2, 4, 8, 16):
                    for kernel in launches.KERNELS[:2]:
                        given = form(3, channels, inner, last)
                        at = launches.launch(
                            given, dtype, alignment, weights is not None, 1, SUM | WRITE, H200
                        )
                        assert launches.instance(kernel, at, dtype, weights) in known
                    plain = launches.launch(given, dtype, alignment, False, 1, WRITE, H200)
                    assert launches.instance("normalize", plain, dtype, None) in known
    assert len(known) == len(launches.instances())
