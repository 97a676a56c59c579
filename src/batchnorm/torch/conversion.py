"""Conversion of the batch norms of a model to modules of this package and back, with a report."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx, jit, nn
from torch.ao.quantization import fuser_method_mappings

from batchnorm.arguments import validate_bool, validate_group
from batchnorm.errors import describe_type, fail
from batchnorm.torch import fusion
from batchnorm.torch.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, validate_no_group
from batchnorm.torch.patterns import PLAIN

Module = Any

OURS: dict[type, type] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


class Found(NamedTuple):
    """A batch norm of a model, in the result of `report`."""

    name: str
    """Its name in the model."""
    kind: str
    """Its class."""
    converted: bool
    """Whether it is a module of this package."""
    why: str
    """The reason if it is not, otherwise an empty string."""
    fused: str = ""
    """What it is fused with: an activation ("relu"), or that and a residual ("residual and relu")."""
    why_not_fused: str = ""
    """The reason for which `convert` with ``fuse=True`` left it, otherwise an empty string."""


def convert(model: Module, group: Any = None, fuse: bool = False) -> Module:
    """Replace the batch norms of a model by modules of this package, in place.

    Each module keeps its parameters, running statistics, hooks, and its place in the model and in
    optimizers. Subclasses of the batch norms of `torch.nn`, including ``SyncBatchNorm``, and batch norms
    of scripted or exported programs are not converted. A warning lists them, as `report` does.

    Parameters
    ----------
    model : torch.nn.Module
        A model, or a batch norm.
    group : optional
        The group over which batches are joined in training, as in `batchnorm.batch_norm`; also for
        modules that have been converted before. Gradients of parameters are those of each member's part
        of the batch, as DistributedDataParallel expects. Copies of the model share the group, and files
        do not contain it.

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    TypeError
        `model` is not a module, `group` is not a group, or `fuse` is not a bool.

    Warns
    -----
    UserWarning
        Batch norms were not converted, or the model has none.
    """
    validate_group(group)
    fuse = validate_bool("fuse", fuse)
    _replace(model, OURS)
    if fuse:
        fusion.fuse(model)
    if group is not None:
        for _, module in _named_modules(model):
            if _is_ours(module):
                module.group = group
    found = report(model)
    left = [f"{f.name or 'the model'}, a {f.kind} ({f.why})" for f in found if not f.converted]
    if left:
        converted = sum(f.converted for f in found)
        listed = "; ".join(left[:10]) + (f"; and {len(left) - 10} more" if len(left) > 10 else "")
        warnings.warn(f"convert: {converted} batch norms, but not {listed}", UserWarning, stacklevel=2)
    elif not found:
        warnings.warn("convert: no batch norms in this model", UserWarning, stacklevel=2)
    return model


def revert(model: Module) -> Module:
    """Convert modules of this package back to those of `torch.nn`, in place, with their current state.

    What `convert` has fused is as it was before. A `BatchNormAct2d` that the model had before `convert`
    stays, as `torch.nn` has no such module.

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
    for _ in _named_modules(model):  # an error where it is none
        break
    fusion.unfuse(model)
    _replace(model, THEIRS)
    return model


def report(model: Module) -> list[Found]:
    """List the batch norms of a model: which are modules of this package, and why others are not.

    Parameters
    ----------
    model : torch.nn.Module
        A model, before `convert` or after it.

    Returns
    -------
    list of Found
        Named tuples of `name`, `kind`, `converted`, `why`, `fused` and `why_not_fused`.

    Raises
    ------
    TypeError
        `model` is not a module.
    """
    named = list(_named_modules(model))
    fused = fusion.described(model)
    return [
        Found(name, kind, why == "", why, *fused.get(module, ()))
        for name, module in named
        for kind, why in _kinds(module)
    ]


def _is_ours(module: Module) -> bool:
    return type(module) in THEIRS or type(module) in PLAIN


def _named_modules(model: Module) -> Iterator[tuple[str, Module]]:
    if not isinstance(model, nn.Module):
        fail(TypeError, "model", describe_type(model), "a torch.nn.Module")
    named: Any = model.named_modules()
    yield from named


def _kinds(module: Module) -> Iterator[tuple[str, str]]:
    """Yield the class of each batch norm that a module itself is or contains in its graph, and `why`."""
    kind = type(module)
    name = module.original_name if isinstance(module, jit.ScriptModule) else kind.__name__
    if _is_ours(module):
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
            "it joins batches itself: use torch.nn's BatchNorm1d to 3d, and convert(model, group)",
        )
    elif isinstance(module, nn.modules.lazy.LazyModuleMixin) and "BatchNorm" in name:
        yield name, "it has had no input yet: convert the model after the first one"
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        yield name, f"a subclass of torch.nn.{_base(kind)}, which may behave differently"
    elif "BatchNorm" in name:
        yield name, "not a class of torch.nn"


def _base(kind: type) -> str:
    return next(
        (b.__name__ for b in kind.__mro__ if b in OURS), nn.modules.batchnorm._BatchNorm.__name__
    )


def _replace(model: Module, by: dict[type, type]) -> None:
    for _, module in _named_modules(model):
        if type(module) in by:  # the state is the same: only the class differs
            module.__class__ = by[type(module)]
            module.__dict__.pop("group", None)


# The eager-mode fusion of PyTorch (fuse_modules, fuse_model) uses a table of classes. Modules of this
# package are registered in it, and are fused as modules of torch.nn with the same state.


def _fuser(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def fuse(is_qat: bool, *modules: Module) -> Any:
        for module in modules:
            if is_qat and type(module) in THEIRS:
                validate_no_group("fuse_modules_qat", module)
        return method(is_qat, *(revert(copy.copy(m)) if type(m) in THEIRS else m for m in modules))

    return fuse


def _register_fusers() -> None:
    table: Any = fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    for kinds, method in list(table.items()):
        if any(kind in OURS for kind in kinds):
            table[tuple(OURS.get(kind, kind) for kind in kinds)] = _fuser(method)


_register_fusers()
