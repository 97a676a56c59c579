"""Sphinx configuration; it also writes the tables that come from the code."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import audited
import chart
import on_gpu
import over_time
import tables

import batchnorm

project = "batchnorm"
author = "The batchnorm developers"
project_copyright = "2026, the batchnorm developers"
version = release = batchnorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx-mathjax-offline",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
default_role = "code"
exclude_patterns = ["_build", "generated", "examples", "gallery"]
html_theme = "furo"
html_title = f"batchnorm {version}"

# The gallery: its scripts run here, and their pages are in why/. Each has its claim as a title.
GALLERY = (
    "deep_chains",
    "saturation",
    "drifting_bias",
    "subsumed_bias",
    "no_undoing",
    "without_gamma_and_beta",
    "alternatives",
    "covariate_shift",
    "train_and_test",
)


def place(filename: str) -> int:
    """Where a script stands in the gallery."""
    return GALLERY.index(filename.removesuffix(".py"))


sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "why",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "conf.place",
    "copyfile_regex": "",
    "image_scrapers": ("matplotlib",),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "abort_on_example_error": True,
    "backreferences_dir": None,
}

html_favicon = "favicon.svg"

tables.write(pathlib.Path(__file__).parent / "generated")
audited.write(pathlib.Path(__file__).parent / "generated")
over_time.write(pathlib.Path(__file__).parent / "generated")
on_gpu.write(pathlib.Path(__file__).parent / "generated")
chart.draw(
    pathlib.Path(__file__).parent / "performance.md",
    pathlib.Path(__file__).parent / "generated" / "speed.png",
)
