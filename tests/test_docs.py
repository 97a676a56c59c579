"""Documentation that runs: every block of code, the docstrings' examples, the tables, the links."""

import contextlib
import doctest
import importlib
import io
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    if not {"_build", "generated"} & set(page.relative_to(ROOT).parts)
)
NEEDS = {
    "lazy.md": ("jax", "dask", "ndonnx", "onnxruntime"),
    "dask.md": ("dask", "zarr"),
    "distributed.md": ("jax",),
    "jax.md": ("jax", "flax"),
    "pytorch.md": ("torch",),
    "checkpoints.md": ("onnx",),
    "tutorial.md": ("sklearn",),
}
LANGUAGES = {"python", "sh", "yaml", "text", "toctree", "eval-rst", "image", "include"}


def named(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The code blocks of a page, each with blank lines before it so that line numbers are the page's."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * (text[: found.start()].count("\n") + 1) + found.group(1)


def program(block):
    """The file name of a block that is a program of its own, which its first line tells; or None."""
    found = re.match(r"# (\w+\.py)\n", block.lstrip("\n"))
    return found and found.group(1)


@pytest.fixture(autouse=True)
def settings_of_a_reader(monkeypatch):
    """No kernels asked for; and those that a page adds are gone after it."""
    from batchnorm.backends import dispatch as kernels

    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._from_environment.cache_clear()
    monkeypatch.setattr(kernels, "_added", ())
    yield
    monkeypatch.undo()
    kernels._from_environment.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_of_a_kind_that_is_tested(page):
    opened = re.findall(r"^ *(?:```|~~~)(.*)$", page.read_text(), re.MULTILINE)[::2]
    assert {line.strip("{} ").partition("}")[0] for line in opened} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_blocks(page, tmp_path, monkeypatch):
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(page, "python"):
        if program(block) is None:
            exec(compile(block, str(page), "exec"), namespace)


PROGRAMS = {
    program(block): block for page in PAGES for block in blocks(page, "python") if program(block)
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "gloo" in n else ()) for n in PROGRAMS]
)
def test_programs(name, tmp_path):
    """Programs of several processes, with the launchers that their pages name."""
    pytest.importorskip("torch" if "torchrun" in launchers()[name] else "mpi4py")
    (tmp_path / name).write_text(PROGRAMS[name])
    launcher, *arguments = shlex.split(launchers()[name])
    scripts = pathlib.Path(sys.executable).parent
    path = os.pathsep.join([str(scripts), os.environ["PATH"]])
    found = shutil.which(launcher, path=path)
    if found is None:
        pytest.skip(f"{launcher} is not installed")
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "BATCHNORM_KERNELS": "numpy"}
    members = subprocess.Popen(
        [found, *arguments],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said, _ = members.communicate(timeout=120)
    finally:
        if members.poll() is None:  # what a launcher has started does not end with it
            os.killpg(members.pid, signal.SIGKILL)
    assert members.returncode == 0, said


def launchers():
    """The command that starts each program."""
    return {line.split()[-1]: line for _, line in COMMANDS if line.split()[-1] in PROGRAMS}


def commands(page):
    """The lines of its shell blocks, one for each command, and of its CI's steps."""
    for block in blocks(page, "sh"):
        for line in block.strip().splitlines():
            yield from re.split(r" && ", line.partition("  #")[0].strip())
    for block in blocks(page, "yaml"):
        yield from re.findall(r"^- run: (.*)$", block, re.MULTILINE)


COMMANDS = [(page, line) for page in PAGES for line in commands(page)]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda a: a if isinstance(a, str) else named(a))
def test_shell_commands(page, line):
    """Of each command, what makes it a right one; the long ones run elsewhere (see TOOLS)."""
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    tool = pathlib.Path(words[0]).name
    if tool.startswith("python"):
        tool = words[2] if words[1] == "-m" else "script"
    assert tool in TOOLS, f"nothing checks {line!r}"
    TOOLS[tool](words)


