"""The graphs of a module's own forward pass, for each way in which it can be called.

A graph holds what Python did when it was recorded. `recorded_passes` returns one only where nothing that
Python may ask gives another: modes of gradients and autocast, whether a value is a tensor, the modes of
children. What a graph does not show (attributes that are set, random numbers, contexts, functions with
gradients of their own) is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

Module = Any


class Way(NamedTuple):
    """How a module is called."""

    training: bool
    kind: type
    """The class of all arguments: a tensor or a list."""


WAYS = tuple(itertools.starmap(Way, itertools.product((True, False), (torch.Tensor, list))))


class UnseenError(Exception):
    """A forward pass does what a graph does not show."""


def in_place(operation: str, a: Any, b: Any) -> Any:
    """Return the result of an operator such as ``a += b``, which changes a if a is a tensor."""
    return getattr(operator, operation)(a, b)


class _Value(fx.Proxy):
    """A value that says that it is none of the classes that are asked for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise UnseenError(f"it sets {name} of a value")
        super().__setattr__(name, value)


def _recorded_in_place(operation: str) -> Any:
    def record(self: _Value, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", in_place, (operation, self, other), {})

    return record


# A proxy of PyTorch takes ``a += b`` for ``a + b``, which is another value where a is used elsewhere.
_IN_PLACE = ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
for _name in (f"i{name}" for name in (*_IN_PLACE, "lshift", "rshift")):
    setattr(_Value, f"__{_name}__", _recorded_in_place(_name))


class _Tensor(_Value):
    """A value that says that it is a tensor."""

    __class__ = property(lambda self: torch.Tensor)


class _List(_Value):
    """A value that says that it is a list."""

    __class__ = property(lambda self: list)


_PROXIES = {torch.Tensor: _Tensor, list: _List}


class _Tracer(fx.Tracer):
    """Records one module's forward pass; its children are calls."""

    proxy_buffer_attributes = True

    def __init__(self, arguments: type, others: type) -> None:
        super().__init__()
        self.arguments, self.others = arguments, others

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        """Return True: a child's forward pass is its own."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return what stands for a value."""
        kind = self.arguments if node.op == "placeholder" else self.others
        return kind(node, self)  # type: ignore[no-any-return]

    def create_arg(self, a: Any) -> Any:
        """Return an argument of a node; a value is one, whatever it says."""
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)


class _OnlyRecorded(TorchFunctionMode):
    """Refuses functions that are called on no recorded value: their results would be constants."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        if not any(issubclass(type(a), fx.Proxy) for a in _leaves(given)):
            raise UnseenError(f"it calls {getattr(func, '__name__', func)} on none of its arguments")
        return func(*args, **(kwargs or {}))


def _leaves(a: Any) -> Iterator[Any]:
    if type(a) in (tuple, list):
        for v in a:
            yield from _leaves(v)
    elif type(a) is dict:
        yield from _leaves(list(a.values()))
    else:
        yield a


# Class, method, what it is: what no graph shows.
_UNSEEN: tuple[tuple[Any, str, str], ...] = (
    (torch.autograd.Function, "apply", "a function with a gradient of its own"),
    (torch.autocast, "__enter__", "autocast"),
    (torch.inference_mode, "__enter__", "inference mode"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "hooks on saved tensors"),
)


@contextlib.contextmanager
def _unseen_refused() -> Iterator[None]:
    def refusing(what: str) -> Any:
        def refuse(*_: Any, **__: Any) -> Any:
            raise UnseenError(f"it uses {what}")

        return refuse

    with contextlib.ExitStack() as stack:
        for owner, name, what in _UNSEEN:
            stack.enter_context(mock.patch.object(owner, name, refusing(what)))
        stack.enter_context(_OnlyRecorded())
        yield


@contextlib.contextmanager
def _modes(module: Module, training: bool, other: bool) -> Iterator[None]:
    """Set the mode of a module, and with `other` the opposite of everything else that may be asked."""
    before = [(m, m.training) for m in module.modules()]
    devices = ("cpu", "cuda")
    autocast = [torch.is_autocast_enabled(device) for device in devices]
    try:
        for m, _ in before:
            vars(m)["training"] = training is not (other and m is not module)
        for device in devices:
            torch.set_autocast_enabled(device, other)
        with torch.set_grad_enabled(not other):
            yield
    finally:
        for m, mode in before:
            vars(m)["training"] = mode
        for device, mode in zip(devices, autocast, strict=True):
            torch.set_autocast_enabled(device, mode)


_CONTAINERS = (dict, list, set)


def _state(module: Module) -> list[Any]:
    """Return what the modules hold, by identity, and Python's random numbers."""
    found: list[Any] = [random.getstate()]
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        found.append([str(v) for v in numpy.random.get_state()])
    for m in module.modules():
        for name, v in vars(m).items():
            inner = list(v.values() if isinstance(v, dict) else v) if isinstance(v, _CONTAINERS) else []
            found.append((name, id(v), [id(w) for w in inner]))
    return found


def _record(module: Module, way: Way, others: type, other_modes: bool) -> fx.Graph:
    tracer = _Tracer(_PROXIES[way.kind], others)
    with _modes(module, way.training, other_modes), _unseen_refused():
        graph = tracer.trace(module)
    if any(str(node.target).startswith("*") for node in graph.nodes if node.op == "placeholder"):
        raise UnseenError("it takes any number of arguments")
    constants = (node.target for node in graph.nodes if node.op == "get_attr")
    if any("_tensor_constant" in str(target) for target in constants):
        raise UnseenError("it makes constants")
    return graph


def recorded_passes(module: Module) -> tuple[dict[Way, fx.Graph], str]:
    """Return the graph of a module's forward pass for each way that has one, and why one has none.

    The module is as before, also where its forward pass sets attributes.
    """
    kind = type(module)
    if "forward" in vars(module) or kind.__call__ is not nn.Module.__call__:
        return {}, "its call or its forward pass is not that of its class"
    found: dict[Way, fx.Graph] = {}
    why = ""
    kept = [(m, {name: _copied(v) for name, v in vars(m).items()}) for m in module.modules()]
    before = _state(module)
    for way in WAYS:
        graphs = []
        try:
            for others, modes in ((_Value, False), (_Tensor, False), (_Tensor, True)):
                graphs.append(_record(module, way, others, modes))
                if _state(module) != before:
                    raise UnseenError("it changes attributes or draws random numbers")
        except Exception as error:  # a forward pass may raise anything on values that it cannot look at
            if _state(module) != before:
                _restore_all(kept)
                before = _state(module)
            why = why or " ".join(str(error).split())[:120] or type(error).__name__
            continue
        sources = {source_of(graph) for graph in graphs}
        if len(sources) == 1:
            found[way] = graphs[0]
        else:
            why = why or "it depends on modes of PyTorch or on the classes of values"
    return found, why


def source_of(graph: fx.Graph) -> str:
    """Return the code of a graph."""
    return graph.python_code("self").src


def _copied(v: Any) -> tuple[Any, Any]:
    """Return a value and, of a container, what is in it."""
    return v, type(v)(v) if type(v) in _CONTAINERS else None


def _restore_all(kept: list[tuple[Any, dict[str, tuple[Any, Any]]]]) -> None:
    """Put back what modules had, in the containers that they had it in."""
    for m, state in kept:
        vars(m).clear()
        for name, (v, inner) in state.items():
            if inner is not None:
                v.clear()
                (v.extend if isinstance(v, list) else v.update)(inner)
            vars(m)[name] = v
