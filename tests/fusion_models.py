"""Small networks for the tests of fusion, each with what is fused in it."""

import torch
from torch import nn
from torch.nn import functional


def added_in_place(a, b):
    return a.add_(b)


class Sequence(nn.Sequential):
    """A subclass with the forward pass of its base, as torchvision has many."""


class Basic(nn.Module):
    """A block of a ResNet, whose activation is shared and in place, and whose shortcut comes last."""

    def __init__(self, shortcut=True, add=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if shortcut else None
        self.add = add

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        if self.add is None:
            out += identity
        else:
            out = self.add(out, identity)
        return self.relu(out)


class Timm(nn.Module):
    """A block with modules that do nothing between, and an activation for each place."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.act1 = nn.Identity(), nn.SiLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.path, self.act2 = nn.Identity(), nn.LeakyReLU(0.2)

    def forward(self, x):
        y = self.act1(self.drop(self.bn1(self.conv1(x))))
        return self.act2(self.path(self.bn2(self.conv2(y))) + x)


class Dense(nn.Module):
    """A layer of a DenseNet, which takes a tensor or a list of them."""

    def __init__(self):
        super().__init__()
        self.norm1, self.relu1, self.conv1 = nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1)
        self.drop_rate = 0.0

    def forward(self, input):
        features = [input] if isinstance(input, torch.Tensor) else input
        y = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        y = self.conv2(self.relu2(self.norm2(y)))
        return functional.dropout(y, self.drop_rate, self.training) if self.drop_rate else y


class DenseBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Dense(), Dense()

    def forward(self, x):
        return self.second([self.first(x[:, :4]) + self.first([x[:, :2], x[:, 2:]])])


class Calls(nn.Module):
    """One batch norm after a convolution, and a function of it, of another and of the input."""

    def __init__(self, function, act=None, between=None, **settings):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, **settings)
        self.other = nn.BatchNorm2d(4)
        self.act, self.between = act or nn.ReLU(), between
        self.weight = nn.Parameter(torch.randn(4, 1, 1))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def norm(m, x):
    return m.bn(m.conv(x))


def _twice(m, x):
    y = norm(m, x)
    return torch.relu(y) + y


def _sum_twice(m, x):
    y = norm(m, x) + x
    return torch.relu(y) * y


def own_input_changed(m, x):
    """Not for gradients."""
    y = m.conv(x)
    z = m.bn(y)
    y.mul_(2)
    return torch.relu(z + y)


def other_input_changed(m, x):
    """Not for gradients."""
    z = m.other(x)
    x.mul_(2)
    return torch.relu(z + x)


def _view_of_input_changed(m, x):
    y = m.conv(x)
    part = y[:, :2]
    z = m.bn(y.detach() * 1)
    part.mul_(2)
    return torch.relu(z + y)


def _residual_changed_after(m, x):
    y, z = m.conv(x), m.conv(-x)
    out = m.bn(y) + z
    z.mul_(3)
    return torch.relu(out) + z


def _in_place_into_the_other(m, x):
    z = m.conv(-x)
    kept = z
    z += norm(m, x)
    return torch.relu(z) + kept


def _in_place_then_used(m, x):
    y = m.other(x)
    kept = y
    y.relu_()
    return y * kept


def _norms(m, x):
    return torch.relu(m.bn(m.conv(x)) + m.other(x))


def _shared(m, x):
    return m.act(m.bn(m.conv(x))) + m.act(x)


def _norm_twice(m, x):
    y = torch.relu(m.bn(m.conv(x)))
    return torch.relu(m.bn(m.conv(y)) + m.bn(x))


def _by_mode(m, x):
    y = norm(m, x)
    return torch.relu(y) if m.training else torch.sigmoid(y)


def _without_gradient(m, x):
    with torch.no_grad():
        y = torch.relu(norm(m, x))
    return y + x * m.weight


def _attribute(m, x):
    m.last = norm(m, x)
    return torch.relu(m.last) + m.last.detach()


def _values(m, x):
    y = norm(m, x)
    return torch.relu(y) if float(x.detach().sum()) > 0 else torch.relu(-y)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


MODELS = {
    # name: (model, what is fused by the names of batch norms)
    "sequential": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU6(True),
            nn.BatchNorm2d(4), nn.SiLU(), nn.BatchNorm2d(4), nn.Identity(), nn.LeakyReLU(0.3),
            nn.BatchNorm2d(4), nn.Hardswish(), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU(),
            nn.BatchNorm2d(4),
        ),
        {"1": "relu", "3": "relu6", "5": "silu", "7": "leaky_relu", "10": "", "12": "", "15": ""},
    ),
    "subclass of Sequential": (
        lambda: Sequence(nn.BatchNorm2d(4), nn.ReLU6(True), Sequence(nn.BatchNorm2d(4)), nn.ReLU()),
        {"0": "relu6", "2.0": ""},
    ),
    "basic": (Basic, {"bn1": "relu", "bn2": "residual and relu", "shortcut.1": ""}),
    "basic without a shortcut": (lambda: Basic(False), {"bn1": "relu", "bn2": "residual and relu"}),
    "basic, torch.add": (
        lambda: Basic(True, torch.add), {"bn1": "relu", "bn2": "residual and relu", "shortcut.1": ""}
    ),
    "basic, add_": (
        lambda: Basic(True, added_in_place),
        {"bn1": "relu", "bn2": "residual and relu", "shortcut.1": ""},
    ),
    "timm": (Timm, {"bn1": "silu", "bn2": "residual and leaky_relu"}),
    "dense": (DenseBlock, dict.fromkeys(
        ("first.norm1", "first.norm2", "second.norm1", "second.norm2"), "relu")),
}  # fmt: skip

# name: (function, what bn is fused with, what other is)
FUNCTIONS = {
    "F.relu": (lambda m, x: functional.relu(norm(m, x)), "relu"),
    "F.relu in place": (lambda m, x: functional.relu(norm(m, x), inplace=True), "relu"),
    "torch.relu": (lambda m, x: torch.relu(norm(m, x)), "relu"),
    "torch.relu_": (lambda m, x: torch.relu_(norm(m, x)), "relu"),
    "method": (lambda m, x: norm(m, x).relu(), "relu"),
    "method in place": (lambda m, x: norm(m, x).relu_(), "relu"),
    "F.relu6": (lambda m, x: functional.relu6(norm(m, x), True), "relu6"),
    "F.silu": (lambda m, x: functional.silu(norm(m, x)), "silu"),
    "F.leaky_relu": (lambda m, x: functional.leaky_relu(norm(m, x), 0.3), "leaky_relu"),
    "slope by name": (
        lambda m, x: functional.leaky_relu(norm(m, x), negative_slope=0.3),
        "leaky_relu",
    ),
    "default slope": (lambda m, x: functional.leaky_relu(norm(m, x)), "leaky_relu"),
    "negative slope": (lambda m, x: functional.leaky_relu(norm(m, x), -0.3), ""),
    "the other order": (lambda m, x: torch.relu(x + norm(m, x)), "residual and relu"),
    "add": (lambda m, x: norm(m, x).add(x).relu(), "residual and relu"),
    "add_": (lambda m, x: norm(m, x).add_(x).relu_(), "residual and relu"),
    "torch.add": (lambda m, x: torch.add(norm(m, x), x).relu(), "residual and relu"),
    "torch.add with a factor": (lambda m, x: torch.add(norm(m, x), x, alpha=2).relu(), ""),
    "add_ with a factor": (lambda m, x: norm(m, x).add_(x, alpha=2).relu(), ""),
    "a number": (lambda m, x: torch.relu(norm(m, x) + 1), ""),
    "a value that is no tensor": (
        lambda m, x: torch.relu(norm(m, x) + x.shape[0]),
        "residual and relu",
    ),
    "a parameter": (lambda m, x: torch.relu(norm(m, x) + m.weight), "residual and relu"),
    "another shape": (lambda m, x: torch.relu(norm(m, x) + x[:1, :, :1]), "residual and relu"),
    "a larger shape": (lambda m, x: torch.relu(norm(m, x) + x[None]), "residual and relu"),
    "another dtype": (lambda m, x: torch.relu(norm(m, x) + x.float()), "residual and relu"),
    "itself": (lambda m, x: (lambda y: torch.relu(y + y))(norm(m, x)), ""),
    "used twice": (_twice, ""),
    "sum used twice": (_sum_twice, ""),
    "a view of its input is changed": (_view_of_input_changed, ""),
    "the residual is changed after": (_residual_changed_after, "residual and relu"),
    "in place into the other": (_in_place_into_the_other, ""),
    "in place, then used": (_in_place_then_used, ""),
    "two norms": (_norms, ""),  # the other takes it
    "shared activation": (_shared, "relu"),
    "norm called twice": (_norm_twice, "relu, residual and relu"),
    "by mode": (_by_mode, "relu"),
    "without gradient": (_without_gradient, ""),
    "sets an attribute": (_attribute, ""),
    "by values": (_values, ""),
    "dropout between": (lambda m, x: torch.relu(functional.dropout(norm(m, x), 0.0)), ""),
    "function of its own": (lambda m, x: _Doubled.apply(torch.relu(norm(m, x))), ""),
    "autocast inside": (
        lambda m, x: torch.autocast("cpu", enabled=False)(lambda: torch.relu(norm(m, x)))(),
        "",
    ),
    "by gradient mode": (
        lambda m, x: torch.relu(norm(m, x)) if torch.is_grad_enabled() else norm(m, x),
        "",
    ),
    "random": (lambda m, x: torch.relu(norm(m, x)) * torch.rand(()).round().add(1), ""),
    "no statistics": (lambda m, x: torch.relu(norm(m, x) + x), "residual and relu"),
    "by size": (lambda m, x: torch.relu(norm(m, x)) if x.shape[0] > 2 else x, ""),
}
SETTINGS = [
    {},
    {"track_running_stats": False},
    {"momentum": None},
    {"affine": False},
    {"eps": 1e-2, "momentum": 0.3},
]
