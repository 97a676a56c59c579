"""Converted models that leave: exported, traced, scripted, fused, in ONNX; judged by PyTorch's own."""

import copy
import io
import subprocess
import sys

import numpy as np
import pytest

import batchnorm as bn

torch = pytest.importorskip("torch")

import batchnorm.torch  # noqa: E402
from batchnorm.torch import BatchNorm1d, BatchNorm2d, convert, report  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's exporters have many of their own
nn = torch.nn
close = torch.testing.assert_close


def model():
    """A model that has seen data, so that no statistic or parameter is 0 or 1."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)]
    made = nn.Sequential(*layers)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) / 4)
    made(torch.randn(4, 3, 9, 9) + 1)
    return made


def images(n=2):
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(n))


def pair(training=False):
    """Ours and PyTorch's."""
    right = model().train(training)
    return convert(copy.deepcopy(right)), right


ALONE = """
import sys, torch
x = torch.load(sys.argv[2])
if sys.argv[1] == "exported":
    y = torch.export.load(sys.argv[3]).module()(x)
else:
    y = torch.jit.load(sys.argv[3])(x)
assert not any(name.startswith("batchnorm") for name in sys.modules)
torch.save(y, sys.argv[4])
"""


def run_alone(kind, program, x, folder):
    """What a saved program gives in a process without this package."""
    torch.save(x, folder / "x.pt")
    paths = [folder / name for name in ("x.pt", "program", "y.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", ALONE, kind, *paths], check=True)
    return torch.load(folder / "y.pt")


def sized():
    return ({0: torch.export.Dim("n", min=2)},)


