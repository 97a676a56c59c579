"""The GPU benchmark without a GPU: contestants on a CPU, and the summary of given times."""

import csv
import importlib
import pathlib

import pytest

from batchnorm.__main__ import main
from batchnorm.backends.cuda import devices as kernels
from batchnorm.bench import gpu
from batchnorm.bench.gpu import Result


@pytest.mark.parametrize("layout", ["second", "last"])
@pytest.mark.parametrize("which", gpu.PASSES)
def test_contestants_compute_the_same(layout, which):
    (case,) = gpu.cases((6, 4, 5, 5), layout, "float32", "cpu", 1)
    for name in ("batchnorm on PyTorch", "PyTorch"):
        result = gpu.CONTESTANTS[name](case, which)()
        assert gpu.error(result, case, which) < 20
    assert gpu.error(case.x, case, which) > 1e4, "a wrong result has a large error"


def test_strides_follow_the_layout():
    (case,) = gpu.cases((6, 4, 5, 5), "last", "float16", "cpu", 1)
    assert case.x.shape == (6, 4, 5, 5)
    assert case.x.stride() == (100, 1, 20, 4)


def test_the_summary():
    """The package takes 1 ms, PyTorch 2 ms, cuDNN 1.5 ms and a copy 0.6 ms."""
    seconds = {"batchnorm on CuPy": 1e-3, "PyTorch": 2e-3, "PyTorch, cuDNN": 1.5e-3, "copy": 0.6e-3}
    results = [
        Result("8 x 4", layout, dtype, which, name, s, 100.0, 1.0)
        for layout in ("second", "last")
        for dtype in gpu.DTYPES
        for which in ("forward", "backward")
        for name, s in seconds.items()
    ]
    lines = [" ".join(line.split()) for line in gpu.summary(results, 60.0)]
    assert "batchnorm on CuPy forward float32 second 1.50 (1.50, 100.0) 0.90 (0.90) 1.00, 1" in lines
    assert "batchnorm on CuPy backward float16 last 1.50 (1.50, 100.0) 1.50 (1.50) 1.00, 1" in lines
    assert len(lines) == 2 + 8


def test_shapes_have_both_batch_sizes():
    found = list(gpu.shapes())
    assert len(found) == len(set(found))
    assert (32, 64, 112, 112) in found
    assert (256, 64, 112, 112) in found


@pytest.mark.skipif(kernels.unusable() is None, reason="there is a GPU")
def test_without_a_gpu_there_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--gpu"])
    assert "argument --gpu: " in capsys.readouterr().err


def test_the_output_must_be_a_csv_file(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["bench", "--gpu", "--output", str(tmp_path / "a.png")])
    assert "expected a .csv file" in capsys.readouterr().err


def test_a_table_and_charts_are_made_of_the_file(tmp_path, monkeypatch):
    """What `gpu.run` writes, of given times: 1.5 times the better peer, and the floor's share."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "docs"))
    on_gpu = importlib.import_module("on_gpu")
    seconds = {"batchnorm on CuPy": 1e-3, "PyTorch": 2e-3, "PyTorch, cuDNN": 1.5e-3, "copy": 0.6e-3}
    with (tmp_path / "gpu.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*Result._fields, "device", "cache"))
        for which in gpu.PASSES:
            for name, s in seconds.items():
                given = ("8 x 4", "second", "float32", which, name, s, 100.0, 1.0)
                writer.writerow((*given, "A device, PyTorch 2", 60.0))
    on_gpu.write(tmp_path, tmp_path / "gpu.csv")
    page = (tmp_path / "on_gpu.md").read_text()
    assert "A device, PyTorch 2, 60 MB of second-level cache" in page
    assert "| batchnorm on CuPy | forward | float32 | second | 1.50 (1.50) | 0.90 |" in page
    assert "| batchnorm on CuPy | fused backward | float32 | second | 1.50 (1.50) | 2.10 |" in page
    assert (tmp_path / "gpu-forward.svg").stat().st_size > 1000
    on_gpu.write(tmp_path, tmp_path / "none.csv")
    assert "has not been measured yet" in (tmp_path / "on_gpu.md").read_text()
