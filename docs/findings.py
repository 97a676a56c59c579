"""What the audit found, in each framework's own words; reproduce.py runs all of it.

A finding is a class of errors; for each peer that has it, there is a program of a few lines that a
maintainer can paste. It compares the framework with NumPy in longdouble, which shares nothing with the
audit, and prints one number. The page shows a peer's finding only where that is at least `at_least`.
"""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """A class of errors."""

    title: str
    text: str
    checks: tuple[str, ...]
    """The checks of the audit that find it."""
    prints: str
    """What the number is that its programs print."""
    at_least: float
    programs: dict[str, str]


# Flax's variances: names of peers, and arguments of the layer.
FLAX = {"": "", "-slow-variance": ", use_fast_variance=False"}

# How each framework normalizes x of shape (n, C), by the batch: imports, and lines that make y.
TRAINING = {
    "torch-channels-second": (
        "import torch",
        "y = torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True).numpy()",
    ),
    "torch-channels-last": (
        "import torch",
        "image = torch.from_numpy(x)[:, :, None, None].contiguous(memory_format=torch.channels_last)\n"
        "y = torch.nn.functional.batch_norm(image, None, None, training=True).numpy()[..., 0, 0]",
    ),
    "torch-compiled": (
        "import torch",
        "norm = torch.compile(torch.nn.functional.batch_norm)\n"
        "y = norm(torch.from_numpy(x), None, None, training=True).numpy()",
    ),
    **{
        f"keras-{backend}": (
            f'import os; os.environ["KERAS_BACKEND"] = "{backend}"; import keras',
            "layer = keras.layers.BatchNormalization(epsilon=1e-5, dtype=x.dtype.name)\n"
            "y = keras.ops.convert_to_numpy(layer(x, training=True))",
        )
        for backend in ("tensorflow", "jax", "torch")
    },
    **{
        f"flax-linen{name}": (
            "import jax; from flax import linen",
            f"layer = linen.BatchNorm(use_running_average=False{setting})\n"
            "y, _ = layer.init_with_output(jax.random.key(0), x)",
        )
        for name, setting in FLAX.items()
    },
    **{
        f"flax-nnx{name}": (
            "from flax import nnx",
            f"y = nnx.BatchNorm(x.shape[1], rngs=nnx.Rngs(0){setting})(x)",
        )
        for name, setting in FLAX.items()
    },
    "haiku": (
        "import haiku as hk",
        "norm = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))\n"
        "y, _ = norm.apply(*norm.init(None, x), None, x)",
    ),
    **{
        f"equinox-{mode}": (
            "import equinox as eqx, jax",
            f'layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(x.shape[1], "i", mode="{mode}")\n'
            'y, _ = jax.vmap(layer, axis_name="i", in_axes=(0, None), out_axes=(0, None))(x, state)',
        )
        for mode in ("batch", "ema")
    },
    "onnxruntime-training": (
        "import onnx.parser, onnxruntime",
        "model = onnx.parser.parse_model(\n"
        "    '<ir_version: 10, opset_import: [\"\": 15]> '\n"
        "    'norm (float[N,C] x, float[C] g, float[C] b) => (float[N,C] y, float[C] m, float[C] v) '\n"
        "    '{ y, m, v = BatchNormalization<training_mode=1>(x, g, b, b, g) }')\n"
        "run = onnxruntime.InferenceSession(model.SerializeToString()).run\n"
        'given = {"x": x, "g": np.ones(x.shape[1], "f4"), "b": np.zeros(x.shape[1], "f4")}\n'
        "y, mean, var = run(None, given)",
    ),
    "tinygrad": (
        "from tinygrad import Context, Tensor, nn",
        "with Context(TRAINING=1):\n    y = nn.BatchNorm(x.shape[1])(Tensor(x)).numpy()",
    ),
    "mlx": (
        "import mlx.core as mx; from mlx import nn",
        "y = np.array(nn.BatchNorm(x.shape[1])(mx.array(x)))",
    ),
    "paddle-channels-second": (
        "import paddle",
        "y = paddle.nn.BatchNorm1D(x.shape[1])(paddle.to_tensor(x)).numpy()",
    ),
    "paddle-channels-last": (
        "import paddle",
        'layer = paddle.nn.BatchNorm2D(x.shape[1], data_format="NHWC")\n'
        "y = layer(paddle.to_tensor(x[:, None, None, :])).numpy()[:, 0, 0, :]",
    ),
    "batchnorm-jax": (
        "import jax.numpy as jnp, batchnorm as bn",
        "y = bn.batch_norm(jnp.asarray(x))[0]",
    ),
}

