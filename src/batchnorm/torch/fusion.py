"""Fusion of batch norms with what follows them in a model: a residual, an activation.

A module whose own forward pass calls a batch norm and then the activation gets a subclass of its class
whose forward pass makes one call of the two. Nothing else changes: called on its own, each module does
what it did. Where the module is not as it was when its forward pass was recorded (other children, hooks,
settings) or is called in another way, its class's own forward pass runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.fx.graph_module import _forward_from_src

from batchnorm.errors import fail
from batchnorm.torch import patterns
from batchnorm.torch.activated import BatchNormAct2d
from batchnorm.torch.passes import Way, recorded_passes, source_of
from batchnorm.torch.patterns import ACTIVATED, PLAIN, NotFusedError

Module = Any
_jit: Any = torch.jit
_compiler: Any = torch.compiler


class Pass(NamedTuple):
    """A rewritten forward pass."""

    way: Way
    source: str
    names: tuple[tuple[str, Any], ...]
    """What the source calls by name; modules by theirs."""
    involved: tuple[tuple[str, str], ...]
    """The modules that it calls or leaves out, with their classes' names."""


class Recipe(NamedTuple):
    """What a class of `_class_of` does."""

    passes: tuple[Pass, ...] = ()
    fused: tuple[tuple[str, str], ...] = ()
    """The names of batch norms, and what each is fused with."""
    settings: tuple[Any, ...] = ()
    """The children and settings of the module when its forward pass was recorded."""


SEQUENTIAL = Recipe()
"""Of `torch.nn.Sequential`, which looks at its modules in each call."""


class Fused:
    """A module whose forward pass is rewritten, in front of its own class."""

    fused_class: type
    fused_recipe: Recipe

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        made, arguments, *state = reduced
        if getattr(made, "__name__", "") != "__newobj__" or len(arguments) != 1:
            name = self.fused_class.__name__
            fail(TypeError, "copy or pickle", f"a {name} with fused batch norms", "one after revert")
        return _restored, (self.fused_class, self.fused_recipe), *state

    def __prepare_scriptable__(self) -> Any:
        got = f"a {self.fused_class.__name__} with fused batch norms"
        fail(TypeError, "torch.jit.script", got, "one without: call batchnorm.torch.revert first")


def _is_fused(module: Module) -> bool:
    """Return whether a module's class is one of `_class_of`; parametrizations make others of these."""
    return "fused_class" in vars(type(module))


def _restored(kind: type, recipe: Recipe) -> Any:
    made: Any = _class_of(kind, recipe)
    return made.__new__(made)


_classes: dict[tuple[type, Recipe], type] = {}


def _class_of(kind: type, recipe: Recipe) -> type:
    """Return the subclass of a module's class with a rewritten forward pass."""
    made = _classes.get((kind, recipe))
    if made is None:
        forward = _sequential if recipe == SEQUENTIAL else _dispatching(kind, recipe)
        own = {"fused_class": kind, "fused_recipe": recipe, "forward": forward}
        own |= {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        }
        made = _classes[kind, recipe] = type(kind.__name__, (Fused, kind), own)
    return made


def _dispatching(kind: Any, recipe: Recipe) -> Callable[..., Any]:
    functions: dict[tuple[bool, type], Any] = {}
    for way, source, names, involved in recipe.passes:
        known = {k: importlib.import_module(v[1]) if _is_module(v) else v for k, v in names}
        functions[way] = _forward_from_src(source, known), involved
    own = kind.forward
    settings = recipe.settings

    @functools.wraps(own)
    def forward(self: Module, *arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.values())
        found = None
        if all([isinstance(a, torch.Tensor) for a in given]):  # noqa: C419  faster
            found = functions.get((self.training, torch.Tensor))
        elif all([type(a) is list for a in given]):  # noqa: C419
            found = functions.get((self.training, list))
        if found is None or _jit.is_tracing():
            return own(self, *arguments, **named)
        function, involved = found
        if not _compiler.is_compiling() and _settings(self) != settings:
            return own(self, *arguments, **named)
        if not _as_recorded(self, involved):
            return own(self, *arguments, **named)
        return function(self, *arguments, **named)

    return forward


def _is_module(v: Any) -> bool:
    return isinstance(v, tuple) and len(v) == 2 and v[0] == "module"


