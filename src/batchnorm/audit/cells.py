"""How a record of an audit is shown, in the terminal and in the documentation."""

from __future__ import annotations

from typing import Any


def row_of(record: dict[str, Any]) -> str:
    """Return the name of a record's row: the check, and its parameters."""
    values = ", ".join(
        f"{v:g}" if isinstance(v, float) else str(v) for v in record["parameters"].values()
    )
    return f"{record['check']} {values}".strip()


def cell(record: dict[str, Any]) -> str:
    """Return a mark where a check passed, the error in eps where it did not, or a cross."""
    if record["passed"]:
        return "✓"
    return "✗" if record["error"] is None else f"{record['error']:.1e}".replace("e+0", "e")


def rows_of(peers: list[dict[str, Any]]) -> list[str]:
    """Return the names of all rows, in the order of the checks."""
    return list(dict.fromkeys(row_of(r) for peer in peers for r in peer["records"]))
