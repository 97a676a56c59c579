"""Report of the benchmark: a table, geometric means of ratios to the other libraries, and a chart."""

from __future__ import annotations

import math
from pathlib import Path

import batchnorm as bn
from batchnorm.bench.cases import FEW, LAYOUTS, PASSES, SHAPES
from batchnorm.bench.contestants import CONTESTANTS, present
from batchnorm.bench.measure import Time, steps, times

PEERS = tuple(name for name, c in CONTESTANTS.items() if not c.ours and name != "copy")


def run(everything: bool, output: Path, *, fused: bool = False) -> int:
    """Measure, print the table, draw the chart, and return the exit status."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shapes = tuple(SHAPES) if everything else FEW
    found = present()
    console = Console(width=150)
    results: list[Time] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=steps(shapes))
        for step in times(shapes, found, fused=fused):
            results += step
            progress.update(task, advance=1, description=f"{step[0].shape}, {step[0].which}")
    after = ", with a residual and a ReLU" if fused else ""
    console.print(f"float32, {bn.get_num_threads()} threads each, medians, milliseconds{after}")
    console.print(table(results, tuple(found)))
    for line in summary(results):
        console.print(line, highlight=False)
    draw(results, output)
    console.print(f"chart: {output}")
    return 0


def table(results: list[Time], contestants: tuple[str, ...]) -> object:
    """Return a table with a row per shape, layout and pass, and a column per contestant."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for heading in ("shape", "channels", "pass", "MB"):
        made.add_column(heading, justify="right" if heading == "MB" else "left", no_wrap=True)
    for name in contestants:
        made.add_column(name.replace("batchnorm", "bn"), justify="right")
    for key, row in _rows(results).items():
        shape, layout, which = key
        size = next(r.megabytes for r in results if r.shape == shape)
        cells = [_milliseconds(row[name]) if name in row else "-" for name in contestants]
        text = " x ".join(map(str, SHAPES[shape]))
        made.add_row(text, layout, which, f"{size:.1f}", *cells)
    return made


def summary(results: list[Time]) -> list[str]:
    """Return lines of ratios to each peer, as geometric mean and for the worst shape, by layout."""
    lines = ["times as fast: geometric mean (worst shape), against the peer at"]
    lines.append(f"{'':64}{'the same layout':20}its best layout")
    for name in (n for n, c in CONTESTANTS.items() if c.ours):
        for peer in PEERS:
            for which in PASSES:
                for layout in LAYOUTS:
                    same = ratios(results, name, peer, which, layout, (layout,))
                    best = ratios(results, name, peer, which, layout, LAYOUTS)
                    if best:
                        cells = [
                            f"{geometric(r):.2f} ({min(r):.2f})" if r else "-" for r in (same, best)
                        ]
                        text = f"  {name:22} vs {peer:15} {which:10} channels {layout:7}"
                        lines.append(f"{text}  {cells[0]:20}{cells[1]}")
    return lines


def ratios(
    results: list[Time], name: str, peer: str, which: str, layout: str, at: tuple[str, ...]
) -> list[float]:
    """Return the ratios of speed to a peer at each shape, with the peer's fastest layout of `at`."""
    rows = _rows(results)
    found = []
    for (shape, mine, passed), row in rows.items():
        if mine == layout and passed == which and name in row:
            theirs = [rows[shape, other, which].get(peer) for other in at]
            known = [seconds for seconds in theirs if seconds is not None]
            if known:
                found.append(min(known) / row[name])
    return found


def draw(results: list[Time], output: Path) -> None:
    """Draw bars of the speed of the forward pass relative to the copy, with channels second."""
    from matplotlib.figure import Figure

    rows = {k[0]: r for k, r in _rows(results).items() if k[1:] == ("second", "forward")}
    last = {k[0]: r for k, r in _rows(results).items() if k[1:] == ("last", "forward")}
    for shape, row in rows.items():  # contestants with one layout only, and the best layout of peers
        for name, seconds in last[shape].items():
            if name in PEERS or name not in row:
                row[name] = min(seconds, row.get(name, math.inf))
    names = [n for n in CONTESTANTS if n != "copy" and any(n in r for r in rows.values())]
    figure = Figure(figsize=(10, 1.2 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(names)
    colours = [f"C{i}" for i in range(len(names))]
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        places = [y + i * height for y, row in enumerate(rows.values()) if name in row]
        shares = [row["copy"] / row[name] for row in rows.values() if name in row]
        axes.barh(places, shares, height, label=name, color=colour)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(
        [y + 0.4 - height / 2 for y in range(len(rows))], [" × ".join(map(str, SHAPES[s])) for s in rows]
    )
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("speed of the training forward pass, as a share of a copy's (line)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=150)


def geometric(values: list[float]) -> float:
    """Return the geometric mean."""
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _rows(results: list[Time]) -> dict[tuple[str, str, str], dict[str, float]]:
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in results:
        rows.setdefault((r.shape, r.layout, r.which), {})[r.contestant] = r.seconds
    return rows


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 1e-2 else f"{seconds * 1e3:.1f}"
