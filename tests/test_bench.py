"""`python -m batchnorm bench`: its arithmetic on known times, and one small run of the whole."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.bench import cases, contestants, measure, report
from batchnorm.bench.measure import Time


def results():
    """Ours takes 1 ms (channels second) and 2 ms (last), the peer 8 ms and 4 ms, a copy half of ours."""
    found = []
    for layout, ours, theirs in (("second", 1e-3, 8e-3), ("last", 2e-3, 4e-3)):
        for which in cases.PASSES:
            for name, seconds in (("batchnorm (native)", ours), ("PyTorch", theirs), ("copy", ours / 2)):
                found.append(Time("MLP", layout, which, name, seconds, 1.0))
    return found


def test_ratios_at_the_same_and_at_the_peers_best_layout():
    lines = [" ".join(line.split()) for line in report.summary(results())]
    ours = "batchnorm (native) vs PyTorch"
    assert f"{ours} forward channels second 8.00 (8.00) 4.00 (4.00)" in lines
    assert f"{ours} backward channels last 2.00 (2.00) 2.00 (2.00)" in lines
    assert report.geometric([1.0, 4.0]) == pytest.approx(2)


def test_every_contestant_computes_the_same():
    for shape in ((6, 4, 5, 5), (40, 6)):
        for layout in cases.LAYOUTS:
            arrays = cases.case(shape, layout)
            axes = tuple(i for i in range(len(shape)) if i != arrays.axis % len(shape))
            x = arrays.x.astype(np.float64)
            scaled = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
            expected = scaled * np.expand_dims(arrays.gamma, axes) + np.expand_dims(arrays.beta, axes)
            for name in ("batchnorm (NumPy)", "batchnorm on PyTorch", "PyTorch", "textbook NumPy"):
                timed = contestants.CONTESTANTS[name].prepare(arrays, "forward")
                y = timed()
                y = np.asarray(y[0] if isinstance(y, tuple) else y)
                if name == "PyTorch" and layout == "last":
                    y = np.moveaxis(y, 1, -1)
                np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5, err_msg=name)


def test_every_contestant_adds_and_activates():
    for layout in cases.LAYOUTS:
        arrays = cases.case((6, 4, 5, 5), layout, fused=True)
        axes = tuple(i for i in range(4) if i != arrays.axis % 4)
        x, z, dy = (a.astype(np.float64) for a in (arrays.x, arrays.z, arrays.dy))
        rstd = 1 / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
        gamma, beta = (np.expand_dims(v, axes) for v in (arrays.gamma, arrays.beta))
        hat = (x - x.mean(axes, keepdims=True)) * rstd
        y = np.maximum(gamma * hat + beta + z, 0)
        g = dy * (y > 0)
        through = g.mean(axes, keepdims=True) + hat * (g * hat).mean(axes, keepdims=True)
        right = {"forward": y, "backward": gamma * rstd * (g - through)}
        ours = ("batchnorm (native)", "batchnorm, add, ReLU", "batchnorm on PyTorch", "batchnorm on JAX")
        for name in (*ours, "PyTorch"):
            for which, expected in right.items():
                found = contestants.CONTESTANTS[name].prepare(arrays, which)()
                while isinstance(found, tuple):
                    found = found[0]
                found = np.asarray(found)
                if name == "PyTorch" and layout == "last":
                    found = np.moveaxis(found, 1, -1)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.filterwarnings("ignore")  # the peers' own, at their import
def test_the_whole_in_small(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "FEW", ("MLP, small",))
    found = contestants.present()
    few = {name: found[name] for name in ("batchnorm (NumPy)", "PyTorch", "copy")}
    monkeypatch.setattr(report, "present", lambda: few)
    monkeypatch.setattr(measure, "PAUSE_SECONDS", 0.0)
    asked = bn.get_kernels()
    assert report.run(False, tmp_path / "chart.png") == 0
    assert bn.get_kernels() == asked
    printed = capsys.readouterr().out
    assert "64 x 100" in printed
    assert "times as fast" in printed
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