RIGHT = """\
right = (x - x.mean(0, dtype=np.longdouble)) / np.sqrt(x.var(0, dtype=np.longdouble) + 1e-5)
print(np.abs(np.asarray(y, np.longdouble) - right).max())"""

IN_EPS = RIGHT.replace("print(np.abs(", "print(1024 * (np.abs(").replace(
    ".max())", " / np.maximum(1, np.abs(right))).max())"
)


def of_batch(batch: str, *peers: str, right: str = RIGHT) -> dict[str, str]:
    """Return programs that normalize a batch."""
    return {
        peer: "\n".join([TRAINING[peer][0], "import numpy as np", batch, TRAINING[peer][1], right])
        for peer in peers
    }


def normal(shape: str, *more: str) -> str:
    """Return a line that makes a batch of float32."""
    return " ".join([f"x = np.random.default_rng(0).standard_normal({shape}, np.float32)", *more])


FAST = ("flax-linen", "flax-nnx", "haiku", "keras-torch")
ALL = tuple(peer for peer in TRAINING if peer not in ("equinox-ema", "batchnorm-jax"))
ONE_MEAN = tuple(peer for peer in ALL if peer not in FAST)
AT_LARGE_MEANS = (
    *("y_at_mean", "y_with_channels_last", "y_of_many_values", "dx", "dgamma", "sharded_y"),
    *("running_variance", "dx_of_a_constant_channel"),
)
EPS = 2.0**-23

# Inference by a running mean of 1e4 + 0.5 and a running variance of 2.
GIVEN = (
    normal("(800, 6)", "+ np.float32(1e4)")
    + "\nmean, var = np.full(6, 10000.5, np.float32), np.full(6, 2, np.float32)"
)
BY_GIVEN = """\
right = (x - mean.astype(np.longdouble)) / np.sqrt(var.astype(np.longdouble) + 1e-5)
print(np.abs(y - right).max())"""
ONNX = """\
model = onnx.parser.parse_model(
    '<ir_version: 10, opset_import: ["": 15]> norm (float[N,C] x, float[C] g, float[C] b, float[C] m, '
    'float[C] v) => (float[N,C] y) { y = BatchNormalization(x, g, b, m, v) }')
run = onnxruntime.InferenceSession(model.SerializeToString()).run
(y,) = run(None, {"x": x, "g": np.ones(6, "f4"), "b": np.zeros(6, "f4"), "m": mean, "v": var})"""
INFERENCE = {
    "torch-channels-second": (
        "import torch",
        "x, mean, var = map(torch.from_numpy, (x, mean, var))\n"
        "y = torch.nn.functional.batch_norm(x, mean, var, training=False)\n"
        "x, mean, var, y = (v.numpy() for v in (x, mean, var, y))",
    ),
    **{
        f"keras-{backend}": (
            f'import os; os.environ["KERAS_BACKEND"] = "{backend}"; import keras',
            "layer = keras.layers.BatchNormalization(epsilon=1e-5, center=False, scale=False)\n"
            "layer.build(x.shape); layer.set_weights([mean, var])\n"
            "y = keras.ops.convert_to_numpy(layer(x, training=False))",
        )
        for backend in ("tensorflow", "jax")
    },
    "onnxruntime-inference": ("import onnx.parser, onnxruntime", ONNX),
    "openvino": (
        "import openvino; from openvino import opset8 as ops",
        'data, one, zero = ops.parameter([800, 6], np.float32), np.ones(6, "f4"), np.zeros(6, "f4")\n'
        "y = ops.batch_norm_inference(data, *map(ops.constant, (one, zero, mean, var)), 1e-5)\n"
        'y = openvino.compile_model(openvino.Model([y], [data]), "CPU")(x)[0]',
    ),
    "paddle-channels-second": (
        "import paddle",
        "x, mean, var = map(paddle.to_tensor, (x, mean, var))\n"
        "y = paddle.nn.functional.batch_norm(x, mean, var, training=False)\n"
        "x, mean, var, y = (v.numpy() for v in (x, mean, var, y))",
    ),
}
INFERENCE["torch-channels-last"] = (
    INFERENCE["torch-channels-second"][0],
    INFERENCE["torch-channels-second"][1].replace(
        "batch_norm(x, mean", "batch_norm(x[:, :, None, None], mean"
    )
    + "\ny = y[..., 0, 0]",
)
INFERENCE["paddle-channels-last"] = (
    INFERENCE["paddle-channels-second"][0],
    INFERENCE["paddle-channels-second"][1]
    .replace("batch_norm(x, mean, var, ", "batch_norm(x[:, None], mean, var, ")
    .replace("training=False)", 'training=False, data_format="NLC")')
    + "\ny = y[:, 0]",
)

