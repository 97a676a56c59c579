"""Use the package as it is installed: the README's first example, on every array library that is there.

python tools/as_installed.py [LIBRARY ...]

Fails where a named library (numpy, torch, jax.numpy) is missing, or a result is not the textbook's.
"""

import importlib
import importlib.util
import pathlib
import re
import sys

import numpy as np

import batchnorm as bn

README = pathlib.Path(__file__).parents[1] / "README.md"
MADE = re.compile(r"^x = .*$", re.MULTILINE)


def example():
    """The first block of Python in the README."""
    return re.search(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL).group(1)


def run(library):
    """Run the example on the arrays of a library; the largest error."""
    module = importlib.import_module(library)
    line = MADE.search(example()).group(0)
    before = {"np": np, "bn": bn}
    exec(line, before)
    wide = before["x"].astype(np.float64)
    names = {"x": module.asarray(before["x"])}
    exec(MADE.sub("", example()), names)
    axes = (0, 2, 3)
    mean, var = wide.mean(axes, keepdims=True), wide.var(axes, keepdims=True)
    y = np.asarray(names["layer"].train()(names["x"]))
    found = np.asarray(names["y"]), y, np.asarray(names["stats"].mean).reshape(mean.shape)
    right = (wide - mean) / np.sqrt(var + 1e-5)
    assert type(names["dx"]) is type(names["x"]), f"{type(names['dx'])} for {type(names['x'])}"
    assert names["dx"].dtype == names["x"].dtype
    judged = zip(("y", "the layer's y", "mean"), found, (right, right, mean), strict=True)
    for what, got, expected in judged:
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=what)
    return float(abs(found[0] - right).max())


def main(libraries):
    """Run it on each, and say on what."""
    for library in libraries or ["numpy"]:
        error = run(library)
        kernels = bn.kernels_for(importlib.import_module(library).zeros((2, 2)))
        beside = [n for n in ("ml_dtypes", "torch", "jax") if importlib.util.find_spec(n)]
        print(f"{library}: off by {error:.1e}, on {kernels.name}; beside it: {beside or 'nothing'}")


if __name__ == "__main__":
    main(sys.argv[1:])