def _as_recorded(module: Module, involved: tuple[tuple[str, str], ...]) -> bool:
    """Return whether the modules of a pass have the classes that they had, and no hooks."""
    for path, name in involved:
        found = module
        for step in path.split("."):
            found = found._modules.get(step)
            if found is None:
                return False
        if type(found).__name__ != name or patterns.is_hooked(found):
            return False
    return True


_PLAIN_VALUES = (bool, int, float, str, type(None))
_OTHER_SETTINGS = frozenset({"training", "_is_full_backward_hook"})


def _settings(module: Module) -> tuple[Any, ...]:
    """Return what a forward pass may ask of its module: its children's classes, and plain attributes."""
    # A batch norm that is left has its plain class again.
    children = [(name, type(m).__name__.replace("Act", "")) for name, m in module._modules.items()]
    plain = [
        (name, v)
        for name, v in vars(module).items()
        if type(v) in _PLAIN_VALUES and name not in _OTHER_SETTINGS
    ]
    return (tuple(children), tuple(plain))


def _sequential(self: Module, input: Any) -> Any:
    """Call the modules in turn, a batch norm and the activation after it as one."""
    modules = list(self._modules.values())
    i = 0
    while i < len(modules):
        module = modules[i]
        i += 1
        if patterns.is_fusable(module):
            last, activation = _activation_after(modules, i)
            if activation is not None:
                input = module(input, None, *activation)
                i = last + 1
                continue
        input = module(input)
    return input


def _activation_after(modules: list[Module], i: int) -> tuple[int, tuple[str, float] | None]:
    """Return where the next activation is, and the activation; None where something else comes first."""
    while i < len(modules) and patterns.passes_through(modules[i]):
        i += 1
    return i, patterns.activation_of(modules[i]) if i < len(modules) else None


# The whole model.


def fuse(model: Module) -> None:
    """Fuse the batch norms of a converted model in place."""
    unfuse(model)
    for module in list(model.modules()):
        _take_activation_of_timm(module)
    for module in list(model.modules()):
        if any(type(child) in ACTIVATED for child in _reached(module)):
            _fuse_in(module)


def unfuse(model: Module) -> None:
    """Give the modules back the classes that they had before `fuse`."""
    for module in model.modules():
        vars(module).pop(_WHY, None)
        if _is_fused(module):
            module.__class__ = module.fused_class
        elif _BEFORE in vars(module):
            module.__class__ = vars(module).pop(_BEFORE)
            for name in ("activation_name", "activation_slope", "group"):
                vars(module).pop(name, None)
        elif type(module) in PLAIN and "activation_name" not in vars(module):
            module.__class__ = PLAIN[type(module)]


_WHY = "not_fused"
"""The attribute of a batch norm that `fuse` has left: the reason."""
_BEFORE = "unfused_class"
"""The attribute of a batch norm with an activation of timm: its class there."""


def _reached(module: Module) -> Iterator[Module]:
    """Yield what is a module's own: its children, and those in lists and dicts of modules."""
    for child in module.children():
        yield child
        if type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from _reached(child)


def _take_activation_of_timm(module: Module) -> None:
    kind = type(module)
    if kind.__name__ != "BatchNormAct2d" or not kind.__module__.startswith("timm.layers."):
        return
    drop, act = module._modules.get("drop"), module._modules.get("act")
    activation = ("", 0.0) if patterns.passes_through(act) else patterns.activation_of(act)
    if activation is None or not patterns.passes_through(drop) or "forward" in vars(module):
        return
    module.__class__ = BatchNormAct2d
    setattr(module, _BEFORE, kind)
    module.activation_name, module.activation_slope = activation


def _fuse_in(parent: Module) -> None:
    """Rewrite a module's forward pass, if it calls a batch norm and then an activation."""
    own = [child for child in _reached(parent) if type(child) in ACTIVATED]
    for child in own:  # with this class, it takes what follows from its caller
        child.__class__ = ACTIVATED[type(child)]
    sequential = type(parent).forward is nn.Sequential.forward and "forward" not in vars(parent)
    if sequential:
        recipe, fused = SEQUENTIAL, {name for name, _ in _fused_in_sequential(parent)}
        done = {parent._modules[name] for name in fused}
        reasons = {m: "it has hooks" for m in own if patterns.is_hooked(m)}
        reasons |= {m: "no activation that is known follows" for m in own if m not in {*done, *reasons}}
    else:
        recipe, reasons = _recipe(parent)
        done = {parent.get_submodule(name) for name, _ in recipe.fused}
    if done:
        try:
            _validate_saved(type(parent))
            pickle.dumps(recipe)
            parent.__class__ = _class_of(type(parent), recipe)
        except Exception as error:
            why = f"{type(parent).__name__}, which calls it, cannot get another forward pass: {error}"
            reasons = dict.fromkeys(own, " ".join(why.split()))
    for child in own:
        if child in reasons:
            _leave(child, reasons[child])


