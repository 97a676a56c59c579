"""One member of a gloo group that trains a converted model with autograd.

python -m members.in_torch folder
"""

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import batchnorm as bn
import batchnorm.torch
from members.worker import counting, group_of

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
    twice = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(
        bn.batch_norm(twice, group=group)[0].pow(3).sum(), twice, create_graph=True
    )
    try:
        dx.sum().backward()
        error = ""
    except RuntimeError as raised:
        error = str(raised)
    Path(folder, f"{group.rank}.pickle").write_bytes(pickle.dumps((found, counted, error, y.detach())))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
