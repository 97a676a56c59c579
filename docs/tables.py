"""Tables of the documentation and the README, from the tables in the code."""

from __future__ import annotations

import itertools
import pathlib
import sys
from collections.abc import Iterable, Sequence

from batchnorm.capabilities import GAPS, LIBRARIES, OPERATIONS, works
from batchnorm.layout import FLOATS
from batchnorm.presets import PRESETS


def markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def support() -> str:
    """Library x device: dtypes that work, and operations that do not."""
    rows = []
    for name, library in LIBRARIES.items():
        for device in library.devices:
            dtypes, operations = works(name, device)
            shown = "all" if len(dtypes) == len(FLOATS) else ", ".join(dtypes)
            lacking = [f"`{op}`" for op in OPERATIONS if op not in operations]
            rows.append([name, device, shown, ", ".join(lacking) or "none", library.note])
    return markdown(["library", "device or mode", "dtypes", "does not work", "note"], rows)


def gaps() -> str:
    """What does not work, and why."""
    rows = [(g.library, g.device, g.dtype, g.operation, g.why) for g in GAPS]
    return markdown(["library", "device", "dtype", "operation", "why"], rows)


def conventions() -> str:
    """The frameworks' defaults in this package's terms."""
    rows = [
        (f"`{name}`", p.layer, p.axis, f"{p.eps:g}", f"{p.momentum:g}", p.correction, p.theirs)
        for name, p in PRESETS.items()
    ]
    headings = ["`like`", "layer", "`axis`", "`eps`", "`momentum`", "`correction`", "its own words"]
    return markdown(headings, rows)


def across() -> str:
    """What airspeed velocity measured across libraries: a table for each pass."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "asv_benchmarks"))
    import series

    name = "across.Across.track_copies"
    runs = [run for run in series.iter_results(str(series.RESULTS)) if name in run.get_all_result_keys()]
    if not runs:
        return "Not measured yet.\n"
    run = max(runs, key=lambda run: run.date)
    found = series.values_of(run, name)
    libraries, backends, shapes, passes = (list(dict.fromkeys(v)) for v in zip(*found, strict=True))
    machine = run.params.get("cpu", run.params["machine"])
    parts = [f"Commit `{run.commit_hash[:7]}`, {run.params.get('num_cpu', '?')} cores of {machine}.\n"]
    for which in passes:
        rows = []
        for library, shape in itertools.product(libraries, shapes):
            cells = [found.get((library, backend, shape, which)) for backend in backends]
            if any(cells):
                rows.append([library, shape, *("" if v is None else f"{v:.3g}" for v in cells)])
        parts += [f"### {which.capitalize()} pass\n", markdown(["arrays of", "shape", *backends], rows)]
    return "\n".join(parts)


def write(folder: pathlib.Path) -> None:
    """Write each table to a file that pages include."""
    folder.mkdir(exist_ok=True)
    for table in (support, gaps, conventions, across):
        (folder / f"{table.__name__}.md").write_text(table())


if __name__ == "__main__":
    print(support())
