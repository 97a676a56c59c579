"""Fusion of batch norms with activations and residuals in PyTorch models; judged by PyTorch's own."""

import copy
import io
import pickle

import pytest

import batchnorm as bn  # noqa: F401

torch = pytest.importorskip("torch")

import fusion_models  # noqa: E402
from fusion_models import FUNCTIONS, MODELS, SETTINGS, Basic, Calls  # noqa: E402

from batchnorm.torch import (  # noqa: E402
    BatchNorm2d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    convert,
    report,
    revert,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # its own
    pytest.mark.filterwarnings("ignore:convert"),
]
nn, functional = torch.nn, torch.nn.functional


def pictures(steps, side=6, channels=4, size=5):
    generator = torch.Generator().manual_seed(0)
    shape = (size, channels, side, side)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def trained(model, data, lr=0.02):
    """Outputs, gradients, parameters and statistics after a training, and the output in inference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    outputs = []
    for step, x in enumerate(data):
        optimizer.zero_grad()
        torch.manual_seed(step)
        x = x.clone().requires_grad_()
        y = model(x)
        (y.square().mean() + y.sin().mean()).backward()
        optimizer.step()
        outputs += [y.detach(), x.grad]
    found = {"outputs": outputs, "parameters": [p.detach() for p in model.parameters()]}
    found["gradients"] = [p.grad for p in model.parameters() if p.grad is not None]
    for kind in ("running_mean", "running_var", "num_batches_tracked"):
        found[kind] = [v.double() for name, v in model.state_dict().items() if name.endswith(kind)]
    model.eval()
    with torch.no_grad():
        found["inference"] = [model(data[0].clone())]
    return found


def off(right, mine):
    """The largest difference, relative to the largest value of its kind."""
    worst = 0.0
    for kind in right:
        a, b = (
            torch.cat([v.flatten().double() for v in r[kind]] or [torch.zeros(1)]) for r in (right, mine)
        )
        assert a.shape == b.shape, kind
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)))
    return worst


def marks(model):
    """What conversion must leave after `revert`: classes and attributes."""
    return [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]


def compared(original, steps=20, bound=1e-12, data=None):
    """Train a model and its fused copy the same; return the copy."""
    original = original.double()
    fused = copy.deepcopy(original)
    keys = list(fused.state_dict())
    assert convert(fused, fuse=True) is fused
    assert list(fused.state_dict()) == keys
    data = data or pictures(steps)
    assert off(trained(original, data), trained(fused, data)) < bound
    again = revert(copy.deepcopy(fused))
    assert marks(again) == marks(original)
    return fused


def what(model):
    return {f.name: f.fused for f in report(model)}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    torch.manual_seed(0)
    make, expected = MODELS[name]
    model = make()
    fused = compared(model)
    assert what(fused) == {**what(model), **expected}
    for found in report(fused):
        assert found.converted
        assert bool(found.fused) != bool(found.why_not_fused), found
    assert off(trained(fused, pictures(2)), trained(convert(fused, fuse=True), pictures(2))) >= 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    torch.manual_seed(0)
    function, expected = FUNCTIONS[name]
    fused = compared(Calls(function), steps=6)
    assert what(fused)["bn"] == expected
    assert what(fused)["other"] == ("residual and relu" if name == "two norms" else "")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings(settings):
    torch.manual_seed(0)
    for function in ("method", "add_"):
        fused = compared(Calls(FUNCTIONS[function][0], **settings), steps=6)
        assert what(fused)["bn"]


@pytest.mark.parametrize(
    "function", [fusion_models.own_input_changed, fusion_models.other_input_changed]
)
def test_an_input_that_changes_before_the_sum(function):
    """The norm is not moved past what changes its input."""
    model = Calls(function).double().eval()
    fused = convert(copy.deepcopy(model), fuse=True)
    assert not any(what(fused).values())
    x = pictures(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-12, atol=1e-12)


# What is done to a model.


def pair(make=Basic):
    """A model that has been trained for a step, and its fused copy."""
    torch.manual_seed(0)
    model = make().double()
    trained(model, pictures(1))
    return model.train(), convert(copy.deepcopy(model), fuse=True)


def same_outputs(a, b, x=None):
    x = pictures(1)[0] if x is None else x
    for mode in (True, False):
        a, b = a.train(mode), b.train(mode)
        torch.testing.assert_close(a(x.clone()), b(x.clone()), rtol=1e-12, atol=1e-12)


WAYS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).module,
    "fx": torch.fx.symbolic_trace,
    "twice": lambda m: convert(convert(m, fuse=True)),
    "unfused in between": lambda m: convert(convert(revert(m)), fuse=True),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS["saved"] = saved


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_copies(way, name):
    model, fused = pair(MODELS[name][0])
    if way == "fx" and name == "dense":
        pytest.skip("PyTorch does not trace it either")
    made = WAYS[way](fused)
    same_outputs(made, model)
    if way not in ("fx", "unfused in between"):
        assert what(made) == what(fused)
    if way not in ("twice", "unfused in between", "copy", "fx"):
        assert marks(revert(made)) == marks(model)
        assert any(what(fused).values()), "the copy's classes are its own"


def test_what_is_given_after_conversion_is_used():
    """Hooks, other modules, settings: the class's own forward pass runs."""
    model, fused = pair()
    seen = [[], []]
    for m, values in zip((model, fused), seen, strict=True):
        m.relu.register_forward_hook(lambda m, args, y, values=values: values.append(y.clone()))
    same_outputs(fused, model)
    assert len(seen[0]) == len(seen[1]) == 4
    torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-12)

    model, fused = pair()
    for m in (model, fused):
        m.relu = nn.Hardswish()
    same_outputs(fused, model)
    for m in (model, fused):
        m.shortcut, m.relu = None, nn.ReLU()
    same_outputs(fused, model)

    model, fused = pair(fusion_models.Dense)
    for m in (model, fused):
        m.drop_rate = 1.0
    same_outputs(fused, model)
    assert not fused.train()(pictures(1)[0]).any()

    model, fused = pair(MODELS["sequential"][0])
    for m in (model, fused):
        m[2], m[4] = nn.Hardswish(), nn.Identity()
    same_outputs(fused, model)
    assert what(fused)["1"] == what(fused)["3"] == ""
    same_outputs(fused[:9], model[:9])
    for a, b in zip(fused, model, strict=True):  # each on its own, as before
        same_outputs(a, b)


