"""The checks of `check_batch_norm`: what a batch norm gets wrong in practice, one function for each.

A check calls an `Implementation` and returns the largest error in units of eps times the size of the
terms, or raises `AssertionError` with a sentence. Data and judgement are NumPy's; the oracle has 50
digits.
"""

from __future__ import annotations

from typing import Any

from batchnorm.testing.checks import gradients, masks, running, values
from batchnorm.testing.checks.implementation import FEATURES, LIMIT, Check, Implementation

__all__ = ["CHECKS", "FEATURES", "LIMIT", "Check", "Implementation"]


def _needs(*features: str) -> frozenset[str]:
    return frozenset(features)


def _means(*means: float) -> tuple[dict[str, Any], ...]:
    return tuple({"mean": mean} for mean in means)


_PAPER = "Ioffe & Szegedy (2015), Algorithm 1"
_BACKWARD = "Ioffe & Szegedy (2015), section 3"
_INFERENCE = "Ioffe & Szegedy (2015), Algorithm 2"
_CHAN = "Chan, Golub & LeVeque (1983)"
_TWO = ({"shards": 2},)

CHECKS: dict[str, Check] = {
    "y_at_mean": Check(
        values.y_at_mean, "E[x²] − E[x]² loses all digits where the mean is large", _CHAN,
        _means(0.0, 1e2, 1e4, 1e6),
    ),
    "y_of_many_values": Check(
        values.y_of_many_values, "the error of a sum in one row grows with its length",
        "Higham (1993), The accuracy of floating point summation", needs=_needs("training", "large"),
    ),
    "y_with_channels_last": Check(
        values.y_with_channels_last, "memory formats have code of their own", _CHAN,
        _means(0.0, 1e2, 1e4, 1e6), _needs("training", "axis"),
    ),
    "y_at_negative_axis": Check(
        values.y_at_negative_axis, "an axis from the end has to be counted before others are reduced",
        "the array API standard, axis", needs=_needs("training", "axis"),
    ),
    "y_of_float16": Check(
        values.y_of_dtype, "sums of float16 in float16 overflow at 65,504",
        "Micikevicius et al. (2018), Mixed Precision Training", ({"dtype": "float16"},),
        _needs("training", "float16"), 1.0,
    ),
    "y_of_bfloat16": Check(
        values.y_of_dtype, "bfloat16 has 8 digits: sums in it stop growing at 256 ones",
        "Kalamkar et al. (2019), A Study of BFLOAT16 for Deep Learning Training",
        ({"dtype": "bfloat16"},), _needs("training", "bfloat16"), 1.0,
    ),
    "y_of_float64": Check(
        values.y_of_dtype, "float64 that passes through float32 loses half of its digits", "IEEE 754",
        ({"dtype": "float64"},), _needs("training", "float64"), 2.0**20,
    ),
    "y_with_float64_parameters": Check(
        values.y_with_float64_parameters, "y has the dtype of x, whatever the parameters have",
        "the array API standard, type promotion", needs=_needs("training", "float64_parameters"),
    ),
    "y_of_large_numbers": Check(
        values.y_of_large_numbers, "squares of numbers over 1.8e19 are infinite in float32", "IEEE 754"
    ),
    "eps_inside_of_the_root": Check(
        values.eps_inside_of_the_root, "√var + eps is not √(var + eps)", _PAPER
    ),
    "variance_of_the_population": Check(
        values.variance_of_the_population, "a batch is normalized by n, not by n − 1", _PAPER
    ),
    "statistics_of_each_channel": Check(
        values.statistics_of_each_channel, "each channel has statistics of its own", _PAPER
    ),
    "constant_channel_is_beta": Check(
        values.constant_channel_is_beta, "a variance below zero is NaN under a root", _CHAN
    ),
    "nan_stays_in_its_channel": Check(
        values.nan_stays_in_its_channel, "one bad value must not end a whole layer, nor be hidden",
        "IEEE 754",
    ),
    "one_value_per_channel": Check(
        values.one_value_per_channel, "0/0 in Bessel's correction is NaN in the running variance", _PAPER
    ),
    "empty_batch": Check(
        values.empty_batch, "the mean of nothing is NaN in the running mean", _PAPER
    ),
    "inputs_are_unchanged": Check(
        values.inputs_are_unchanged, "a caller's arrays are the caller's", "the array API standard"
    ),
    "same_bits_again": Check(
        values.same_bits_again, "results that differ from run to run cannot be reproduced", "IEEE 754"
    ),
    "same_bits_with_threads": Check(
        values.same_bits_with_threads, "results that depend on the machine cannot be reproduced",
        "Demmel & Nguyen (2013), Fast Reproducible Floating-Point Summation",
        needs=_needs("training", "set_threads"),
    ),
    "dx": Check(
        gradients.dx, "the mean and the variance depend on x, too", _BACKWARD, _means(0.0, 1e4),
        _needs("backward"),
    ),
    "dgamma": Check(
        gradients.dgamma, "Σ dy·x − mean·Σ dy cancels where the mean is large", _CHAN,
        _means(0.0, 1e4), _needs("backward"),
    ),
    "dbeta": Check(
        gradients.dbeta, "a sum over all axes but the channels'", _BACKWARD, _means(0.0),
        _needs("backward"),
    ),
    "dgamma_where_gamma_is_0": Check(
        gradients.dgamma_where_gamma_is_0, "x̂ found from (y − beta)/gamma is 0/0",
        "Goyal et al. (2017), γ = 0", needs=_needs("backward"),
    ),
    "dx_of_a_constant_channel": Check(
        gradients.dx_of_a_constant_channel, "the derivative of a root at 0 is infinite", _BACKWARD,
        needs=_needs("backward"),
    ),
    "sums_of_many_gradients": Check(
        gradients.sums_of_many_gradients, "gradients of parameters are long sums, too",
        "Higham (1993), The accuracy of floating point summation", needs=_needs("backward", "large"),
    ),
    "second_derivative": Check(
        gradients.second_derivative, "gradient penalties differentiate dx",
        "Gulrajani et al. (2017), Improved Training of Wasserstein GANs",
        tuple({"to": to} for to in ("dy", "x", "gamma")), _needs("double_backward"), 64.0,
    ),
    "running_mean": Check(
        running.running_mean, "momentum weighs the new batch in PyTorch, the old value in Keras", _PAPER,
        _means(0.0, 1e4), _needs("training", "running"),
    ),
    "running_variance": Check(
        running.running_variance, "with Bessel's correction or without, but as is said", _PAPER,
        _means(0.0, 1e4), _needs("training", "running"),
    ),
    "running_mean_of_float64": Check(
        running.running_mean_of_float64, "float32 statistics of float64 data are off by 8 at 1e8",
        "IEEE 754", needs=_needs("training", "running", "float64"),
    ),
    "running_statistics_of_float16": Check(
        running.running_statistics_of_float16, "small updates vanish in a float16 running mean",
        "Micikevicius et al. (2018), Mixed Precision Training",
        needs=_needs("training", "running", "float16", "mixed"),
    ),
    "start_of_running_statistics": Check(
        running.start_of_running_statistics, "a new layer is the identity in inference", _INFERENCE,
        needs=_needs("inference", "start"),
    ),
    "first_batch": Check(
        running.first_batch, "an average from 0 that is not corrected shrinks the variance",
        "Kingma & Ba (2015), Adam, section 3", needs=_needs("training", "running", "start"),
    ),
    "inference_by_running_statistics": Check(
        running.inference_by_running_statistics, "scale·x + shift cancels where the mean is large",
        _INFERENCE, _means(0.0, 1e4), _needs("inference"),
    ),
    "inference_updates_nothing": Check(
        running.inference_updates_nothing, "a test set must not change what is tested", _INFERENCE,
        needs=_needs("inference"),
    ),
    "masked_y": Check(
        masks.masked_y, "what is left out must not count", _PAPER, needs=_needs("training", "where")
    ),
    "masked_nan": Check(
        masks.masked_nan, "0·NaN is NaN: padding may be anything", "IEEE 754",
        needs=_needs("training", "where"),
    ),
    "masked_running_variance": Check(
        masks.masked_running_variance, "Bessel's correction counts what is left", _PAPER,
        needs=_needs("training", "running", "where"),
    ),
    "fully_masked": Check(
        masks.fully_masked, "the mean of nothing is NaN in the running mean", _PAPER,
        needs=_needs("training", "where"),
    ),
    "sharded_y": Check(
        masks.sharded_y, "a variance of the whole is not the mean of the parts' variances", _CHAN,
        _means(0.0, 1e4), _needs("training", "shards"),
    ),
    "sharded_masked_y": Check(
        masks.masked_y, "parts of which a mask keeps unlike many weigh unlike much", _CHAN, _TWO,
        _needs("training", "shards", "where"),
    ),
    "sharded_masked_running_variance": Check(
        masks.masked_running_variance, "Bessel's correction counts what is left in all parts", _CHAN,
        _TWO, _needs("training", "running", "shards", "where"),
    ),
}  # fmt: skip
