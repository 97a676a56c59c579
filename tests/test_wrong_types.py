"""Every public function with arguments of every wrong type: one line that names the argument."""

import math
import re

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.backends.dispatch import VARIABLE

X = np.random.default_rng(0).normal(size=(6, 4))
V = np.ones(4)
STATS = bn.moments(X)
KERAS = bn.to_state(bn.BatchNorm(4), "keras").arrays
TORCH = bn.to_state(bn.BatchNorm(4), "torch").arrays


class Thing:
    """Something that nobody knows, and that takes two lines to say so."""

    def __repr__(self):
        return "line one\nline two"


WRONG = {
    "a module": math,
    "a class": int,
    "an ellipsis": ...,
    "a masked array": np.ma.masked_array(X),
    "a masked vector": np.ma.masked_array(V),
    "a matrix": X.view(np.matrix),
    "dates": np.zeros((6, 4), "M8[s]"),
    "a vector of dates": np.zeros(4, "M8[s]"),
    "objects": np.ones((6, 4), object),
    "a vector of objects": np.ones(4, object),
    "a structured array": np.zeros((6, 4), [("a", float)]),
    "a structured vector": np.zeros(4, [("a", float)]),
    "text in an array": np.asarray(["a"] * 4),
    "complex numbers": X + 0j,
    "long doubles": X.astype(np.longdouble),
    "the other byte order": X.astype(">f8" if np.little_endian else "<f8"),
    "another shape": np.ones((2, 3)),
    "a 0-d array": np.asarray(0.5),
    "a NumPy number": np.float64(0.5),
    "text": "abc",
    "bytes": b"abc",
    "None": None,
    "a bool": True,
    "an int": 3,
    "a negative int": -1,
    "a huge int": 10**400,
    "a float": 2.5,
    "NaN": math.nan,
    "infinity": math.inf,
    "a complex number": 1j,
    "a tuple": (1, 2),
    "a list": [1.0] * 4,
    "a set": {1},
    "a dict": {},
    "a generator": (i for i in ()),
    "a function": len,
    "a thing": Thing(),
}
if np.dtype(np.longdouble) == np.float64:
    del WRONG["long doubles"]


class Argument:
    """What an argument is in a right call, and which of the wrong ones are right for it after all.

    Where its shape is what others are held to, one of these may be named instead.
    """

    def __init__(self, right, *fine, others=()):
        self.right, self.fine, self.others = right, fine, others


def arrays(**right):
    return {name: Argument(v) for name, v in right.items()}


def optional(**right):
    return {name: Argument(v, "None") for name, v in right.items()}


NUMBER = ("a 0-d array", "a NumPy number")
AXIS = {"axis": Argument(1, "a negative int")}
EPS = {"eps": Argument(1e-5, "an int", "a float", *NUMBER)}
WHERE = {"where": Argument(None, "None", *NUMBER)}
REST = AXIS | EPS | WHERE | optional(group=None)
ADDED = optional(residual=X, activation="relu")
GONE_BACK = ADDED | optional(beta=V) | {"residual": Argument(X, "None", others=("y",))}
COUNT = {"count": Argument(V, "an int", "a float", *NUMBER)}


def switch(name, right=False):
    return {name: Argument(right, "a bool")}


def called(x=X, **options):
    return bn.BatchNorm(4)(x, **options)


def gone_back(dy=X, **options):
    layer = bn.BatchNorm(4)
    layer(X)
    return layer.backward(dy, **options)


def loaded(**state):
    layer = bn.BatchNorm(4)
    layer.load_state_dict({**layer.state_dict(), **state})


def added(kind, backend):
    bn.add_kernels(kind, backend)()


def recalibrated(**options):
    layer = bn.BatchNorm(4)
    bn.recalibrate(**{"layers": layer, "forward": layer, "batches": [X], **options})


LAYER = bn.BatchNorm(4)
FOLD = optional(gamma=V, beta=V) | EPS
GIVEN = arrays(mean=V, var=V)
LEAD = {"x": Argument(X, others=("axis", "gamma", "mean", "dy", "dx"))}
LEADS = {"mean": Argument(V, others=("var", r"parts\[0\]\.count")), "var": Argument(V)}

