"""BatchNorm: training, inference, the three switches, committing, state."""

import numpy as np
import pytest

import batchnorm as bn
from batchnorm.testing import data, oracle, verdict
from batchnorm.testing.oracle import Problem

pytestmark = pytest.mark.operation("layer")


def loaded(gamma, beta, mean, var, count=0, **settings):
    """A layer with this state, in the library of the state."""
    layer = bn.BatchNorm(gamma.shape[0], **settings)
    names = ("gamma", "beta", "running_mean", "running_var")
    state = dict(zip(names, (gamma, beta, mean, var), strict=True))
    layer.load_state_dict({**state, "num_batches_tracked": count})
    return layer


def state(n):
    return (*data.parameters((n,)), *data.statistics((n,)))


def test_training_step(target):
    x, dy = data.batch((12, 5), mean=2.0), data.batch((12, 5), seed=5)
    gamma, beta, mean, var = state(5)

    def step(x, dy, *arrays):
        layer = loaded(*arrays)
        y = layer(x)
        dx = layer.backward(dy)
        return y, (dx, layer.gamma_grad, layer.beta_grad), layer.state_dict()

    y, grads, after = target.call(step, x, dy, gamma, beta, mean, var)
    problem = Problem(x, gamma, beta)
    verdict.forward(y, problem, "float32")
    verdict.backward(grads, problem.backward(dy), "float32", "float32")
    expected = oracle.running(mean, var, [problem], 0.1, 1)
    verdict.assert_close(after["running_mean"], expected[0], 2.0, "float32", 2, "running mean")
    verdict.assert_close(after["running_var"], expected[1], expected[1], "float32", 4, "running var")
    assert after["num_batches_tracked"] == 1
    np.testing.assert_array_equal(after["gamma"], gamma)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_residual_and_activation(target, training, activation):
    x, z, dy = (data.batch((12, 5), mean=m, seed=i) for i, m in enumerate((2.0, 0.5, 0.1)))
    gamma, beta, mean, var = state(5)
    given = {} if training else {"mean": mean, "var": var}
    problem = Problem(x, gamma, beta, residual=z, activation=activation, **given)
    dy = np.where(problem.near_a_kink("float32"), np.zeros_like(dy), dy)

    def step(x, z, dy, *arrays):
        layer = loaded(*arrays, activation=activation).train(training)
        y = layer(x, residual=z)
        dx, dz = layer.backward(dy)
        return y, (dx, layer.gamma_grad, layer.beta_grad), dz

    y, grads, dz = target.call(step, x, z, dy, gamma, beta, mean, var)
    verdict.forward(y, problem, "float32")
    right = problem.backward(dy)
    verdict.backward(grads, right, "float32", "float32")
    verdict.dresidual(dz, right, "float32")


def test_fresh_layer_takes_the_library_of_its_input(target):
    x = data.batch((12, 5), mean=2.0)

    def steps(x):
        layer = bn.BatchNorm(5, momentum=None)
        y = layer(x)
        layer.update()
        layer.eval()
        return y, layer(x), layer.state_dict()

    y, inferred, after = target.call(steps, x)
    problem = Problem(x)
    verdict.forward(y, problem, "float32")
    assert after["gamma"].dtype == after["beta"].dtype == np.float32
    var = after["running_var"].astype(float)
    verdict.assert_close(var, x.astype(float).var(axis=0, ddof=1), var, "float32", 4, "running var")
    expected = Problem(x, mean=after["running_mean"], var=after["running_var"])
    verdict.forward(inferred, expected, "float32")


def test_inference_and_its_gradients(target):
    x, dy = data.batch((12, 5)), data.batch((12, 5), seed=5)
    gamma, beta, mean, var = state(5)

    def run(x, dy, *arrays):
        layer = loaded(*arrays).eval()
        y = layer(x)
        dx = layer.backward(dy)
        return y, (dx, layer.gamma_grad, layer.beta_grad), layer.state_dict()

    y, grads, after = target.call(run, x, dy, gamma, beta, mean, var)
    problem = Problem(x, gamma, beta, mean=mean, var=var)
    verdict.forward(y, problem, "float32")
    verdict.backward(grads, problem.backward(dy), "float32", "float32")
    assert after["num_batches_tracked"] == 0
    np.testing.assert_array_equal(after["running_mean"], mean)


