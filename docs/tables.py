"""Tables of the documentation and the README, from the tables in the code."""

from __future__ import annotations

import pathlib
import subprocess
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


def benchmark_pages(folder: pathlib.Path) -> None:
    """Let airspeed velocity make its pages from the results in the repository."""
    suite = pathlib.Path(__file__).parents[1] / "asv_benchmarks"
    command = [sys.executable, "-m", "asv", "publish", "--html-dir", str(folder.resolve())]
    subprocess.run(command, cwd=suite, check=True, stdout=subprocess.DEVNULL)


def write(folder: pathlib.Path) -> None:
    """Write each table to a file that pages include."""
    folder.mkdir(exist_ok=True)
    for table in (support, gaps, conventions):
        (folder / f"{table.__name__}.md").write_text(table())


if __name__ == "__main__":
    print(support())
