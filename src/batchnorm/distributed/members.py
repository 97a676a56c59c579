"""Exchanges of the members of a group: announcements, sums and errors.

An engine that sums vectors of different lengths hangs, crashes or returns wrong numbers. Every member
therefore announces each call at its beginning: it sends a row of bytes that describes the call, which is
transmitted while the member works on its own part of the batch. The members sum only if all rows agree.

A member that fails before it has announced the call sends its error in place of the announcement, and
waits until all members have received it. A member that fails later takes part in the sum of the others,
with a mark in place of its share. A member that fails after the last sum sends its error at the
beginning of the next call. All members therefore make the same exchanges in the same order even if one
of them fails. Each message contains the number of its exchange, so that messages of two calls cannot be
confused.
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
from batchnorm.errors import GroupError, describe_type, fail

Array = Any
Rows = npt.NDArray[np.uint8]
Shape = tuple[int, ...]

ROW_BYTES = 512
FAILURE_MARK = "!"  # the first character of a row that holds an error
# Modulus of the numbers in messages: float32 represents their sum over some thousand members.
NUMBER_MODULUS = 2**12
# How often a request is polled without a pause, and the seconds between the polls after that.
SPIN_LIMIT, BACK_OFF = 2000, 5e-5


class _Announcement(NamedTuple):
    """An announcement that this member has sent, and the function that waits for all members' rows."""

    row: str
    wait: Callable[[], Rows]


