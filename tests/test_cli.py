"""python -m batchnorm: the demo trains and tells, info lists, and a wrong option is one line."""

import importlib
import os
import subprocess
import sys

import pytest

from batchnorm.__main__ import main

SLOW = pytest.mark.slow


def run(*arguments, timeout=300, cwd=None, **environment):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "batchnorm", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=environment
    )


@pytest.mark.parametrize("library", ["numpy", *(pytest.param(n, marks=SLOW) for n in ("torch", "jax"))])
def test_demo(library, tmp_path):
    """That it works; `test_batch_norm_wins` trains for long enough."""
    pytest.importorskip(library)
    done = run("demo", "--array-library", library, "--steps", "60", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with batch norm" in done.stdout
    assert f"{library} arrays" in done.stdout
    picture = (tmp_path / "batchnorm-demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_batch_norm_wins():
    from batchnorm.demo import experiment

    curves = {
        name: experiment.train(settings, "numpy", 300, 0, lambda step, accuracy: None)
        for name, settings in experiment.NETWORKS.items()
    }
    with_norm, without = curves["with batch norm"], curves["without batch norm"]
    assert with_norm.steps_to_goal <= 60
    assert without.steps_to_goal is None
    assert max(with_norm.accuracy) > 0.96


def test_demo_gradients_are_slopes():
    """The network's step is its loss's slope: float64, finite differences, every parameter."""
    import numpy as np

    from batchnorm.demo import network

    rng = np.random.default_rng(0)
    images = rng.uniform(size=(12, 5))
    labels = np.eye(4)[rng.integers(0, 4, 12)]
    for batch_norm in (True, False):
        settings = network.Settings(batch_norm, 1.0)
        start = {k: v.astype(float) for k, v in network.initial(settings, 5, 4, 0).items()}
        stepped = network.step(start, images, labels, settings)
        for name in start:
            if name.startswith(("mean", "var")):
                continue
            direction = rng.standard_normal(start[name].shape)
            slope = _slope(start, name, direction, images, labels, settings)
            gradient = np.sum((start[name] - stepped[name]) * direction)
            np.testing.assert_allclose(gradient, slope, rtol=2e-5, atol=1e-8, err_msg=name)


def _slope(start, name, direction, images, labels, settings, h=1e-5):
    import numpy as np

    import batchnorm as bn
    from batchnorm.demo import network

    def loss(state):
        a = images
        for i in range(network.HIDDEN):
            z = a @ state[f"weight{i}"]
            if settings.batch_norm:
                y, _ = bn.batch_norm(z, state[f"gamma{i}"], state[f"beta{i}"], eps=network.EPS)
            else:
                y = z + state[f"bias{i}"]
            a = 1 / (1 + np.exp(-y))
        z = a @ state[f"weight{network.HIDDEN}"] + state[f"bias{network.HIDDEN}"]
        return -np.mean(np.sum(labels * (z - np.log(np.sum(np.exp(z), axis=1, keepdims=True))), axis=1))

    there = loss({**start, name: start[name] + h * direction})
    return (there - loss({**start, name: start[name] - h * direction})) / (2 * h)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "--array-library", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["demo", "--steps", "0"], "got '0', expected a whole number of at least 1"),
        (["demo", "--output", "/nowhere/x.png"], "--output: no folder"),
        (["demo", "--output", "x.txt"], "expected a .png, .pdf or .svg file"),
        (["demo", "--output", "folder.png"], "--output: folder.png cannot be written (Is a directory)"),
        (["bench", "--output", "folder.png"], "--output: folder.png cannot be written (Is a directory)"),
        (["demo", "--output", "nowhere.png"], "--output: nowhere.png cannot be written (No such file"),
        (["demo", "--seed", "-1"], "--seed: got '-1', expected a whole number of at least 0"),
        (["demo", "--seed", "a"], "--seed: got 'a', expected a whole number of at least 0"),
        (["bench", "--output", "x.txt"], "expected a .png, .pdf or .svg file"),
        (["bench", "--all", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["demo", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["train"], "invalid choice: 'train'"),
        ([], "the following arguments are required"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to("/nowhere/x.png")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_is_where_a_link_leads(tmp_path, capsys):
    target, link = tmp_path / "target.svg", tmp_path / "link.svg"
    link.symlink_to(target)
    assert main(["demo", "--steps", "1", "--output", str(link)]) == 0
    assert link.is_symlink()
    assert target.stat().st_size > 1000


# A command that gets a signal at a moment of its own: an import, or a call.
INTERRUPTED = """
import importlib, itertools, runpy, signal, sys
moment, *sys.argv[1:] = sys.argv[1:]
kind, _, name = moment.partition(" ")

def interrupt():
    signal.raise_signal(signal.SIGINT)

if kind == "import":
    sys.addaudithook(lambda event, about: event == "import" and about[0] == name and interrupt())
else:
    module, _, function = name.rpartition(".")
    module = importlib.import_module(module)
    own, count = getattr(module, function), itertools.count(1)

    def called(*arguments, **options):
        if next(count) == 20:
            interrupt()
        return own(*arguments, **options)

    setattr(module, function, called)
runpy.run_module("batchnorm", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
@pytest.mark.parametrize(
    ("moment", "command"),
    [
        ("import sklearn", ("demo",)),
        ("call batchnorm.demo.network.step", ("demo",)),
        pytest.param("import rich.console", ("bench",), marks=SLOW),
        pytest.param("call batchnorm.bench.measure._seconds", ("bench",), marks=SLOW),
    ],
)
def test_an_interrupt_is_one_line(moment, command, tmp_path):
    """While it imports, while it works."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, moment, *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "python -m batchnorm: interrupted"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "cupy" else object())
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--array-library", "cupy"])
    assert stopped.value.code == 2
    assert "pip install 'batchnorm[cupy-cuda13x]'" in capsys.readouterr().err


def test_info():
    done = run("info")
    assert done.returncode == 0, done.stderr
    assert "numpy " in done.stdout
    assert "generic: array API code" in done.stdout
    assert "native: the compiled core" in done.stdout


def test_info_says_which_instruction_set_the_core_uses():
    from batchnorm import core

    done = run("info")
    if core.load() is None:
        assert f"compiled core: not there ({core.missing()})" in done.stdout
    else:
        present, used = core.load().instruction_sets()
        assert f"compiled core: {used} (this processor has {', '.join(present)})" in done.stdout
        oldest = run("info", BATCHNORM_ISA=present[0]).stdout
        assert f"compiled core: {present[0]} (" in oldest


def test_info_says_that_an_instruction_set_is_unknown():
    from batchnorm import core

    if core.load() is None:
        pytest.skip(f"the compiled core is not there: {core.missing()}")
    oldest = core.load().instruction_sets()[0][0]
    done = run("info", BATCHNORM_ISA="nonsense")
    assert done.returncode == 0, done.stderr
    why = "it cannot be loaded: BATCHNORM_ISA: got 'nonsense', expected one that this processor has: "
    why += oldest
    assert f"compiled core: not there ({why}" in done.stdout
    assert f"the compiled core is not there: {why}" in done.stdout  # of NumPy's arrays


def test_info_says_why_the_core_is_not_there(tmp_path, monkeypatch):
    import batchnorm
    from batchnorm import core

    done = run("info", BATCHNORM_NATIVE="0")
    assert "compiled core: not there (BATCHNORM_NATIVE=0)" in done.stdout

    monkeypatch.setenv("BATCHNORM_NATIVE", "1")
    monkeypatch.delitem(sys.modules, "batchnorm._core", raising=False)
    monkeypatch.delattr(batchnorm, "_core", raising=False)
    monkeypatch.setattr(batchnorm, "__path__", [str(tmp_path)])
    assert core._found.__wrapped__() == "this installation was built without it"
    (tmp_path / "_core.py").write_text("raise ImportError('no such symbol')")
    importlib.invalidate_caches()
    assert core._found.__wrapped__() == "it cannot be loaded: no such symbol"
