"""The part of the documentation on speed on GPUs, from gpu.csv, which `tools/gpu_check.sh` writes."""

from __future__ import annotations

import math
import pathlib

from matplotlib.figure import Figure
from tables import markdown

from batchnorm.bench import gpu
from batchnorm.bench.report import geometric

HERE = pathlib.Path(__file__).parent
MEASURED = HERE / "gpu.csv"
NOT_YET = """The speed on GPUs has not been measured yet, because `tools/gpu_check.sh` has not been run
on one ([how to run it](howto/gpu.md#check-a-machine)).
"""
LARGE = math.nextafter(100.0, 0.0)  # MB: 100 and more
COLOURS = {"batchnorm on CuPy": "tab:blue", "PyTorch": "tab:orange", "PyTorch, cuDNN": "tab:green"}

Rows = dict[tuple[str, ...], dict[str, gpu.Result]]


def ratios(results: list[gpu.Result]) -> str:
    """A row for each pass, dtype and layout: times the better of PyTorch and cuDNN, and of the floor."""
    lines = []
    for c in gpu.compared(results, LARGE):
        times = [ratio for ratio, _ in c.won]
        share = f"{geometric(c.shares):.2f}" if c.shares else ""
        cells = (c.name, c.which, c.dtype, c.layout, f"{geometric(times):.2f} ({min(times):.2f})", share)
        lines.append(cells)
    headings = [
        "",
        "pass",
        "dtype",
        "channels",
        "times the better peer (worst)",
        "of the floor, 100 MB up",
    ]
    return markdown(headings, lines)


def draw(rows: Rows, which: str, output: pathlib.Path) -> None:
    """Draw speed as a share of a copy's over the size of arrays, float32, channels second."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        points = [
            (row[name].megabytes, row["copy"].seconds / row[name].seconds)
            for key, row in rows.items()
            if key[1:] == ("second", "float32", which) and name in row and "copy" in row
        ]
        axes.semilogx(
            *zip(*sorted(points), strict=True) if points else ([], []), "o", color=colour, label=name
        )
    axes.axhline(1 / gpu.FLOOR[which], color="black", linewidth=1)
    axes.set_xlabel("MB of the array; the line is the floor of its bytes")
    axes.set_ylabel("speed of a copy")
    axes.set_title(f"{which.capitalize()} pass, float32, channels second", fontsize="medium")
    axes.legend(fontsize="small")
    figure.savefig(output, metadata={"Date": None})


def write(folder: pathlib.Path, measured: pathlib.Path = MEASURED) -> None:
    """Write what pages include: tables and charts, or that nothing has been measured."""
    page = folder / "on_gpu.md"
    if not measured.exists():
        page.write_text(NOT_YET)
        return
    results, device, cache = gpu.read(measured)
    rows = gpu.by_case(results)
    parts = [
        f"{device}, {cache:.0f} MB of second-level cache; times by the device's events.\n",
        ratios(results),
    ]
    for which in ("forward", "backward"):
        draw(rows, which, folder / f"gpu-{which}.svg")
        parts.append(f"![The {which} pass on a GPU](generated/gpu-{which}.svg)\n")
    page.write_text("\n".join(parts))
