"""Benchmark of batch norm on this machine: this package, other libraries, and a copy of memory."""

from batchnorm.bench.report import run

__all__ = ["run"]
