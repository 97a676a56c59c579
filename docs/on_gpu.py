"""The part of the documentation on speed on GPUs, from gpu.csv, which `tools/gpu_check.sh` writes."""

from __future__ import annotations

import pathlib
from collections import defaultdict

from matplotlib.figure import Figure
from tables import markdown

from batchnorm.bench import gpu
from batchnorm.bench.report import geometric

HERE = pathlib.Path(__file__).parent
MEASURED = HERE / "gpu.csv"
NOT_YET = """The speed on GPUs has not been measured yet, because `tools/gpu_check.sh` has not been run
on one ([how to run it](howto/gpu.md#check-a-machine)).
"""
COLOURS = {"batchnorm on CuPy": "tab:blue", "PyTorch": "tab:orange", "PyTorch, cuDNN": "tab:green"}

Rows = dict[tuple[str, ...], dict[str, gpu.Result]]


def by_case(results: list[gpu.Result]) -> Rows:
    """Contestants of each shape, layout, dtype and pass."""
    found: Rows = defaultdict(dict)
    for r in results:
        found[r.shape, r.layout, r.dtype, r.which][r.contestant] = r
    return found


def ratios(rows: Rows) -> str:
    """A row for each pass, dtype and layout: times the better of PyTorch and cuDNN, and of the floor."""
    lines = []
    for which in gpu.PASSES:
        for dtype in gpu.DTYPES:
            for layout in dict.fromkeys(key[1] for key in rows):
                chosen = [row for key, row in rows.items() if key[1:] == (layout, dtype, which)]
                for name in gpu.OURS:
                    own = [row for row in chosen if name in row]
                    won = [
                        min(row[p].seconds for p in gpu.PEERS if p in row) / row[name].seconds
                        for row in own
                        if any(p in row for p in gpu.PEERS)
                    ]
                    floor = gpu.FLOOR[which]
                    large = [
                        floor * row["copy"].seconds / row[name].seconds
                        for row in own
                        if row[name].megabytes >= 100 and "copy" in row
                    ]
                    if won:
                        share = f"{geometric(large):.2f}" if large else ""
                        times = f"{geometric(won):.2f} ({min(won):.2f})"
                        lines.append([name, which, dtype, layout, times, share])
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
    rows = by_case(results)
    parts = [
        f"{device}, {cache:.0f} MB of second-level cache; times by the device's events.\n",
        ratios(rows),
    ]
    for which in ("forward", "backward"):
        draw(rows, which, folder / f"gpu-{which}.svg")
        parts.append(f"![The {which} pass on a GPU](generated/gpu-{which}.svg)\n")
    page.write_text("\n".join(parts))
