"""How fast batch norm is on this machine: this package, its peers, and a copy of the same bytes."""

from batchnorm.bench.report import run

__all__ = ["run"]
