"""Tables of the documentation and the README, from the tables in the code."""

from __future__ import annotations

import datetime
import itertools
import json
import pathlib
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


def over_time() -> str:
    """What airspeed velocity measured: a table for each benchmark, a column for each run."""
    from asv.results import iter_results

    folder = pathlib.Path(__file__).parents[1] / "asv_benchmarks" / "results"
    units = json.loads((folder / "benchmarks.json").read_text())
    runs = sorted(iter_results(str(folder)), key=lambda run: run.date)
    days = [datetime.datetime.fromtimestamp(run.date / 1000, datetime.UTC).date() for run in runs]
    found: dict[str, dict[str, list[str]]] = {}
    for i, run in enumerate(runs):
        for name in sorted(run.get_all_result_keys()):
            parameters = run.get_result_params(name)
            values = run.get_result_value(name, parameters)
            for case, value in zip(itertools.product(*parameters), values, strict=True):
                words = ", ".join(word.strip("'") for word in case)
                row = found.setdefault(name, {}).setdefault(words, [""] * len(runs))
                unit = units.get(name, {}).get("unit", "")
                row[i] = "failed" if value is None else f"{value:.3g} {unit}"
    commits = [f"`{run.commit_hash[:7]}`" for run in runs]
    machines = [
        (c, day, run.params.get("cpu", run.params["machine"]))
        for c, day, run in zip(commits, days, runs, strict=True)
    ]
    parts = [markdown(["commit", "day", "machine"], machines)]
    for name, rows in found.items():
        parts += [f"## {name}\n", markdown(["", *commits], [(w, *row) for w, row in rows.items()])]
    return "\n".join(parts)


def write(folder: pathlib.Path) -> None:
    """Write each table to a file that pages include."""
    folder.mkdir(exist_ok=True)
    for table in (support, gaps, conventions, over_time):
        (folder / f"{table.__name__}.md").write_text(table())


if __name__ == "__main__":
    print(support())
