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
    deepest = {case: (ratios[-1], rates[-1]) for case, ratios, rates in both(found, "ratios", "rates")}
    assert abs(deepest[False, 2.0][0]) > 1e20
    assert abs(deepest[False, 0.5][0] - 1) < 1e-3  # promises next to nothing, and keeps that
    assert abs(found["promises"][False, 0.5][-1]) < 1e-6
    for normalized, ratios in ((case[0], ratios) for case, ratios in found["ratios"].items()):
        if normalized:
            assert np.all(ratios > 0.1)
            assert np.all(ratios < 1.05)
    usable = {n: [rate for case, (_, rate) in deepest.items() if case[0] == n] for n in (False, True)}
    assert max(usable[True]) < 30 * min(usable[True])
    assert max(usable[False]) > 1e6 * min(usable[False])


def both(found, *keys):
    """Some of what was found, case by case."""
    return [(case, *(found[key][case] for key in keys)) for case in found[keys[0]]]


def saturation(found):
    for (normalized, scale), sizes in found["gradients"].items():
        if normalized:
            assert max(sizes) < 2 * min(sizes)
        elif scale <= 1:
            assert sizes[0] < 1e-3 * sizes[-1]
    assert found["flat"][False, 10.0] > 0.5
    for scale in (0.3, 1.0, 3.0, 10.0):
        assert found["flat"][True, scale] < 0.02
    trained = {case: reached >= 0.8 for case, reached in found["accuracies"].items()}
    assert not np.any(trained[False, 1.0])
    assert np.sum(trained[False, 3.0]) <= 2
    assert np.sum(trained[False, 10.0]) <= 3
    assert np.any(trained[False, 10.0])
    for scale in (1.0, 3.0, 10.0):
        assert np.all(trained[True, scale][2:6])  # 0.3 to 10


def drifting_bias(found):
    biases, losses = found["bias"][False]
    steps = np.arange(len(biases))
    np.testing.assert_allclose(np.diff(biases), biases[1], rtol=1e-9)  # the same step again and again
    assert biases[-1] > 25
    np.testing.assert_allclose(losses, losses[0], rtol=1e-9)
    assert np.all(np.abs(found["bias"][True][0]) < 1e-12 * steps + 1e-15)
    ends = {case: curves[0][-50:].mean() for case, curves in found["network"].items()}
    for rate in (0.3, 1.0):
        assert ends[True, rate] < 0.8 * ends[False, rate] < 1
    assert ends[True, 3.0] < 0.2
    assert ends[False, 3.0] > 2 * np.log(10)
    assert found["network"][False, 3.0][1][-1] > 5
    assert found["network"][False, 3.0][2][-1] > 10 * found["network"][True, 3.0][2][-1]
    for rate in (0.3, 1.0, 3.0):
        assert found["network"][True, rate][1][-1] < 1e-12
        assert found["network"][False, rate][1][-1] > 0.1


def subsumed_bias(found):
    for i, size in enumerate((1e0, 1e2, 1e4, 1e6)):
        value, weights, bias, beta = found["differences"][:, i]
        assert max(value, weights) < 1e-16 * size + 1e-14
        assert max(bias, beta) < 1e-13
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
            np.testing.assert_allclose(sizes, factors**power, rtol=1e-6, err_msg=name)
    assert np.max(found["unlike"]) < 1e-6
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
    bare, near, apart = (share for _, _, share in found["fits"].values())
    np.testing.assert_allclose(bare, found["bound"], atol=1e-3)
    assert near > 1.5 * bare
    assert apart > 0.8
    assert found["digits"][False] > 1.2 * found["digits"][True]


