"""What is fused: a batch norm, a sum with it, and an activation, in the graph of a forward pass."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from batchnorm.torch.activated import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from batchnorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.passes import in_place

Module = Any

ACTIVATED: dict[type, type] = {
    BatchNorm1d: BatchNormAct1d,
    BatchNorm2d: BatchNormAct2d,
    BatchNorm3d: BatchNormAct3d,
}
PLAIN = {activated: plain for plain, activated in ACTIVATED.items()}
MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
}
CALLS: dict[Any, str] = {
    functional.relu: "relu",
    functional.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    "relu": "relu",  # methods, by their names
    "relu_": "relu",
    functional.relu6: "relu6",
    functional.leaky_relu: "leaky_relu",
    functional.leaky_relu_: "leaky_relu",
    functional.silu: "silu",
}
SUMS: dict[Any, bool] = {
    operator.add: False,
    torch.add: False,
    "add": False,
    operator.iadd: True,
    "add_": True,
}
"""What adds, and whether to its first argument in place."""
_FRESH = (nn.modules.conv._ConvNd, nn.Linear)
"""Modules whose result is a new tensor, which nothing else can change."""


class Match(NamedTuple):
    """A batch norm in a graph that can be fused with what follows."""

    nodes: tuple[fx.Node, ...]
    """The calls that it stands for, the norm's first, the activation's last."""
    place: fx.Node
    """Where the fused call goes: before this."""
    residual: fx.Node | None
    activation: tuple[str, float]
    in_place: bool


class NotFusedError(Exception):
    """Why a batch norm is left."""


def is_hooked(module: Module) -> bool:
    """Return whether a module has hooks, which see its input and its result."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def activation_of(module: Module) -> tuple[str, float] | None:
    """Return the name and the slope of an activation module, or None."""
    name = MODULES.get(type(module))
    if name is None or is_hooked(module) or "forward" in vars(module):
        return None
    return _checked(name, getattr(module, "negative_slope", 0.0))


def passes_through(module: Module) -> bool:
    """Return whether a module returns what it gets."""
    return type(module) is nn.Identity and not is_hooked(module) and "forward" not in vars(module)


def is_fusable(module: Module) -> bool:
    """Return whether a batch norm takes what follows from its caller."""
    plain = type(module) in PLAIN and not module.activation_name
    return plain and not is_hooked(module) and "forward" not in vars(module)


def _checked(name: str, slope: Any) -> tuple[str, float] | None:
    if name != "leaky_relu":
        return name, 0.0
    known = isinstance(slope, (int, float)) and 0 <= slope < float("inf")
    return (name, float(slope)) if known else None


def find(parent: Module, norm: fx.Node) -> Match:
    """Return how a batch norm's call is fused; an error says why it is not."""
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        raise NotFusedError("it is called with more than its input")
    nodes = [norm]
    user = _next(parent, nodes)
    added = _sum(user, nodes[-1])
    residual, place, changes = None, norm, False
    if added is not None:
        residual, changes = added
        place = user
        nodes.append(user)
        user = _next(parent, nodes)
    activation = _activation(parent, user, nodes[-1])
    if activation is None:
        raise NotFusedError("no activation that is known follows" + (" the sum" if residual else ""))
    nodes.append(user)
    if residual is not None:
        _validate_move(parent, norm, place, nodes)
    return Match(tuple(nodes), place, residual, activation, changes)


def _next(parent: Module, nodes: list[fx.Node]) -> fx.Node:
    """Return what alone uses the last of the nodes, past modules that return what they get."""
    while True:
        users = list(nodes[-1].users)
        if len(users) != 1 or users[0].op == "output":
            what = "its result" if len(nodes) == 1 else "the sum"
            raise NotFusedError(f"{what} is returned" if len(users) == 1 else f"{what} is used twice")
        user = users[0]
        if user.op != "call_module" or user.args != (nodes[-1],) or user.kwargs:
            return user
        if not passes_through(parent.get_submodule(str(user.target))):
            return user
        nodes.append(user)


def _operation(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return what a function or a method does, and its arguments."""
    if node.op not in ("call_function", "call_method"):
        return None, ()
    if node.target is in_place:
        return getattr(operator, str(node.args[0])), node.args[1:]
    return node.target, node.args


def _sum(node: fx.Node, norm: fx.Node) -> tuple[fx.Node, bool] | None:
    """Return what is added to the result of the norm, and whether in place; None for no sum."""
    target, arguments = _operation(node)
    changes = SUMS.get(target)
    if changes is None:
        return None
    if len(arguments) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in arguments):
        raise NotFusedError("it is added to a number, or with a factor")
    a, b = arguments
    if a is b:
        raise NotFusedError("it is added to itself")
    if changes and a is not norm:
        raise NotFusedError("it is added to another tensor in place")
    return (b if a is norm else a), changes


def _activation(parent: Module, node: fx.Node, norm: fx.Node) -> tuple[str, float] | None:
    """Return the activation that a node applies to the result of the norm, or None."""
    if node.op == "call_module":
        module = parent.get_submodule(str(node.target))
        return activation_of(module) if node.args == (norm,) and not node.kwargs else None
    target, arguments = _operation(node)
    name = CALLS.get(target)
    if name is None or not arguments or arguments[0] is not norm:
        return None
    sloped = name == "leaky_relu"
    named = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    slope = arguments[1] if sloped and len(arguments) > 1 else named.pop("negative_slope", 0.01)
    flags = arguments[2:] if sloped else arguments[1:]
    if named or any(type(flag) is not bool for flag in (*flags, node.kwargs.get("inplace", False))):
        return None
    return _checked(name, slope)


def _validate_move(parent: Module, norm: fx.Node, place: fx.Node, nodes: list[fx.Node]) -> None:
    """Check that the norm may be computed where the sum is: nothing before that changes its input."""
    between = []
    node = norm.next
    while node is not place:
        if node not in nodes:
            between.append(node)
        node = node.next
    if not between:
        return
    given: Any = norm.args[0]
    own = parent.get_submodule(str(norm.target))
    fresh = False
    if given.op == "call_module" and len(given.users) == 1:
        producer = parent.get_submodule(str(given.target))
        fresh = isinstance(producer, _FRESH) and not is_hooked(producer)
    for other in between:
        if other.op == "call_module":
            fresh = fresh and own not in parent.get_submodule(str(other.target)).modules()
        elif other.op == "get_attr":
            fresh = fresh and not str(other.target).startswith(f"{norm.target}.")
    if not fresh:
        raise NotFusedError("what is added to it is computed after it, and may change its input")


def rewrite(graph: fx.Graph, match: Match) -> None:
    """Put one call of the batch norm in the place of what it is fused with."""
    norm, *_, last = match.nodes
    with graph.inserting_before(match.place):
        given = (norm.args[0], match.residual, *match.activation, match.in_place)
        fused = graph.call_module(str(norm.target), given)
    last.replace_all_uses_with(fused)
    for node in reversed(match.nodes):
        graph.erase_node(node)
