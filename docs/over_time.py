"""The page on speed over time: charts and tables of what `asv_benchmarks/history` measured."""

from __future__ import annotations

import pathlib
import sys
import textwrap

from matplotlib.figure import Figure
from tables import markdown

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "asv_benchmarks"))
import series

PASSES = ("forward", "backward", "inference")
COLOURS = {"slower": "tab:red", "faster": "tab:green"}
BACKENDS = {"compiled": "compiled code", "numpy": "NumPy alone"}


def commits_of(cases: series.Series) -> list[str]:
    """All commits of a machine, in their order; a combination may lack some."""
    found = {point.commit for points in cases.values() for point in points}
    known = [commit for commit in series.subjects() if commit in found]
    return known + sorted(found.difference(known))


def draw(cases: series.Series, which: str, output: pathlib.Path) -> None:
    """Draw a small chart for each shape class and backend of a pass, with commits along the x axis."""
    order, names = commits_of(cases), series.subjects()
    shapes = list(dict.fromkeys(shape for _, shape, _ in cases))
    figure = Figure(figsize=(9, 1.5 * len(shapes) + 2.4), layout="constrained")
    backends = [backend for backend in BACKENDS if any(case[0] == backend for case in cases)]
    grid = figure.subplots(len(shapes), len(backends), sharex=True, squeeze=False)
    for axes, shape in zip(grid, shapes, strict=True):
        for chart, backend in zip(axes, backends, strict=True):
            points = cases.get((backend, shape, which), [])
            places = [order.index(point.commit) for point in points]
            chart.plot(places, [point.value for point in points], "o-", markersize=3, linewidth=1)
            for step in series.steps(points) if points else []:
                colour = COLOURS[step.verdict]
                place = order.index(step.commit) - 0.5
                chart.axvline(place, color=colour, linewidth=1)
                chart.annotate(
                    f"{step.commit[:7]}: {step.before:.2g} to {step.after:.2g}",
                    (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -9),
                    textcoords="offset points", fontsize=7, color=colour,
                )  # fmt: skip
            chart.axhline(1, color="0.7", linewidth=0.8)
            chart.set_ylim(0, 1.3 * max((point.value for point in points), default=1))
            chart.set_title(f"{shape}, {BACKENDS[backend]}", fontsize=8)
            chart.tick_params(labelsize=7)
    labels = [f"{c[:7]} {textwrap.shorten(names.get(c, ''), 36, placeholder=' …')}" for c in order]
    for chart in grid[-1]:
        chart.set_xticks(range(len(order)), labels, rotation=90, fontsize=6)
    figure.supylabel(f"{which} pass, in copies of the same bytes", fontsize=8)
    figure.savefig(output, metadata={"Date": None})


def steps(cases: series.Series) -> str:
    """A row for each step that asv detects."""
    names, rows = series.subjects(), []
    for (backend, shape, which), points in cases.items():
        for step in series.steps(points):
            ratio = f"{step.before:.3g} to {step.after:.3g} copies"
            since = f"`{step.commit[:7]}` {names.get(step.commit, '')}"
            rows.append([since, which, shape, BACKENDS[backend], ratio, step.verdict])
    if not rows:
        return "asv detects no steps.\n"
    order = commits_of(cases)
    rows.sort(key=lambda row: [c[:7] for c in order].index(row[0][1:8]))
    return markdown(["since", "pass", "shape", "backend", "from, to", ""], rows)


def write(folder: pathlib.Path) -> None:
    """Write the part of the page that is made, and its pictures."""
    parts, names = [], series.subjects()
    for number, (machine, cases) in enumerate(series.measured().items()):
        rows = [(f"`{c[:7]}`", names.get(c, "")) for c in commits_of(cases)]
        parts.append(f"## On {machine}\n")
        for which in PASSES:
            if not any(case[2] == which for case in cases):
                continue
            file = f"over-time-{number}-{which}.svg"
            draw(cases, which, folder / file)
            words = f"The {which} pass over commits, in copies, for each shape and backend"
            parts.append(f"![{words}](generated/{file})\n")
        parts += ["### Steps\n", steps(cases), "### Commits\n", markdown(["commit", "subject"], rows)]
    (folder / "over_time.md").write_text("\n".join(parts))
