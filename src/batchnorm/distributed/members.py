"""What processes of a group tell each other before they add up vectors, and how they give up.

An engine that adds vectors of different lengths hangs, crashes or gives nonsense. So each member first
says in one row of bytes what it comes with; only when all say the same do they begin. The rows travel
while each member works on its own part of the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

import array_api_compat as compat
import numpy as np
import numpy.typing as npt

from batchnorm import checks
from batchnorm.distributed import GroupError

Array = Any
Rows = npt.NDArray[np.uint8]

ROW = 512  # bytes
FAILED = "!"  # what a word begins with whose member does not take part
# How often an answer is asked for before this process sleeps between questions, and how long then.
AWAKE, NAP = 2000, 5e-5


class Members:
    """A group of processes: what the adapters to their engines share."""

    rank: int
    size: int
    timeout: float | None
    quiet = False
    """Whether members add up without a word before it."""

    def __init__(self) -> None:
        # What was said, and how to wait for what all said; usually one, more after errors.
        self._words: list[tuple[str, Callable[[], Rows]]] = []
        self._broken = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} group, rank {self.rank} of {self.size}>"

    def announce(self, word: str, failed: bool = False) -> None:
        """Say what this member comes with, or that it does not come; does not wait for others."""
        self._whole()
        if self.quiet:
            return
        row = np.zeros(ROW, np.uint8)
        encoded = (FAILED * failed + word).encode()[:ROW]
        row[: len(encoded)] = list(encoded)
        self._words.append((word if not failed else "", self._gather(row)))

    def all_reduce(self, array: Array) -> Array:
        """Sum an array over the members, each of which calls this with one of the same shape.

        Parameters
        ----------
        array : array
            float32 or float64.

        Returns
        -------
        array
            The sum, in the library and on the device of `array`.

        Raises
        ------
        GroupError
            A member is missing or late, or came with something else.
        """
        self._whole()
        words, self._words = self._words, []
        for own, wait in words:
            rows = wait()
            if own:  # not of a call that failed here: there is nothing to compare
                self._compare(own, [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows])
        return self._sum(array)

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        """Begin to exchange rows; what is returned waits for all members'."""
        raise NotImplementedError

    def _sum(self, array: Array) -> Array:
        """Sum an array over the members."""
        raise NotImplementedError

    def _whole(self) -> None:
        if self._broken:
            raise GroupError(f"group: got a call after {self._broken}; expected a new group")

    def _break(self, why: object) -> NoReturn:
        """Give up: messages of this call may still be under way, so none can follow."""
        got = str(why).strip().partition("\n")[0]
        self._broken = f"an error in an earlier one ({got})"
        raise GroupError(f"group: got {got}, expected all {self.size} members to answer")

    def _compare(self, own: str, words: list[str]) -> None:
        for rank, word in enumerate(words):
            if word.startswith(FAILED):
                got, what = (
                    f"an error on rank {rank} ({word[len(FAILED) :]})",
                    "all members to take part",
                )
                checks.fail(GroupError, "group", got, what)
            if word != own.encode()[:ROW].decode(errors="replace"):
                expected = f"{own}, as on this rank {self.rank}"
                checks.fail(GroupError, "group", f"{word} from rank {rank}", expected)

    def _await(self, done: Callable[[], bool]) -> None:
        """Wait until something is done, or for as long as a member may take."""
        limit = float("inf") if self.timeout is None else time.monotonic() + self.timeout
        asked = 0
        while not done():
            asked += 1
            if asked > AWAKE:
                time.sleep(NAP)
            elif asked % 20 == 0:
                time.sleep(0)  # another member may need this very processor
            if time.monotonic() > limit:
                self._break(f"no answer within {self.timeout:g} s on rank {self.rank}")


def to_host(array: Array) -> Array:
    """An eager array of any library as one of NumPy."""
    if compat.is_torch_array(array):
        return plain(array).detach().cpu().numpy()
    if compat.is_cupy_array(array):
        return array.get()
    if compat.is_lazy_array(array) and not compat.is_jax_array(array):
        got = f"a lazy array of {checks.library(checks.namespace('array', array))}"
        checks.fail(TypeError, "group", got, "an array whose values can be sent")
    try:
        return np.asarray(array)
    except TypeError:
        got = f"{checks.kind(array)} without values"
        checks.fail(TypeError, "group", got, "bn.distributed.jax(axis_name) for what JAX traces")


def plain(tensor: Array) -> Array:
    """A tensor whose sum over the members PyTorch need not know of: it could not go back through it."""
    from batchnorm.kernels import torch as adapter

    why = adapter.recorded((tensor,)) or adapter.transformed()
    if why is not None:
        expected = "plain ones, under torch.no_grad() say; or batch_norm's first derivative, by autograd"
        checks.fail(TypeError, "group", f"tensors to add up, and {why}", expected)
    return tensor


def from_host(host: Array, like: Array) -> Array:
    """A NumPy array in the library and on the device of another."""
    xp = compat.array_namespace(like)
    return xp.asarray(host, device=compat.device(like))


def seconds(timeout: float | None) -> float | None:
    """Check a timeout."""
    if timeout is None:
        return None
    found: float = checks.scalar("timeout", timeout, 0)
    return found