@pytest.mark.parametrize("strict", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_exported_program_runs_without_this_package(training, strict, tmp_path):
    ours, right = pair(training)
    program = torch.export.export(ours, (images(),), dynamic_shapes=sized(), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("batchnorm" in name for name in targets)
    assert training or "aten.batch_norm.default" in targets
    assert program.run_decompositions().graph is not None
    torch.export.save(program, tmp_path / "program.pt2")
    (tmp_path / "program.pt2").rename(tmp_path / "program")
    x = images(7)  # another number of them
    close(run_alone("exported", None, x, tmp_path), right(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [1, -1, (1, 3), (), (0, 1, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", ["exported", "traced"])
def test_functions_in_a_program(how, dtype, axis):
    x = torch.randn(4, 3, 2, 5).to(dtype)
    shape = [x.shape[a] for a in (axis if isinstance(axis, tuple) else (axis,))]
    vectors = [torch.rand(shape) + 0.5 for _ in range(4)]

    class Normalize(nn.Module):
        def forward(self, x, *vectors):
            return bn.normalize(x, *vectors, axis=axis)

    given = (x, *vectors)
    right = Normalize()(*given)
    if how == "exported":
        program = torch.export.export(Normalize(), given).module()
    else:
        program = torch.jit.trace(Normalize(), given)
        assert "batchnorm::" not in str(program.inlined_graph)
    found = program(*given)
    assert found.dtype == dtype
    close(
        found,
        right,
        rtol=2e-2 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-2 if dtype == torch.bfloat16 else 1e-5,
    )


def test_a_trace_runs_without_this_package(tmp_path):
    ours, right = pair()
    torch.jit.save(torch.jit.trace(ours, images()), tmp_path / "program")
    close(run_alone("traced", None, images(7), tmp_path), right(images(7)), rtol=1e-5, atol=1e-5)
    frozen = torch.jit.freeze(torch.jit.load(tmp_path / "program").eval())
    close(frozen(images()), right(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("sizes", ["fixed", "any"])
def test_onnx(dynamo, sizes):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    alone = convert(nn.Sequential(nn.ReLU(), model()[1], nn.Sigmoid())).eval()
    ours, _ = pair()
    for made, x in ((alone, torch.randn(2, 4, 5, 5)), (ours, images())):
        file = io.BytesIO()
        options = {"dynamic_shapes": sized()} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
        options = {} if sizes == "fixed" else options
        torch.onnx.export(made, (x,), file, dynamo=dynamo, input_names=["x"], verbose=False, **options)
        found = onnx.load_from_string(file.getvalue())
        if made is alone:
            assert "BatchNormalization" in {node.op_type for node in found.graph.node}
        session = onnxruntime.InferenceSession(file.getvalue())
        more = x if sizes == "fixed" else torch.cat([x, 2 * x])
        (y,) = session.run(None, {"x": more.numpy()})
        np.testing.assert_allclose(y, made(more).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_scripted(training):
    """As PyTorch's own module, statistics too; the model that was scripted stays converted."""
    ours, right = pair(training)
    scripted = torch.jit.script(ours)
    assert type(ours[1]) is BatchNorm2d
    close(scripted(images()), right(images()), rtol=1e-5, atol=1e-5)
    close(dict(scripted.state_dict()), dict(right.state_dict()))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    close(torch.jit.load(file).eval()(images()), right.eval()(images()), rtol=1e-5, atol=1e-5)


class Alone:
    """A group of one."""

    def all_reduce(self, array):
        return array


def test_a_module_with_a_group_is_not_scripted():
    module = convert(nn.BatchNorm2d(4), Alone())
    with pytest.raises(
        TypeError, match=r"torch.jit.script: got a module that joins batches over a group"
    ):
        torch.jit.script(module)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), module)
    with pytest.raises(
        TypeError, match="fuse_modules_qat: got a module that joins batches over a group"
    ):
        torch.ao.quantization.fuse_modules_qat(model.train(), [["0", "1"]])


def test_a_group_reaches_what_is_this_package_s_already():
    model = nn.Sequential(convert(nn.BatchNorm1d(3)), BatchNorm1d(3), nn.BatchNorm1d(3))
    group = Alone()
    convert(model, group)
    assert all(module.group is group for module in model)
    assert all("group" not in vars(module) for module in batchnorm.torch.revert(model))


def test_copies_of_a_compiled_module_are_their_own():
    module, x = convert(nn.BatchNorm2d(3)).eval(), images()
    module.compile(backend="eager")
    y, copied = module(x), copy.deepcopy(module)
    with torch.no_grad():
        copied.weight.fill_(5.0)
    close(copied(x), 5 * y)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(x), y)


@pytest.mark.parametrize("axis", [1, (1, 2)])
@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_program_keeps_the_digits_of_statistics_in_float64(how, axis):
    x = torch.randn(64, 3, 2) + 1e6
    mean, var = (np.asarray(v) for v in bn.moments(x.double(), axis=axis)[1:3])
    given = [torch.from_numpy(v) for v in (mean + 0.01, var)]

    class Normalize(nn.Module):
        def forward(self, x):
            return bn.normalize(x, *given, axis=axis)

    if how == "trace":
        program = torch.jit.trace(Normalize(), (x[:5],))
    else:
        program = torch.export.export(Normalize(), (x,)).module()
    place = (None, slice(None), None) if axis == 1 else (None,)
    expected = (x.double() - given[0][place]) / (given[1][place] + 1e-5).sqrt()
    close(program(x), expected.float(), rtol=1e-6, atol=1e-6)


FUSED = [["0", "1", "2"], ["3", "4"]]


def test_fused_modules():
    quantization = torch.ao.quantization
    ours, right = pair()
    fused = quantization.fuse_modules(ours, FUSED)
    kinds = [type(m) for m in quantization.fuse_modules(right, FUSED)]
    assert [type(m) for m in fused] == kinds
    close(fused(images()), right(images()), rtol=1e-5, atol=1e-5)
    assert type(ours[1]) is BatchNorm2d, "not in place"

    ours, right = pair(training=True)
    fused = quantization.fuse_modules_qat(ours, FUSED)
    kinds = [type(m) for m in quantization.fuse_modules_qat(right, FUSED)]
    assert [type(m) for m in fused] == kinds
    linear = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).eval()
    x, y = torch.randn(5, 3), None
    y = linear(x)
    close(quantization.fuse_modules(linear, [["0", "1"]])(x), y, rtol=1e-5, atol=1e-5)


def test_a_quantized_model():
    """The steps of post-training quantization, `fuse_model` among them."""
    quantization = torch.ao.quantization

    class Model(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
            self.body = body

        def forward(self, x):
            return self.dequant(self.body(self.quant(x)))

        def fuse_model(self):
            quantization.fuse_modules(self.body, FUSED, inplace=True)

    results = []
    for body in pair():
        made = Model(body).eval()
        made.fuse_model()
        made.qconfig = quantization.get_default_qconfig("x86")
        prepared = quantization.prepare(made)
        prepared(images(8))
        results.append(quantization.convert(prepared)(images()))
    close(*results)


# What `convert` says.


def named(found):
    return {f.name: (f.kind, f.converted) for f in found}


class Act(nn.BatchNorm2d):
    """A norm with an activation, as other packages have them."""


class FrozenBatchNorm2d(nn.Module):
    """As detection models have them: no subclass of anything."""


def test_what_was_left_alone_and_why():
    kinds = [nn.BatchNorm2d(3), Act(3), nn.SyncBatchNorm(3), FrozenBatchNorm2d(), nn.LazyBatchNorm2d()]
    made = nn.Sequential(*kinds, nn.InstanceNorm2d(3), nn.GroupNorm(1, 3))
    assert [f.converted for f in report(made)] == [False] * 5
    with pytest.warns(UserWarning, match="convert: 1 batch norms, but not 1, a Act") as warned:
        convert(made)
    said = str(warned[0].message)
    for text in (
        "1, a Act (a subclass of torch.nn.BatchNorm2d, which may behave differently)",
        "2, a SyncBatchNorm (it joins batches itself: use torch.nn's BatchNorm1d to 3d",
        "3, a FrozenBatchNorm2d (not a class of torch.nn)",
        "4, a LazyBatchNorm2d (it has had no input yet: convert the model after the first one)",
    ):
        assert text in said
    assert named(report(made))["0"] == ("BatchNorm2d", True)


@pytest.mark.parametrize("how", ["scripted", "traced", "exported"])
def test_programs_are_left_alone(how):
    made = model().eval()
    if how == "scripted":
        program, why = torch.jit.script(made), "scripted or traced: convert the model before that"
    elif how == "traced":
        program, why = (
            torch.jit.trace(made, images()),
            "scripted or traced: convert the model before that",
        )
    else:
        program = torch.export.export(made, (images(),)).module()
        why = "part of a graph: convert the model before it is exported or traced"
    with pytest.warns(UserWarning, match="convert: 0 batch norms, but not") as warned:
        convert(program)
    assert str(warned[0].message).count(why) == 2


def test_a_compiled_model_is_converted():
    right = model()
    compiled = torch.compile(copy.deepcopy(right), backend="eager")
    close(compiled(images()), right(images()))
    convert(compiled)
    assert sum(f.converted for f in report(compiled)) == 2
    close(compiled(images()), right(images()), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_a_model_without_batch_norms():
    with pytest.warns(UserWarning, match="convert: no batch norms in this model"):
        convert(nn.Linear(3, 4))


# Strides.


def tensors():
    """Tensors of up to five axes: permuted, with steps, broadcast, short axes."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        ndim = int(rng.integers(2, 6))
        shape = [int(n) for n in rng.choice([1, 2, 3, 4], ndim)]
        order = rng.permutation(ndim)
        steps = [int(s) for s in rng.choice([1, 1, 1, 2], ndim)]
        x = torch.randn([shape[i] * steps[i] for i in order]).permute(*np.argsort(order).tolist())
        x = x[tuple(slice(None, None, s) for s in steps)]
        if rng.random() < 0.15:
            axis = int(rng.integers(ndim))
            x = x.narrow(axis, 0, 1).expand(shape)
        if x.numel() > x.shape[1]:
            yield x


@pytest.mark.parametrize("kernels", [None, "numpy", "generic"])
def test_results_lie_in_memory_as_pytorch_s_do(kernels):
    """So `.view` works where it works there; gradients likewise, but along axes of length 1."""
    bn.set_kernels(kernels)
    try:
        for x in tensors():
            channels = x.shape[1]
            weight, bias, mean, var = (torch.rand(channels) + 0.5 for _ in range(4))
            for training in (True, False):
                for gradient in (True, False):
                    given = x.detach().requires_grad_(gradient)
                    theirs = nn.functional.batch_norm(
                        given, mean.clone(), var.clone(), weight, bias, training=training
                    )
                    if training:
                        mine = bn.batch_norm(given, weight, bias)[0]
                    else:
                        mine = bn.normalize(given, mean, var, weight, bias)
                    assert mine.stride() == theirs.stride(), (tuple(x.shape), x.stride())
                    if gradient and kernels != "generic" and 1 not in x.shape:
                        grads = [
                            torch.autograd.grad(y, given, torch.ones_like(y))[0] for y in (mine, theirs)
                        ]
                        assert grads[0].stride() == grads[1].stride(), (tuple(x.shape), x.stride())
    finally:
        bn.set_kernels(None)


def test_a_view_of_the_result_of_a_permuted_input():
    x = torch.randn(5, 6, 4, 3).permute(2, 3, 0, 1)
    for module in (BatchNorm2d(3), nn.BatchNorm2d(3)):
        assert module(x).view(4, -1).shape == (4, 90)
    assert BatchNorm1d(3)(torch.randn(4, 5, 3).transpose(1, 2)).view(-1).shape == (60,)
