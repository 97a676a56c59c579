"""The command ``python -m batchnorm``: demonstration, benchmark, audit, and list of array libraries."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from batchnorm import __version__, core, kernels_for
from batchnorm.capabilities import LIBRARIES

DEMO_LIBRARIES = ("numpy", "torch", "jax", "cupy")
BENCH_NEEDS = {"matplotlib": "demo", "rich": "demo"}
DEMO_NEEDS = {"matplotlib": "demo", "rich": "demo", "sklearn": "demo"}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit status."""
    parser = OneLineParser(prog="python -m batchnorm", description="Batch norm for any array library.")
    parser.add_argument("--version", action="version", version=f"batchnorm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,bench,audit,info}")

    demo = commands.add_parser("demo", help="train the paper's first experiment on handwritten digits")
    demo.add_argument("--array-library", choices=DEMO_LIBRARIES, default="numpy", help="default: numpy")
    demo.add_argument("--steps", type=_positive, default=4000, help="training steps (default: 4000)")
    demo.add_argument("--seed", type=_natural, default=0, help="of weights and batches (default: 0)")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("batchnorm-demo.png"),
        help="the picture (default: %(default)s)",
    )
    bench = commands.add_parser("bench", help="measure this machine: this package, its peers, a copy")
    bench.add_argument(
        "--gpu",
        action="store_true",
        help="measure an NVIDIA GPU: CuPy, PyTorch; the output is a .csv file",
    )
    bench.add_argument("--fused", action="store_true", help="with a residual and a ReLU after each norm")
    bench.add_argument("--all", action="store_true", help="all shapes of the published table (minutes)")
    bench.add_argument(
        "--output",
        type=Path,
        help="the chart (default: batchnorm-bench.png), or the table of --gpu (batchnorm-bench.csv)",
    )
    judge = commands.add_parser("audit", help="check the batch norms of frameworks, or your own")
    judge.add_argument(
        "peers",
        nargs="*",
        metavar="PEER",
        help="a name, or the path of an adapter (default: all that come with the package)",
    )
    judge.add_argument("--json", type=Path, metavar="FILE", help="write what was found to a .json file")
    judge.add_argument(
        "--limit", type=_seconds, default=60.0, help="seconds for each check (default: 60)"
    )
    commands.add_parser("info", help="list the array libraries found, and the kernels each would run")

    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        return info()
    if chosen.command == "audit":
        return _audit(judge, chosen.peers, chosen.json, chosen.limit)
    command, needed = (demo, DEMO_NEEDS) if chosen.command == "demo" else (bench, BENCH_NEEDS)
    if command is demo:
        needed = {**needed, chosen.array_library: LIBRARIES[chosen.array_library].extra}
    _need(command, needed)
    on_gpu = command is bench and chosen.gpu
    chosen.output = chosen.output or Path("batchnorm-bench.csv" if on_gpu else "batchnorm-bench.png")
    _need_writable(command, "--output", chosen.output, (".csv",) if on_gpu else (".png", ".pdf", ".svg"))

    if on_gpu and chosen.fused:
        command.error("argument --fused: not with --gpu")
    if on_gpu:
        from batchnorm.bench import gpu

        problem = gpu.missing()
        if problem is not None:
            command.error(f"argument --gpu: {problem}")
        return gpu.run(chosen.all, chosen.output)
    if command is bench:
        from batchnorm.bench import run as measure

        return measure(chosen.all, chosen.output, fused=chosen.fused)

    from batchnorm.demo import run

    return run(chosen.array_library, chosen.steps, chosen.seed, chosen.output)


def _audit(command: OneLineParser, peers: list[str], output: Path | None, limit: float) -> int:
    _need(command, {"rich": "demo"})
    from batchnorm import audit
    from batchnorm.audit.adapters import AdapterError, find

    if output is not None:
        _need_writable(command, "--json", output, (".json",))
    try:
        chosen = find(peers)
    except AdapterError as error:
        command.error(f"argument PEER: {error}")
    return audit.run(chosen, output, limit, named=bool(peers))


def _need(command: OneLineParser, modules: dict[str, str]) -> None:
    for module, extra in modules.items():
        if importlib.util.find_spec(module) is None:
            command.error(f"{module} is not installed: pip install 'batchnorm[{extra}]'")


def _need_writable(command: OneLineParser, option: str, path: Path, suffixes: tuple[str, ...]) -> None:
    if not path.parent.is_dir():
        command.error(f"argument {option}: no folder {path.parent}")
    if path.suffix.lower() not in suffixes:
        expected = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}" if suffixes[1:] else suffixes[0]
        command.error(f"argument {option}: got {path}, expected a {expected} file")
    problem = _write_error(path)
    if problem is not None:
        command.error(f"argument {option}: {path} cannot be written ({problem})")


def info() -> int:
    """Print a line on the compiled core, and one per array library of the capability table."""
    print(f"batchnorm {__version__}, Python {sys.version.split()[0]}")
    print(f"compiled core: {_core()}\n")
    print(f"{'library':18}{'version':14}kernels")
    for name, row in LIBRARIES.items():
        root = row.module.partition(".")[0]
        if importlib.util.find_spec(root) is None:
            print(f"{name:18}{'-':14}not installed")
            continue
        try:
            module = importlib.import_module(row.module)
            version = importlib.import_module(root).__version__
            kernels = kernels_for(module.zeros((2, 2)))
        except Exception as error:  # a broken installation, or a GPU library without a GPU
            reason = str(error).splitlines()[0] if str(error) else ""
            print(f"{name:18}{'-':14}cannot be used here: {type(error).__name__}: {reason}")
            continue
        print(f"{name:18}{version:14}{kernels.name}: {kernels.why}")
    return 0


def _core() -> str:
    """Return the instruction set that the core uses, or why it is not there."""
    native = core.load()
    if native is None:
        return f"not there ({core.missing()})"
    present, used = native.instruction_sets()
    return f"{used} (this processor has {', '.join(present)})"


def _positive(text: str) -> int:
    return _integer(text, 1)


def _natural(text: str) -> int:
    return _integer(text, 0)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of seconds above 0")
    return value


def _integer(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {low}")
    return value


def _write_error(path: Path) -> str | None:
    """Return why a file cannot be written, or None; the file is not changed."""
    path = path.resolve()  # the target of a link
    existed = path.exists()
    try:
        with path.open("ab"):
            pass
    except OSError as error:
        return error.strerror or type(error).__name__
    if not existed:
        path.unlink()
    return None


def interrupted(number: int, frame: Any) -> NoReturn:
    """Exit immediately after one line: threads and compilers of libraries would print many more."""
    cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # shows the cursor, which progress bars hide
    sys.stdout.flush()
    os.write(2, f"{cursor}\npython -m batchnorm: interrupted\n".encode())
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(main())
