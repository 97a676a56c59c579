"""A ResNet of plain PyTorch modules, and the same with its batch norms converted: results and time.

Trains both on the same random images for some steps, eager and compiled, prints the largest difference
of outputs, gradients and running statistics, and the CPU time that each spends in batch norm. With
`--fuse`, it converts with `fuse=True`, and prints the time in batch norm, sums and ReLU, the medians of
runs that alternate, and the largest memory of each.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
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


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut, with one activation module as torchvision has it."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def resnet50(classes: int = 10, width: int = 64) -> nn.Module:
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = width
    for i, blocks in enumerate((3, 4, 6, 3)):
        inner = width * 2**i
        for block in range(blocks):
            layers.append(Bottleneck(before, inner, 2 if i and block == 0 else 1))
            before = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


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
    ours = (e for e in profile.key_averages() if e.key.startswith(NORM))
    return sum(e.cpu_time_total for e in ours) / 1e6


NORM = ("aten::native_batch_norm", "batchnorm::", "_BatchNormModule")  # and their backward passes
AROUND = ("aten::add_", "aten::add", "aten::relu", "aten::relu_", "aten::threshold_backward")


def seconds_around_norm(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """CPU seconds in batch norm, sums of activations and ReLU, forward and backward."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        for x, labels in data:  # without the optimizer, whose sums are not of activations
            model.zero_grad()
            nn.functional.cross_entropy(model(x), labels).backward()
    return (
        sum(
            e.cpu_time_total
            for e in profile.key_averages(group_by_input_shape=True)
            if e.key.startswith(NORM)
            or (e.key in AROUND and e.input_shapes and len(e.input_shapes[0]) == 4)
        )
        / 1e6
    )


MODELS = {"resnet18": resnet18, "resnet50": resnet50}


def prepared(chosen: argparse.Namespace, converted: bool) -> nn.Module:
    """The network, with the same weights each time."""
    torch.manual_seed(0)
    if chosen.torchvision:
        try:
            import torchvision
        except Exception as error:  # a build for another PyTorch raises others than ImportError
            sys.exit(
                f"--torchvision: it cannot be imported ({error}); without, the network of this file"
            )
        model = getattr(torchvision.models, chosen.model)(num_classes=10)
    else:
        model = MODELS[chosen.model]()
    return batchnorm.torch.convert(model, fuse=chosen.fuse) if converted else model


def largest_memory(chosen: argparse.Namespace) -> list[float]:
    """The largest memory of a process that trains, in MiB, of PyTorch and of this package."""
    found = []
    for which in ("theirs", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", which]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(float(said.split()[-1]))
    return found


def compare_fused(chosen: argparse.Namespace) -> None:
    """Print the time in norm, sum and ReLU and the largest memory of both."""
    prepared(chosen, False)  # an error, if it cannot be made
    memory = largest_memory(chosen)  # before the rest: a process starts with the largest of its parent
    data = batches(chosen.steps, chosen.size, chosen.side, torch.float32)
    models = [prepared(chosen, converted) for converted in (False, True)]
    for model in models:
        train(model, data[:1], None)  # compile what is compiled, fill pools
    seconds: list[list[float]] = [[], []]
    for _ in range(chosen.runs):
        for model, found in zip(models, seconds, strict=True):
            found.append(seconds_around_norm(model, data))
    theirs, ours = map(statistics.median, seconds)
    print(
        f"{chosen.model}, {torch.get_num_threads()} threads, seconds in norm, sums and ReLU,"
        f" {chosen.steps} steps of {chosen.size} images of {chosen.side} pixels,"
        f" medians of {chosen.runs}:"
    )
    print(f"  PyTorch {theirs:.3f}, converted {ours:.3f}: {ours / theirs:.2f} of it")
    print(f"largest memory in MiB: PyTorch {memory[0]:.0f}, converted {memory[1]:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5, help="of the timed training")
    parser.add_argument("--size", type=int, default=32, help="images of a batch")
    parser.add_argument("--side", type=int, default=224, help="pixels of a side")
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--torchvision", action="store_true", help="take torchvision's network")
    parser.add_argument("--fuse", action="store_true", help="norm, sums and ReLU in one pass")
    parser.add_argument("--runs", type=int, default=7, help="with --fuse, of each, alternating")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--memory-of", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.memory_of:
        data = batches(chosen.steps, chosen.size, chosen.side, torch.float32)
        train(prepared(chosen, chosen.memory_of == "ours"), data, None)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    if chosen.fuse:
        compare_fused(chosen)
        return
    original, converted = prepared(chosen, False), prepared(chosen, True)
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
