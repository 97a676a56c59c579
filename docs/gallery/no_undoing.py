r"""
γ and β scale the output, but they do not undo the normalization
================================================================

γ and β can give the output any scale and shift. They do not restore the dependence on the scale of the
weights, which batch norm removes. With :math:`a > 0`, and variances that are large compared with
:math:`\epsilon`,

.. math::
    \mathrm{BN}((a W) u) = \mathrm{BN}(W u), \qquad
    \frac{\partial\, \mathrm{BN}((a W) u)}{\partial u}
        = \frac{\partial\, \mathrm{BN}(W u)}{\partial u}, \qquad
    \frac{\partial\, \mathrm{BN}((a W) u)}{\partial (a W)}
        = \frac{1}{a} \cdot \frac{\partial\, \mathrm{BN}(W u)}{\partial W} ,

so large weights scale neither the output nor the gradient of the input, and their own gradients are
smaller. A plain learned :math:`\gamma' x + \beta'`, which can represent the same functions once the
statistics are fixed, has none of these properties. (Ioffe & Szegedy, 2015, section 3.3.)
"""

# %%
# Scale the weights
# -----------------
# A layer of 16 units is applied to 256 inputs, with all weights multiplied by :math:`a`, from 1/100 to
# 100. The affine layer has the γ′ and β′ that make it equal to batch norm at :math:`a = 1`.

import matplotlib.pyplot as plt
import numpy as np

import batchnorm as bn

FACTORS = np.logspace(-2, 2, 9)
EPS = 1e-12  # so that a variance of 1e-4 is still much larger


def problem(seed):
    """Inputs, weights, γ, β and the gradient of the output, of a layer."""
    rng = np.random.default_rng(seed)
    u, weight, dy = (rng.standard_normal(shape) for shape in ((256, 8), (8, 16), (256, 16)))
    return u, weight, rng.uniform(0.5, 2, 16), rng.standard_normal(16), dy


def normalized(u, weight, gamma, beta, dy):
    """Output, and the gradients of u and of the weights, with batch norm."""
    x = u @ weight
    y, stats = bn.batch_norm(x, gamma, beta, eps=EPS)
    dx, *_ = bn.batch_norm_backward(dy, x, stats, gamma, eps=EPS)
    return y, dx @ weight.T, u.T @ dx


def affine(u, weight, gamma, beta, dy):
    """The same with a plain scale and shift instead of batch norm."""
    dx = dy * gamma
    return u @ weight * gamma + beta, dx @ weight.T, u.T @ dx


def size(a):
    """Root mean square."""
    return np.sqrt(np.mean(a**2))


def measure(seed):
    """Sizes relative to the factor 1 and largest differences, over the factors; the error of fold."""
    u, weight, gamma, beta, dy = problem(seed)
    stats = bn.moments(u @ weight)
    scale, shift = bn.fold(stats.mean, stats.var, gamma, beta, eps=EPS)
    sizes, unlike = {}, []
    for layer, vectors in ((normalized, (gamma, beta)), (affine, (scale, shift))):
        first, rows = layer(u, weight, *vectors, dy), []
        for a in FACTORS:
            y, du, dweight = layer(u, a * weight, *vectors, dy)
            rows.append([size(y - vectors[1]), size(du), size(dweight)])
            if layer is normalized:
                pairs = zip((y, du, a * dweight), first, strict=True)
                unlike.append([np.max(np.abs(found - expected)) for found, expected in pairs])
        one = np.asarray([size(first[0] - vectors[1]), size(first[1]), size(first[2])])
        sizes[layer.__name__] = np.asarray(rows).T / one[:, None]

    # At inference the statistics are constants, and batch norm is an affine layer.
    fresh = np.random.default_rng([seed, 1]).standard_normal((100, 8)) @ weight
    inference = bn.normalize(fresh, stats.mean, stats.var, gamma, beta, eps=EPS)
    fold = np.max(np.abs(scale * fresh + shift - inference))
    return {"sizes": sizes, "unlike": np.max(unlike, axis=0), "fold": fold}


found = measure(seed=0)

figure, axes = plt.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
for ax, i, title in zip(axes, range(3), ("output, less β", "∂L/∂u", "∂L/∂W"), strict=True):
    for name, colour in (("affine", "tab:orange"), ("normalized", "tab:blue")):
        ax.loglog(FACTORS, found["sizes"][name][i], "o-", color=colour, label=name)
    ax.set(title=title, xlabel="a: what the weights are multiplied by")
axes[0].set_ylabel("size, relative to a = 1")
axes[0].legend()
plt.show()

for name, difference in zip(("y", "∂L/∂u", "a·∂L/∂W"), found["unlike"], strict=True):
    print(f"with batch norm, {name} at any a differs from that at a = 1 by {difference:.0e} at most")

# %%
# With batch norm, the output and ∂L/∂u do not depend on the scale of the weights, and ∂L/∂W is
# proportional to 1/a. With γ′x + β′, the output and ∂L/∂u grow with a, and ∂L/∂W does not depend on it.
#
# Both are equal in inference
# ---------------------------
# When the statistics are fixed after training, batch norm is only a scale and a shift,
# :math:`\gamma' = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`\beta' = \beta - \gamma' \mu`.
# :func:`batchnorm.fold` computes them, and :func:`batchnorm.fold_linear` folds them into the weights.

print(f"folded against normalized, on new inputs: {found['fold']:.1g} apart at most")
