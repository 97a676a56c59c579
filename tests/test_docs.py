"""Documentation that runs: every Python block, the docstrings' examples, the README's tables."""

import doctest
import importlib
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    page for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")] if "_build" not in page.parts
)
NEEDS = {"lazy.md": ("jax", "dask", "ndonnx", "onnxruntime")}


def blocks(page, language):
    """The code blocks of a page, each with blank lines before it so that line numbers are the page's."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield "\n" * (text[: found.start()].count("\n") + 1) + found.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks(page):
    for module in NEEDS.get(page.name, ()):
        pytest.importorskip(module)
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", ["batchnorm.layer", "batchnorm.folding"])
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_has_the_table():
    sys.path.insert(0, str(ROOT / "docs"))
    import tables

    assert tables.support() in (ROOT / "README.md").read_text()


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_page_says_how_long_the_kernels_are():
    lines = len((ROOT / "src/batchnorm/kernels/generic.py").read_text().splitlines())
    assert f"[{lines} lines]" in (ROOT / "README.md").read_text()
