"""Progress bars on standard error, where rich is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")


def shown(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Give the items one by one, and show how far they are."""
    if importlib.util.find_spec("rich") is None:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    total = len(items) if isinstance(items, Sized) else None
    yield from track(items, what, total, console=Console(stderr=True), transient=True)
