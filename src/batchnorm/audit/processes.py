"""A peer's checks in a process of their own, so that a crash or a hang costs one cell."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from batchnorm.audit.adapters import Adapter
from batchnorm.testing.checking import Record, surprises
from batchnorm.testing.checks import CHECKS

START = 300.0
"""Seconds in which a framework has to be imported."""
LOST = 4
"""Processes that a peer may lose; its remaining checks fail."""


def audit(
    adapter: Adapter, limit: float, progress: Callable[[Adapter, int, int], None]
) -> dict[str, Any]:
    """Run the checks of a peer, and return what was found.

    Parameters
    ----------
    adapter : Adapter
        The peer.
    limit : float
        Seconds that each check may take.
    progress : callable
        Called with the adapter, the number of checks that are done, and of all.

    Returns
    -------
    dict
        ``peer``, ``title``, ``adapter``, ``status`` ("audited", "not installed" or what went wrong),
        ``why``, ``versions``, ``seconds``, ``records`` and ``surprises``.
    """
    begun = time.monotonic()
    result: dict[str, Any] = {
        "peer": adapter.name,
        "title": adapter.title,
        "adapter": adapter.file.stem,
        "status": "audited",
        "why": "",
        "versions": {},
    }
    records: list[Record] = []
    expected: dict[str, str] = {}
    checks: list[tuple[str, dict[str, Any]]] | None = None
    lost = 0
    while result["status"] == "audited" and (checks is None or len(records) < len(checks)):
        with _Worker(adapter, len(records)) as worker:
            for line in worker.lines(START, limit):
                if "missing" in line:
                    result.update(status="not installed", why=line["missing"])
                elif "broken" in line:
                    result.update(status="cannot be run", why=line["broken"])
                elif "ready" in line:
                    checks, expected = [(c, p) for c, p in line["ready"]], line["expected"]
                    result["versions"] = line["versions"]
                else:
                    records.append(Record(**line["record"]))
                progress(adapter, len(records), len(checks or ()))
        if result["status"] != "audited":
            break
        if checks is None:
            result.update(status="cannot be run", why=worker.ending(START))
        elif len(records) < len(checks):
            lost += 1
            ending = worker.ending(limit)
            left = checks[len(records) :]
            for check, parameters in left if lost == LOST else left[:1]:
                records.append(_failed(check, parameters, ending, expected))
                ending = f"not run, after {LOST} processes were lost"
    return {
        **result,
        "seconds": round(time.monotonic() - begun, 1),
        "surprises": surprises(records, expected),
        "records": [r._asdict() for r in records],
    }


def _failed(check: str, parameters: dict[str, Any], why: str, expected: dict[str, str]) -> Record:
    return Record(check, parameters, None, CHECKS[check].limit, why, False, expected.get(check, ""))


class _Worker:
    """A process of `batchnorm.audit.worker`."""

    def __init__(self, adapter: Adapter, skip: int) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        command = [sys.executable, "-m", "batchnorm.audit.worker"]
        self._process = subprocess.Popen(
            [*command, str(adapter.file), adapter.name, str(skip)],
            stdin=subprocess.PIPE,  # never written to: its end is this process's
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._late, self._said = False, ""
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(b"")

    def lines(self, start: float, limit: float) -> Iterator[dict[str, Any]]:
        """Yield what the process prints, until it ends or takes longer than a limit for a line."""
        seconds = start
        while True:
            try:
                line = self._lines.get(timeout=seconds)
            except queue.Empty:
                self._late = True
                return
            if not line:
                return
            yield json.loads(line)
            seconds = limit

    def ending(self, limit: float) -> str:
        """Return how the process ended."""
        if self._late:
            return f"took more than {limit:g} s"
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            return f"the process was ended by {name}"
        return f"the process ended with status {code}" + (f": {self._said}" if self._said else "")

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._late:
            if hasattr(os, "killpg"):  # with the compilers that it may have started
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self._said = lines[-1][:200] if lines else ""
        self._errors.close()
