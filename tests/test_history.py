"""Speed over time: series of asv's results, their steps, the page, and the command that measures."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("asv")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "asv_benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(ROOT / "docs")]

import over_time  # noqa: E402
import series  # noqa: E402
from asv.results import Results  # noqa: E402

COMMITS = [f"{i:x}".ljust(40, "0") for i in range(0xA00, 0xA09)]
PARAMETERS = [["'compiled'", "'numpy'"], ["'convolution'"], ["'forward'", "'backward'"]]
LEVELS = {
    ("compiled", "convolution", "forward"): [2.0] * 5 + [1.0] * 4,
    ("compiled", "convolution", "backward"): [3.0] * 9,
    ("numpy", "convolution", "forward"): [6.0] * 7 + [9.0] * 2,
    ("numpy", "convolution", "backward"): [None] * 3 + [5.0] * 6,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Results as asv writes them, not in the order of commits, with a noise of three per cent."""
    rng, results = np.random.default_rng(0), tmp_path / "results"
    (results / "a").mkdir(parents=True)
    machine = {"arch": "", "cpu": "", "machine": "a", "num_cpu": "", "os": "", "ram": "", "version": 1}
    (results / "a" / "machine.json").write_text(json.dumps(machine))
    for i in (4, 0, 8, 1, 7, 2, 6, 3, 5):
        made = Results({"machine": "a"}, {}, COMMITS[i], 1000 * i, "3.11", f"env{i}", {})
        values = [None if v[i] is None else v[i] * rng.uniform(0.97, 1.03) for v in LEVELS.values()]
        nothing = [None] * len(values)
        last = {"params": PARAMETERS, "errcode": 0, "stderr": "", "profile": None}
        result = SimpleNamespace(result=values, samples=nothing, number=nothing, **last)
        benchmark = {"name": series.BENCHMARK, "version": "1", "params": PARAMETERS}
        made.add_result(benchmark, result)
        made.save(str(results))
    names = tmp_path / "commits.json"
    names.write_text(json.dumps({c: f"subject of {c[:3]}" for c in COMMITS}))
    monkeypatch.setattr(series, "SUBJECTS", names)
    return results


def test_points_are_in_the_order_of_commits(folder):
    found = series.measured(folder)["a"]
    assert list(found) == list(LEVELS)
    for case, levels in LEVELS.items():
        expected = [(c, v) for c, v in zip(COMMITS, levels, strict=True) if v is not None]
        assert [point.commit for point in found[case]] == [c for c, _ in expected]
        np.testing.assert_allclose([p.value for p in found[case]], [v for _, v in expected], rtol=0.031)


def test_steps_are_detected_where_they_are(folder):
    found = {case: series.steps(points) for case, points in series.measured(folder)["a"].items()}
    (faster,), (slower,) = (
        found[backend, "convolution", "forward"] for backend in ("compiled", "numpy")
    )
    assert faster.commit == COMMITS[5]
    assert slower.commit == COMMITS[7]
    np.testing.assert_allclose([*faster[1:], *slower[1:]], [2, 1, 6, 9], rtol=0.05)
    assert not found["compiled", "convolution", "backward"]


def test_the_page_names_the_commits(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(series, "RESULTS", folder)
    monkeypatch.setattr(series, "measured", lambda f=series.measured: f(folder))
    output = tmp_path / "generated"
    output.mkdir()
    over_time.write(output)
    text = (output / "over_time.md").read_text()
    for row in (
        f"| `{COMMITS[5][:7]}` subject of a05 | forward | convolution | compiled code |",
        f"| `{COMMITS[7][:7]}` subject of a07 | forward | convolution | NumPy alone |",
    ):
        assert row in text
    assert text.index("subject of a05 | forward") < text.index("subject of a07 | forward")
    assert sorted(p.name for p in output.glob("*.svg")) == [
        "over-time-0-backward.svg",
        "over-time-0-forward.svg",
    ]


def test_few_commits_are_no_series(folder):
    for file in sorted((folder / "a").glob("*.json"))[2:]:
        if file.name != "machine.json":
            file.unlink()
    assert series.measured(folder) == {}


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "history"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_tells_of_the_published_results():
    done = run("--report")
    assert done.returncode == 0, done.stderr
    assert "commits" in done.stdout


def test_an_unknown_commit_is_an_error_before_anything_is_written():
    before = series.SUBJECTS.read_text()
    done = run("no-such-commit")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "history: error: revision: got 'no-such-commit', expected a commit or a range of this repository"
    )
    assert series.SUBJECTS.read_text() == before


def test_the_gate_s_benchmark_runs():
    """Each backend on one small pass, in a process that may fork: a multiple of a copy."""
    program = """
from benchmarks import gate

quick = gate.Gate()
quick.processes = 1
for backend in gate.BACKENDS:
    assert 0.01 < quick.track_copies(backend, "vectors", "inference") < 1000
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
