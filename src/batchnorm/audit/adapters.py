"""Adapters: a Python file for each framework, which brings its batch norm to the form of the checks.

A file has the table ``PEERS``, name → what it is, and the function ``peer(name)``, which imports the
framework and returns the arguments of `check_batch_norm`, and ``versions``, a dict. A table ``KNOWN``,
name → reason → checks in one string, says which failures are expected of whom.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import batchnorm

HERE = Path(batchnorm.__file__).parent
FOLDERS = (HERE / "audit" / "peers", HERE.parents[1] / "docs" / "examples" / "peers")
"""Where the adapters lie in an installed package, and in its source."""


class Adapter(NamedTuple):
    """One peer of a file."""

    file: Path
    name: str
    title: str


class AdapterError(Exception):
    """There is no such adapter, or its file is not one."""


def load(file: Path) -> tuple[dict[str, str], Callable[[str], dict[str, Any]]]:
    """Execute a file, and return its table and its function, which adds what is known.

    Raises
    ------
    AdapterError
        It cannot be executed, or lacks one of them.
    """
    spec = importlib.util.spec_from_file_location(f"batchnorm_peer_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise AdapterError(f"got {file}, expected a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # of anybody's file
        raise AdapterError(f"{file} raises {type(error).__name__}: {error}") from error
    peers, peer = getattr(module, "PEERS", None), getattr(module, "peer", None)
    if not isinstance(peers, dict) or not callable(peer):
        raise AdapterError(f"{file} has no dict PEERS and function peer(name)")
    known = getattr(module, "KNOWN", {})

    def arguments(name: str) -> dict[str, Any]:
        reasons = known.get(name, {}).items()
        expected = {check: why for why, checks in reasons for check in checks.split()}
        return {"expected_failures": expected, **peer(name)}

    return peers, arguments


def known() -> list[Adapter]:
    """Return the adapters that come with the package, this package's own first."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    files = sorted(folder.glob("*.py")) if folder is not None else []
    files.sort(key=lambda file: file.stem != "ours")
    return [Adapter(file, *item) for file in files for item in load(file)[0].items()]


def find(names: Sequence[str]) -> list[Adapter]:
    """Return the adapters of names: of a peer, of an adapter, or of any file; all without names.

    Raises
    ------
    AdapterError
        A name that is none of them.
    """
    if not names:
        return known()
    found, own = [], [] if all(name.endswith(".py") for name in names) else known()
    for name in names:
        if name.endswith(".py"):
            if not Path(name).is_file():
                raise AdapterError(f"no file {name}")
            file = Path(name).resolve()
            found += [Adapter(file, *item) for item in load(file)[0].items()]
            continue
        named = [a for a in own if a.name == name] or [a for a in own if a.file.stem == name]
        if not named:
            words = ", ".join(a.name for a in own) or "none comes with this installation"
            raise AdapterError(f"got {name!r}, expected the path of a .py file, or one of: {words}")
        found += named
    return list(dict.fromkeys(found))
