"""At home in PyTorch: derivatives, compilation, modules; judged by PyTorch itself."""

import copy
import importlib.util
import pathlib
import sys

import pytest

import batchnorm as bn

torch = pytest.importorskip("torch")

import batchnorm.torch  # noqa: E402
from batchnorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, convert, revert  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # its own
nn = torch.nn
ROOT = pathlib.Path(__file__).parents[1]


def tensor(*shape, positive=False, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    v = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return (v.abs() + 0.5 if positive else v).requires_grad_()


def arguments(shape=(4, 3, 5), channels=3):
    return tensor(*shape), tensor(channels, seed=1), tensor(channels, seed=2)


def weights(shape, kind):
    if kind is None:
        return None
    w = torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    w[0, :, 1] = 0
    return w > 0.3 if kind == "mask" else w


# Derivatives.


@pytest.mark.parametrize("kind", [None, "mask", "weights"])
@pytest.mark.parametrize(("shape", "axis"), [((4, 3, 5), 1), ((4, 5, 3), -1)])
def test_gradients_of_batch_norm(kind, shape, axis):
    """First and second order, backward and forward, and through the statistics that are returned."""
    where = weights(shape, kind)

    def f(x, gamma, beta):
        y, stats = bn.batch_norm(x, gamma, beta, axis=axis, where=where)
        return y, stats.mean, stats.var

    given = arguments(shape)
    assert bn.kernels_for(given[0]).name == "operators"
    assert torch.autograd.gradcheck(f, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *a: f(*a)[0], given)


@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_normalize(affine):
    x, gamma, beta = arguments()
    given = (x, tensor(3, seed=3), tensor(3, seed=4, positive=True))
    given += (gamma, beta) if affine else ()
    assert torch.autograd.gradcheck(bn.normalize, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(bn.normalize, given)


def test_gradients_of_moments():
    def f(x):
        stats = bn.moments(x)
        return stats.mean, stats.var

    assert torch.autograd.gradcheck(f, (tensor(4, 3, 5),))


def test_a_third_derivative_says_so():
    x, gamma, beta = arguments()
    (dx,) = torch.autograd.grad((bn.batch_norm(x, gamma, beta)[0] ** 3).sum(), x, create_graph=True)
    (d2,) = torch.autograd.grad((dx**3).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="got a third derivative, expected at most two"):
        d2.sum().backward()


def test_operators_are_what_pytorch_expects_of_them():
    x, gamma, beta = arguments()
    mean, var = tensor(3, seed=3), tensor(3, seed=4, positive=True)
    where = weights(x.shape, "weights")
    stats = bn.batch_norm(x.detach())[1]
    dy, rest = tensor(4, 3, 5, seed=9), ([1], 1e-5)
    vector = tensor(3, seed=5)
    calls = {
        "batch_norm": (x, gamma, beta, where, *rest),
        "batch_norm_backward": (dy, x, *stats, gamma, where, *rest),
        "normalize": (x, mean, var, gamma, beta, *rest),
        "normalize_backward": (dy, x, mean, var, gamma, *rest),
        "moments": (x, where, [1]),
    }
    for name, given in calls.items():
        found = torch.library.opcheck(getattr(torch.ops.batchnorm, name).default, given)
        assert set(found.values()) == {"SUCCESS"}, name
    second = torch.ops.batchnorm.batch_norm_double_backward.default
    given = (dy, vector, None, dy, x, *stats, gamma, None, *rest)
    detached = [v.detach() if isinstance(v, torch.Tensor) else v for v in given]
    found = torch.library.opcheck(second, tuple(detached))
    assert set(found.values()) == {"SUCCESS"}


def test_torch_func():
    """grad, vmap, jvp and what they make together, on PyTorch's own operators."""
    x, gamma, beta = (v.detach() for v in arguments())

    def loss(x):
        return (bn.batch_norm(x, gamma, beta)[0] ** 3).sum()

    def formula(x):
        mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
        scaled = (x - mean) / torch.sqrt(var + 1e-5)
        return ((gamma[:, None] * scaled + beta[:, None]) ** 3).sum()

    func = torch.func
    batch = torch.randn(6, 4, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(func.grad(loss)(x), func.grad(formula)(x))
    torch.testing.assert_close(func.vmap(func.grad(loss))(batch), func.vmap(func.grad(formula))(batch))
    torch.testing.assert_close(func.hessian(loss)(x), func.hessian(formula)(x))
    tangent = func.jvp(loss, (x,), (batch[0],))
    torch.testing.assert_close(tangent, func.jvp(formula, (x,), (batch[0],)))


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow), torch.float32]
)
def test_gradients_are_this_package_s_own(dtype):
    """What PyTorch differentiates is what `batch_norm_backward` gives."""
    x, dy = (torch.randn(8, 6, 20).to(dtype) for _ in range(2))
    gamma, beta = torch.rand(6) + 0.5, torch.randn(6)
    _, stats = bn.batch_norm(x, gamma, beta)
    expected = bn.batch_norm_backward(dy, x, stats, gamma)
    given = [v.clone().requires_grad_() for v in (x, gamma, beta)]
    y, _ = bn.batch_norm(*given)
    y.backward(dy)
    for v, right in zip(given, expected, strict=True):
        assert v.grad.dtype == v.dtype
        torch.testing.assert_close(v.grad, right, rtol=0, atol=0)


