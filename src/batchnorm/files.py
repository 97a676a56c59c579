"""Arrays by name in files: whole or not at all when written, and only what is wanted when read."""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.arguments import validate_path
from batchnorm.errors import fail

Array = Any
Shape = tuple[int, ...]


class _Opened(NamedTuple):
    """A file that is read."""

    names: Collection[str]
    shape: Callable[[str], Shape]
    """Of an array, which is not read for it."""
    array: Callable[[str], Array]


class _Kind(NamedTuple):
    """How a kind of file is read and written."""

    opened: Callable[[Path], Any]
    """A context manager around what is read."""
    write: Callable[[Path, dict[str, Array]], None]


def names(path: str | os.PathLike[str]) -> list[str]:
    """The names of the arrays in a file."""
    return _visited(path, {})[0]


def read(path: str | os.PathLike[str], wanted: Mapping[str, Shape]) -> dict[str, Array]:
    """Some of a file's arrays, whose shapes are known; none is read before all have these.

    The others may be of kinds that NumPy cannot hold.
    """
    return _visited(path, wanted)[1]


def write(path: str | os.PathLike[str], arrays: dict[str, Array]) -> None:
    """Write a file, which is there whole or not at all; several processes may write it at once."""
    kind = _kind(path)
    target = Path(os.path.realpath(path))  # of a link, what it leads to
    if not target.parent.is_dir():
        fail(FileNotFoundError, "path", os.fspath(path), "a file in a folder that exists")
    if target.is_dir():
        fail(IsADirectoryError, "path", f"{os.fspath(path)}, a folder", "a file")
    # A name that is nobody else's, beside the target: a file is replaced at once only within a disk.
    prefix = f".{target.stem[:32]}."  # short: the longest name that a disk takes has to do
    number, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=target.suffix)
    os.close(number)
    partial = Path(name)
    try:
        kind.write(partial, arrays)
        with contextlib.suppress(OSError):  # on a disk that knows no permissions
            partial.chmod(target.stat().st_mode if target.exists() else 0o666 & ~_umask())
        _settle(partial)
        os.replace(partial, target)
        with contextlib.suppress(OSError):  # where a folder cannot be opened
            _settle(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Wait until a file, or a folder's list of them, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _umask() -> int:
    """The permissions that new files of this process do not get; there is no way but to set them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _opened_npz(path: Path) -> Iterator[_Opened]:
    import numpy as np

    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:

        def shape(name: str) -> Shape:
            with file.zip.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                header = {1: "read_array_header_1_0", 2: "read_array_header_2_0"}[version[0]]
                found: Shape = getattr(np.lib.format, header)(member)[0]
                return found

        yield _Opened(file.files, shape, file.__getitem__)


def _write_npz(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **arrays)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        got = "a .safetensors file, but safetensors is not installed"
        fail(ImportError, "path", got, "it: pip install 'batchnorm[safetensors]'")


@contextlib.contextmanager
def _opened_safetensors(path: Path) -> Iterator[_Opened]:
    with _safetensors().safe_open(path, framework="np") as file:
        yield _Opened(file.keys(), lambda name: tuple(file.get_slice(name).get_shape()), file.get_tensor)


def _write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    _safetensors().save_file({name: np.asarray(v, order="C") for name, v in arrays.items()}, path)


_KINDS = {
    ".npz": _Kind(_opened_npz, _write_npz),
    ".safetensors": _Kind(_opened_safetensors, _write_safetensors),
}


def _kind(path: Any) -> _Kind:
    suffix = validate_path("path", path).suffix.lower()
    if suffix not in _KINDS:
        fail(ValueError, "path", os.fspath(path), f"a file that ends in {' or '.join(_KINDS)}")
    return _KINDS[suffix]


def _visited(path: Any, wanted: Mapping[str, Shape]) -> tuple[list[str], dict[str, Array]]:
    """The names in a file, and the arrays that are wanted."""
    opened = _kind(path).opened
    what = os.fspath(path)
    try:
        with opened(Path(path)) as file:
            shapes = {}
            for name in wanted:
                what = f"{name!r} in {os.fspath(path)}"
                shapes[name] = file.shape(name)
            for name, shape in wanted.items():
                if shapes[name] != shape:
                    fail(_ShapeError, name, f"shape {shapes[name]}", str(shape))
            arrays: dict[str, Array] = {}
            for name in wanted:
                what = f"{name!r} in {os.fspath(path)}"
                arrays[name] = file.array(name)
            return list(file.names), arrays
    except (FileNotFoundError, ImportError):
        raise
    except _ShapeError as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # each library has errors of its own for what is cut or foreign
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        got = f"{what}, which cannot be read ({reason})"
        fail(ValueError, "path", got, f"a whole {Path(path).suffix.lower()} file")


class _ShapeError(ValueError):
    """An array of another shape than the one that is wanted."""
