"""The landing page's chart, from the published table of forward passes."""

from __future__ import annotations

import pathlib
import statistics

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

LARGE = 25.0  # MB: what caches do not decide
COLOURS = {"batchnorm": "tab:blue", "PyTorch": "tab:orange"}


def rows(page: pathlib.Path) -> list[dict[str, str]]:
    """The first table of a page, a dict for each line; of repeated headings, the first."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    headings, _, *cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = []
    for line in cells:
        if len(line) != len(headings):
            break
        found.append(dict(reversed([*zip(headings, line, strict=True)])))
    return found


def shares(page: pathlib.Path) -> dict[tuple[str, str], list[float]]:
    """Speed as a share of the copy's, by layout and library, of each large shape."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows(page):
        if float(row["MB"]) < LARGE:
            continue
        for name in COLOURS:
            took = row["forward" if name == "batchnorm" else name]
            key = (f"channels {row['channels']}", name)
            found.setdefault(key, []).append(float(row["copy"]) / float(took))
    return found


def draw(page: pathlib.Path, output: pathlib.Path) -> None:
    """Draw a bar for each median, and a dot for each shape."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    found = shares(page)
    for place, (key, values) in enumerate(reversed(found.items())):
        colour = COLOURS[key[1]]
        axes.barh(place, statistics.median(values), color=colour, alpha=0.8)
        axes.plot(values, [place] * len(values), ".", color="black", markersize=4)
    axes.set_yticks(range(len(found)), [f"{name}, {layout}" for layout, name in reversed(found)])
    axes.axvline(1, color="black", linewidth=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("speed of a copy of the same bytes")
    axes.set_title("Training forward pass, float32, arrays of 25 to 103 MB", fontsize="medium")
    figure.savefig(output, dpi=160)
