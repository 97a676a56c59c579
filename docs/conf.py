"""Sphinx configuration; it also writes the tables that come from the code."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tables

import batchnorm

project = "batchnorm"
author = "The batchnorm developers"
project_copyright = "2026, the batchnorm developers"
version = release = batchnorm.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
default_role = "code"
exclude_patterns = ["_build", "generated", "examples"]
html_theme = "furo"
html_title = f"batchnorm {version}"

# The benchmarks' pages, as airspeed velocity makes them from the results in the repository.
html_extra_path = ["generated/extra"]

tables.benchmark_pages(pathlib.Path(__file__).parent / "generated" / "extra" / "benchmarks")
tables.write(pathlib.Path(__file__).parent / "generated")