def test_writing_into_out_is_not_differentiated():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(ValueError, match="out: got an array to write to, with tensors that PyTorch"):
        bn.batch_norm(x, out=torch.empty(4, 3))


# Compilation.


def everything(x, gamma, beta):
    y, stats = bn.batch_norm(x, gamma, beta)
    moments = bn.moments(y)
    z = bn.normalize(x, stats.mean, stats.var, gamma, beta)
    with torch.no_grad():
        dx, dgamma, _ = bn.batch_norm_backward(y, x, stats, gamma)
        given = bn.normalize_backward(y, x, stats.mean, stats.var, gamma)
    return (y**3).sum() + moments.var.sum() + stats.mean.sum(), z, dx, dgamma, given[0]


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler has many of its own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    results = []
    for f in (everything, compiled):
        given = [v.detach().clone().requires_grad_() for v in arguments()]
        found = f(*given)
        (found[0] + found[1].sum()).backward()
        results.append([*(v.detach() for v in found), *(v.grad for v in given)])
    for mine, right in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
def test_exported():
    class Model(nn.Module):
        def forward(self, x, gamma, beta):
            return everything(x, gamma, beta)[:2]

    given = tuple(v.detach() for v in arguments())
    program = torch.export.export(Model(), given)
    assert not any("batchnorm" in str(node.target) for node in program.graph.nodes)
    for mine, right in zip(program.module()(*given), Model()(*given), strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_call_in_a_graph_is_an_error():
    torch._dynamo.reset()

    def f(x, gamma):
        return bn.batch_norm(x, gamma)[0]

    with pytest.raises(Exception, match="gamma: got shape"):
        torch.compile(f, backend="aot_eager", fullgraph=True)(torch.randn(4, 3), torch.ones(5))


# Modules.

PAIRS = [
    (BatchNorm1d, nn.BatchNorm1d, (8, 6)),
    (BatchNorm1d, nn.BatchNorm1d, (8, 6, 5)),
    (BatchNorm2d, nn.BatchNorm2d, (4, 6, 5, 3)),
    (BatchNorm3d, nn.BatchNorm3d, (4, 6, 2, 3, 2)),
]
OPTIONS = [
    {},
    {"eps": 1e-3, "momentum": 0.3},
    {"momentum": None},
    {"affine": False},
    {"track_running_stats": False},
]


def pair(ours, theirs, **options):
    made = [kind(6, dtype=torch.float64, **options) for kind in (ours, theirs)]
    if options.get("affine", True):
        with torch.no_grad():
            made[1].weight.uniform_(0.5, 2)
            made[1].bias.normal_()
    made[0].load_state_dict(made[1].state_dict())
    return made


def same(a, b, **tolerance):
    torch.testing.assert_close(a, b, **({"rtol": 1e-11, "atol": 1e-11} | tolerance))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_modules_do_what_pytorch_s_do(ours, theirs, shape, options):
    """Three steps of training, then evaluation: outputs, gradients and state."""
    mine, right = pair(ours, theirs, **options)
    for step in range(3):
        x = torch.randn(*shape, dtype=torch.float64) * (step + 1) + step
        given = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(v) for module, v in zip((mine, right), given, strict=True)]
        same(*outputs)
        for y in outputs:
            (y**3).sum().backward()
        same(given[0].grad, given[1].grad, rtol=1e-8)
        for p, q in zip(mine.parameters(), right.parameters(), strict=True):
            same(p.grad, q.grad, rtol=1e-8)
        assert mine.state_dict().keys() == right.state_dict().keys()
        for name, v in right.state_dict().items():
            same(mine.state_dict()[name], v)
            assert mine.state_dict()[name].dtype == v.dtype
    mine.eval(), right.eval()
    same(mine(x), right(x))


@pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
def test_modules_refuse_what_pytorch_s_refuse(ours, theirs, shape):
    for bad in (torch.randn(1, 6), torch.randn(3)):
        errors = []
        for kind in (ours, theirs):
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                kind(6)(bad)
            errors.append(str(caught.value))
        assert errors[0]
    with pytest.raises(ValueError, match="gamma: got shape|running|channels"):
        ours(6)(torch.randn(shape[0], 7, *shape[2:]))