def test_statistics_that_are_frozen():
    model, fused = pair()
    x = pictures(1)[0]
    for m in (model, fused):
        m.train()
        for norm in (m.bn1, m.bn2):
            norm.eval()
    torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-12, atol=1e-12)


def test_hooks_are_kept():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).double()
    model[0].register_forward_hook(lambda *_: None)
    model[3].register_forward_hook(lambda *_: None)
    convert(model, fuse=True)
    assert [(f.fused, f.why_not_fused) for f in report(model)] == [
        ("", "it has hooks"),
        ("", "no activation that is known follows"),
    ]
    block = Basic()
    block.bn2.register_full_backward_hook(lambda *_: None)
    assert [f.why_not_fused for f in report(convert(block, fuse=True))][1] == "it has hooks"


def test_a_group_stays():
    class Alone:
        def all_reduce(self, array):
            return array

    group = Alone()
    model, fused = pair()
    convert(fused, group, fuse=True)
    assert fused.bn1.group is fused.shortcut[1].group is group
    same_outputs(fused, model)
    assert what(convert(fused, fuse=True))["bn2"] == "residual and relu"
    assert fused.bn2.group is group
    assert marks(revert(fused)) == marks(model)


def test_a_model_that_is_already_converted():
    model, _ = pair()
    fused = convert(convert(copy.deepcopy(model)), fuse=True)
    assert what(fused)["bn2"] == "residual and relu"
    same_outputs(fused, model)


def test_scripting_says_what_to_do():
    _, fused = pair()
    with pytest.raises(TypeError, match=r"torch.jit.script: got a Basic with .*, expected one without"):
        torch.jit.script(fused)
    with pytest.raises(TypeError, match="fuse: got"):
        convert(fused, fuse="yes")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["basic", "sequential", "dense"])
def test_compiled_exported_and_traced(name):
    model, fused = pair(MODELS[name][0])
    x = pictures(1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(fused), backend="aot_eager", fullgraph=True)
    assert off(trained(copy.deepcopy(model), [x]), trained(compiled, [x])) < 1e-12
    for mode in (True, False):
        a, b = model.train(mode), fused.train(mode)
        right = copy.deepcopy(a)(x)
        program = torch.export.export(copy.deepcopy(b), (x,))
        assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(x), right, rtol=1e-12, atol=1e-12)
    traced = torch.jit.trace(fused.eval(), (x,))
    torch.testing.assert_close(traced(x), model.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_data_parallel_wrappers():
    model, fused = pair()
    wrapped = convert(nn.DataParallel(copy.deepcopy(model)), fuse=True)
    assert what(wrapped)["module.bn2"] == "residual and relu"
    same_outputs(wrapped, model)
    replica = fused._replicate_for_data_parallel()
    assert type(replica) is type(fused)


def test_autocast_and_channels_last():
    model, fused = (m.float() for m in pair())
    x = pictures(1)[0].float().to(memory_format=torch.channels_last)
    same = {"rtol": 0.05, "atol": 0.05}
    for m in (model, fused):
        m.train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, right = fused(x.clone()), model(x.clone())
    assert y.dtype == right.dtype
    assert y.stride() == right.stride()
    torch.testing.assert_close(y, right, **same)
    y.float().square().sum().backward()
    assert fused.conv1.weight.grad is not None
    torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-4)