# What a running mean is after a batch of nothing.
EMPTY = {
    **{
        f"keras-{backend}": (
            f'import os; os.environ["KERAS_BACKEND"] = "{backend}"; import keras, numpy as np\n'
            "layer = keras.layers.BatchNormalization()\n"
            "layer(np.zeros((0, 3), np.float32), training=True)\n"
            "print(np.isnan(keras.ops.convert_to_numpy(layer.moving_mean)).sum())"
        )
        for backend in ("tensorflow", "jax", "torch")
    },
    **{
        f"flax-linen{name}": (
            "import jax, numpy as np; from flax import linen\n"
            f"layer = linen.BatchNorm(use_running_average=False{setting})\n"
            "x = np.zeros((0, 3), np.float32); state = layer.init(jax.random.key(0), x)\n"
            '_, state = layer.apply(state, x, mutable=["batch_stats"])\n'
            'print(np.isnan(state["batch_stats"]["mean"]).sum())'
        )
        for name, setting in FLAX.items()
    },
    **{
        f"flax-nnx{name}": (
            "import numpy as np; from flax import nnx\n"
            f"layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0){setting})\n"
            "layer(np.zeros((0, 3), np.float32))\n"
            "print(np.isnan(layer.mean[...]).sum())"
        )
        for name, setting in FLAX.items()
    },
    "haiku": (
        "import haiku as hk, numpy as np\n"
        "norm = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(x, True))\n"
        "x = np.zeros((0, 3), np.float32); _, state = norm.apply(*norm.init(None, x), None, x)\n"
        'print(np.isnan(state["batch_norm/~/mean_ema"]["average"]).sum())'
    ),
    **{
        f"equinox-{mode}": (
            "import equinox as eqx, jax, numpy as np\n"
            f'layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, "i", mode="{mode}")\n'
            'norm = jax.vmap(layer, axis_name="i", in_axes=(0, None), out_axes=(0, None))\n'
            "_, state = norm(np.zeros((0, 3), np.float32), state)\n"
            f"print(np.isnan(state.get(layer.{mode}_state_index)[0]).sum())"
        )
        for mode in ("batch", "ema")
    },
    "onnxruntime-training": "\n".join(
        [
            "import numpy as np",
            TRAINING["onnxruntime-training"][0],
            "x = np.zeros((0, 3), np.float32)",
            TRAINING["onnxruntime-training"][1],
            "print(np.isnan(mean).sum())",
        ]
    ),
    "tinygrad": (
        "import numpy as np; from tinygrad import Context, Tensor, nn\n"
        "layer = nn.BatchNorm(3)\n"
        "with Context(TRAINING=1):\n"
        "    layer(Tensor(np.zeros((0, 3), np.float32)))\n"
        "print(np.isnan(layer.running_mean.numpy()).sum())"
    ),
    "mlx": (
        "import mlx.core as mx, numpy as np; from mlx import nn\n"
        "layer = nn.BatchNorm(3)\n"
        "layer(mx.zeros((0, 3)))\n"
        "print(np.isnan(np.array(layer.running_mean)).sum())"
    ),
}

