"""At home in PyTorch: modules in the place of `torch.nn`'s, and operators that it differentiates.

`import batchnorm.torch` imports PyTorch. The functions of `batchnorm` take its tensors without it.
"""

from batchnorm.torch import operators  # noqa: F401  (what is loaded from a file may call them)
from batchnorm.torch.activated import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from batchnorm.torch.conversion import convert, report, revert
from batchnorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "convert",
    "report",
    "revert",
]