# Modules.

ACTIVATIONS = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    ("leaky_relu", 0.2): lambda h: functional.leaky_relu(h, 0.2),
    None: lambda h: h,
}
KINDS = [
    (BatchNormAct1d, nn.BatchNorm1d, (8, 4)),
    (BatchNormAct2d, nn.BatchNorm2d, (5, 4, 3, 3)),
    (BatchNormAct3d, nn.BatchNorm3d, (4, 4, 2, 3, 2)),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), KINDS)
def test_modules(ours, theirs, shape, activation, settings):
    """Training and inference, without a residual, with one, and with one that broadcasts."""
    mine, right = (kind(4, dtype=torch.float64, **settings) for kind in (ours, theirs))
    mine.activation = activation
    mine.load_state_dict(right.state_dict())
    narrow = (1, 4) + (1,) * (len(shape) - 2)
    for training in (True, True, False):
        mine.train(training), right.train(training)
        for size in (None, shape, narrow):
            x = torch.randn(shape, dtype=torch.float64)
            z = None if size is None else torch.randn(size, dtype=torch.float64)
            found = []
            for module in (mine, right):
                given = [v.clone().requires_grad_() for v in (x, z) if v is not None]
                if module is mine:
                    y = module(*given)
                else:
                    y = module(given[0])
                    y = ACTIVATIONS[activation](y if z is None else y + given[1])
                (y**3).sum().backward()
                found.append([y.detach(), *(v.grad for v in given)])
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mine.state_dict(), right.state_dict(), rtol=1e-12, atol=1e-12)


class Holder(nn.Module):
    def __init__(self, activation=("leaky_relu", 0.1)):
        super().__init__()
        self.bn = BatchNormAct2d(4, activation=activation)

    def forward(self, x, z):
        return self.bn(x, z)


LEAVING = {
    "script": lambda m, x: torch.jit.script(m),
    "trace": lambda m, x: torch.jit.trace(m, x, check_trace=False),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "compile": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True),
    "export": lambda m, x: torch.export.export(m, x).module(),
    "pickle": lambda m, x: pickle.loads(pickle.dumps(m)),
    "deepcopy": lambda m, x: copy.deepcopy(m),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", LEAVING)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_modules_elsewhere(way, activation):
    torch._dynamo.reset()
    x, z = torch.randn(2, 5, 4, 3, 3).unbind()
    for mode in (True, False):
        module = Holder(activation).train(mode)
        y = nn.BatchNorm2d(4).train(mode)(x)
        right = ACTIVATIONS[activation](y + z)
        made = LEAVING[way](module, (x, z))
        torch.testing.assert_close(made(x, z), right)


def test_modules_say_what_they_are():
    module = BatchNormAct2d(4, activation=("leaky_relu", 0.1))
    assert "activation=('leaky_relu', 0.1)" in repr(module)
    assert isinstance(module, (BatchNorm2d, nn.BatchNorm2d))
    assert list(module.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
    module.activation = "silu"
    assert module.activation.name == "silu"
    with pytest.raises(ValueError, match="activation: got 'gelu', expected one of"):
        BatchNormAct2d(4, activation="gelu")
    assert type(revert(nn.Sequential(module))[0]) is BatchNormAct2d
    assert report(module)[0].fused == "silu"


def test_a_residual_of_another_dtype():
    """The sum is PyTorch's."""
    x, z = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    module = BatchNormAct2d(4)
    y = module(x.bfloat16(), z)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.relu(nn.BatchNorm2d(4)(x.bfloat16()) + z))
    assert module(x.bfloat16(), z.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(module(x, 0.5), torch.relu(nn.BatchNorm2d(4)(x) + 0.5))


# The networks of torchvision and timm.

NETWORKS = {
    ("torchvision", "resnet18"): (9, 8),
    ("torchvision", "resnet50"): (33, 16),
    ("torchvision", "densenet121"): (120, 0),
    ("torchvision", "mobilenet_v2"): (35, 0),
    ("torchvision", "mobilenet_v3_small"): (5, 0),
    ("timm", "resnet18"): (9, 8),
    ("timm", "efficientnet_b0"): (33, 0),
    ("timm", "mobilenetv3_small_100"): (5, 0),
    ("timm", "regnety_002"): (27, 0),
    ("timm", "densenet121"): (121, 0),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "name"), NETWORKS)
def test_networks(library, name):
    if library == "torchvision":
        make = getattr(pytest.importorskip("torchvision").models, name)
    else:
        timm = pytest.importorskip("timm")
        make = lambda **settings: timm.create_model(name, **settings)  # noqa: E731
    torch.manual_seed(0)
    fused = compared(make(num_classes=10), data=pictures(20, 64, 3, 4))
    found = list(what(fused).values())
    sums = sum(f.startswith("residual") for f in found)
    assert (sum(map(bool, found)) - sums, sums) == NETWORKS[library, name]
