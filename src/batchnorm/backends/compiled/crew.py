"""How compiled loops share a job with helper threads, who never need the interpreter.

A helper is a thread inside `serve`, and a box of numbers through which it is given jobs. It watches
its box for a moment, in case calls come in rows, then sleeps on a lock of the interpreter's own kind,
which needs no interpreter to be taken or released. A caller takes the helpers that are free, begins at
once itself, and takes back what no helper has begun when it has finished.
"""

from __future__ import annotations

import os
import sys

from numba import njit, types

from batchnorm.backends.compiled.atomic import changed, fetch_add, invoke, peek, poke
from batchnorm.backends.compiled.terms import OPTIONS, TILES, compiled

# What is where in a box, in bytes.
STATE, LOOP, JOB, NUMBER, ENDED, ASLEEP, DISMISSED, BED, CHAIR, OURS, THEIRS = range(0, 88, 8)
MASK, MASK_BYTES = 128, 128  # room for the numbers of 1024 processors
BOX = 256  # in pairs of cache lines, as processors fetch them
# A state is 4 times the number of jobs so far, and one of these. A caller leads a box from FREE over
# TAKEN to POSTED, its helper to RUNNING and FREE. With the number, nobody takes back another's job.
FREE, TAKEN, POSTED, RUNNING = range(4)
# How often a number is read before its reader sleeps: some tenths of a millisecond.
AWAKE = 300_000
# After so many reads, another thread may have the processor: the one that is waited for, perhaps.
PATIENCE = 1000
# How long a caller sleeps at a time while a helper finishes, in microseconds.
NAP = 50

# Bare locks of Python's C interface. They belong to the system, not to the interpreter.
_acquire = types.ExternalFunction("PyThread_acquire_lock", types.intc(types.int64, types.intc))
_acquire_timed = types.ExternalFunction(
    "PyThread_acquire_lock_timed", types.intc(types.int64, types.int64, types.intc)
)
_release = types.ExternalFunction("PyThread_release_lock", types.void(types.int64))

if hasattr(os, "sched_yield"):
    _sched_yield = types.ExternalFunction("sched_yield", types.intc())

    @compiled
    def give_way():
        """Let another thread have this processor, if one waits for it."""
        _sched_yield()

else:

    @compiled
    def give_way():
        """Do nothing: this system has no such call."""


if sys.platform == "linux":
    _getcpu = types.ExternalFunction("sched_getcpu", types.intc())
    _affinity = types.intc(types.intc, types.int64, types.int64)
    _getaffinity = types.ExternalFunction("sched_getaffinity", _affinity)
    _setaffinity = types.ExternalFunction("sched_setaffinity", _affinity)

    @compiled
    def processor():
        """The number of the processor that runs this, or -1."""
        return types.int64(_getcpu())

    @compiled
    def move_away(box):
        """Leave the caller's processor for another that this thread may use.

        Of two threads that slept, the second to wake is often put beside the first, and stays there
        for some ten milliseconds, each with half of a processor while another idles.
        """
        here = processor()
        if here == peek(box + THEIRS) and _getaffinity(0, MASK_BYTES, box + MASK) == 0:
            word = box + MASK + here // 64 * 8
            allowed = peek(word)
            poke(word, allowed & ~(1 << here % 64))
            if _setaffinity(0, MASK_BYTES, box + MASK) == 0:  # not where this one is all there is
                poke(word, allowed)
                _setaffinity(0, MASK_BYTES, box + MASK)
        poke(box + OURS, processor())

else:

    @compiled
    def processor():
        """Nothing that equals a processor's number."""
        return types.int64(-1)

    @compiled
    def move_away(box):
        """Stay: where threads run is this system's own affair."""
        poke(box + OURS, 0)


@compiled
def reread(reads):
    """Count a read in vain."""
    if reads % PATIENCE == 0:
        give_way()
    return reads + 1


@njit(**OPTIONS)
def serve(box):
    """A helper's life: run what its box is given, until it is dismissed."""
    reads = 0
    while not peek(box + DISMISSED):
        state = peek(box + STATE)
        if state & 3 == POSTED and changed(box + STATE, state, state - POSTED + RUNNING):
            move_away(box)
            invoke(peek(box + LOOP), peek(box + JOB), peek(box + NUMBER))
            poke(box + ENDED, state >> 2)
            poke(box + STATE, state - POSTED + FREE)
            reads = 0
        reads = reread(reads)
        if reads > AWAKE:
            poke(box + ASLEEP, 1)
            # What was posted before its caller could see that is found here.
            if peek(box + STATE) & 3 != POSTED and not peek(box + DISMISSED):
                _acquire(peek(box + BED), 1)
            poke(box + ASLEEP, 0)
            reads = 0


@compiled
def wake(box):
    """Wake a helper if it sleeps; whether it did. Once too often does no harm."""
    asleep = changed(box + ASLEEP, 1, 0)
    if asleep:
        _release(peek(box + BED))
    return asleep


@njit(**OPTIONS)
def dispatch(loop, job, boxes, helpers):
    """Run loop(job, 0) here and loop(job, k) on the k-th helper, as far as they are free."""
    tickets, here, beside = job + 8 * (TILES + helpers + 1), processor(), False
    for k in range(helpers):
        box, ticket = boxes + k * BOX, 0
        state = peek(box + STATE)
        if state & 3 == FREE and changed(box + STATE, state, state + 4 + TAKEN):
            ticket = (state >> 2) + 1
            poke(box + LOOP, loop)
            poke(box + JOB, job)
            poke(box + NUMBER, k + 1)
            poke(box + THEIRS, here)
            poke(box + STATE, 4 * ticket + POSTED)
            beside |= wake(box) or peek(box + OURS) == here
        poke(tickets + 8 * k, ticket)
    if beside:  # perhaps: then a helper on this processor can leave it
        give_way()
    invoke(loop, job, 0)
    for k in range(helpers):
        box, ticket = boxes + k * BOX, peek(tickets + 8 * k)
        if ticket and not changed(box + STATE, 4 * ticket + POSTED, 4 * ticket + FREE):
            reads = 1
            while peek(box + ENDED) < ticket:
                reads = reread(reads)
                if reads > AWAKE:
                    _acquire_timed(peek(box + CHAIR), NAP, 0)


def share(common):
    """What each thread of somebody else's team does: loop(job, k), with a k of its own."""
    invoke(peek(common), peek(common + 8), fetch_add(common + 16))