def test_channels_last_stays():
    x = torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    y = BatchNorm2d(6)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (y**3).sum().backward()
    same(y, nn.BatchNorm2d(6)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    """Narrow activations with float32 parameters, as under autocast: the dtypes of PyTorch's."""
    mine, right = BatchNorm2d(6), nn.BatchNorm2d(6)
    conv = nn.Conv2d(3, 6, 3)
    x = torch.randn(4, 3, 9, 9)
    with torch.autocast("cpu", dtype=dtype):
        outputs = [module(conv(x)) for module in (mine, right)]
    assert outputs[0].dtype == outputs[1].dtype
    same(outputs[0], outputs[1], rtol=0.02, atol=0.02)
    for y in outputs:
        y.float().square().sum().backward()
    assert mine.running_mean.dtype == torch.float32
    same(mine.running_var, right.running_var, rtol=1e-2, atol=1e-3)


def test_convert_and_revert():
    class Own(nn.BatchNorm2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Sequential(nn.ReLU(), nn.BatchNorm2d(6)), Own(6)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    with pytest.warns(UserWarning, match=r"convert: 2 batch norms, but not 3, an? Own \(a subclass of"):
        assert convert(model) is model
    assert [type(m) for m in (model[1], model[2][1], model[3])] == [BatchNorm2d, BatchNorm2d, Own]
    model(torch.randn(4, 3, 9, 9)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(model.state_dict())
    assert state["1.num_batches_tracked"] == 1
    assert revert(model) is model
    assert type(model[1]) is nn.BatchNorm2d
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(state[name], v) for name, v in model.state_dict().items())
    with pytest.raises(TypeError, match="model: got an int, expected a torch.nn.Module"):
        convert(3)


def test_modules_are_copied_and_saved(tmp_path):
    module = BatchNorm2d(6)
    module(torch.randn(4, 6, 5, 5))
    torch.save(copy.deepcopy(module).state_dict(), tmp_path / "state.pt")
    other = nn.BatchNorm2d(6)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    same(other.running_var, module.running_var)
    assert repr(module) == repr(other)


class Alone:
    """A group of one, of which there cannot be two."""

    def all_reduce(self, array):
        return array

    def __deepcopy__(self, memo):
        raise TypeError("a communicator is not copied")

    def __reduce__(self):
        raise TypeError("a communicator is not pickled")


def test_copies_share_a_group_and_files_leave_it_out(tmp_path):
    group = Alone()
    model = convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), group)
    x = torch.randn(6, 3)
    y = model(x)
    copied = copy.deepcopy(model)
    assert copied[1].group is group
    assert copied[1].running_mean is not model[1].running_mean
    same(copied(x), y)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert averaged.module[1].group is group
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded[1].group is None
    same(loaded.eval()(x), model.eval()(x))
    assert copy.copy(model[1]).group is group
    assert type(revert(copied)[1]) is nn.BatchNorm1d
    assert not hasattr(copied[1], "group")


def test_a_layer_s_copies_share_its_group():
    import pickle

    group = Alone()
    layer = bn.BatchNorm(3, group=group)
    layer.backward(layer(torch.randn(6, 3)))
    copied = copy.deepcopy(layer)
    assert copied.group is copy.copy(layer).group is group
    assert copied.running_mean is not layer.running_mean
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.group is None
    assert torch.equal(loaded.running_mean, layer.running_mean)
    assert loaded.num_batches_tracked == 1


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("resnet", ROOT / "docs/examples/resnet.py")
    module = sys.modules["resnet"] = importlib.util.module_from_spec(spec)  # the compiler looks for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_converted_resnet_trains_the_same(example):
    """10 steps in float64: every output, the gradients and the running statistics."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    original = example.resnet18(width=16).double()
    converted = convert(copy.deepcopy(original))
    data = example.batches(10, 8, 64, torch.float64)
    right = example.train(original, data, None)
    for compiled in (None, "aot_eager"):
        found = example.train(copy.deepcopy(converted), data, compiled)
        assert example.difference(right, found) < 1e-10
    perturbed = copy.deepcopy(original)
    assert example.difference(right, example.train(perturbed, data, None)) > 1e-3, "it can fail"


def test_a_sparse_tensor_after_a_dense_one():
    """What is known of a dense tensor says nothing of a sparse one of its shape."""
    x = torch.randn(6, 3)
    bn.batch_norm(x)
    with pytest.raises(
        TypeError, match="x: got a tensor of layout torch.sparse_coo, expected a strided"
    ):
        bn.batch_norm(x.to_sparse())
