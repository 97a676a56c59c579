"""The package: what an import loads, what a user imports, what the wheel holds."""

import ast
import importlib
import inspect
import json
import pathlib
import subprocess
import sys
import zipfile

import pytest

import batchnorm as bn

ROOT = pathlib.Path(__file__).parents[1]
OPTIONAL = ("cupy", "dask", "jax", "matplotlib", "ndonnx", "numba", "rich", "sklearn", "torch")


def test_import_loads_no_array_library():
    code = "import sys, json, batchnorm; print(json.dumps(sorted(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    roots = {name.partition(".")[0] for name in json.loads(loaded.stdout)}
    assert roots.isdisjoint({*OPTIONAL, "numpy", "pytest"})


def test_public_names():
    for name in bn.__all__:
        assert inspect.getdoc(getattr(bn, name)), name


def test_imports_point_one_way():
    """layer -> functional -> groups -> kernels -> checks -> layout; and beside them, in this order."""
    order = [
        "layout",
        "checks",
        "threads",
        "outputs",
        "moments",
        "kernels",
        "vectors",
        "groups",
        "distributed",
        "functional",
        "folding",
        "state",
        "layer",
        "recalibration",
        "files",
        "checkpoints",
        "__init__",
    ]
    source = ROOT / "src" / "batchnorm"
    for height, room in enumerate(order):
        path = source / room
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("batchnorm."):
                    imported = node.module.split(".")[1]
                    if imported in order and imported != room:
                        assert order.index(imported) < height, f"{file.name} imports {imported}"


def test_generic_kernels_ask_no_array_and_write_to_none():
    tree = ast.parse((ROOT / "src/batchnorm/backends/generic.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AugAssign), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert not any(isinstance(target, ast.Subscript) for target in node.targets)
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("bool", "any", "all")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (found,) = folder.glob("*.whl")
    return found


def test_wheel(wheel):
    assert wheel.name == f"batchnorm-{bn.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (
        "py.typed",
        "testing/conftest.py",
        "testing/nist/nist.npz",
        "backends/generic.py",
        "backends/cuda/tasks.cu",
    ):
        assert f"batchnorm/{file}" in names
    assert not [n for n in names if n.startswith(("tests", "docs"))]
    metadata = zipfile.ZipFile(wheel).read(f"batchnorm-{bn.__version__}.dist-info/METADATA").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    plain = sorted(line.split()[1].partition(">")[0] for line in needed if "extra" not in line)
    assert plain == ["array-api-compat", "numpy"]
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    wanted = {"numba", "cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "dask", "safetensors", "mpi"}
    wanted |= {"demo", "docs", "test"}
    assert extras == wanted


def test_the_layer_can_be_copied_and_pickled():
    import copy
    import pickle

    import numpy as np

    layer = bn.BatchNorm(3)
    layer(np.arange(12.0).reshape(4, 3))
    layer.update()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(twin.running_mean, layer.running_mean)
        assert twin.num_batches_tracked == 1


def test_versions_agree():
    assert f"## {bn.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert importlib.metadata.version("batchnorm") == bn.__version__