# The second derivative: of sum(ddx · dx) to x, against differences of the formula of dx in longdouble.
SECOND = """\
def dx(x, dy):
    d = x - x.mean(0); r = 1 / np.sqrt((d * d).mean(0) + 1e-5)
    return r * (dy - dy.mean(0) - d * r * (dy * d * r).mean(0))
x, dy, ddx = x.astype(np.longdouble), dy.astype(np.longdouble), ddx.astype(np.longdouble)
right, step = np.zeros_like(x), np.longdouble(1e-6)
for i in np.ndindex(x.shape):
    e = np.zeros_like(x); e[i] = step
    right[i] = ((dx(x + e, dy) - dx(x - e, dy)) * ddx).sum() / (2 * step)
print(np.abs(found - right).max() / np.abs(right).max())"""
THREE = "x, dy, ddx = np.random.default_rng(0).standard_normal((3, 5, 3)).astype(np.float32)\n"

SHARDED = {
    f"flax-linen{name}": (
        "import jax, numpy as np; from flax import linen\n"
        "x = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32); x[1] += 2\n"
        "mask = np.ones((2, 4, 1), bool); mask[1, 1:] = False\n"
        f'layer = linen.BatchNorm(use_running_average=False, axis_name="i"{setting})\n'
        "state = layer.init(jax.random.key(0), x[0])\n"
        'part = lambda x, m: layer.apply(state, x, mask=m, mutable=["batch_stats"])[0]\n'
        'y = np.asarray(jax.vmap(part, axis_name="i")(x, mask))[mask[..., 0]]\n'
        "x = x[mask[..., 0]]\n" + RIGHT
    )
    for name, setting in FLAX.items()
} | {
    f"flax-nnx{name}": (
        "import jax, numpy as np; from flax import nnx\n"
        "x = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32); x[1] += 2\n"
        "mask = np.ones((2, 4, 1), bool); mask[1, 1:] = False\n"
        f'part = lambda x, m: nnx.BatchNorm(3, axis_name="i", rngs=nnx.Rngs(0){setting})(x, mask=m)\n'
        'y = np.asarray(jax.vmap(part, axis_name="i")(x, mask))[mask[..., 0]]\n'
        "x = x[mask[..., 0]]\n" + RIGHT
    )
    for name, setting in FLAX.items()
}

MASKED = {
    f"flax-linen{name}": (
        "import jax, numpy as np; from flax import linen\n"
        f"layer = linen.BatchNorm(use_running_average=False{setting})\n"
        "x = np.ones((4, 3), np.float32); state = layer.init(jax.random.key(0), x)\n"
        '_, state = layer.apply(state, x, mask=np.zeros((4, 1), bool), mutable=["batch_stats"])\n'
        'print(np.isnan(state["batch_stats"]["mean"]).sum())'
    )
    for name, setting in FLAX.items()
} | {
    f"flax-nnx{name}": (
        "import numpy as np; from flax import nnx\n"
        f"layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0){setting})\n"
        "layer(np.ones((4, 3), np.float32), mask=np.zeros((4, 1), bool))\n"
        "print(np.isnan(layer.mean[...]).sum())"
    )
    for name, setting in FLAX.items()
}