def test_a_repeated_forward_pass_counts_once(target):
    first, x, dy = data.batch((12, 5), seed=8), data.batch((12, 5)), data.batch((12, 5), seed=5)
    gamma, beta, mean, var = state(5)

    def run(first, x, dy, *arrays):
        layer = loaded(*arrays)
        layer(first)  # given up, say after an error elsewhere
        layer(x)
        layer(x)  # recomputed
        layer.backward(dy)
        layer.update()
        layer.update()
        return layer.state_dict()

    after = target.call(run, first, x, dy, gamma, beta, mean, var)
    expected = oracle.running(mean, var, [Problem(x)], 0.1, 1)
    verdict.assert_close(after["running_mean"], expected[0], 1.0, "float32", 2, "running mean")
    assert after["num_batches_tracked"] == 1


def test_a_loaded_state_is_a_copy(target):
    """What is written to the arrays afterwards does not reach the layer."""
    x = data.batch((12, 5), mean=1.0)

    def run(x, *arrays):
        own = [0 * a for a in arrays]
        try:
            for buffer, a in zip(own, arrays, strict=True):
                buffer[...] = a
        except TypeError as error:
            pytest.skip(f"arrays that cannot be written to: {error}")
        layer = loaded(*own).eval()
        for buffer in own:
            buffer[...] = 7.0
        return layer(x)

    gamma, beta, mean, var = state(5)
    y = target.call(run, x, gamma, beta, mean, var)
    verdict.forward(y, Problem(x, gamma, beta, mean=mean, var=var), "float32")


def test_switches_are_separate(target):
    x, dy = data.batch((12, 5), mean=1.0), data.batch((12, 5), seed=5)
    gamma, beta, mean, var = state(5)

    def run(x, dy, *arrays):
        follows = loaded(*arrays).eval()  # running statistics normalize, and follow the batch
        follows.update_statistics, follows.trainable = True, False
        y = follows(x)
        follows.backward(dy)
        assert follows.gamma_grad is None
        assert follows.beta_grad is None
        probe = loaded(*arrays)  # the batch's statistics normalize, and leave no trace
        probe.update_statistics = False
        z = probe(x)
        probe.backward(dy)
        assert probe.gamma_grad is not None
        return y, follows.state_dict(), z, probe.state_dict()

    y, follows, z, probe = target.call(run, x, dy, gamma, beta, mean, var)
    verdict.forward(y, Problem(x, gamma, beta, mean=mean, var=var), "float32")
    expected = oracle.running(mean, var, [Problem(x)], 0.1, 1)
    verdict.assert_close(follows["running_mean"], expected[0], 1.0, "float32", 2, "running mean")
    verdict.forward(z, Problem(x, gamma, beta), "float32")
    np.testing.assert_array_equal(probe["running_mean"], mean)
    assert probe["num_batches_tracked"] == 0


def test_without_parameters_and_statistics(target):
    x, dy = data.batch((12, 5), mean=1.0), data.batch((12, 5), seed=5)

    def run(x, dy):
        layer = bn.BatchNorm(5, affine=False, track_running_stats=False)
        y = layer(x)
        dx = layer.backward(dy)
        assert layer.state_dict() == {}
        return y, dx, layer.eval()(x)

    y, dx, inferred = target.call(run, x, dy)
    verdict.forward(y, Problem(x), "float32")
    verdict.forward(inferred, Problem(x), "float32")
    verdict.assert_close(dx, (g := Problem(x).backward(dy)).dx, g.dx_size, "float32", 16, "dx")


@pytest.mark.operation("where")
def test_where(target):
    x, dy, where = data.batch((12, 5)), data.batch((12, 5), seed=5), data.weights((12, 5), "mask")
    gamma, beta, mean, var = state(5)

    def run(x, dy, where, *arrays):
        layer = loaded(*arrays)
        y = layer(x, where=where)
        return y, layer.backward(dy), layer.state_dict()

    y, dx, after = target.call(run, x, dy, where, gamma, beta, mean, var)
    problem = Problem(x, gamma, beta, where=where)
    verdict.forward(y, problem, "float32")
    verdict.assert_close(dx, (g := problem.backward(dy)).dx, g.dx_size, "float32", 16, "dx")
    expected = oracle.running(mean, var, [problem], 0.1, 1)
    verdict.assert_close(after["running_var"], expected[1], expected[1], "float32", 8, "running var")
