"""Conversion of BatchNormalization nodes of ONNX models to layers, and of layers to nodes.

This module requires the package `onnx`, which is imported at the first call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from batchnorm.arguments import validate_bool, validate_int
from batchnorm.checkpoints import from_state, to_state
from batchnorm.epilogue import validate_activation
from batchnorm.errors import describe, describe_type, fail
from batchnorm.formats import FORMATS
from batchnorm.functional import batch_norm, normalize
from batchnorm.layer import BatchNorm
from batchnorm.moments import update_running
from batchnorm.validation import validate_input, validate_vectors

Array = Any
OPERATOR = "BatchNormalization"
DOMAIN = ("", "ai.onnx")
NAMES = FORMATS["onnx"].names
FIRST_OPSET = 15  # of the current definition of the operator
# Whether a node is in training, by the first opset in which this holds.
TRAINING: dict[int, Callable[[Any, dict[str, Any]], bool]] = {
    14: lambda node, found: bool(found.get("training_mode", 0)),
    7: lambda node, found: _count_outputs(node) > 1,
    0: lambda node, found: not found.get("is_test", 0),
}


def _onnx() -> Any:
    try:
        return importlib.import_module("onnx")
    except ImportError:
        raise ImportError(
            "batchnorm.onnx: onnx is not installed, expected it: pip install onnx"
        ) from None


class Fused(NamedTuple):
    """A layer that does what some nodes do."""

    layer: BatchNorm
    """With the activation of the node after it."""
    residual: str | None
    """The tensor that an Add node adds, which is the `residual` of a call; None for none."""
    output: str
    """The tensor that the layer then gives: the output of the last of the nodes."""


def from_onnx(model: Any, *, fuse: bool = False) -> dict[str, Any]:
    """Load a model's batch norms as layers.

    Parameters
    ----------
    model : onnx.ModelProto
        A model whose BatchNormalization nodes have their parameters as initializers or constants,
        perhaps behind Identity and Cast nodes, in its graph, in subgraphs or in its own functions.
    fuse : bool, default False
        Whether an Add of another tensor, and then a Relu, LeakyRelu, Clip to [0, 6], or a Sigmoid with
        its Mul, become the residual and the activation of the layer. They do where nothing else uses
        the tensors between.

    Returns
    -------
    dict of str to BatchNorm, or with `fuse` to Fused
        A layer for each node, in the order of the graph. Its key is the name of the node, or of its
        first output if the node has no name or shares it. Nodes of subgraphs follow their node. Nodes of
        a function are included at each call, under the names that ``onnx.inliner`` generates. A layer
        is in training mode if its node is, which ``training_mode`` determines from opset 14 on, the
        number of outputs from opset 7 on, and ``is_test`` before opset 7.

    Raises
    ------
    TypeError, ValueError
        `model` is not a model, the parameters of a node are not in the model or do not fit, a node has
        ``spatial=0``, two nodes share the name and the output, or a function has another opset.
    """
    onnx = _onnx()
    if not isinstance(model, onnx.ModelProto):
        fail(TypeError, "model", describe_type(model), "an onnx.ModelProto")
    if any(map(_has_batch_norm, model.functions)):
        model = importlib.import_module("onnx.inliner").inline_local_functions(model)
    for function in filter(_has_batch_norm, model.functions):
        got = f"batch norm in the function {function.name!r}, which onnx.inliner does not inline"
        fail(ValueError, "model", got, "functions of the model's own opset")
    opset = next((o.version for o in model.opset_import if o.domain in DOMAIN), 1)
    fuse = validate_bool("fuse", fuse)
    found = list(_layers(onnx, model.graph, {}, opset))
    times = Counter(node.name for node, *_ in found)
    layers: dict[str, Any] = {}
    for node, layer, graph, known in found:
        name = node.name if node.name and times[node.name] == 1 else node.output[0]
        if name in layers:
            fail(ValueError, "model", f"two nodes {name!r}", "nodes that differ in name or output")
        layers[name] = _fused(onnx, graph, known, node, layer) if fuse else layer
    return layers


def _layers(
    onnx: Any, graph: Any, outer: dict[str, Any], opset: int
) -> Iterator[tuple[Any, BatchNorm, Any, dict[str, Any]]]:
    """Yield each batch norm of a graph and its subgraphs: its node, layer, graph and known tensors."""
    known = outer | {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in DOMAIN:
            for attribute in node.attribute:
                if attribute.name in ("value", "value_float", "value_floats"):
                    known[node.output[0]] = onnx.helper.get_attribute_value(attribute)
        if node.op_type in ("Identity", "Cast") and node.domain in DOMAIN and node.input[0] in known:
            known[node.output[0]] = _Cast(node, known[node.input[0]])
        if _is_batch_norm(node):
            missing = [tensor for tensor in node.input[1:5] if tensor not in known]
            if missing or len(node.input) < 5:
                got = f"{_describe_node(node)} with {missing or len(node.input)} not in the model"
                fail(ValueError, "model", got, "parameters as initializers or constants")
            arrays = {}
            for name, tensor in zip(NAMES, node.input[1:5], strict=True):
                try:
                    arrays[name] = _array(onnx, known[tensor])
                except Exception as error:  # errors of onnx and NumPy for truncated or external data
                    got = f"{tensor!r} of {_describe_node(node)}, which cannot be read ({error})"
                    fail(ValueError, "model", got, "an array of numbers with its data")
            settings = _settings(onnx, node, "model")
            is_training = next(rule for since, rule in TRAINING.items() if opset >= since)
            training = is_training(node, settings)
            settings = {n: v for n, v in settings.items() if n in ("epsilon", "momentum")}
            yield node, from_state(arrays, "onnx", settings).train(training), graph, known
        for inner in _subgraphs(node):
            yield from _layers(onnx, inner, known, opset)


def _fused(onnx: Any, graph: Any, known: dict[str, Any], node: Any, layer: BatchNorm) -> Fused:
    """Let a layer do what the nodes after its own do, as far as it can."""
    y, residual = node.output[0], None
    users = _users(graph, y)
    if [n.op_type for n in users] == ["Add"]:
        others = [tensor for tensor in users[0].input if tensor != y]
        if len(others) == 1 and others[0] not in known:  # a constant is a bias, maybe
            y, residual = users[0].output[0], others[0]
            users = _users(graph, y)
    for operators, rule in _ACTIVATIONS.items():
        if sorted(n.op_type for n in users) == sorted(operators):
            activation, last = rule(onnx, graph, known, users)
            if activation is not None:
                layer.activation = validate_activation(activation)
                y = last.output[0]
                break
    return Fused(layer, residual, y)


def _users(graph: Any, tensor: str) -> list[Any]:
    """Return the nodes that use a tensor; none where it is an output, or used in a subgraph."""
    inner = [g for node in graph.node for g in _subgraphs(node)]
    if tensor in {output.name for output in graph.output} or any(_reads(g, tensor) for g in inner):
        return []
    return [node for node in graph.node if tensor in node.input and node.domain in DOMAIN]


def _reads(graph: Any, tensor: str) -> bool:
    """Return whether a graph or one inside it reads a tensor."""
    return any(
        tensor in node.input or any(_reads(g, tensor) for g in _subgraphs(node)) for node in graph.node
    ) or tensor in {output.name for output in graph.output}


def _relu(onnx: Any, graph: Any, known: Any, users: list[Any]) -> tuple[Any, Any]:
    return "relu", users[0]


def _leaky_relu(onnx: Any, graph: Any, known: Any, users: list[Any]) -> tuple[Any, Any]:
    slope = next((a.f for a in users[0].attribute if a.name == "alpha"), 0.01)
    return ("leaky_relu", float(f"{slope:.7g}")) if slope >= 0 else None, users[0]


def _clip(onnx: Any, graph: Any, known: Any, users: list[Any]) -> tuple[Any, Any]:
    given = {a.name: onnx.helper.get_attribute_value(a) for a in users[0].attribute}
    bounds = [given.get("min"), given.get("max")]
    for i, tensor in enumerate(users[0].input[1:3]):  # from opset 11 on
        bounds[i] = float(_array(onnx, known[tensor])) if tensor in known else None
    return "relu6" if bounds == [0.0, 6.0] else None, users[0]


def _silu(onnx: Any, graph: Any, known: Any, users: list[Any]) -> tuple[Any, Any]:
    sigmoid, product = sorted(users, key=lambda node: node.op_type == "Mul")
    own = [n for n in _users(graph, sigmoid.output[0]) if sigmoid.output[0] in product.input]
    return "silu" if own == [product] else None, product


# Operators of the nodes that use a norm's result: the activation that they are, or None, and the last.
_ACTIVATIONS: dict[tuple[str, ...], Callable[..., tuple[Any, Any]]] = {
    ("Relu",): _relu,
    ("LeakyRelu",): _leaky_relu,
    ("Clip",): _clip,
    ("Mul", "Sigmoid"): _silu,
}


def _is_batch_norm(node: Any) -> bool:
    return bool(node.op_type == OPERATOR and node.domain in DOMAIN)


def _describe_node(node: Any) -> str:
    return f"node {node.name or node.output[0]!r}"


def _count_outputs(node: Any) -> int:
    """Return the number of outputs of a node; omitted ones have an empty name."""
    return sum(map(bool, node.output))


def _subgraphs(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def _has_batch_norm(graph: Any) -> bool:
    """Return whether a graph or a function has a batch norm, also in its subgraphs."""
    return any(
        _is_batch_norm(node) or any(map(_has_batch_norm, _subgraphs(node))) for node in graph.node
    )


class _Cast(NamedTuple):
    """The output of an Identity or a Cast node."""

    node: Any
    value: Any


def _array(onnx: Any, value: Any) -> Array:
    """Return the array of an initializer, of the attribute of a Constant, or of a Cast of one."""
    if isinstance(value, _Cast):
        array = _array(onnx, value.value)
        to = next((a.i for a in value.node.attribute if a.name == "to"), None)
        return array if to is None else array.astype(onnx.helper.tensor_dtype_to_np_dtype(to))
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return value if isinstance(value, np.ndarray) else np.asarray(value, np.float32)


def _settings(onnx: Any, node: Any, argument: str) -> dict[str, Any]:
    """Return the attributes of a node; float32 numbers are rounded to 7 decimal digits."""
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if not found.get("spatial", 1):
        expected = "spatial=1, statistics for each channel"
        fail(ValueError, argument, f"{_describe_node(node)} with spatial=0", expected)
    return {n: float(f"{v:.7g}") if isinstance(v, float) else v for n, v in found.items()}


def to_onnx(layer: BatchNorm, *, ndim: int = 4, name: str = "bn", opset: int | None = None) -> Any:
    """Export a layer as a model of one node, and its activation.

    Parameters
    ----------
    layer : BatchNorm
        A layer with running statistics and one channel axis, axis 1.
    ndim : int, default 4
        The number of axes of x: 4 for images, 2 for vectors.
    name : str, default "bn"
        The name of the node. Its parameters are ``name.scale`` and so on, its input ``x``, its output
        ``y``.
    opset : int, optional
        At least 15. The default is the newest opset that the installed `onnx` knows and that the
        installed `onnxruntime`, if there is one, can run.

    Returns
    -------
    onnx.ModelProto
        A model that passes the checker of onnx, with the layer's activation after the node. x is
        float32, or float64 for a layer in float64 (as in `to_state`), and has the shape (N, C, ...), in
        which all dimensions except C are arbitrary.

    Raises
    ------
    TypeError, ValueError
        ONNX's operator cannot represent the layer (channels at another axis or at several axes, a
        cumulative average, no running statistics), or the opset is too old, or newer than the installed
        `onnx`.
    """
    onnx = _onnx()
    opset = _newest_opset() if opset is None else validate_int("opset", opset, FIRST_OPSET)
    known = int(onnx.defs.onnx_opset_version())
    if opset > known:
        expected = f"an integer from {FIRST_OPSET} to {known}, the newest of onnx {onnx.__version__}"
        fail(ValueError, "opset", opset, expected)
    if name == "" or not isinstance(name, str):
        fail(ValueError if name == "" else TypeError, "name", describe(name), "a name")
    if not isinstance(layer, BatchNorm):
        fail(TypeError, "layer", describe_type(layer), "a BatchNorm")
    activation, plain = layer.activation, copy.copy(layer)
    plain.activation = None
    state = to_state(plain, "onnx")
    if layer.axis != 1:
        fail(ValueError, "layer", f"one with channels at axis {layer.axis}", "channels at axis 1")
    tensors = [onnx.numpy_helper.from_array(v, f"{name}.{key}") for key, v in state.arrays.items()]
    result = "y" if activation is None else f"{name}.h"
    inputs = ["x", *(tensor.name for tensor in tensors)]
    nodes = [onnx.helper.make_node(OPERATOR, inputs, [result], name=name, **state.settings)]
    if activation is not None:
        dtype = next(iter(state.arrays.values())).dtype
        made, constants = _activation_nodes(onnx, activation, name, dtype)
        nodes, tensors = nodes + made, tensors + constants
    helper, element = onnx.helper, tensors[0].data_type
    shape = ["N", layer.num_features, *(f"D{i}" for i in range(2, validate_int("ndim", ndim, 2)))]
    ends = ([helper.make_tensor_value_info(end, element, shape)] for end in ("x", "y"))
    graph = helper.make_graph(nodes, name, *ends, tensors)
    opsets = [helper.make_opsetid("", opset)]
    version = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="batchnorm")
    onnx.checker.check_model(model, full_check=True)
    return model


def _activation_nodes(onnx: Any, activation: Any, name: str, dtype: Any) -> tuple[list[Any], list[Any]]:
    """Return nodes from the tensor ``name.h`` to y, and the constants that they need."""
    make, h = onnx.helper.make_node, f"{name}.h"
    if activation.name == "relu6":
        bounds = {f"{name}.min": 0, f"{name}.max": 6}
        constants = [onnx.numpy_helper.from_array(np.asarray(v, dtype), n) for n, v in bounds.items()]
        return [make("Clip", [h, *bounds], ["y"])], constants
    if activation.name == "silu":
        gate = f"{name}.gate"
        return [make("Sigmoid", [h], [gate]), make("Mul", [h, gate], ["y"])], []
    if activation.name == "leaky_relu":
        return [make("LeakyRelu", [h], ["y"], alpha=activation.slope)], []
    return [make("Relu", [h], ["y"])], []


@functools.cache
def _newest_opset() -> int:
    """Return the newest opset that the installed onnx and onnxruntime support."""
    newest = int(_onnx().defs.onnx_opset_version())
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except Exception:  # it is not installed, or cannot be loaded
        return newest
    for opset in range(newest, FIRST_OPSET, -1):
        model = to_onnx(BatchNorm(1).eval(), opset=opset).SerializeToString()
        with contextlib.suppress(Exception):  # the runtime has errors of its own
            runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
            return opset
    return FIRST_OPSET


def run(node: Any, x: Array, scale: Array, bias: Array, mean: Array, var: Array) -> tuple[Array, ...]:
    """Run a BatchNormalization node on arrays of any library.

    Parameters
    ----------
    node : onnx.NodeProto
        The node whose attributes are used.
    x : array, shape (N, C, ...)
        The input.
    scale, bias, mean, var : array, shape (C,)
        The other inputs of the node.

    Returns
    -------
    tuple of arrays
        y; with ``training_mode=1`` also the updated running mean and variance, in the dtypes of `mean`
        and `var`.

    Raises
    ------
    TypeError, ValueError
        The node is another one, is in training without ``training_mode`` as before opset 14, or has
        ``spatial=0``; and as `batch_norm`.
    """
    onnx = _onnx()
    if not isinstance(node, onnx.NodeProto) or node.op_type != OPERATOR:
        got = node.op_type if isinstance(node, onnx.NodeProto) else describe_type(node)
        fail(TypeError, "node", got, f"a {OPERATOR} node")
    settings = {"epsilon": 1e-5, "momentum": 0.9, "training_mode": 0} | _settings(onnx, node, "node")
    if not settings["training_mode"] and (_count_outputs(node) > 1 or not settings.get("is_test", 1)):
        got = f"{_describe_node(node)} in training as before opset 14"
        fail(ValueError, "node", got, "training_mode=1 for more than inference")
    validate_vectors(validate_input(x, 1), scale=scale, bias=bias, mean=mean, var=var)
    if not settings["training_mode"]:
        return (normalize(x, mean, var, scale, bias, eps=settings["epsilon"]),)
    y, stats = batch_norm(x, scale, bias, eps=settings["epsilon"])
    new = update_running(mean, var, stats, momentum=1 - settings["momentum"], correction=0)
    return y, *new