# A name for the call, the function, and its arguments.
CALLS = {
    "batch_norm": (bn.batch_norm, LEAD | optional(gamma=V, beta=V, out=None) | ADDED | REST),
    "batch_norm_backward": (
        bn.batch_norm_backward,
        arrays(dy=X, stats=STATS) | LEAD | optional(gamma=V, out=None) | GONE_BACK | REST,
    ),
    "batch_norm_backward from y": (
        lambda **options: bn.batch_norm_backward(X, X, STATS, **options),
        {"y": Argument(X, "None"), "activation": Argument("relu", others=("y",))},
    ),
    "fields of stats": (
        lambda **fields: bn.batch_norm_backward(X, X, bn.Moments(**fields)),
        COUNT | GIVEN | optional(mean_lo=V),
    ),
    "normalize": (
        bn.normalize,
        LEAD | GIVEN | optional(gamma=V, beta=V, out=None) | ADDED | AXIS | EPS,
    ),
    "normalize_backward": (
        bn.normalize_backward,
        arrays(dy=X)
        | LEAD
        | GIVEN
        | optional(gamma=V, out=None)
        | GONE_BACK
        | AXIS
        | EPS
        | switch("stats_grad"),
    ),
    "moments": (bn.moments, {"x": Argument(X, "another shape", others=("axis",))} | AXIS | WHERE),
    "Moments.merge": (lambda parts: bn.Moments.merge(parts, STATS), arrays(parts=STATS)),
    "fields of Moments.merge": (
        lambda **fields: bn.Moments.merge(bn.Moments(**fields), STATS),
        COUNT | LEADS | optional(mean_lo=V),
    ),
    "update_running": (
        bn.update_running,
        LEADS
        | arrays(stats=STATS)
        | {"momentum": Argument(0.1, *NUMBER), "correction": Argument(1, "an int", "a float", *NUMBER)},
    ),
    "fold": (bn.fold, LEADS | FOLD),
    "fold_linear": (
        bn.fold_linear,
        {"weight": Argument(X.T, others=("layout", "bias"))}
        | arrays(layout="OI")
        | GIVEN
        | optional(bias=V)
        | FOLD,
    ),
    "fold_conv": (
        bn.fold_conv,
        {"weight": Argument(np.ones((4, 3, 1, 1)), others=("layout",))}
        | arrays(layout="OIHW")
        | GIVEN
        | optional(bias=V)
        | FOLD,
    ),
    "batch_norm_jvp": (
        bn.batch_norm_jvp,
        optional(dx=X, dgamma=V, dbeta=V)
        | arrays(stats=STATS)
        | LEAD
        | optional(gamma=V, dresidual=X)
        | GONE_BACK
        | {"residual": Argument(X, others=("y", "d?dresidual"))}
        | AXIS
        | EPS
        | WHERE,
    ),
    "batch_norm_double_backward": (
        bn.batch_norm_double_backward,
        optional(ddx=X, ddgamma=V, ddbeta=V)
        | arrays(dy=X, stats=STATS)
        | LEAD
        | optional(gamma=V, ddresidual=X)
        | GONE_BACK
        | {"residual": Argument(X, others=("y", "d?dresidual"))}
        | AXIS
        | EPS
        | WHERE,
    ),
    "recalibrate": (
        recalibrated,
        {
            "layers": Argument(LAYER),
            # What is called, or comes out, is an argument of the layer's.
            "forward": Argument(LAYER, "a class", others=(r"layers\[0\]",)),
            "batches": Argument([X], others=("x", "axis")),
        }
        | optional(group=None)
        | switch("progress"),
    ),
    "BatchNorm": (
        bn.BatchNorm,
        {
            "num_features": Argument(4, "an int", others=("axis",)),
            "axis": Argument(1, "an int", "a negative int", "a huge int"),
            "momentum": Argument(0.1, "None", *NUMBER),
            "correction": Argument(1, "an int", "a float", *NUMBER),
        }
        | EPS
        | switch("affine", True)
        | switch("track_running_stats", True)
        | optional(group=None, xp=np, device=None, dtype=None, activation="relu"),
    ),
    "BatchNorm of a library": (
        lambda **options: bn.BatchNorm(4, xp=np, **options),
        optional(device=None, dtype=None),
    ),
    "BatchNorm.like": (
        bn.BatchNorm.like,
        arrays(framework="keras") | {"num_features": Argument(4, "an int", others=("axis",))},
    ),
    "a layer's call": (called, LEAD | WHERE | optional(group=None, residual=X, out=None)),
    "a layer's backward": (gone_back, arrays(dy=X) | optional(out=None)),
    "a layer's train": (bn.BatchNorm(4).train, switch("mode")),
    "a layer's load_state_dict": (
        bn.BatchNorm(4).load_state_dict,
        arrays(state=bn.BatchNorm(4).state_dict()),
    ),
    "a state": (
        loaded,
        arrays(gamma=V, beta=V, running_mean=V, running_var=V)
        | {"num_batches_tracked": Argument(0, "an int", "a huge int")},
    ),
    "from_state": (
        bn.from_state,
        arrays(arrays=TORCH, framework="torch") | {"settings": Argument({}, "None", "a dict")},
    ),
    "arrays of from_state": (
        lambda **found: bn.from_state({**TORCH, **found}, "torch"),
        {name: Argument(V, "a list") for name in ("weight", "bias", "running_mean", "running_var")}
        | {"running_mean": Argument(V, "a list", others=("axis", "weight"))}
        | {"num_batches_tracked": Argument(0, "an int")},
    ),
    "settings of from_state": (
        lambda **settings: bn.from_state(TORCH, "torch", settings),
        EPS
        | {"momentum": Argument(0.1, "None", *NUMBER), "num_features": Argument(4)}
        | {"affine": Argument(True, "a bool"), "track_running_stats": Argument(True, "a bool")},
    ),
    "settings of from_state, Keras's": (
        lambda **settings: bn.from_state(KERAS, "keras", settings),
        {
            "axis": Argument(1, "an int", "a negative int", "a huge int"),
            "epsilon": EPS["eps"],
            "momentum": Argument(0.99, *NUMBER),
        }
        | {"scale": Argument(True, "a bool"), "center": Argument(True, "a bool")},
    ),
    "to_state": (bn.to_state, arrays(layer=LAYER, framework="torch")),
    "save": (bn.save, arrays(path="model.npz", layers=LAYER)),
    "a prefix of save": (
        lambda layers: bn.save("model.npz", {layers: LAYER}),
        {"layers": Argument("bn", "text")},
    ),
    "load": (bn.load, arrays(path="model.npz", layers=LAYER)),
    "set_kernels": (bn.set_kernels, optional(name="numpy")),
    "set_num_threads": (bn.set_num_threads, {"n": Argument(1, "None", "an int", "a huge int")}),
    "set_output_pool": (
        bn.set_output_pool,
        {"max_bytes": Argument(0, "None", "an int", "a huge int")},
    ),
    "add_kernels": (
        added,
        {"kind": Argument(np.ndarray, "a class")} | {"backend": Argument(bn.Backend())},
    ),
    "kernels_for": (
        lambda x, others: bn.kernels_for(x, others),
        {"x": Argument(X, "another shape", *NUMBER)}
        | {"others": Argument(V, "None", "another shape", *NUMBER)},
    ),
}


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bn.save("model.npz", bn.BatchNorm(4))
    yield
    bn.set_kernels(None), bn.set_num_threads(None), bn.set_output_pool(None)


