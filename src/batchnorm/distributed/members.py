"""What processes of a group tell each other around the vectors that they add up, and how they give up.

An engine that adds vectors of different lengths hangs, crashes or gives nonsense. So at its beginning
each call is announced: every member says in one row of bytes what it comes with, and these rows travel
while each works on its own part of the batch. Only when all rows are the same do members add up.

A member that fails before it has announced itself says that instead, and waits until all have heard it.
One that fails later takes part in the sum that the others are in, with a mark in place of its share; one
that fails after the last sum says so where the next call begins. So all members make the same exchanges
in the same order, whatever happens to one of them, and what is exchanged has the number of its call in
it: messages of two calls are never taken for each other's.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, Self

import array_api_compat as compat
import numpy as np
import numpy.typing as npt

from batchnorm import tracing
from batchnorm.arguments import validate_number
from batchnorm.arrays import library_name, namespace, on_host
from batchnorm.distributed import GroupError
from batchnorm.errors import describe_type, fail

Array = Any
Rows = npt.NDArray[np.uint8]
Shape = tuple[int, ...]

ROW = 512  # bytes
FAILED = "!"  # what a row begins with whose member does not take part
# Numbers of calls, as float32 holds them when some thousand members add theirs up.
NUMBERS = 2**12
# How often an answer is asked for before this process sleeps between questions, and how long then.
AWAKE, NAP = 2000, 5e-5


class _Announced(NamedTuple):
    """A call that this member has announced, until all know that all came with the same."""

    row: str
    wait: Callable[[], Rows]


class Members:
    """A group of processes: what the adapters to their engines share."""

    rank: int
    size: int
    timeout: float | None
    quiet = False
    """Whether members add up without a word before it."""

    def __init__(self) -> None:
        self.exchanges = 0  # that were begun
        self._announced: _Announced | None = None
        self._sums: list[tuple[Shape, str]] = []  # shapes and dtypes that are still to be added up
        self._late = ""  # an error after the last sum of a call, of which the others do not know yet
        self._broken = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} group, rank {self.rank} of {self.size}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        got, expected = "one to pickle", "its members' processes alone to hold it"
        fail(TypeError, "group", got, expected)

    def announce(self, what: str, sums: tuple[Shape, ...], dtype: str) -> None:
        """Say what this member comes with; does not wait for others.

        Parameters
        ----------
        what : str
            The call, for people: all members say the same.
        sums : tuple of tuples of ints
            The shapes that the call is going to add up, in order.
        dtype : {"float32", "float64"}
            Their dtype.
        """
        self._whole()
        if self._late:
            late, self._late = self._late, ""
            self._tell(late)
            got = f"got a call after one that failed on this rank {self.rank} ({late})"
            self._refuse(f"{got}, expected all members to go on")
        if not self.quiet:
            digest = hashlib.sha256(f"{what} {sums} {dtype}".encode()).hexdigest()[:16]
            self._announced = self._say(f"{digest} {what}")
            self._sums = [(shape, dtype) for shape in sums]

    def abort_unannounced(self, error: BaseException) -> None:
        """Tell the others that this member does not come to a call, and why; wait until all know.

        They learn of it where they would add up. Nothing is raised here: the error is being raised.
        """
        if not (self._broken or self.quiet):
            told, self._late = self._late or _told(error), ""
            self._tell(told)
            self._mark(error)

    def abort(self, error: BaseException) -> None:
        """Tell the others that this member fails in a call that it has announced.

        That is, where they wait for it; or in the next call, unless all have failed alike.
        """
        if self._broken or self.quiet:
            return
        if not self._sums:
            if getattr(error, "on_all_members", False):
                self._mark(error)
            else:
                self._late = _told(error)
            return
        with contextlib.suppress(GroupError), self._whole_or_broken():
            self._agree()  # raises where the others go no further either
            self._add_up(None)
            self._heard(self._say(_told(error), FAILED).wait())
        self._mark(error)

    def told(self, error: BaseException, since: int) -> bool:
        """Whether all members know of an error, by an exchange after so many."""
        group, exchanges = getattr(error, "_batchnorm_told", (None, 0))
        return group is self and exchanges > since

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
            A member is missing or late, came with something else, or failed.
        """
        self._whole()
        announced = bool(self._sums)
        since = self.exchanges - (self._announced is not None)
        try:
            vector = self._vector(array)
            own = tuple(array.shape), _name(vector)
            if self.quiet:
                return self._back(self._sum(vector), array)
            if not announced:  # a call of the user's own
                announced = True
                self.announce(f"all_reduce of an array of shape {own[0]}", own[:1], own[1])
            if own != self._sums[0]:
                got, expected = (f"{dtype} of shape {shape}" for shape, dtype in (own, self._sums[0]))
                fail(TypeError, "group.all_reduce", got, f"{expected}, as was announced")
            self._agree()
            total = self._add_up(vector)
        except BaseException as error:
            if not self.told(error, since):
                (self.abort if announced else self.abort_unannounced)(error)
            raise
        return self._back(total, array)

    # What an engine brings.

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        """Begin to exchange rows; what is returned waits for all members'."""
        raise NotImplementedError

    def _vector(self, array: Array) -> Array:
        """An array as a 1-d array of the engine's kind, a copy where the sum may be written to it."""
        raise NotImplementedError

    def _sum(self, vector: Array) -> Array:
        """Sum a 1-d array over the members."""
        raise NotImplementedError

    def _zeros(self, size: int, dtype: str) -> Array:
        """A 1-d array of the engine's kind."""
        raise NotImplementedError

    def _back(self, vector: Array, like: Array) -> Array:
        """A sum in the library, shape and place of an array."""
        raise NotImplementedError

    # Exchanges.

    def _say(self, text: str, mark: str = "") -> _Announced:
        """Begin to exchange rows, with the number of this exchange."""
        self.exchanges += 1
        row = np.zeros(ROW, np.uint8)
        encoded = f"{mark}{self.exchanges} {text}".encode(errors="replace")[:ROW]
        row[: len(encoded)] = list(encoded)
        return _Announced(encoded.decode(errors="replace"), self._gather(row))

    def _heard(self, rows: Rows) -> list[str]:
        """What the members said, where none of them failed."""
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
        for rank, text in enumerate(texts):
            if text.startswith(FAILED):
                got = f"an error on rank {rank} ({text.partition(' ')[2]})"
                self._refuse(f"got {got}, expected all members to take part")
        return texts

    def _tell(self, text: str) -> None:
        """Take part in an exchange to say that this member does not come, and why."""
        with contextlib.suppress(GroupError), self._whole_or_broken():
            self._say(text, FAILED).wait()

    def _agree(self) -> None:
        """Wait for the rows of the call that was announced, if one was; all have to be the same."""
        if self._announced is None:
            return
        rows = self._announced.wait()  # who is interrupted in this has still announced the call
        own, self._announced = self._announced.row, None
        try:
            self._compare(own, rows)
        except GroupError:
            self._sums = []  # nobody adds up
            raise

    def _compare(self, own: str, rows: Rows) -> None:
        for rank, text in enumerate(self._heard(rows)):
            if text == own:
                continue
            (number, _, theirs), (mine, _, ours) = (t.split(" ", 2) for t in (text, own))
            if number != mine:
                self._break(f"exchange {number} from rank {rank} for {mine}")
            if theirs == ours:
                theirs, ours = f"another {theirs}", "the same"
            self._refuse(f"got {theirs} from rank {rank}, expected {ours}, as on this rank {self.rank}")

    def _add_up(self, vector: Array | None) -> Array:
        """Sum a vector over the members; None where this one failed.

        Behind the vector go the number of the exchange and a mark for each member that failed.
        """
        shape, dtype = self._sums[0]
        number, size = (self.exchanges + 1) % NUMBERS, int(np.prod(shape))
        failed = vector is None
        vector = self._zeros(size, dtype) if vector is None else vector
        xp = compat.array_namespace(vector)
        tail = xp.asarray([number, failed], dtype=vector.dtype, device=compat.device(vector))
        message = xp.concat((vector, tail))
        self.exchanges += 1
        self._sums = self._sums[1:]
        with self._whole_or_broken():
            total = self._sum(message)
        numbers, failures = on_host(total[size:]).tolist()
        if numbers != number * self.size:
            self._break("a message of another call")
        if failures:
            self._sums = []
            if not failed:  # who did says why
                self._heard(self._say("-").wait())
        return total[:size]

    def _whole(self) -> None:
        if self._broken:
            self._refuse(f"got a call after {self._broken}; expected a new group")

    def _mark(self, error: BaseException) -> None:
        """Note that all members know of an error, for the calls around this one."""
        with contextlib.suppress(AttributeError):  # of a class that has no place for it
            error._batchnorm_told = self, self.exchanges  # type: ignore[attr-defined]

    def _refuse(self, why: str) -> NoReturn:
        """Raise an error that all members raise too, or that finds the group broken."""
        error = GroupError(f"group: {why}")
        self._mark(error)
        raise error

    def _break(self, why: object) -> NoReturn:
        """Give up: messages of this call may still be under way, so none can follow."""
        got = str(why).strip().partition("\n")[0]
        self._broken = f"an error in an earlier one ({got})"
        self._announced, self._sums = None, []
        self._refuse(f"got {got}, expected all {self.size} members to answer")

    @contextlib.contextmanager
    def _whole_or_broken(self) -> Iterator[None]:
        """Give up where an exchange is interrupted: the others' part of it is still under way."""
        try:
            yield
        except GroupError:
            raise
        except BaseException as error:
            with contextlib.suppress(GroupError):
                self._break(_told(error))
            raise

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


