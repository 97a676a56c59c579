"""Run the programs of findings.py, and write what they print to findings.json."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from findings import FINDINGS

RESULTS = pathlib.Path(__file__).parent / "findings.json"
LIMIT = 300
"""Seconds for each program."""


def reproduce(program: str) -> str:
    """Run a program in a process of its own, and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    said = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return said[-1].strip() if said else ""


def confirmed(printed: str, at_least: float) -> bool:
    """Return whether what was printed is an error as large as is claimed."""
    try:
        number = float(printed)
    except ValueError:
        return False
    return not number < at_least


def main() -> int:
    """Run all programs, write what they print, and return 1 if one shows no error."""
    jobs = [(name, peer) for name, finding in FINDINGS.items() for peer in finding.programs]
    with ThreadPoolExecutor(2) as pool:
        printed = list(pool.map(lambda job: reproduce(FINDINGS[job[0]].programs[job[1]]), jobs))
    found: dict[str, dict[str, str]] = {}
    failures = 0
    for (name, peer), line in zip(jobs, printed, strict=True):
        right = confirmed(line, FINDINGS[name].at_least)
        print(f"{'confirmed' if right else 'NOT CONFIRMED':14}{name:30}{peer:28}{line}")
        failures += not right
        if right:
            found.setdefault(name, {})[peer] = line
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
