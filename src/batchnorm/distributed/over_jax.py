"""Groups of the devices along a named axis of JAX's `pmap` or `shard_map`."""

from __future__ import annotations

from typing import Any

import jax

from batchnorm.errors import fail

Array = Any


class Jax:
    """A group of `batchnorm.distributed.jax`. All devices run one program, so their calls agree."""

    def __init__(self, axis_name: Any, axis_index_groups: Any = None) -> None:
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups

    def __repr__(self) -> str:
        return f"<Jax group over the axis {self.axis_name!r}>"

    @property
    def rank(self) -> Array:
        """The position of a device along the axis; a traced number."""
        return self._with_axis(jax.lax.axis_index)

    @property
    def size(self) -> int:
        """The number of devices along the axis; unknown if they form several groups."""
        if self.axis_index_groups is not None:
            raise AttributeError("size")
        found: int = self._with_axis(jax.lax.axis_size)
        return found

    def all_reduce(self, array: Array) -> Array:
        """Sum an array over the devices along the axis."""
        psum: Any = jax.lax.psum
        return self._with_axis(lambda name: psum(array, name, axis_index_groups=self.axis_index_groups))

    def _with_axis(self, function: Any) -> Any:
        try:
            return function(self.axis_name)
        except NameError:
            got = f"the axis name {self.axis_name!r}, which is not bound here"
            fail(ValueError, "group", got, "a call inside jax.pmap or jax.shard_map with that axis")
