"""Progress bars."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def with_progress(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Iterate over items, and show the progress on standard error if rich is installed."""
    if importlib.util.find_spec("rich") is None:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sized) else None
    yield from track(items, what, total, console=Console(stderr=True), transient=True)