class Members:
    """A group of processes, without what depends on the engine."""

    rank: int
    size: int
    timeout: float | None
    unchecked = False
    """Whether the members sum without announcements."""

    def __init__(self) -> None:
        self.exchanges = 0  # the number of exchanges that were begun
        self._announcement: _Announcement | None = None
        self._remaining_sums: list[tuple[Shape, str]] = []  # shapes and dtypes, in order
        self._deferred_error = ""  # after the last sum of a call: not known to the other members yet
        self._broken = ""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} group, rank {self.rank} of {self.size}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        got, expected = "a request to pickle it", "use in the processes of its members only"
        fail(TypeError, "group", got, expected)

    def announce(self, what: str, sums: tuple[Shape, ...], dtype: str) -> None:
        """Announce a call; the other members are not waited for.

        Parameters
        ----------
        what : str
            A description of the call, the same on all members.
        sums : tuple of tuples of ints
            The shapes that the call is going to sum, in order.
        dtype : {"float32", "float64"}
            Their dtype.
        """
        self._raise_if_broken()
        if self._deferred_error:
            error, self._deferred_error = self._deferred_error, ""
            self._send_error(error)
            got = f"got a call after one that failed on this rank {self.rank} ({error})"
            self._raise_on_all(f"{got}, expected all members to go on")
        if not self.unchecked:
            digest = hashlib.sha256(f"{what} {sums} {dtype}".encode()).hexdigest()[:16]
            self._announcement = self._begin_exchange(f"{digest} {what}")
            self._remaining_sums = [(shape, dtype) for shape in sums]

    def abort_unannounced(self, error: BaseException) -> None:
        """Send the error of a call that this member has not announced; return when all know of it.

        The other members receive it where they would sum. This function raises nothing itself: the
        caller is already raising the error.
        """
        if not (self._broken or self.unchecked):
            text, self._deferred_error = self._deferred_error or _describe_error(error), ""
            self._send_error(text)
            self._mark_as_known(error)

    def abort(self, error: BaseException) -> None:
        """Tell the other members that this one has failed in a call that it has announced.

        They receive the error in the next sum of the call. If there is none, they receive it in the next
        call, unless all members have raised the same error.
        """
        if self._broken or self.unchecked:
            return
        if not self._remaining_sums:
            if getattr(error, "on_all_members", False):
                self._mark_as_known(error)
            else:
                self._deferred_error = _describe_error(error)
            return
        with contextlib.suppress(GroupError), self._break_if_interrupted():
            self._compare_announcements()  # raises if the other members do not continue either
            self._checked_sum(None)
            self._read_rows(self._begin_exchange(_describe_error(error), FAILURE_MARK).wait())
        self._mark_as_known(error)

    def is_known_to_all(self, error: BaseException, since: int) -> bool:
        """Return whether all members know of an error from an exchange after number `since`."""
        group, exchanges = getattr(error, "_batchnorm_known", (None, 0))
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
            A member is missing or late, announced another call, or failed.
        """
        self._raise_if_broken()
        announced = bool(self._remaining_sums)
        since = self.exchanges - (self._announcement is not None)
        try:
            vector = self._to_vector(array)
            own = tuple(array.shape), _dtype_name(vector)
            if self.unchecked:
                return self._from_vector(self._sum(vector), array)
            if not announced:  # all_reduce is called by the user
                announced = True
                self.announce(f"all_reduce of an array of shape {own[0]}", own[:1], own[1])
            if own != self._remaining_sums[0]:
                given = own, self._remaining_sums[0]
                got, expected = (f"{dtype} of shape {shape}" for shape, dtype in given)
                fail(TypeError, "group.all_reduce", got, f"{expected}, as was announced")
            self._compare_announcements()
            total = self._checked_sum(vector)
        except BaseException as error:
            if not self.is_known_to_all(error, since):
                (self.abort if announced else self.abort_unannounced)(error)
            raise
        return self._from_vector(total, array)

    # The operations of an engine.

    def _gather(self, row: Rows) -> Callable[[], Rows]:
        """Begin to exchange rows; return a function that waits for the rows of all members."""
        raise NotImplementedError

    def _to_vector(self, array: Array) -> Array:
        """Return an array as a 1-d array of the engine, copied if the sum may be written to it."""
        raise NotImplementedError

    def _sum(self, vector: Array) -> Array:
        """Sum a 1-d array over the members."""
        raise NotImplementedError

    def _zeros(self, size: int, dtype: str) -> Array:
        """Return a 1-d array of the engine, filled with zeros."""
        raise NotImplementedError

    def _from_vector(self, vector: Array, like: Array) -> Array:
        """Return a sum in the library and shape, and on the device, of an array."""
        raise NotImplementedError

    # Exchanges.

    def _begin_exchange(self, text: str, mark: str = "") -> _Announcement:
        """Begin to exchange rows that contain the number of this exchange."""
        self.exchanges += 1
        row = np.zeros(ROW_BYTES, np.uint8)
        encoded = f"{mark}{self.exchanges} {text}".encode(errors="replace")[:ROW_BYTES]
        row[: len(encoded)] = list(encoded)
        return _Announcement(encoded.decode(errors="replace"), self._gather(row))

    def _read_rows(self, rows: Rows) -> list[str]:
        """Return the texts of all members; raise if one of them is an error."""
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
        for rank, text in enumerate(texts):
            if text.startswith(FAILURE_MARK):
                got = f"an error on rank {rank} ({text.partition(' ')[2]})"
                self._raise_on_all(f"got {got}, expected all members to take part")
        return texts

    def _send_error(self, text: str) -> None:
        """Take part in an exchange with an error in place of an announcement."""
        with contextlib.suppress(GroupError), self._break_if_interrupted():
            self._begin_exchange(text, FAILURE_MARK).wait()

    def _compare_announcements(self) -> None:
        """Wait for the announcements of the current call, if it has any; raise unless all agree."""
        if self._announcement is None:
            return
        rows = self._announcement.wait()  # if this is interrupted, the call stays announced
        own, self._announcement = self._announcement.row, None
        try:
            self._compare(own, rows)
        except GroupError:
            self._remaining_sums = []  # no member sums
            raise

    def _compare(self, own: str, rows: Rows) -> None:
        for rank, text in enumerate(self._read_rows(rows)):
            if text == own:
                continue
            (number, _, theirs), (mine, _, ours) = (t.split(" ", 2) for t in (text, own))
            if number != mine:
                self._break(f"exchange {number} from rank {rank} for {mine}")
            if theirs == ours:
                theirs, ours = f"another {theirs}", "the same"
            got = f"got {theirs} from rank {rank}"
            self._raise_on_all(f"{got}, expected {ours}, as on this rank {self.rank}")

    def _checked_sum(self, vector: Array | None) -> Array:
        """Sum a vector over the members; None if this member has failed.

        The number of the exchange, and 1 for each member that has failed, are appended to the vector.
        """
        shape, dtype = self._remaining_sums[0]
        number, size = (self.exchanges + 1) % NUMBER_MODULUS, int(np.prod(shape))
        failed = vector is None
        vector = self._zeros(size, dtype) if vector is None else vector
        xp = compat.array_namespace(vector)
        tail = xp.asarray([number, failed], dtype=vector.dtype, device=compat.device(vector))
        message = xp.concat((vector, tail))
        self.exchanges += 1
        self._remaining_sums = self._remaining_sums[1:]
        with self._break_if_interrupted():
            total = self._sum(message)
        numbers, failures = on_host(total[size:]).tolist()
        if numbers != number * self.size:
            self._break("a message of another call")
        if failures:
            self._remaining_sums = []
            if not failed:  # the members that failed send their errors
                self._read_rows(self._begin_exchange("-").wait())
        return total[:size]

    # Errors.

    def _raise_if_broken(self) -> None:
        if self._broken:
            self._raise_on_all(f"got a call after {self._broken}; expected a new group")

    def _mark_as_known(self, error: BaseException) -> None:
        """Record on an error, for the calls around this one, that all members know of it."""
        with contextlib.suppress(AttributeError):  # raised by classes with __slots__
            error._batchnorm_known = self, self.exchanges  # type: ignore[attr-defined]

    def _raise_on_all(self, why: str) -> NoReturn:
        """Raise an error that all members raise, or that says that the group is broken."""
        error = GroupError(f"group: {why}")
        self._mark_as_known(error)
        raise error

    def _break(self, why: object) -> NoReturn:
        """Make the group unusable, because messages of this call may still be on their way."""
        got = str(why).strip().partition("\n")[0]
        self._broken = f"an error in an earlier one ({got})"
        self._announcement, self._remaining_sums = None, []
        self._raise_on_all(f"got {got}, expected all {self.size} members to answer")

    @contextlib.contextmanager
    def _break_if_interrupted(self) -> Iterator[None]:
        """Make the group unusable if an exchange is interrupted: the other members are still in it."""
        try:
            yield
        except GroupError:
            raise
        except BaseException as error:
            with contextlib.suppress(GroupError):
                self._break(_describe_error(error))
            raise

    def _poll(self, done: Callable[[], bool]) -> None:
        """Wait until a condition is true, for at most the timeout of the group."""
        limit = float("inf") if self.timeout is None else time.monotonic() + self.timeout
        polls = 0
        while not done():
            polls += 1
            if polls > SPIN_LIMIT:
                time.sleep(BACK_OFF)
            elif polls % 20 == 0:
                time.sleep(0)  # another member may need this processor
            if time.monotonic() > limit:
                self._break(f"no answer within {self.timeout:g} s on rank {self.rank}")


def _describe_error(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:
        text = "which cannot be shown"
    return " ".join(f"{type(error).__name__}: {text}".split())


def _dtype_name(vector: Array) -> str:
    """Return the name of the dtype of a vector, which must be one that members can sum."""
    name = str(vector.dtype).rpartition(".")[2]
    if name not in ("float32", "float64"):
        fail(TypeError, "array", f"dtype {name}", "float32 or float64")
    return name


def to_host(array: Array) -> Array:
    """Return an eager array of any library as a NumPy array."""
    if compat.is_torch_array(array) or compat.is_cupy_array(array):
        return on_host(validate_not_recorded(array))
    if compat.is_lazy_array(array) and not compat.is_jax_array(array):
        got = f"a lazy array of {library_name(namespace('array', array))}"
        fail(TypeError, "group", got, "an array whose values can be sent")
    try:
        return np.asarray(array)
    except TypeError:
        got = f"{describe_type(array)} without values"
        fail(TypeError, "group", got, "bn.distributed.jax(axis_name) for arrays that JAX traces")


def validate_not_recorded(tensor: Array) -> Array:
    """Check that PyTorch does not differentiate a tensor: it has no gradient of a sum over members."""
    if not compat.is_torch_array(tensor):
        return tensor
    why = tracing.transformed() or tracing.recorded((tensor,))
    if why is not None:
        expected = (
            "tensors that are not recorded, for example under torch.no_grad();"
            " or the first derivative of batch_norm, by autograd"
        )
        fail(TypeError, "group", f"tensors to sum, and {why}", expected)
    return tensor


def from_host(host: Array, like: Array) -> Array:
    """Return a NumPy array in the library, and on the device, of another array."""
    xp = compat.array_namespace(like)
    return xp.asarray(host, device=compat.device(like))


def validate_timeout(timeout: float | None) -> float | None:
    """Check a timeout, and return it as a float."""
    if timeout is None:
        return None
    seconds: float = validate_number("timeout", timeout, 0)
    return seconds
