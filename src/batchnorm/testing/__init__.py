"""The conformance suite: batch norm against any array library.

``pytest --pyargs batchnorm.testing --array-library NAME`` runs it for NAME, a library of the
capability table or any importable module that offers the array API. `check_batch_norm` turns it around:
anybody's batch norm through checks of this package.
"""

from typing import Any

__all__ = [
    "CHECKS",
    "FEATURES",
    "BatchNormError",
    "Record",
    "check_batch_norm",
    "parametrize_with_checks",
]

_HOMES = dict.fromkeys(("CHECKS", "FEATURES"), "checks")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'checking')}"), name)