def alternatives(found):
    ends = {name: entry[0] for name, entry in found["methods"].items()}
    best = {name: min(losses) for name, losses in ends.items()}
    ours = best.pop("batch norm")
    assert ours < 0.15
    assert all(other > 1.2 * ours for other in best.values()), best
    assert best["nothing"] > 1.5
    assert best["penalty, λ = 0.01"] > 1
    assert best["penalty, λ = 0.1"] > 1
    at_three = {name: losses[3] for name, losses in ends.items()}
    assert max(at_three["batch norm"], at_three["whitening (ZCA)"]) < 0.3
    assert min(at_three["every step, as constants"], at_three["every 10 steps"]) > 1
    whitening, norm = found["costs"]
    assert whitening[-1] > 10 * norm[-1]


def covariate_shift(found):
    shifts, turns = ({n: np.median(of[k]) for n, of in found.items()} for k in ("shifts", "turns"))
    losses = {name: of["losses"][-20:].mean() for name, of in found.items()}
    plain, normalized, jittered = found
    assert shifts[normalized] < shifts[plain] / 10
    assert shifts[jittered] > 1.3 * shifts[plain]
    assert turns[normalized] < turns[plain] / 2
    assert losses[normalized] < losses[plain] / 3
    assert losses[jittered] < losses[plain] / 1.5


def train_and_test(found):
    ways, momenta = found["ways"][8], found["momenta"]
    assert np.all(np.diff(ways["batch"][:5]) < 0)  # from 2 to 60
    assert ways["batch"][0] > 4 * ways["population"]
    assert abs(ways["batch"][-1] / ways["population"] - 1) < 0.1  # of all test examples
    assert ways["changed"][0] > 0.4
    assert ways["changed"][-1] == 0
    gains = [of["running"] - of["population"] for of in found["ways"].values()]
    assert gains[0] > gains[1] > gains[2] > -0.005  # of training on 4, 8 and 60
    means, deviations, losses = zip(
        *(momenta[m] for m in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)), strict=True
    )
    for distances in (means, deviations):
        assert min(distances[0], distances[-1]) > 1.2 * min(distances)
    assert losses[0] > 3 * min(losses)
    assert min(losses) > ways["population"]


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
    """The script runs as a reader runs it, and what it measured holds."""
    CLAIMS[name](script(name)["found"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_claim_with_other_seeds(name):
    """What it measures does not depend on the seed."""
    namespace = script(name)
    for seed in (1, 2):
        with threadpoolctl.threadpool_limits(1):
            found = namespace["measure"](seed)
        try:
            CLAIMS[name](found)
        except AssertionError as error:
            error.add_note(f"with seed {seed}")
            raise


def test_orders_add_up():
    """The terms of all orders are the whole change of a chain of equal weights."""
    orders = script("deep_chains")["orders"]
    for depth, w, rate in ((3, 1.5, 0.1), (20, 1.2, 0.01), (20, 0.8, 0.3)):
        changed = (w - rate * w ** (depth - 1)) ** depth - w**depth
        np.testing.assert_allclose(orders(depth, w, rate).sum(), changed, rtol=1e-9)


def test_penalty_and_jitter():
    """Their gradients, against slopes of what they stand for."""
    rng = np.random.default_rng(0)
    x, dy, direction = rng.normal(1, 2, (3, 20, 4))

    def slope(f):
        return (f(x + 1e-6 * direction) - f(x - 1e-6 * direction)) / 2e-6

    penalty = script("alternatives")["Penalty"](0.3)
    np.testing.assert_array_equal(penalty(x), x)

    def penalized(x):
        mean, var = x.mean(axis=0), x.var(axis=0)
        return np.sum(dy * x) + 0.3 * np.sum(mean**2 + (var - 1) ** 2)

    np.testing.assert_allclose(np.sum(penalty.backward(dy) * direction), slope(penalized), rtol=1e-6)
    jitter = script("covariate_shift")["Jitter"](np.random.default_rng(1))
    jitter(x)
    found = np.sum(jitter.backward(dy) * direction)

    def jittered(x):
        jitter.rng = np.random.default_rng(1)
        return np.sum(dy * jitter(x))

    np.testing.assert_allclose(found, slope(jittered), rtol=1e-6)


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
