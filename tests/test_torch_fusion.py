"""Fusion of batch norms with activations and residuals in PyTorch models; judged by PyTorch's own."""

import copy
import io
import pickle

import pytest

import batchnorm as bn  # noqa: F401

torch = pytest.importorskip("torch")

import fusion_models  # noqa: E402
from fusion_models import FUNCTIONS, MODELS, SETTINGS, Basic, Calls  # noqa: E402

from batchnorm.torch import convert, report, revert  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # its own
    pytest.mark.filterwarnings("ignore:convert"),
]
nn = torch.nn


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


def test_modules_of_other_kinds():
    """Recorded graphs are left; parametrizations before and after; a batch norm that others share."""
    model, _ = pair()
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    holder = convert(nn.Sequential(graph, nn.BatchNorm2d(4), nn.ReLU()).double(), fuse=True)
    assert list(what(holder).values()) == ["", "", "", "relu"]
    assert "not that of its class" in report(holder)[0].why_not_fused
    same_outputs(copy.deepcopy(holder)[0], model)

    for before in (True, False):
        model, fused = pair()
        if before:
            fused = copy.deepcopy(model)
        for m in (model, fused):
            torch.nn.utils.parametrizations.weight_norm(m.conv1)
            torch.nn.utils.parametrize.register_parametrization(m.bn1, "weight", nn.Softplus())
        if before:
            convert(fused, fuse=True)
        assert what(fused).get("bn1", "") == ""
        same_outputs(fused, model)

    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm, nn.Hardswish()), norm).double()
    compared(model)


def test_a_forward_pass_on_an_instance_is_left():
    model, _ = pair()
    mine = copy.deepcopy(model)
    for m in (model, mine):
        m.forward = lambda x, m=m: torch.relu(m.bn1(x)) * 2
    convert(mine, fuse=True)
    assert not any(what(mine).values())
    same_outputs(mine, model)


@pytest.mark.filterwarnings("ignore")
def test_sync_batch_norm_of_a_fused_model():
    """The modules that it replaces are no longer what was recorded."""
    model, fused = pair()
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(synced.bn1, nn.SyncBatchNorm)
    same_inference = synced.eval()(pictures(1)[0])
    torch.testing.assert_close(same_inference, model.eval()(pictures(1)[0]), rtol=1e-12, atol=1e-12)


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
        try:
            import torchvision
        except (ImportError, RuntimeError) as error:  # the latter from a build for another PyTorch
            pytest.skip(f"torchvision: {error}")
        make = getattr(torchvision.models, name)
    else:
        timm = pytest.importorskip("timm")
        make = lambda **settings: timm.create_model(name, **settings)  # noqa: E731
    torch.manual_seed(0)
    original = make(num_classes=10).double()
    fused, moved = copy.deepcopy(original), copy.deepcopy(original)
    convert(fused, fuse=True)
    with torch.no_grad():  # by a rounding error, which grows with depth
        for p in moved.parameters():
            p.mul_(1 + 2e-16 * torch.randn_like(p).sign())
    data = pictures(20, 64, 3, 4)
    right, mine, control = (trained(m, data, lr=1e-5) for m in (original, fused, moved))
    assert off(right, mine) < max(1e-12, 4 * off(right, control))
    assert off(right, control) < 1e-6, "it can fail"
    assert marks(revert(fused)) == marks(original)
    found = list(what(convert(fused, fuse=True)).values())
    sums = sum(f.startswith("residual") for f in found)
    assert (sum(map(bool, found)) - sums, sums) == NETWORKS[library, name]