def fields(call):
    function, arguments = CALLS[call]
    return function, arguments, {name: a.right for name, a in arguments.items()}


@pytest.mark.parametrize("call", CALLS)
def test_one_line_that_names_the_argument(call):
    function, arguments, right = fields(call)
    function(**right)
    wrong = []
    for name, argument in arguments.items():
        for what, value in WRONG.items():
            if what in argument.fine or (what == "a dict" and call == "a prefix of save"):
                continue
            if call == "a prefix of save" and getattr(value, "__hash__", None) is None:
                continue  # no key of a mapping
            try:
                function(**{**right, name: value})
            except (TypeError, ValueError) as error:
                said = str(error)
                named = "|".join((rf"(stats\.|parts\[0\]\.)?{name}(\[\d\])?", *argument.others))
                if not re.fullmatch(f"({named}): got .*, expected .*", said):
                    wrong.append(f"{name} {what}: {type(error).__name__}: {said[:120]!r}")
            except Exception as error:
                wrong.append(f"{name} {what}: {type(error).__name__}: {str(error)[:120]!r}")
            else:
                wrong.append(f"{name} {what}: no error")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("call", CALLS)
def test_what_is_right_after_all_is_taken(call):
    function, arguments, right = fields(call)
    for name, argument in arguments.items():
        for what in argument.fine:
            if not (call == "recalibrate" and name == "forward"):
                function(**{**right, name: WRONG[what]})


def test_how_to_go_back_to_the_default_kernels():
    with pytest.raises(
        ValueError, match=r"name: got 'fast', expected one of .*, or None for the default"
    ):
        bn.set_kernels("fast")
    assert VARIABLE == "BATCHNORM_KERNELS"


TENSORS = {
    "sparse": (lambda torch, x: x.to_sparse(), "x: got a tensor of layout torch.sparse_coo, expected a"),
    "nested": (lambda torch, x: torch.nested.nested_tensor([x, x]), "x: got a tensor of layout nested"),
    "masked": (lambda torch, x: torch.masked.masked_tensor(x, x > 0), "x: got a MaskedTensor, expected"),
    "integers": (lambda torch, x: x.int(), "x: got dtype torch.int32, expected one of float16"),
    "8 bits": (lambda torch, x: x.to(torch.float8_e4m3fn), "x: got dtype torch.float8_e4m3fn, expected"),
    "a module": (lambda torch, x: torch.nn.Linear(2, 2), "x: got a Linear, expected an array of an"),
    "a device": (lambda torch, x: x.device, "x: got a device, expected an array of an array API"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of what it calls a prototype
@pytest.mark.parametrize("what", TENSORS)
def test_tensors(what):
    torch = pytest.importorskip("torch")
    make, message = TENSORS[what]
    x = make(torch, torch.ones(6, 4))
    for function in (bn.batch_norm, bn.moments, bn.BatchNorm(4)):
        with pytest.raises(TypeError, match=re.escape(message)):
            function(x)
