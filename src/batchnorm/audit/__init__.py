"""The command ``python -m batchnorm audit``: checks of frameworks' batch norms, in processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchnorm.audit.adapters import Adapter
from batchnorm.audit.processes import audit


def run(chosen: Sequence[Adapter], output: Path | None, limit: float, *, named: bool) -> int:
    """Audit peers, print the table, and return the exit status.

    Parameters
    ----------
    chosen : sequence of Adapter
        The peers.
    output : Path, optional
        Where the records are written, as JSON.
    limit : float
        Seconds that a check may take.
    named : bool
        Whether the user named the peers: then one that is not installed is a failure.

    Returns
    -------
    int
        1 if a check failed, or passed, other than the adapters expect; 0 otherwise.
    """
    from batchnorm.audit import report

    with report.Progress(len(chosen)) as progress:
        found = [audit(adapter, limit, progress) for adapter in chosen]
    report.show(found)
    if output is not None:
        output.write_text(json.dumps({**report.environment(limit), "peers": found}, indent=1) + "\n")
        print(f"written: {output}")
    return int(any(_wrong(peer, named) for peer in found))


def _wrong(peer: dict[str, Any], named: bool) -> bool:
    absent = peer["status"] == "not installed"
    return bool(peer["surprises"]) or (peer["status"] != "audited" and (named or not absent))
