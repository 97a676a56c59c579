"""The page of the audit, from audit.json (python -m batchnorm audit --json) and findings.json."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from findings import FINDINGS
from tables import markdown

from batchnorm.audit.cells import cell, row_of
from batchnorm.testing import CHECKS

HERE = pathlib.Path(__file__).parent


def results() -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The run, and what the programs of the findings printed."""
    files = (HERE / "audit.json", HERE / "findings.json")
    run, printed = (json.loads(file.read_text()) for file in files)
    return run, printed


def summary(run: dict[str, Any], printed: dict[str, dict[str, str]]) -> str:
    """A row for each peer: what it is, how many checks it passes, what was found."""
    rows = []
    for peer in run["peers"]:
        records = peer["records"]
        passed = f"{sum(r['passed'] for r in records)} of {len(records)}"
        links = [
            f"[{i}](#{name.replace('_', '-')})"
            for i, name in enumerate(FINDINGS, start=1)
            if peer["peer"] in printed.get(name, {})
        ]
        if not records:
            passed = peer["status"]
        rows.append([f"`{peer['peer']}`", peer["title"], passed, ", ".join(links) or "none"])
    return markdown(["peer", "what it is", "checks that it passes", "findings"], rows)


def environment(run: dict[str, Any]) -> str:
    """Versions and machine of the run."""
    versions = {k: v for peer in run["peers"] for k, v in peer["versions"].items()}
    listed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return f"{run['day']}, {run['system']}, Python {run['python']}: {listed}.\n"


def table(peers: list[dict[str, Any]]) -> str:
    """A row for each check that applies to one of some peers, and a column for each peer."""
    found = [{row_of(r): r for r in peer["records"]} for peer in peers]
    order = list(CHECKS)
    rows = sorted(
        dict.fromkeys(row for cells in found for row in cells),
        key=lambda row: order.index(row.split()[0]),
    )
    shown = [
        [f"`{row}`", *(cell(cells[row]) if row in cells else "" for cells in found)] for row in rows
    ]
    return markdown(["check", *(f"`{peer['peer']}`" for peer in peers)], shown)


def tables(run: dict[str, Any]) -> str:
    """A table for each adapter, in the order of the run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for peer in run["peers"]:
        if peer["records"]:
            groups.setdefault(peer["adapter"], []).append(peer)
    return "\n".join(f"### {name}.py\n\n{table(peers)}" for name, peers in groups.items())


def findings(run: dict[str, Any], printed: dict[str, dict[str, str]]) -> str:
    """A section for each finding that a program confirms."""
    parts = []
    titles = {peer["peer"]: peer["title"] for peer in run["peers"]}
    for number, (name, finding) in enumerate(FINDINGS.items(), start=1):
        confirmed = printed.get(name, {})
        if not confirmed:
            continue
        checks = ", ".join(f"`{check}`" for check in finding.checks)
        rows = [(titles[peer], f"{float(number):.3g}") for peer, number in confirmed.items()]
        parts.append(f"({name.replace('_', '-')})=\n\n### {number}. {finding.title}\n")
        parts.append(f"{finding.text} Found by {checks}.\n")
        parts.append(markdown(["peer", finding.prints], rows))
        for peer in confirmed:
            program = f"```python\n{finding.programs[peer]}\n```\n\nprints `{confirmed[peer]}`."
            parts.append(f":::{{dropdown}} {titles[peer]}\n\n{program}\n:::\n")
    return "\n".join(parts)


def checks() -> str:
    """A row for each check: why it matters, and the source."""
    rows = [(f"`{name}`", check.why, check.source) for name, check in CHECKS.items()]
    return markdown(["check", "why", "source"], rows)


def write(folder: pathlib.Path) -> None:
    """Write each part to a file that the page includes."""
    folder.mkdir(exist_ok=True)
    run, printed = results()
    parts = {
        "audit_summary": summary(run, printed),
        "audit_environment": environment(run),
        "audit_tables": tables(run),
        "audit_findings": findings(run, printed),
        "checks": checks(),
    }
    for name, text in parts.items():
        (folder / f"{name}.md").write_text(text)
