"""Batch normalization for any array library."""

from batchnorm import distributed
from batchnorm.backends.base import Backend, KernelSet
from batchnorm.backends.dispatch import add_kernels, get_kernels, kernels_for, set_kernels
from batchnorm.checkpoints import from_state, load, save, to_state
from batchnorm.derivatives import batch_norm_double_backward, batch_norm_jvp
from batchnorm.folding import fold, fold_conv, fold_linear
from batchnorm.functional import (
    batch_norm,
    batch_norm_backward,
    moments,
    normalize,
    normalize_backward,
)
from batchnorm.layer import BatchNorm
from batchnorm.moments import Moments, update_running
from batchnorm.outputs import get_output_pool, set_output_pool
from batchnorm.recalibration import recalibrate
from batchnorm.renormalization import batch_renorm, batch_renorm_backward, update_renorm
from batchnorm.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BatchNorm",
    "KernelSet",
    "Moments",
    "add_kernels",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_double_backward",
    "batch_norm_jvp",
    "batch_renorm",
    "batch_renorm_backward",
    "distributed",
    "fold",
    "fold_conv",
    "fold_linear",
    "from_state",
    "get_kernels",
    "get_num_threads",
    "get_output_pool",
    "kernels_for",
    "load",
    "moments",
    "normalize",
    "normalize_backward",
    "recalibrate",
    "save",
    "set_kernels",
    "set_num_threads",
    "set_output_pool",
    "to_state",
    "update_renorm",
    "update_running",
]
