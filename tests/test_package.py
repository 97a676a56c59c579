"""The package: what an import loads, what a user imports, what the wheel holds."""

import ast
import graphlib
import importlib
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import batchnorm as bn

ROOT = pathlib.Path(__file__).parents[1]
OPTIONAL = ("cupy", "dask", "jax", "matplotlib", "ndonnx", "rich", "sklearn", "torch")


def test_import_loads_no_array_library():
    code = "import sys, json, batchnorm; print(json.dumps(sorted(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    roots = {name.partition(".")[0] for name in json.loads(loaded.stdout)}
    assert roots.isdisjoint({*OPTIONAL, "numpy", "pytest"})


def test_public_names():
    for name in bn.__all__:
        assert inspect.getdoc(getattr(bn, name)), name


SOURCE = ROOT / "src" / "batchnorm"


def modules():
    """Every module of the package, by its name below `batchnorm`; the package itself by its own."""
    found = {}
    for file in SOURCE.rglob("*.py"):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "batchnorm"] = file
    return found


def imports(name, file, known):
    """What a module imports from this package, anywhere in it, relatively too; and by a string."""
    here = ("batchnorm." if name != "batchnorm" else "") + name
    package = here if file.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        full = []
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            full = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            text = ast.unparse(node.args[0])
            if "batchnorm" in text and name != "frameworks":
                raise AssertionError(f"{name} imports {text} by name, past frameworks.load")
        for path in full:
            if path.partition(".")[0] == "batchnorm" and path != "batchnorm._core":  # which is compiled
                below = path.removeprefix("batchnorm").lstrip(".") or "batchnorm"
                while below not in known and "." in below:
                    below = below.rpartition(".")[0]
                yield below if below in known else "batchnorm"


def order():
    """The lines of the list in CONTRIBUTING, the uppermost first."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("## Where things are")[2]
    lines = re.findall(r"^\d+\. ((?:`[\w.]+`(?:, )?)+)", section, re.M)
    return [re.findall(r"`([\w.]+)`", line) for line in lines]


def check_imports(edges, lines):
    """Fail on an import that points up or sideways in a list, on a cycle, and on an unknown module."""
    height = {room: i for i, line in enumerate(lines) for room in line}

    def room(name):
        while name not in height:
            assert "." in name, f"{name} is missing in the list of CONTRIBUTING"
            name = name.rpartition(".")[0]
        return name

    for name, imported in edges.items():
        for other in imported - {name}:
            if name == "backends" or (other == "backends" and name.startswith("backends.")):
                continue  # a package's own page, which imports nothing
            mine, theirs = room(name), room(other)
            assert mine == theirs or height[mine] < height[theirs], f"{name} imports {other}"
    tuple(graphlib.TopologicalSorter(edges).static_order())  # raises for a cycle


def test_imports_point_one_way():
    """As the list in CONTRIBUTING has it: at the top of modules, inside functions, and relatively."""
    known = modules()
    edges = {name: set(imports(name, file, known)) - {name} for name, file in known.items()}
    assert not edges.pop("backends")
    check_imports(edges, order())


@pytest.mark.parametrize(
    ("name", "line", "text"),
    [
        ("errors", "from batchnorm.functional import batch_norm", "errors imports functional"),
        ("layout", "def f():\n    from . import layer", "layout imports layer"),
        ("backends.base", "def f():\n    from .dispatch import NAMES", "base imports backends.dispatch"),
        ("moments", "import importlib\nimportlib.import_module('batchnorm.layer')", "past frameworks"),
        ("torch.shapes", "from batchnorm.torch import operators", None),
    ],
)
def test_a_planted_import_is_found(tmp_path, name, line, text):
    known = modules()
    planted = tmp_path / "planted.py"
    planted.write_text(f"{known[name].read_text()}\n{line}\n")
    error = graphlib.CycleError if text is None else AssertionError
    known[name] = planted
    with pytest.raises(error, match=text):
        check_imports({n: set(imports(n, file, known)) - {n} for n, file in known.items()}, order())


def test_generic_kernels_ask_no_array_and_write_to_none():
    tree = ast.parse((ROOT / "src/batchnorm/backends/generic.py").read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AugAssign), ast.unparse(node)
        if isinstance(node, ast.Assign):
            assert not any(isinstance(target, ast.Subscript) for target in node.targets)
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in ("bool", "any", "all")


def built(folder, **environment):
    """A wheel of this repository, and what its build printed."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", str(folder), str(ROOT)]
    environment = {**os.environ, **environment}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=600, env=environment
    )
    (found,) = folder.glob("*.whl")
    return found, done.stdout + done.stderr


def test_wheel_without_the_core(tmp_path):
    """It has no platform, and no core that a developer built beside the sources."""
    wheel, printed = built(tmp_path, BATCHNORM_NATIVE="0")
    assert wheel.name == f"batchnorm-{bn.__version__}-py3-none-any.whl"
    assert "built without its compiled core" in printed
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [n for n in names if "_core" in n]
    for file in (
        "py.typed",
        "backends/coefficients.h",
        "testing/conftest.py",
        "testing/nist/nist.npz",
        "backends/generic.py",
        "backends/activations.h",
        "backends/cuda/tasks.cu",
        "audit/peers/torch.py",
    ):
        assert f"batchnorm/{file}" in names
    assert not [n for n in names if n.startswith(("tests", "docs", "native"))]
    metadata = zipfile.ZipFile(wheel).read(f"batchnorm-{bn.__version__}.dist-info/METADATA").decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    plain = sorted(line.split()[1].partition(">")[0] for line in needed if "extra" not in line)
    assert plain == ["array-api-compat", "numpy"]
    extras = {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    wanted = {"cupy-cuda12x", "cupy-cuda13x", "torch", "jax", "dask", "safetensors", "mpi"}
    wanted |= {"demo", "docs", "test"}
    assert extras == wanted


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a compiler that fails is called false")
def test_wheel_where_the_compiler_fails(tmp_path):
    """The same, and the build says so; or it fails, where the core is demanded."""
    broken = {"CC": "false", "CXX": "false"}
    wheel, printed = built(tmp_path, **broken, BATCHNORM_NATIVE="")
    assert wheel.name == f"batchnorm-{bn.__version__}-py3-none-any.whl"
    assert "built WITHOUT its compiled core" in printed
    with pytest.raises(subprocess.CalledProcessError):
        built(tmp_path, **broken, BATCHNORM_NATIVE="1")


def test_other_systems_compile_with_the_same_options():
    """Those of CMakeLists.txt, in .ci/cross."""
    cross = (ROOT / ".ci" / "cross").read_text()
    options = re.findall(r"\s(-[mf][\w.=-]+)", (ROOT / "CMakeLists.txt").read_text())
    assert len(options) > 10
    assert [o for o in options if o not in cross] == []


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
