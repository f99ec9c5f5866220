"""Pooling that is fast on a CPU and hides no NaN."""

import jax
import jax.numpy as jnp


@jax.named_scope("max_pool")
def max_pool(x: jax.Array) -> jax.Array:
    """The maximum of each 2x2 window: [B, H, W, C] to [B, H // 2, W // 2, C]; an odd last row or column is left out.

    Equal to `nn.max_pool(x, (2, 2), (2, 2))` in every bit, and in its gradient, which goes to the first maximum of a
    window; but XLA's program for that on a CPU (jaxlib 0.10.2) hides a NaN. Forward and backward of [128, 28, 28, 64]
    together take a core of an Intel Xeon 0.06 of the time, of 6 channels 0.31; in bfloat16 1.06 and 1.32 (`python
    benchmarks/layers.py`).
    """
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    a, b, c, d = (x[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1))

    def larger(first: jax.Array, second: jax.Array) -> jax.Array:
        # not jnp.maximum, which would split the gradient of a tie
        return jnp.where((first >= second) | jnp.isnan(first), first, second)

    return larger(larger(a, b), larger(c, d))


@jax.named_scope("mean_pool")
def mean_pool(x: jax.Array) -> jax.Array:
    """The mean over height and width: [B, H, W, C] to [B, C].

    On a CPU it is computed as a product with ones. With a sum XLA (jaxlib 0.10.2) makes one program of what comes
    before it, in which a ReLU hides a NaN and wide convolutions are slow. With the product ResNet-18 answers one image
    in 0.45 of Linen's time on a core of an Intel Xeon, 32 in 1.00 and 256 in 0.94 (`python
    benchmarks/side_by_side.py`).
    """

    def product(x: jax.Array) -> jax.Array:
        ones = jnp.ones(x.shape[1:3], x.dtype)
        return jnp.tensordot(x, ones, ((1, 2), (0, 1))) / ones.size

    def mean(x: jax.Array) -> jax.Array:
        return x.mean((1, 2))

    return jax.lax.platform_dependent(x, cpu=product, default=mean)
