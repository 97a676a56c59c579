"""The gallery's claims, as numbers: a function each of what a script's `measure` found."""

import functools
import pathlib
import runpy
import types
from unittest import mock

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
import threadpoolctl

GALLERY = pathlib.Path(__file__).parents[1] / "docs" / "gallery"
matplotlib.use("Agg")


@functools.cache
def script(name):
    """Run a script; what is in it then."""
    with (
        mock.patch.object(matplotlib.pyplot, "show", new=close),
        threadpoolctl.threadpool_limits(1),  # other workers have the other cores
    ):
        return runpy.run_path(str(GALLERY / f"{name}.py"))


def close():
    """What `show` does here."""
    matplotlib.pyplot.close("all")


def deep_chains(found):
    for ratios in found[False].values():
        np.testing.assert_allclose(ratios[0], 1, rtol=1e-3)  # one layer: its change is of first order
    assert abs(found[False][2.0][-1]) > 1e20
    for ratios in found[True].values():
        assert np.all(ratios > 0)
        assert np.all(ratios < 1.01)
    for scale in (1.0, 1.5, 2.0):
        assert found[True][scale][-1] > 0.4


def saturation(found):
    for (normalized, scale), sizes in found["gradients"].items():
        if normalized:
            assert max(sizes) < 2 * min(sizes)
        elif scale <= 1:
            assert sizes[0] < 1e-4 * sizes[-1]
    assert found["flat"][False, 10.0] > 0.5
    for scale in (0.3, 1.0, 3.0, 10.0):
        assert found["flat"][True, scale] < 0.02
    trained = {case: np.sum(reached >= 0.8) for case, reached in found["accuracies"].items()}
    assert trained[False, 1.0] == 0
    assert 1 <= trained[False, 3.0] <= 2
    for scale in (1.0, 3.0):
        reached = found["accuracies"][True, scale]
        assert np.all(reached[1:6] >= 0.8)  # 0.1 to 10


def drifting_bias(found):
    biases, losses = found["bias"][False]
    steps = np.arange(len(biases))
    np.testing.assert_allclose(np.diff(biases), biases[1], rtol=1e-9)  # the same step again and again
    assert biases[-1] > 25
    np.testing.assert_allclose(losses, losses[0], rtol=1e-9)
    assert np.all(np.abs(found["bias"][True][0]) < 1e-12 * steps + 1e-15)
    outside, through = found["network"][False], found["network"][True]
    assert through[0][-50:].mean() < 0.3
    assert outside[0][-50:].mean() > 2 * np.log(10)
    assert outside[2][-1] > 10 * through[2][-1]
    assert through[1][-1] < 1e-12


def subsumed_bias(found):
    by_size = found["differences"]
    for i, size in enumerate((1e0, 1e2, 1e4, 1e6)):
        assert np.all(by_size[:, i] < 1e-14 * size + 1e-13)
    (losses, bias, beta, reached), (plain, none, _, also) = found["with"], found["without"]
    assert none is None
    np.testing.assert_allclose(losses, plain, rtol=1e-9)
    assert np.max(np.abs(bias)) < 1e-12
    assert np.max(np.abs(beta)) > 0.1
    assert reached == also > 0.9


def no_undoing(found):
    factors = np.logspace(-2, 2, 9)
    for name, powers in {"normalized": (0, 0, -1), "affine": (1, 1, 0)}.items():
        for sizes, power in zip(found["sizes"][name], powers, strict=True):
            np.testing.assert_allclose(sizes, factors**power, rtol=1e-6, atol=1e-8, err_msg=name)
    assert found["fold"] < 1e-13


def without_gamma_and_beta(found):
    # By quadrature: E[σ']²/Var σ for x ~ N(0, 1).
    x, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    y = 1 / (1 + np.exp(-x))
    expected = (weights @ (y * (1 - y))) ** 2 / (weights @ (y - 0.5) ** 2)
    np.testing.assert_allclose(found["straightness"][1.0], expected, atol=2e-3)
    assert expected > 0.98
    assert found["straightness"][10.0] < 0.75
    assert found["fits"][False][2] < found["bound"] + 1e-6
    assert found["fits"][True][2] > 0.9


