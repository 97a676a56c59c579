"""What cannot be normalized is an error that names the argument, and changes nothing."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data

X = data.batch((6, 4))
V = data.batch((4,))

# (what is wrong, the call, the arrays, the error, its text)
WRONG = [
    (
        "integer",
        bn.batch_norm,
        (X.astype(np.int32),),
        TypeError,
        r"x: got dtype .*int32.*, expected one of",
    ),
    ("boolean", bn.batch_norm, (X > 0,), TypeError, r"x: got dtype .*, expected one of"),
    ("complex", bn.batch_norm, (X.astype(np.complex64),), TypeError, r"x: got dtype .*complex64"),
    ("axis too high", lambda x: bn.batch_norm(x, axis=2), (X,), ValueError, r"axis: got 2, expected"),
    ("axis too low", lambda x: bn.batch_norm(x, axis=-3), (X,), ValueError, r"axis: got -3, expected"),
    ("axis twice", lambda x: bn.batch_norm(x, axis=(1, -1)), (X,), ValueError, r"axis: got \(1, -1\)"),
    ("axis a float", lambda x: bn.batch_norm(x, axis=1.0), (X,), TypeError, r"axis: got 1\.0, expected"),
    ("channels", bn.batch_norm, (X, V[:3]), ValueError, r"gamma: got shape \(3,\), expected \(4,\)"),
    ("beta", bn.batch_norm, (X, V, V[:1]), ValueError, r"beta: got shape \(1,\), expected \(4,\)"),
    ("integer gamma", bn.batch_norm, (X, V.astype(np.int32)), TypeError, r"gamma: got dtype .*int32"),
    (
        "eps",
        lambda x: bn.batch_norm(x, eps=-1.0),
        (X,),
        ValueError,
        r"eps: got -1\.0, expected a number",
    ),
    ("eps a string", lambda x: bn.batch_norm(x, eps="1"), (X,), TypeError, r"eps: got '1', expected"),
    (
        "one value",
        bn.batch_norm,
        (X[:1],),
        ValueError,
        r"x: got shape \(1, 4\) with one value per channel",
    ),
    ("empty batch", bn.batch_norm, (X[:0],), ValueError, r"x: got an empty batch of shape \(0, 4\)"),
    (
        "empty space",
        bn.batch_norm,
        (np.zeros((3, 4, 0), np.float32),),
        ValueError,
        r"x: got an empty batch of shape",
    ),
    (
        "a list",
        lambda _: bn.batch_norm([[1.0], [2.0]]),
        (X,),
        TypeError,
        r"x: got a list, expected an array",
    ),
    ("gamma a list", lambda x: bn.batch_norm(x, [1.0] * 4), (X,), TypeError, r"gamma: got a list"),
    (
        "where's shape",
        lambda x, w: bn.batch_norm(x, where=w),
        (X, np.ones((5, 4), np.bool_)),
        ValueError,
        r"where: got shape \(5, 4\), expected one that broadcasts to \(6, 4\)",
    ),
    (
        "where complex",
        lambda x, w: bn.batch_norm(x, where=w),
        (X, np.ones((6, 4), np.complex64)),
        TypeError,
        r"where: got dtype .*complex64.*, expected a boolean mask",
    ),
    (
        "dy's shape",
        lambda dy, x: bn.batch_norm_backward(dy, x, bn.moments(x)),
        (X[:5], X),
        ValueError,
        r"dy: got shape \(5, 4\), expected \(6, 4\), as x",
    ),
    (
        "no stats",
        lambda x: bn.batch_norm_backward(x, x, None),
        (X,),
        TypeError,
        r"stats: got a NoneType",
    ),
    (
        "stats of others",
        lambda x, z: bn.batch_norm_backward(x, x, bn.moments(z)),
        (X, X[:, :3]),
        ValueError,
        r"stats\.mean: got shape \(3,\), expected \(4,\)",
    ),
    ("mean", bn.normalize, (X, V[:2], V), ValueError, r"mean: got shape \(2,\), expected \(4,\)"),
    ("var", bn.normalize, (X, V, V[:2]), ValueError, r"var: got shape \(2,\), expected \(4,\)"),
    (
        "momentum",
        lambda m, v, x: bn.update_running(m, v, bn.moments(x), momentum=1.5),
        (V, V, X),
        ValueError,
        r"momentum: got 1\.5, expected a number in \[0, 1\]",
    ),
    ("nothing to merge", lambda _: bn.Moments.merge(), (X,), ValueError, r"parts: got nothing to merge"),
    ("merge", lambda x: bn.Moments.merge(bn.moments(x), x), (X,), TypeError, r"parts\[1\]: got a"),
    (
        "merge shapes",
        lambda x: bn.Moments.merge(bn.moments(x), bn.moments(x[:, :3])),
        (X,),
        ValueError,
        r"parts\[1\]\.count: got shape \(3,\), expected \(4,\)",
    ),
    (
        "layout",
        lambda w, m: bn.fold_linear(w, None, m, m, layout="OHWI"),
        (X.T, V),
        ValueError,
        r"layout: got 'OHWI', expected different letters, O and I among them",
    ),
    (
        "fold",
        lambda w, m: bn.fold_linear(w, None, m, m, layout="OI"),
        (X, V),
        ValueError,
        r"mean: got shape \(4,\), expected \(6,\)",
    ),
    (
        "group",
        lambda x: bn.batch_norm(x, group=3),
        (X,),
        TypeError,
        r"group: got an int, expected an object",
    ),
    (
        "layer channels",
        lambda x: bn.BatchNorm(5)(x),
        (X,),
        ValueError,
        r"x: got shape \(.*4\), expected \(5,\)",
    ),
]


# What the capability table calls these cases, where that is not plain "errors".
OPERATION = {
    "complex": "complex-errors",
    "where complex": "complex-errors",
    **dict.fromkeys(
        ("one value", "empty batch", "empty space", "where's shape", "dy's shape"), "shape-errors"
    ),
    **dict.fromkeys(("stats of others", "merge shapes", "fold"), "shape-errors"),
}


def _case(name, *case):
    operation = OPERATION.get(name, "errors")
    return pytest.param(*case, id=name.replace(" ", "-"), marks=pytest.mark.operation(operation))


@pytest.mark.parametrize(("call", "arrays", "error", "text"), [_case(*case) for case in WRONG])
def test_wrong_call(target, call, arrays, error, text):
    arrays = tuple(np.ascontiguousarray(a) for a in arrays)
    with pytest.raises(error, match=f"(?i){text}"):
        target.call(call, *arrays)


def test_arrays_of_two_libraries(target):
    other = np.ones(4)
    if isinstance(target.asarray(X), np.ndarray):
        strict = pytest.importorskip("array_api_strict")
        other = strict.ones(4, dtype=strict.float32)
    with pytest.raises(TypeError, match=r"gamma: got an array of .*, expected one of .*, as x"):
        target.call(lambda x: bn.batch_norm(x, other), X)


@pytest.mark.operation("shape-errors")
def test_a_failing_layer_is_as_it_was(target):
    dy = data.batch((5, 4))

    def run(x, dy):
        layer = bn.BatchNorm(4, momentum=0.5)
        layer(x)
        before = layer.state_dict()
        with pytest.raises(ValueError, match="dy: got shape"):
            layer.backward(dy)
        with pytest.raises(ValueError, match="x: got an empty batch"):
            layer(x[:0, ...])
        with pytest.raises(ValueError, match="state: got keys"):
            layer.load_state_dict({**before, "more": x})
        with pytest.raises(ValueError, match="running_var: got shape"):
            layer.load_state_dict({**before, "gamma": -before["gamma"], "running_var": x})
        after = layer.state_dict()
        assert all(after[name] is before[name] for name in before)
        assert layer.gamma_grad is None
        dx = layer.backward(x)  # the forward pass is still there to go back
        return dx, layer.num_batches_tracked

    assert target.call(run, X, dy)[1] == 1


@pytest.mark.operation("shape-errors")
def test_out_that_does_not_fit(target):
    if target.library in ("jax", "dask", "ndonnx", "sparse"):
        text, error = r"out: got an array of .*, expected an array that can be written to", TypeError
        with pytest.raises(error, match=text):
            target.call(lambda x: bn.batch_norm(x, out=x), X)
    with pytest.raises(ValueError, match=r"out: got shape \(5, 4\), expected \(6, 4\), as x"):
        target.call(lambda x, out: bn.batch_norm(x, out=out), X, X[:5])


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_weights_that_are_none(target, wrong):
    where = np.ones((6, 4), np.float32)
    where[2, 1] = wrong
    _raises_where_values_are_seen(
        target, where, r"where: got a weight that is negative, infinite or NaN"
    )


def test_too_few_weighted_values(target):
    where = np.ones((6, 4), np.bool_)
    where[1:, 2] = False
    _raises_where_values_are_seen(target, where, r"where: got a channel with fewer than 2 values")


def _raises_where_values_are_seen(target, where, text):
    def call(x, where):
        return bn.batch_norm(x, where=where)

    if target.library in ("dask", "ndonnx") or target.device_name.startswith("jit"):
        with np.errstate(all="ignore"):
            target.call(call, X, where)  # lazy values cannot be looked at: no error, no compute
    else:
        with pytest.raises(ValueError, match=text):
            target.call(call, X, where)
