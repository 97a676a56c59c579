"""The paper's first experiment: a sigmoid network on handwritten digits, with and without batch norm."""

from batchnorm.demo.experiment import run

__all__ = ["run"]
