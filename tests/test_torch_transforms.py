"""Where PyTorch follows or transforms calls: tracers, torch.func, forward mode; judged by PyTorch."""

import io

import pytest

import batchnorm as bn

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from batchnorm.torch import BatchNorm1d, BatchNorm2d, convert  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # its own
nn, func = torch.nn, torch.func
close = torch.testing.assert_close


def data(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


GAMMA, BETA = data(3, seed=1), data(3, seed=2)
MEAN, VAR = data(3, seed=3), data(3, seed=4).abs() + 0.5
MASK = data(4, 3, 5, seed=5) > -0.5


def own(x):
    return bn.batch_norm(x, GAMMA, BETA)[0]


def theirs(x):
    return nn.functional.batch_norm(x, None, None, GAMMA, BETA, training=True)


def own_given(x):
    return bn.normalize(x, MEAN, VAR, GAMMA, BETA)


def theirs_given(x):
    return nn.functional.batch_norm(x, MEAN, VAR, GAMMA, BETA)


def own_masked(x):
    return bn.batch_norm(x, GAMMA, BETA, where=MASK)[0]


def theirs_masked(x):
    w = MASK.to(x.dtype)
    n = w.sum((0, 2), keepdim=True)
    mean = (w * x).sum((0, 2), keepdim=True) / n
    var = (w * (x - mean) ** 2).sum((0, 2), keepdim=True) / n
    return GAMMA[:, None] * (x - mean) / torch.sqrt(var + 1e-5) + BETA[:, None]


FUNCTIONS = {
    "batch": (own, theirs),
    "given": (own_given, theirs_given),
    "masked": (own_masked, theirs_masked),
}


def modules(training):
    made = [kind(3, dtype=torch.float64) for kind in (BatchNorm1d, nn.BatchNorm1d)]
    for module in made:
        with torch.no_grad():
            module.weight.copy_(GAMMA), module.bias.copy_(BETA)
            module.running_mean.copy_(MEAN), module.running_var.copy_(VAR)
        module.train(training).track_running_stats = not training
    return made


# Tracers, which would take what another library computes for a constant.


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("which", FUNCTIONS)
def test_a_traced_function_is_no_constant(which, gradients):
    f, formula = FUNCTIONS[which]
    other = data(4, 3, 5, seed=9)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(f, data(4, 3, 5))
        close(traced(other), formula(other))
        close(make_fx(f)(data(4, 3, 5))(other), formula(other))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    close(torch.jit.load(file)(other), formula(other))


@pytest.mark.parametrize("gradients", [True, False])
def test_a_traced_module_is_no_constant(gradients):
    mine, right = modules(training=False)
    other = data(6, 3, 7, seed=9)
    with torch.set_grad_enabled(gradients):
        close(torch.jit.trace(mine, data(4, 3, 5))(other), right(other))


def test_a_mode_sees_the_operator():
    """Without gradients too: kernels on NumPy's view would be invisible."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x = data(4, 3, 5)
    with Watch():
        y = own(x)
    assert "batchnorm.batch_norm.default" in seen
    close(y, theirs(x))


def test_symbolic_tracing_keeps_the_module():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3)).double()
    graph = torch.fx.symbolic_trace(convert(model))
    x = data(4, 2, 5)
    right = nn.BatchNorm1d(3, dtype=torch.float64)
    close(graph(x), right(model[0](x)))
    close(graph.get_submodule("1").running_var, right.running_var)
    close(graph.eval()(x), right.eval()(model[0](x)))


# torch.func and forward mode.

X, ALONG = data(4, 3, 5, seed=6), data(4, 3, 5, seed=7)


def forward_mode(f):
    def tangent(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, ALONG))).tangent

    return tangent


TRANSFORMS = {
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (ALONG,))[1],
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](ALONG)[0],
    "grad": lambda f: func.grad(lambda x: (f(x) ** 3).sum()),
    "vmap": lambda f: lambda x: func.vmap(f)(torch.stack([x, 2 * x + ALONG])),
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "hessian": lambda f: func.hessian(lambda x: (f(x) ** 3).sum()),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_modules(name, training):
    results = []
    for module in modules(training):
        results.append(TRANSFORMS[name](module)(X).detach())
    assert results[1].abs().max() > 0.1
    close(results[0], results[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_to_parameters_of_a_functional_call(training):
    """Training with its statistics, which are among the tensors that are given."""
    results = []
    for module in modules(training):
        module.track_running_stats = True
        state = {name: v.detach().clone() for name, v in module.state_dict().items()}

        def loss(parameters, module=module, state=state):
            state = {name: v.clone() for name, v in state.items()} | parameters
            y = func.functional_call(module, state, (X,))
            return (y**3).sum(), state

        given = {name: state[name] for name in ("weight", "bias")}
        results.append(func.grad(loss, has_aux=True)(given))
    close(*results)


@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler has many of its own
@pytest.mark.parametrize("which", FUNCTIONS)
@pytest.mark.parametrize(
    "name", ["jvp", "grad", "vmap", pytest.param("hessian", marks=pytest.mark.slow), "forward mode"]
)
def test_transformed_in_a_graph(name, which):
    torch._dynamo.reset()
    f, formula = FUNCTIONS[which]
    compiled = torch.compile(TRANSFORMS[name](f), backend="aot_eager", fullgraph=True)
    close(compiled(X), TRANSFORMS[name](formula)(X), rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_transformed_modules_in_a_graph(training):
    torch._dynamo.reset()
    mine, right = modules(training)
    compiled = torch.compile(TRANSFORMS["jvp"](mine), backend="aot_eager")
    close(compiled(X), TRANSFORMS["jvp"](right)(X))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_that_is_transformed():
    torch._dynamo.reset()
    compiled = torch.compile(own, backend="aot_eager")
    close(TRANSFORMS["jvp"](compiled)(X), TRANSFORMS["jvp"](theirs)(X))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("axis", [7, -4, (1, 5)])
def test_an_axis_out_of_range_in_a_graph(axis):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: bn.batch_norm(x, axis=axis)[0], backend="aot_eager")
    with pytest.raises(Exception, match="axis: got"):
        compiled(X)


# Gradients to every argument.


def real_weights():
    w = torch.rand(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.2
    return w.requires_grad_()


def test_gradients_to_weights():
    """Of all that takes weights, first and second order, against differences."""
    x, w, dy = X.clone().requires_grad_(), real_weights(), ALONG.clone().requires_grad_()

    def forward(x, w):
        y, stats = bn.batch_norm(x, GAMMA, where=w)
        return y, stats.mean, stats.var

    def moments(w):
        return tuple(bn.moments(X, where=w))[:3]

    def backward(dy, x, w):
        _, stats = bn.batch_norm(x, GAMMA, where=w)
        return bn.batch_norm_backward(dy, x, stats, GAMMA, where=w)

    assert torch.autograd.gradcheck(forward, (x, w))
    assert torch.autograd.gradgradcheck(lambda w: forward(X, w)[0], (w,))
    assert torch.autograd.gradcheck(moments, (w,))
    assert torch.autograd.gradcheck(backward, (dy, x, w))
    assert "for gradients to `where`, PyTorch's own" in bn.kernels_for(x, w).why


@pytest.mark.filterwarnings("ignore")
def test_gradients_to_weights_in_a_graph():
    torch._dynamo.reset()

    def loss(w):
        return (bn.batch_norm(X, GAMMA, BETA, where=w)[0] ** 3).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.autograd.gradcheck(compiled, (real_weights(),))


def test_an_operator_says_that_it_has_no_gradient_to_weights():
    y, *_ = torch.ops.batchnorm.batch_norm(X, GAMMA, BETA, real_weights(), [1], 1e-5)
    with pytest.raises(ValueError, match="where: got weights that require gradients, expected"):
        y.sum().backward()


def test_gradients_of_the_derivatives():
    """`batch_norm_jvp` and `batch_norm_double_backward`, in each argument by itself."""
    x = data(5, 3, seed=6)
    _, stats = bn.batch_norm(x, GAMMA)
    u, dy = data(5, 3, seed=7), data(5, 3, seed=8)
    a, b = data(3, seed=9), data(3, seed=10)

    def tangents(u, a, b, var):
        return bn.batch_norm_jvp(u, a, b, x, stats._replace(var=var), GAMMA)

    def second(u, a, b, dy, var):
        return bn.batch_norm_double_backward(u, a, b, dy, x, stats._replace(var=var), GAMMA)

    for f, given in ((tangents, (u, a, b, stats.var)), (second, (u, a, b, dy, stats.var))):
        for i, v in enumerate(given):

            def one(v, i=i, f=f, given=given):
                return f(*given[:i], v, *given[i + 1 :])

            along = torch.autograd.gradcheck(one, (v.clone().requires_grad_(),))
            assert along


@pytest.mark.parametrize("axis", [(0, 1), (0, 1, 2), ()])
def test_second_order_of_normalize_whatever_is_reduced(axis):
    x = data(2, 3, 2).requires_grad_()
    vectors = [data(*(x.shape[a] for a in axis), seed=i) for i in range(4)]
    vectors[1] = vectors[1].abs() + 0.5
    given = (x, *(v.requires_grad_() for v in vectors))
    assert torch.autograd.gradgradcheck(lambda *a: bn.normalize(*a, axis=axis), given)


def test_gradients_through_the_variance_of_a_huge_mean():
    """d var / dx = 2 (x - mean) / n, whose digits the rounded mean would lose."""
    x = (data(6, 3) + 1e12).requires_grad_()
    for stats in (bn.moments(x), bn.batch_norm(x)[1]):
        (dx,) = torch.autograd.grad(stats.var.sum(), x)
        wide = x.detach() - 1e12  # exact, and so is its mean but for eps of 1
        close(dx, 2 * (wide - wide.mean(0)) / 6, rtol=1e-12, atol=1e-14)


def test_a_third_derivative_of_a_module_runs_where_its_error_says():
    """The error names `set_kernels('generic')`. (torch.nn's own module gives a wrong one.)"""

    def formula(x):
        mean, var = x.mean((0, 2), keepdim=True), x.var((0, 2), correction=0, keepdim=True)
        return GAMMA[:, None] * (x - mean) / torch.sqrt(var + 1e-5) + BETA[:, None]

    bn.set_kernels("generic")
    try:
        results = []
        for f in (modules(training=True)[0], formula):
            x = X.clone().requires_grad_()
            v = f(x)
            for _ in range(3):
                (v,) = torch.autograd.grad((v * ALONG).sum(), x, create_graph=True)
            results.append(v.detach())
    finally:
        bn.set_kernels(None)
    close(*results)


def test_a_negated_view():
    z = torch.complex(data(8, 3), data(8, 3, seed=1))
    x = z.conj().imag
    assert x.is_neg()
    close(bn.batch_norm(x)[0], nn.functional.batch_norm(x.clone(), None, None, training=True))
    out = z.clone().conj().imag
    bn.normalize(x, MEAN, VAR, out=out)
    close(out, nn.functional.batch_norm(x.clone(), MEAN, VAR))


# What torch.nn's modules do at the edges.


@pytest.mark.parametrize(("channels", "given"), [(4, 1), (1, 4)])
def test_another_number_of_channels_changes_nothing(channels, given):
    for training in (True, False):
        module = BatchNorm1d(channels, affine=False).train(training)
        with pytest.raises(ValueError, match=r"(input|mean): got .*, expected"):
            module(torch.randn(5, given))
        assert module.num_batches_tracked == 0
        assert torch.equal(module.running_mean, torch.zeros(channels))


def test_a_gradient_after_the_statistics_moved():
    """It is the gradient of what was computed: with the statistics of then."""
    mine, fresh = BatchNorm2d(3).eval(), nn.BatchNorm2d(3).eval()
    x = torch.randn(4, 3, 5, 5)
    given = [x.clone().requires_grad_() for _ in range(2)]
    y = mine(given[0])
    mine.train()(x)
    (y**3).sum().backward()
    (fresh(given[1]) ** 3).sum().backward()
    close(given[0].grad, given[1].grad)
    close(mine.weight.grad, fresh.weight.grad)


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training, options):
    results = []
    for kind in (BatchNorm2d, nn.BatchNorm2d):
        module = kind(3, **options).train(training)
        x = torch.zeros(0, 3, 4, 4, requires_grad=True)
        y = module(x)
        if y.requires_grad:
            y.sum().backward()
        grads = [p.grad for p in module.parameters()]
        results.append((y.detach(), x.grad, grads, module.state_dict()))
    close(*results)


def test_a_cumulative_average_that_nobody_counts():
    made = [kind(3, momentum=None) for kind in (BatchNorm1d, nn.BatchNorm1d)]
    x = torch.randn(5, 3) + 1
    for module in made:
        module.num_batches_tracked = None
        module(x)
    close(made[0].running_mean, made[1].running_mean)
    close(made[0].running_var, made[1].running_var)