def alternatives(found):
    loss = {name: entry[0] for name, entry in found["methods"].items()}
    ours = loss.pop("batch norm")
    whitened = loss.pop("whitening (ZCA)")
    assert ours < 0.2
    assert whitened < 0.2
    assert all(other > 1.5 * ours for other in loss.values()), loss
    assert loss["nothing"] > 1.5
    for name in loss:
        if name.startswith("penalty"):
            assert loss[name] > 1
    whitening, norm = found["costs"]
    assert whitening[-1] > 10 * norm[-1]


def covariate_shift(found):
    shifts = {name: np.median(shifts) for name, (_, shifts) in found.items()}
    losses = {name: losses[-20:].mean() for name, (losses, _) in found.items()}
    plain, normalized, jittered = found
    assert shifts[normalized] < shifts[plain] / 5, shifts
    assert shifts[jittered] > shifts[plain], shifts
    assert losses[normalized] < losses[plain] / 3, losses
    assert losses[jittered] < losses[plain] / 1.5, losses


def train_and_test(found):
    ways, momenta = found["ways"], found["momenta"]
    assert np.all(np.diff(ways["batch"][:5]) < 0)  # from 2 to 60
    assert ways["batch"][0] > 4 * ways["population"]
    assert abs(ways["batch"][-1] / ways["population"] - 1) < 0.1  # of all test examples
    assert ways["population"] < ways["running"]
    distances, losses = zip(
        *(momenta[m] for m in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)), strict=True
    )
    assert min(distances[0], distances[-1]) > 1.5 * min(distances)
    assert losses[0] > 3 * min(losses)
    assert min(losses[0], losses[-1]) > min(losses) > ways["population"]


CLAIMS = {
    claim.__name__: claim
    for claim in (
        deep_chains,
        saturation,
        drifting_bias,
        subsumed_bias,
        no_undoing,
        without_gamma_and_beta,
        alternatives,
        covariate_shift,
        train_and_test,
    )
}


def test_all_scripts_have_claims():
    assert {path.stem for path in GALLERY.glob("*.py")} == set(CLAIMS)


@pytest.mark.parametrize("name", CLAIMS)
def test_claim(name):
    """The script runs as a reader runs it, and what it measured holds; with three other seeds too."""
    namespace = script(name)
    for seed in range(4):
        with threadpoolctl.threadpool_limits(1):
            found = namespace["measure"](seed) if seed else namespace["found"]
        try:
            CLAIMS[name](found)
        except AssertionError as error:
            error.add_note(f"with seed {seed}")
            raise


def test_gradients_of_the_layers():
    """Of whitening, and of what all scripts train with: the slopes of the loss."""
    from batchnorm.demo.chain import Chain, Linear, cross_entropy, sigmoid

    rng = np.random.default_rng(0)
    whitening = script("alternatives")["Whitening"](6)
    whitening.gamma, whitening.beta = rng.normal(size=(2, 6))
    net = Chain([Linear(5, 6, rng), whitening, sigmoid(), Linear(6, 3, rng)])
    x, labels = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    dx = net.backward(cross_entropy(net(x), labels)[1])
    gradients = list(net.gradients())
    assert [name for _, name, _ in gradients] == ["weight", "bias", "gamma", "beta", "weight", "bias"]

    def slope(owner, name, direction):
        value, losses = getattr(owner, name), []
        for h in (1e-6, -1e-6):
            setattr(owner, name, value + h * direction)
            losses.append(cross_entropy(net(batch.x), labels)[0])
        setattr(owner, name, value)
        return (losses[0] - losses[1]) / 2e-6

    batch = types.SimpleNamespace(x=x)
    for owner, name, gradient in [*gradients, (batch, "x", dx)]:
        direction = rng.normal(size=gradient.shape)
        expected = slope(owner, name, direction)
        np.testing.assert_allclose(
            np.sum(gradient * direction), expected, rtol=1e-6, atol=1e-8, err_msg=name
        )
