"""One member of a gloo group that trains a converted model with autograd.

python -m members.in_torch folder
"""

import pickle
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn
import batchnorm.torch
from members.worker import counting, group_of, leave

SIZES = (5, 1, 0, 6)


def model():
    """Two layers with parameters that are not 0 and 1, in float64."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4, momentum=None)]
    made = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn_like(p) / 4)
    return made


def batches():
    """Inputs and gradients of three steps, of all members."""
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, sum(SIZES), 3, 7)
    given = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [(x + 100, torch.cat([dy, dy[:, :1]], 1)) for x, dy in given]


def train(net, part):
    """What three steps give: outputs, gradients, and the state."""
    found = []
    for x, dy in batches():
        x, dy = x[part].clone().requires_grad_(), dy[part]
        net.zero_grad()
        y = net(x)
        y.backward(dy)
        found += [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]
    return found, [v.clone() for v in net.state_dict().values()]


def main(folder):
    group = group_of("gloo", folder)
    calls = counting(group)
    start = sum(SIZES[: group.rank])
    net = batchnorm.torch.convert(model(), group)
    found = train(net, slice(start, start + SIZES[group.rank]))
    counted = len(calls)
    y = net.eval()(batches()[0][0])  # in inference there is nothing to join
    assert len(calls) == counted
    x = torch.randn(4, 3, dtype=torch.float64)
    twice = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(
        bn.batch_norm(twice, group=group)[0].pow(3).sum(), twice, create_graph=True
    )
    refused = []
    warnings.filterwarnings("ignore", "`torch.jit.script`")  # PyTorch's own use of it, in forward mode
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(twice.detach(), twice.detach())
        for call in (
            lambda: dx.sum().backward(),
            lambda: bn.batch_norm(dual, group=group),
            lambda: torch.func.grad(lambda x: bn.batch_norm(x, group=group)[0].sum())(x),
        ):
            try:
                call()
            except (RuntimeError, TypeError) as raised:
                refused.append(str(raised))
    Path(folder, f"{group.rank}.pickle").write_bytes(pickle.dumps((found, counted, refused, y.detach())))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