THREADS = {
    "torch-channels-last": (
        "import numpy as np, torch\n"
        "x = np.random.default_rng(0).standard_normal((32, 16, 3000, 1), np.float32)\n"
        "x = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)\n"
        "def norm(threads):\n"
        "    torch.set_num_threads(threads)\n"
        "    return torch.nn.functional.batch_norm(x, None, None, training=True)\n"
        "print((norm(1) != norm(2)).sum().item())"
    )
}
SUMS = {
    "torch-channels-last": (
        "import torch",
        "image = torch.from_numpy(x)[:, :, None, None].contiguous(memory_format=torch.channels_last)\n"
        "bias = torch.zeros(16, requires_grad=True)\n"
        "y = torch.nn.functional.batch_norm(image, None, None, torch.ones(16), bias, training=True)\n"
        "y.backward(torch.from_numpy(dy)[:, :, None, None]); dbeta = bias.grad.numpy()",
    ),
    "keras-tensorflow": (
        'import os; os.environ["KERAS_BACKEND"] = "tensorflow"; import keras, tensorflow as tf',
        "layer = keras.layers.BatchNormalization(); layer.build(x.shape)\n"
        "with tf.GradientTape() as tape:\n"
        "    y = layer(x, training=True)\n"
        "dbeta = tape.gradient(y, layer.beta.value, output_gradients=tf.constant(dy)).numpy()",
    ),
    "paddle-channels-last": (
        "import paddle",
        'layer = paddle.nn.BatchNorm2D(16, data_format="NHWC")\n'
        "y = layer(paddle.to_tensor(x[:, None, None, :]))\n"
        "y.backward(paddle.to_tensor(dy[:, None, None, :])); dbeta = layer.bias.grad.numpy()",
    ),
}

