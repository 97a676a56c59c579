"""Arrays by name in files: whole or not at all when written, and only what is wanted when read."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm import checks

Array = Any


class _Kind(NamedTuple):
    """How a kind of file is read and written."""

    opened: Callable[[Path], Any]
    """A context manager around the names and a function from a name to its array."""
    write: Callable[[Path, dict[str, Array]], None]


def names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the arrays in a file."""
    return _visited(path, ())[0]


def read(path: str | os.PathLike[str], wanted: Collection[str]) -> dict[str, Array]:
    """Some of a file's arrays. The others may be of kinds that NumPy cannot hold."""
    return _visited(path, wanted)[1]


def write(path: str | os.PathLike[str], arrays: dict[str, Array]) -> None:
    """Write a file, which is there whole or not at all."""
    kind = _kind(path)
    partial = Path(path).with_name(Path(path).name + ".partial")
    try:
        kind.write(partial, arrays)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened_npz(path: Path) -> Iterator[tuple[Collection[str], Callable[[str], Array]]]:
    import numpy as np

    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        yield file.files, file.__getitem__


def _write_npz(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **arrays)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        got = "a .safetensors file, but safetensors is not installed"
        checks.fail(ImportError, "path", got, "it: pip install 'batchnorm[safetensors]'")


@contextlib.contextmanager
def _opened_safetensors(path: Path) -> Iterator[tuple[Collection[str], Callable[[str], Array]]]:
    with _safetensors().safe_open(path, framework="np") as file:
        yield file.keys(), file.get_tensor


def _write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    _safetensors().save_file({name: np.asarray(v, order="C") for name, v in arrays.items()}, path)


_KINDS = {
    ".npz": _Kind(_opened_npz, _write_npz),
    ".safetensors": _Kind(_opened_safetensors, _write_safetensors),
}


def _kind(path: Any) -> _Kind:
    suffix = checks.path("path", path).suffix.lower()
    if suffix not in _KINDS:
        checks.fail(ValueError, "path", os.fspath(path), f"a file that ends in {' or '.join(_KINDS)}")
    return _KINDS[suffix]


def _visited(path: Any, wanted: Collection[str]) -> tuple[list[str], dict[str, Array]]:
    """The names in a file, and the arrays that are wanted."""
    opened = _kind(path).opened
    arrays: dict[str, Array] = {}
    what = os.fspath(path)
    try:
        with opened(Path(path)) as (found, get):
            for name in wanted:
                what = f"{name!r} in {os.fspath(path)}"
                arrays[name] = get(name)
            return list(found), arrays
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # each library has errors of its own for what is cut or foreign
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        got = f"{what}, which cannot be read ({reason})"
        checks.fail(ValueError, "path", got, f"a whole {Path(path).suffix.lower()} file")
