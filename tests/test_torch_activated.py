"""Modules of a batch norm, a residual and an activation; judged by PyTorch's own."""

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from fusion_models import SETTINGS  # noqa: E402

from batchnorm.torch import (  # noqa: E402
    BatchNorm2d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    report,
    revert,
)

nn, functional = torch.nn, torch.nn.functional


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
    assert module(x.bfloat16(), z, in_place=True).dtype == torch.bfloat16  # as of y += z
    torch.testing.assert_close(module(x, 0.5), torch.relu(nn.BatchNorm2d(4)(x) + 0.5))
