"""BatchNormalization nodes of ONNX models as layers, and layers as nodes.

Needs the package `onnx`, which is imported at the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from batchnorm import checks
from batchnorm.checkpoints import FORMATS, from_state, to_state
from batchnorm.functional import batch_norm, normalize
from batchnorm.layer import BatchNorm
from batchnorm.moments import update_running

Array = Any
OPERATOR = "BatchNormalization"
NAMES = FORMATS["onnx"].names
FIRST_OPSET = 15  # since which the operator is as it is


def _onnx() -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError:
        raise ImportError(
            "batchnorm.onnx: onnx is not installed, expected it: pip install onnx"
        ) from None


def from_onnx(model: Any) -> dict[str, BatchNorm]:
    """Load a model's batch norms as layers.

    Parameters
    ----------
    model : onnx.ModelProto
        A model whose BatchNormalization nodes have their parameters as initializers or constants.

    Returns
    -------
    dict of str to BatchNorm
        A layer for each node, by the node's name, or its first output's where it has none; in the
        order of the graph, those of subgraphs after their node. In inference mode, or in training
        where the node's ``training_mode`` is 1.

    Raises
    ------
    TypeError, ValueError
        Not a model, or a node whose parameters are not in the model or do not fit.
    """
    onnx = _onnx()
    if not isinstance(model, onnx.ModelProto):
        checks.fail(TypeError, "model", f"a {type(model).__name__}", "an onnx.ModelProto")
    return dict(_layers(onnx, model.graph, {}))


def _layers(onnx: Any, graph: Any, outer: dict[str, Any]) -> Iterator[tuple[str, BatchNorm]]:
    known = outer | {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    known[node.output[0]] = attribute.t
        if node.op_type == OPERATOR and node.domain in ("", "ai.onnx"):
            name = node.name or node.output[0]
            missing = [tensor for tensor in node.input[1:5] if tensor not in known]
            if missing or len(node.input) < 5:
                got = f"node {name!r} with {missing or len(node.input)} not in the model"
                checks.fail(ValueError, "model", got, "parameters as initializers or constants")
            tensors = (onnx.numpy_helper.to_array(known[tensor]) for tensor in node.input[1:5])
            settings = _settings(onnx, node)
            training = settings.pop("training_mode", 0)
            layer = from_state(dict(zip(NAMES, tensors, strict=True)), "onnx", settings)
            yield name, layer.train(bool(training))
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _layers(onnx, inner, known)


def _settings(onnx: Any, node: Any) -> dict[str, Any]:
    """A node's attributes. ONNX holds float32: the nearest short decimal is meant."""
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    known = ("epsilon", "momentum", "training_mode")
    return {n: float(f"{v:.7g}") if isinstance(v, float) else v for n, v in found.items() if n in known}


def to_onnx(layer: BatchNorm, *, ndim: int = 4, name: str = "bn", opset: int | None = None) -> Any:
    """Export a layer as a model of one node.

    Parameters
    ----------
    layer : BatchNorm
        With channels at axis 1, one channel axis, and running statistics.
    ndim : int, default 4
        Axes of x: 4 for images, 2 for vectors.
    name : str, default "bn"
        Of the node; its parameters are ``name.scale`` and so on, its input ``x``, its output ``y``.
    opset : int, optional
        At least 15; the newest that the installed `onnx` knows where it is left out.

    Returns
    -------
    onnx.ModelProto
        Which passes onnx's checker. x is float32, or float64 for a layer in float64, of shape
        (N, C, ...), in which all but C may be anything.

    Raises
    ------
    TypeError, ValueError
        A layer that ONNX's operator cannot be: channels elsewhere, in several axes, a cumulative
        average, no running statistics; an opset that is too old.
    """
    onnx = _onnx()
    newest = int(onnx.defs.onnx_opset_version())
    opset = newest if opset is None else checks.whole("opset", opset, FIRST_OPSET)
    state = to_state(layer, "onnx")
    if layer.axis != 1:
        checks.fail(ValueError, "layer", f"one with channels at axis {layer.axis}", "channels at axis 1")
    kind = np.float64 if state.arrays["scale"].dtype == np.float64 else np.float32
    tensors = [
        onnx.numpy_helper.from_array(np.asarray(v, kind), f"{name}.{key}")
        for key, v in state.arrays.items()
    ]
    node = onnx.helper.make_node(
        OPERATOR, ["x", *(tensor.name for tensor in tensors)], ["y"], name=name, **state.settings
    )
    helper, element = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    shape = ["N", layer.num_features, *(f"D{i}" for i in range(2, checks.whole("ndim", ndim, 2)))]
    ends = ([helper.make_tensor_value_info(end, element, shape)] for end in ("x", "y"))
    graph = helper.make_graph([node], name, *ends, tensors)
    opsets = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="batchnorm")
    onnx.checker.check_model(model, full_check=True)
    return model


def run(node: Any, x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> tuple[Array, ...]:
    """Run a BatchNormalization node on arrays of any library.

    Parameters
    ----------
    node : onnx.NodeProto
        Its attributes count.
    x : array, shape (N, C, ...)
        Input.
    scale, bias, mean, var : array, shape (C,)
        The node's other inputs.

    Returns
    -------
    tuple of arrays
        y; with ``training_mode=1`` also the new running mean and variance, in the dtypes of `mean` and
        `var`.

    Raises
    ------
    TypeError, ValueError
        Another node, or as `batch_norm`.
    """
    onnx = _onnx()
    if getattr(node, "op_type", None) != OPERATOR:
        got = getattr(node, "op_type", None) or f"a {type(node).__name__}"
        checks.fail(TypeError, "node", got, f"a {OPERATOR} node")
    settings = {"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0} | _settings(onnx, node)
    if not settings["training_mode"]:
        return (normalize(x, mean, var, scale, bias, eps=settings["epsilon"]),)
    y, stats = batch_norm(x, scale, bias, eps=settings["epsilon"])
    new = update_running(mean, var, stats, momentum=1 - settings["momentum"], correction=0)
    return y, *new
