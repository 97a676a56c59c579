"""A ResNet-18 of plain PyTorch modules, and the same with its batch norms converted: results and time.

Trains both on the same random images for some steps, eager and compiled, prints the largest difference
of outputs, gradients and running statistics, and the CPU time that each spends in batch norm.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from torch import nn

import batchnorm.torch


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.bn1(self.conv1(x)))
        return nn.functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes: int = 10, width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = width
    for after, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        layers += [Block(before, after, stride), Block(after, after, 1)]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def batches(
    steps: int, size: int, side: int, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 3, side, side, generator=generator, dtype=dtype),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(steps)
    ]


def train(
    model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]], compiled: str | None
) -> list[torch.Tensor]:
    """Train; returns every output, the last gradients, and the state."""
    model.train()
    run = torch.compile(model, backend=compiled, fullgraph=True) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for x, labels in data:
        optimizer.zero_grad()
        y = run(x)
        nn.functional.cross_entropy(y, labels).backward()
        optimizer.step()
        found.append(y.detach())
    found += [p.grad.clone() for p in model.parameters()]
    found += [b.detach().clone() for b in model.state_dict().values()]
    return found


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest, relative to the largest value of each tensor."""
    return max(
        float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in zip(a, b, strict=True)
    )


def seconds_in_batch_norm(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """CPU seconds of all operators of batch norm, their helpers included, forward and backward."""
    train(model, data[:1], None)  # compile what is compiled, fill pools
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, data, None)
    names = ("aten::native_batch_norm", "batchnorm::", "_BatchNormModule")  # and their backward passes
    ours = (e for e in profile.key_averages() if e.key.startswith(names))
    return sum(e.cpu_time_total for e in ours) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="of the timed training")
    parser.add_argument("--size", type=int, default=32, help="images of a batch")
    parser.add_argument("--side", type=int, default=224, help="pixels of a side")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    original = resnet18()
    converted = batchnorm.torch.convert(copy.deepcopy(original))
    data = batches(chosen.steps, chosen.size, chosen.side, torch.float32)
    theirs, ours = (
        seconds_in_batch_norm(m, data) for m in (copy.deepcopy(original), copy.deepcopy(converted))
    )
    print(
        f"seconds in batch norm, {chosen.steps} steps of {chosen.size} images of {chosen.side} pixels:"
    )
    print(f"  PyTorch {theirs:.2f}, converted {ours:.2f}: {ours / theirs:.2f} of it")

    exact = [m.double() for m in (original, converted)]
    data = batches(20, 8, 64, torch.float64)
    right = train(copy.deepcopy(exact[0]), data, None)
    for name, backend in (("eager", None), ("compiled", "inductor")):
        off = difference(right, train(copy.deepcopy(exact[1]), data, backend))
        print(
            f"{name}, 20 steps in float64: outputs, gradients and statistics differ by {off:.1e} at most"
        )


if __name__ == "__main__":
    main()