def _told(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "which cannot be shown"
    return " ".join(f"{type(error).__name__}: {text}".split())


def _name(vector: Array) -> str:
    """The name of a dtype that members add up in."""
    name = str(vector.dtype).rpartition(".")[2]
    if name not in ("float32", "float64"):
        fail(TypeError, "array", f"dtype {name}", "float32 or float64")
    return name


def to_host(array: Array) -> Array:
    """An eager array of any library as one of NumPy."""
    if compat.is_torch_array(array) or compat.is_cupy_array(array):
        return on_host(plain(array))
    if compat.is_lazy_array(array) and not compat.is_jax_array(array):
        got = f"a lazy array of {library_name(namespace('array', array))}"
        fail(TypeError, "group", got, "an array whose values can be sent")
    try:
        return np.asarray(array)
    except TypeError:
        got = f"{describe_type(array)} without values"
        fail(TypeError, "group", got, "bn.distributed.jax(axis_name) for what JAX traces")


def plain(tensor: Array) -> Array:
    """A tensor whose sum over the members PyTorch need not know of: it could not go back through it."""
    if not compat.is_torch_array(tensor):
        return tensor
    why = tracing.transformed() or tracing.recorded((tensor,))
    if why is not None:
        expected = "plain ones, under torch.no_grad() say; or batch_norm's first derivative, by autograd"
        fail(TypeError, "group", f"tensors to add up, and {why}", expected)
    return tensor


def from_host(host: Array, like: Array) -> Array:
    """A NumPy array in the library and on the device of another."""
    xp = compat.array_namespace(like)
    return xp.asarray(host, device=compat.device(like))


def seconds(timeout: float | None) -> float | None:
    """Check a timeout."""
    if timeout is None:
        return None
    found: float = validate_number("timeout", timeout, 0)
    return found
