"""A million merges, in random trees, against exact arithmetic."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs" / "examples"))
import million_merges


@pytest.mark.parametrize("shape", million_merges.SHAPES)
def test_a_million_merges(shape):
    """Mean and variance within 1e-14."""
    mean, var, depth = million_merges.errors(shape, 1_000_000)
    assert max(mean, var) * million_merges.EPS < 1e-14
    assert depth >= 20


@pytest.mark.parametrize("shape", million_merges.SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_trees_hold_each_part_once(shape, count):
    import numpy as np

    parent = million_merges.SHAPES[shape](count, np.random.default_rng(0))
    (root,) = np.flatnonzero(parent == np.arange(2 * count - 1))
    children = np.bincount(np.delete(parent, root), minlength=2 * count - 1)
    assert not children[:count].any()
    assert (children[count:] == 2).all()