def installs(words):
    """pip install: the extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        for names in re.findall(r"(?:^\.|batchnorm)\[([^]]*)\]", word):
            assert set(names.split(",")) <= set(extras), word


def of_this_package(words):
    """python -m batchnorm: the options exist. test_cli.py, test_bench.py and test_audit.py run it."""
    from batchnorm.__main__ import main

    said = io.StringIO()
    given = words[words.index("batchnorm") + 1 :]
    option = "--json" if given[0] == "audit" else "--output"
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit):
        main([*given, option, "no folder/x"])
    assert f"{option}: no folder" in said.getvalue()  # what is looked at after all other options


def is_there(words):
    """A file or folder of this repository: test_gpu.py and others run the scripts."""
    assert (ROOT / words[0 if len(words) == 1 or words[0].startswith("tools") else 1]).exists(), words


def history_takes(words):
    """The options exist; a commit is named by what any clone has. test_history.py runs the command."""
    assert (ROOT / words[0]).exists()
    help_text = subprocess.run(
        [sys.executable, ROOT / words[0], "--help"], capture_output=True, text=True
    )
    for word in words[1:]:
        assert word.startswith("HEAD") or word in help_text.stdout, word


def is_run_elsewhere(words):
    """By the gate, by test_suite.py, test_programs and test_own_kernels; asv by hand, for minutes."""


TOOLS = {
    "pip": installs,
    "batchnorm": of_this_package,
    "cd": is_there,
    "script": is_there,
    "gpu_check.sh": is_there,
    "history": history_takes,
    **dict.fromkeys(
        ("asv", "cmake", "linkchecker", "mpiexec", "mypy", "pre-commit", "pytest"), is_run_elsewhere
    ),
    **dict.fromkeys(("sphinx-build", "torchrun", "venv"), is_run_elsewhere),
}


@pytest.mark.slow
def test_own_kernels(tmp_path):
    """The backend of the how-to passes the suite, as the how-to says."""
    page = ROOT / "docs" / "howto" / "backends.md"
    made = "\n".join([*blocks(page, "python"), "from numpy import __array_namespace_info__, zeros"])
    (tmp_path / "my_backend.py").write_text(made)
    command = [sys.executable, "-m", "pytest", "--pyargs", "batchnorm.testing", "-q", "-m", "not large"]
    command += ["--array-library", "my_backend", "-p", "no:cacheprovider", "-k", "float64"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40


@pytest.mark.parametrize("name", ["batchnorm.layer", "batchnorm.folding"])
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_has_the_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import tables

    assert tables.support() in (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    made = {"why"}  # by the gallery; the built site's links are checked as a whole
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            path = page.parent / target
            if path.parent.name in made:
                path = ROOT / "docs" / "gallery" / path.name.replace("index.rst", "GALLERY_HEADER.rst")
                path = path.with_suffix(".py") if path.name != "GALLERY_HEADER.rst" else path
            assert path.exists(), f"{page.name}: {target}"


def test_the_landing_page_s_chart_is_of_the_table(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import chart

    page = ROOT / "docs" / "performance.md"
    first = next(
        line for line in page.read_text().splitlines() if line.startswith("| 32×64×112×112 | s")
    )
    _, _, _, _, ours, pytorch, copy, *_ = (cell.strip() for cell in first.split("|"))
    shares = chart.shares(page)
    assert shares["channels second", "batchnorm"][0] == float(copy) / float(ours)
    assert shares["channels second", "PyTorch"][0] == float(copy) / float(pytorch)
    assert {len(values) for values in shares.values()} == {9}


def test_the_page_says_how_long_the_kernels_are():
    lines = len((ROOT / "src/batchnorm/backends/generic.py").read_text().splitlines())
    assert f"[{lines} lines]" in (ROOT / "README.md").read_text()