FINDINGS = {
    "square_of_the_mean": Finding(
        "The variance is E[x²] − E[x]²",
        "At a mean of 1e4 and a standard deviation of 1, both terms are 1e8, of which float32 holds 8. "
        "The variance that is left is 0, or negative: y is off by thousands of standard deviations, or "
        "NaN. In Flax, `use_fast_variance=False` avoids this.",
        AT_LARGE_MEANS,
        "largest error of y, in standard deviations, at a mean of 1e4 (NaN counts)",
        0.1,
        of_batch(normal("(800, 6)", "+ np.float32(1e4)"), *FAST),
    ),
    "mean_in_one_number": Finding(
        "The mean is one float32",
        "The variance is right, but half an eps of the mean is lost in all of y: an error of |mean|/std "
        "times eps. It is a few thousandths of a standard deviation at 1e4, and as much as the data at "
        "1e7. Sums in one long row make it larger.",
        AT_LARGE_MEANS,
        "largest error of y, in standard deviations, at a mean of 1e4",
        64 * EPS,
        of_batch(normal("(800, 6)", "+ np.float32(1e4)"), *ONE_MEAN),
    ),
    "inference_as_scale_and_shift": Finding(
        "Inference is x·scale + shift",
        "Both terms are as large as the mean over the standard deviation, and cancel. This is inherent "
        "in the form, which saves a subtraction: `batchnorm.fold` has it, too, and says so.",
        ("inference_by_running_statistics",),
        "largest error of y, in standard deviations, at a running mean of 1e4",
        64 * EPS,
        {
            peer: "\n".join([imports, "import numpy as np", GIVEN, lines, BY_GIVEN])
            for peer, (imports, lines) in INFERENCE.items()
        },
    ),
    "sums_in_one_row": Finding(
        "Gradients of parameters are sums in one row",
        "Each of millions of additions in float32 may add half an eps. Pairwise sums, or sums in "
        "float64, lose nothing.",
        ("sums_of_many_gradients",),
        "largest error of dbeta over the sum of |dy|, for 390,000 values of each channel",
        16 * EPS,
        {
            peer: "\n".join(
                [
                    imports,
                    "import numpy as np",
                    normal("(390_000, 16)"),
                    "dy = np.random.default_rng(1).standard_normal(x.shape, np.float32) + "
                    "np.float32(0.5)",
                    lines,
                    "right, size = dy.sum(0, dtype=np.longdouble), np.abs(dy).sum(0)",
                    "print((np.abs(dbeta - right) / size).max())",
                ]
            )
            for peer, (imports, lines) in SUMS.items()
        },
    ),
    "large_numbers": Finding(
        "Squares beyond the range of float32",
        "Squares of differences over 1.8e19 are infinite, 1/√inf is 0, and y is beta, whatever x is. "
        "Such numbers are rare, but nothing is said. JAX without float64 gives NaN in this package.",
        ("y_of_large_numbers",),
        "largest error of y, in standard deviations, of data with a standard deviation of 1e20",
        1,
        of_batch(normal("(800, 6)", "* np.float32(1e20)"), *ALL, "batchnorm-jax"),
    ),
    "empty_batch": Finding(
        "An empty batch poisons the running mean",
        "The mean of no values is NaN, and so is the running mean from then on, without a word. PyTorch "
        "and PaddlePaddle leave the running mean as it is; this package raises an error.",
        ("empty_batch",),
        "NaN in a running mean of three channels",
        1,
        EMPTY,
    ),
    "fully_masked": Finding(
        "A mask that leaves nothing poisons the running mean",
        "As an empty batch does; one batch of padding is enough.",
        ("fully_masked",),
        "NaN in a running mean of three channels",
        1,
        MASKED,
    ),
    "sharded_masks": Finding(
        "A mask over several devices is averaged without its counts",
        "With `axis_name`, the means of the parts are averaged as if each had kept as many values. The "
        "statistics are then not those of the batch.",
        ("sharded_masked_y", "sharded_masked_running_variance"),
        "largest error of y, in standard deviations, where one part keeps four rows and the other one",
        0.01,
        SHARDED,
    ),
    "second_derivatives": Finding(
        "The second derivative lacks a term",
        "The mean inside of the variance is behind a stop_gradient (detach): the first derivative does "
        "not change by it, the second does. Gradient penalties then follow a wrong gradient.",
        ("second_derivative",),
        "largest relative error of the derivative of sum(ddx · dx) to x",
        0.01,
        {
            "keras-tensorflow": "import numpy as np, tensorflow as tf\n" + THREE + "v = tf.constant(x)\n"
            "with tf.GradientTape() as outer:\n"
            "    outer.watch(v)\n"
            "    with tf.GradientTape() as inner:\n"
            "        inner.watch(v); mean, var = tf.nn.moments(v, [0])\n"
            "        y = (v - mean) / tf.sqrt(var + 1e-5)\n"
            "    along = tf.reduce_sum(ddx * inner.gradient(y, v, dy))\n"
            "found = outer.gradient(along, v).numpy()\n" + SECOND,
            "tinygrad": "import numpy as np; from tinygrad import Context, Tensor, nn\n"
            + THREE
            + "v = Tensor(x)\n"
            "with Context(TRAINING=1):\n"
            "    y = nn.BatchNorm(3)(v)\n"
            "first = y.gradient(v, gradient=Tensor(dy))[0]\n"
            "found = (Tensor(ddx) * first).sum().gradient(v)[0].numpy()\n" + SECOND,
        },
    ),
    "float64_in_float32": Finding(
        "float64 is computed in float32",
        'On its PyTorch backend, Keras says that `result_type("float64", "float32")` is float32, and '
        'a layer with `dtype="float64"` computes in that. y comes back as float64.',
        ("y_of_float64", "running_mean_of_float64"),
        "largest error of y of float64 data with a mean of 3",
        1e-8,
        of_batch("x = np.random.default_rng(0).standard_normal((800, 6)) + 3", "keras-torch"),
    ),
    "new_layer": Finding(
        "Inference of a new layer is not the identity",
        "In Haiku, the averages of a new layer are the statistics of the batch that `init` saw, though "
        "its counter is 0. In Equinox's default mode they are memory that nobody wrote (`jnp.empty`).",
        ("start_of_running_statistics",),
        "largest error of y, beside x / √(1 + eps)",
        0.01,
        {
            "haiku": "import haiku as hk, numpy as np\n"
            + normal("(800, 6)")
            + "\nnorm = hk.transform_with_state(lambda x, t: hk.BatchNorm(True, True, 0.9)(x, t))\n"
            "y, _ = norm.apply(*norm.init(None, x, True), None, x, False)\n"
            "print(np.abs(np.asarray(y, np.longdouble) - x / np.sqrt(1 + np.longdouble(1e-5))).max())",
            "equinox-ema": "import equinox as eqx, jax, numpy as np\n"
            + normal("(800, 6)")
            + '\nlayer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(6, "i", mode="ema")\n'
            "norm = jax.vmap(eqx.nn.inference_mode(layer), axis_name='i', in_axes=(0, None), "
            "out_axes=(0, None))\n"
            "y, _ = norm(x, state)\n"
            "print(np.abs(np.asarray(y, np.longdouble) - x / np.sqrt(1 + np.longdouble(1e-5))).max())",
        },
    ),
    "debiased_from_one": Finding(
        "An average that starts at 1 is corrected as if it started at 0",
        "The hidden variance starts at 1 and is divided by 1 − momentumᵏ, which is the correction of a "
        "start at 0. With the default momentum of 0.99, the variance after the first batch is too large "
        "by 99, and by 0.58 after a hundred batches.",
        ("first_batch",),
        "running variance after one batch of variance 1, as inference uses it, minus 1",
        1,
        {
            "equinox-batch": "import equinox as eqx, jax, numpy as np\n"
            + normal("(800, 6)")
            + '\nlayer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(6, "i", mode="batch")\n'
            'norm = jax.vmap(layer, axis_name="i", in_axes=(0, None), out_axes=(0, None))\n'
            "_, state = norm(x, state)\n"
            "var = state.get(layer.batch_state_index)[1] / (1 - layer.momentum)\n"
            "print(np.abs(np.asarray(var) - x.var(0, dtype=np.longdouble)).max())",
        },
    ),
    "by_the_average": Finding(
        "Training normalizes by the running average",
        'By default (`mode="legacy"`, which is "ema", with a warning), a batch is normalized by the '
        "running statistics that it has just moved, not by its own: this is documented, but it is not "
        'the batch norm of the paper. `mode="batch"` is.',
        (
            *("y_at_mean", "y_of_many_values", "y_of_float16", "y_of_bfloat16", "y_of_large_numbers"),
            *("eps_inside_of_the_root", "variance_of_the_population", "statistics_of_each_channel"),
            *("constant_channel_is_beta", "nan_stays_in_its_channel", "dx", "dgamma", "sharded_y"),
        ),
        "largest error of y of the second batch, in standard deviations",
        1,
        {
            "equinox-ema": "import equinox as eqx, jax, numpy as np\n"
            + normal("(800, 6)")
            + '\nlayer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(6, "i", mode="ema")\n'
            'norm = jax.vmap(layer, axis_name="i", in_axes=(0, None), out_axes=(0, None))\n'
            "_, state = norm(x, state)\n"
            "x = 3 * x + 5\n"
            "y, state = norm(x, state)\n" + RIGHT,
        },
    ),
    "sixteen_bits": Finding(
        "Arithmetic in 16 bits",
        "The statistics, or the differences from them, are rounded to the dtype of the data on the way. "
        "A result that is rounded once is within half an eps.",
        ("y_of_float16", "y_of_bfloat16"),
        "largest error of y of float16, in eps of max(1, |y|)",
        1,
        of_batch(
            "x = (np.random.default_rng(0).standard_normal((4000, 6)) + 3).astype(np.float16)",
            *("haiku", "equinox-batch", "tinygrad", "mlx"),
            right=IN_EPS,
        ),
    ),
    "bits_by_threads": Finding(
        "Results depend on the number of threads",
        "Sums are split by the number of threads, and added in that order.",
        ("same_bits_with_threads",),
        "values of y that are not the same with one thread and with two",
        1,
        THREADS,
    ),
}
# Float16 layers of Equinox have float16 parameters, too.
_programs = FINDINGS["sixteen_bits"].programs
_programs["equinox-batch"] = _programs["equinox-batch"].replace(
    'mode="batch")', 'mode="batch", dtype=x.dtype)'
)
