"""A model's batch norms taken to this package's modules, and back; what was left alone, and why."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx, jit, nn
from torch.ao.quantization import fuser_method_mappings

from batchnorm.arguments import validate_group
from batchnorm.errors import describe_type, fail
from batchnorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, alone

Module = Any

OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


class Found(NamedTuple):
    """A batch norm of a model, as `report` tells of it."""

    name: str
    """Where it is in the model."""
    kind: str
    """Its class."""
    converted: bool
    """Whether it runs on this package's passes."""
    why: str
    """Why it does not, or an empty string."""


def convert(model: Module, group: Any = None) -> Module:
    """Replace the batch norms of a model by this package's, in place.

    A module keeps all it has: parameters, running statistics, hooks, its place in the model and in
    optimizers. Subclasses of `torch.nn`'s batch norms, ``SyncBatchNorm`` among them, and what is part
    of a scripted or exported program are left alone; a warning names them, and `report` lists all.

    Parameters
    ----------
    model : torch.nn.Module
        A model, or a batch norm.
    group : optional
        The members over which batches are joined in training, as in `batchnorm.batch_norm`, by modules
        that are this package's already too. Gradients of parameters stay each member's own part, as
        DistributedDataParallel expects them. Copies of the model share the group; files do not hold it.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        `model` is not a module, or `group` is no group.

    Warns
    -----
    UserWarning
        Batch norms were left alone, or there are none in the model.
    """
    validate_group(group)
    _replace(model, OURS)
    if group is not None:
        for _, module in _named(model):
            if type(module) in THEIRS:
                module.group = group
    found = report(model)
    left = [f"{f.name or 'the model'}, a {f.kind} ({f.why})" for f in found if not f.converted]
    if left:
        converted = sum(f.converted for f in found)
        told = "; ".join(left[:10]) + (f"; and {len(left) - 10} more" if len(left) > 10 else "")
        warnings.warn(f"convert: {converted} batch norms, but not {told}", UserWarning, stacklevel=2)
    elif not found:
        warnings.warn("convert: no batch norms in this model", UserWarning, stacklevel=2)
    return model


def revert(model: Module) -> Module:
    """Put `torch.nn`'s batch norms back, in place, as they are after any training since `convert`.

    Parameters
    ----------
    model : torch.nn.Module
        A model, or a batch norm.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        `model` is not a module.
    """
    _replace(model, THEIRS)
    return model


def report(model: Module) -> list[Found]:
    """List the batch norms of a model: which run on this package's passes, and why others do not.

    Parameters
    ----------
    model : torch.nn.Module
        A model, before `convert` or after it.

    Returns
    -------
    list of Found
        Named tuples of `name`, `kind`, `converted` and `why`.

    Raises
    ------
    TypeError
        `model` is not a module.
    """
    return [
        Found(name, kind, why == "", why)
        for name, module in _named(model)
        for kind, why in _kinds(module)
    ]


def _named(model: Module) -> Iterator[tuple[str, Module]]:
    if not isinstance(model, nn.Module):
        fail(TypeError, "model", describe_type(model), "a torch.nn.Module")
    named: Any = model.named_modules()
    yield from named


def _kinds(module: Module) -> Iterator[tuple[str, str]]:
    """What of a module itself is a batch norm: its class, and why it is not this package's."""
    kind = type(module)
    name = module.original_name if isinstance(module, jit.ScriptModule) else kind.__name__
    if kind in THEIRS:
        yield name, ""
    elif isinstance(module, fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_function" and "batch_norm" in str(node.target):
                yield (
                    str(node.target),
                    "part of a graph: convert the model before it is exported or traced",
                )
    elif isinstance(module, jit.ScriptModule):
        if "BatchNorm" in name:
            yield name, "scripted or traced: convert the model before that"
    elif kind in OURS:
        yield name, "not converted"
    elif isinstance(module, nn.SyncBatchNorm):
        yield (
            name,
            "it joins batches by itself: convert(model, group) does on torch.nn's BatchNorm1d to 3d",
        )
    elif isinstance(module, nn.modules.lazy.LazyModuleMixin) and "BatchNorm" in name:
        yield name, "it has seen no input yet: convert the model after the first one"
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        yield name, f"a subclass of torch.nn.{_base(kind)}, which may do more or otherwise"
    elif "BatchNorm" in name:
        yield name, "none of torch.nn's classes"


def _base(kind: type) -> str:
    return next(
        (b.__name__ for b in kind.__mro__ if b in OURS), nn.modules.batchnorm._BatchNorm.__name__
    )


def _replace(model: Module, by: dict[type, type]) -> None:
    for _, module in _named(model):
        if type(module) in by:  # the state is the same, so the class is all that differs
            module.__class__ = by[type(module)]
            module.__dict__.pop("group", None)


# PyTorch's eager-mode fusion (fuse_modules, fuse_model) looks classes up in a table: what it makes of
# one of our modules is what it makes of torch.nn's with the same state.


def _fuser(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def fuse(is_qat: bool, *modules: Module) -> Any:
        for module in modules:
            if is_qat and type(module) in THEIRS:
                alone("fuse_modules_qat", module)
        return method(is_qat, *(revert(copy.copy(m)) if type(m) in THEIRS else m for m in modules))

    return fuse


def _register_fusers() -> None:
    table: Any = fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    for kinds, method in list(table.items()):
        if any(kind in OURS for kind in kinds):
            table[tuple(OURS.get(kind, kind) for kind in kinds)] = _fuser(method)


_register_fusers()