def _validate_saved(kind: type) -> None:
    """Check that a class is saved and copied as others are: code that is generated is not."""
    for name in ("__reduce__", "__reduce_ex__"):
        if getattr(kind, name) is not getattr(object, name):
            raise TypeError("it is saved in its own way")


def _leave(module: Module, why: str) -> None:
    if type(module) in PLAIN:
        module.__class__ = PLAIN[type(module)]
    setattr(module, _WHY, why)


def _fused_in_sequential(module: Module) -> Iterator[tuple[str, str]]:
    names, modules = list(module._modules), list(module._modules.values())
    for i, child in enumerate(modules):
        if patterns.is_fusable(child):
            activation = _activation_after(modules, i + 1)[1]
            if activation is not None:
                yield names[i], activation[0]


def _recipe(parent: Module) -> tuple[Recipe, dict[Module, str]]:
    """Return how a module's forward pass is rewritten, and why batch norms in it are left."""
    graphs, why = recorded_passes(parent)
    passes: list[Pass] = []
    fused: dict[str, dict[str, None]] = {}
    reasons: dict[Module, str] = {}
    sources = {way: source_of(graph) for way, graph in graphs.items()}
    for way, graph in graphs.items():
        matched = []
        same = sources[way] == sources.get(way._replace(kind=torch.Tensor))
        for node in reversed(
            list(graph.nodes)
        ):  # of two norms that are added, the later takes the other
            if node.op != "call_module":
                continue
            module: Module = parent.get_submodule(str(node.target))
            if type(module) not in PLAIN or module.activation_name:
                continue
            try:
                if patterns.is_hooked(module) or "forward" in vars(module):
                    raise NotFusedError("it has hooks")
                match = patterns.find(parent, node)
            except NotFusedError as error:
                reasons.setdefault(module, str(error))
                continue
            what = (
                match.activation[0] if match.residual is None else f"residual and {match.activation[0]}"
            )
            fused.setdefault(str(node.target), {})[what] = None
            matched += [str(n.target) for n in match.nodes if n.op == "call_module"]
            patterns.rewrite(graph, match)
        if matched and not (way.kind is list and same):
            passes.append(_pass(parent, way, graph, matched))
    left = {
        child: f"the forward pass that calls it is not followed: {why}" if why else "it is not called"
        for child in _reached(parent)
        if type(child) in PLAIN and child not in reasons
    }
    done = {parent.get_submodule(name) for name in fused}
    all_reasons = {m: text for m, text in (left | reasons).items() if m not in done}
    said = tuple((name, ", ".join(sorted(whats))) for name, whats in fused.items())
    return Recipe(tuple(passes), said, _settings(parent)), all_reasons


def _pass(parent: Module, way: Way, graph: fx.Graph, names: list[str]) -> Pass:
    graph.lint()
    code: Any = graph.python_code("self")
    known = {
        name: ("module", v.__name__) if isinstance(v, types.ModuleType) else v
        for name, v in code.globals.items()
        if name in code.src
    }
    involved = {name: type(parent.get_submodule(name)).__name__ for name in names}
    return Pass(way, code.src, tuple(known.items()), tuple(involved.items()))


def described(model: Module) -> dict[Module, tuple[str, str]]:
    """Return for each batch norm what it is fused with, and why not."""
    found: dict[Module, tuple[str, str]] = {}
    for module in model.modules():
        if type(module) in PLAIN:
            name = module.activation_name
            found.setdefault(module, (name, ""))
        if _WHY in vars(module):
            found.setdefault(module, ("", vars(module)[_WHY]))
        if not _is_fused(module):
            continue
        recipe = module.fused_recipe
        pairs = _fused_in_sequential(module) if recipe == SEQUENTIAL else recipe.fused
        changed = recipe != SEQUENTIAL and not (
            _settings(module) == recipe.settings
            and all(_as_recorded(module, p.involved) for p in recipe.passes)
        )
        for path, what in pairs:
            with contextlib.suppress(AttributeError):  # it is gone
                norm = module.get_submodule(path)
                found[norm] = ("", "its parent has changed since") if changed else (what, "")
    return found
