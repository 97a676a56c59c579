"""Named arrays in files: atomic writes, and reads of selected arrays."""

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


class _Reader(NamedTuple):
    """Functions to read an open file."""

    names: Collection[str]
    shape: Callable[[str], Shape]
    """Return the shape of an array without reading the array."""
    array: Callable[[str], Array]


class _Kind(NamedTuple):
    """Functions to read and write a kind of file."""

    open: Callable[[Path], Any]
    """Return a context manager whose value is a `_Reader`."""
    write: Callable[[Path, dict[str, Array]], None]


def names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays in a file."""
    return _read(path, {})[0]


def read(path: str | os.PathLike[str], wanted: Mapping[str, Shape]) -> dict[str, Array]:
    """Return selected arrays of a file; no array is read before the shapes of all are checked.

    Arrays that are not selected may have dtypes that NumPy does not have.
    """
    return _read(path, wanted)[1]


def write(path: str | os.PathLike[str], arrays: dict[str, Array]) -> None:
    """Write a file atomically; several processes may write it at the same time."""
    kind = _kind(path)
    target = Path(os.path.realpath(path))  # the target of a link
    if not target.parent.is_dir():
        fail(FileNotFoundError, "path", os.fspath(path), "a file in a folder that exists")
    if target.is_dir():
        fail(IsADirectoryError, "path", f"{os.fspath(path)}, a folder", "a file")
    # The temporary file is in the same folder, because a file is replaced atomically only on one disk.
    prefix = f".{target.stem[:32]}."  # the length of file names is limited
    number, name = tempfile.mkstemp(dir=target.parent, prefix=prefix, suffix=target.suffix)
    os.close(number)
    partial = Path(name)
    try:
        kind.write(partial, arrays)
        with contextlib.suppress(OSError):  # on a file system without permissions
            partial.chmod(target.stat().st_mode if target.exists() else 0o666 & ~_umask())
        _sync(partial)
        os.replace(partial, target)
        with contextlib.suppress(OSError):  # on systems that cannot open a folder
            _sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are written to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _umask() -> int:
    """Return the umask of this process, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[_Reader]:
    import numpy as np

    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:

        def shape(name: str) -> Shape:
            with file.zip.open(f"{name}.npy") as member:
                version = np.lib.format.read_magic(member)
                header = {1: "read_array_header_1_0", 2: "read_array_header_2_0"}[version[0]]
                found: Shape = getattr(np.lib.format, header)(member)[0]
                return found

        yield _Reader(file.files, shape, file.__getitem__)


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
def _open_safetensors(path: Path) -> Iterator[_Reader]:
    with _safetensors().safe_open(path, framework="np") as file:
        yield _Reader(file.keys(), lambda name: tuple(file.get_slice(name).get_shape()), file.get_tensor)


def _write_safetensors(path: Path, arrays: dict[str, Array]) -> None:
    import numpy as np

    _safetensors().save_file({name: np.asarray(v, order="C") for name, v in arrays.items()}, path)


_KINDS = {
    ".npz": _Kind(_open_npz, _write_npz),
    ".safetensors": _Kind(_open_safetensors, _write_safetensors),
}


def _kind(path: Any) -> _Kind:
    suffix = validate_path("path", path).suffix.lower()
    if suffix not in _KINDS:
        fail(ValueError, "path", os.fspath(path), f"a file that ends in {' or '.join(_KINDS)}")
    return _KINDS[suffix]


def _read(path: Any, wanted: Mapping[str, Shape]) -> tuple[list[str], dict[str, Array]]:
    """Return the names of the arrays in a file, and the selected arrays."""
    open_file = _kind(path).open
    what = os.fspath(path)
    try:
        with open_file(Path(path)) as file:
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
    except Exception as error:  # each library raises its own errors for truncated or other files
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        got = f"{what}, which cannot be read ({reason})"
        fail(ValueError, "path", got, f"a whole {Path(path).suffix.lower()} file")


class _ShapeError(ValueError):
    """An array whose shape is not the expected one."""
