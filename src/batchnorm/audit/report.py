"""What an audit shows: progress, a table of checks and peers, and what was not expected."""

from __future__ import annotations

import datetime
import os
import platform
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

import batchnorm as bn
from batchnorm.audit.adapters import Adapter
from batchnorm.audit.cells import cell, row_of, rows_of

HEADING = 42
"""Characters of the column of checks."""
LEGEND = (
    "✓ right; a number: how far off, in eps of the size of the terms; ✗ wrong otherwise, or it raised;",
    "blank: does not apply; dim: known to the adapter.",
    "",
)


class Progress:
    """A bar for the peers and one for the checks, on standard error."""

    def __init__(self, peers: int) -> None:
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=Console(stderr=True), transient=True)
        self._peers = self._bars.add_task("peers", total=peers)
        self._checks: dict[Adapter, TaskID] = {}

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, adapter: Adapter, done: int, total: int) -> None:
        """Show how many of a peer's checks are done."""
        if adapter not in self._checks:
            for task in self._checks.values():
                self._bars.remove_task(task)
            self._checks = {adapter: self._bars.add_task(adapter.name, total=None)}
            self._bars.advance(self._peers)
        self._bars.update(self._checks[adapter], completed=done, total=total or None)


def environment(limit: float) -> dict[str, Any]:
    """Return what the results depend on, but for the peers."""
    return {
        "batchnorm": bn.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "day": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "limit": limit,
    }


def show(peers: list[dict[str, Any]]) -> None:
    """Print a table with a row for each check and a column for each peer, and the surprises."""
    console = Console()
    audited = [peer for peer in peers if peer["records"]]
    rows = rows_of(audited)
    while audited:
        width = HEADING
        here: list[dict[str, Any]] = []
        while audited and (not here or width + _width(audited[0]) <= console.width):
            here.append(audited.pop(0))
            width += _width(here[-1])
        console.print(_table(rows, here))
    for line in LEGEND:
        console.print(line, highlight=False)
    for peer in peers:
        if peer["status"] != "audited":
            console.print(f"{peer['peer']}: {peer['status']} ({peer['why']})", markup=False)
        for line in peer["surprises"]:
            console.print(f"{peer['peer']}: {line}", markup=False, highlight=False)


def _width(peer: dict[str, Any]) -> int:
    return max(len(peer["peer"]), 7) + 2


def _table(rows: list[str], peers: list[dict[str, Any]]) -> Table:
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("check", no_wrap=True)
    found = []
    for peer in peers:
        made.add_column(peer["peer"], justify="right", no_wrap=True)
        found.append({row_of(r): r for r in peer["records"]})
    for row in rows:
        records = [cells.get(row) for cells in found]
        if any(records):
            made.add_row(row, *(_styled(r) if r else "" for r in records))
    passed = (f"{sum(r['passed'] for r in p['records'])}/{len(p['records'])}" for p in peers)
    made.add_row("passed", *passed, style="bold")
    made.add_row("seconds", *(f"{p['seconds']:.0f}" for p in peers))
    return made


def _styled(record: dict[str, Any]) -> str:
    if record["passed"]:
        return f"[green]{cell(record)}[/]"
    return f"[{'dim' if record['expected'] else 'bold red'}]{cell(record)}[/]"
