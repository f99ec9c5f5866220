"""A convolution, its activation and a max pool as one layer, whose gradient is fast on a CPU."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from .conv import CHANNELS_LAST, Padding, automatic, conv, known, one_device
from .pooling import max_pool

Activation = Callable[[jax.Array], jax.Array]
# known to act on each value by itself: a softmax, say, would take other axes where the batch is last
ELEMENTWISE: tuple[Activation, ...] = (
    *(nn.relu, nn.relu6, nn.leaky_relu, nn.elu, nn.celu, nn.selu, nn.gelu, nn.silu, nn.softplus, nn.log_sigmoid),
    *(nn.sigmoid, nn.tanh, nn.soft_sign, nn.hard_sigmoid, nn.hard_silu, nn.hard_tanh),
)


class ConvPool(nn.Module):
    """`max_pool(activation(nn.Conv(features, window, padding=padding)(x)))`, of the same parameters.

    x [B, H, W, C] to [B, H' // 2, W' // 2, features], where H' = H + 2 padding - h + 1.

    On a CPU, on one device, in float32 or wider, of 16 examples or more, an odd window, even H' and W' and an
    activation that is one of `ELEMENTWISE`, what is differentiated is computed with the batch last, where all that is
    copied or compared lies side by side, and the four pixels that a pool chooses from come of one matrix product. A
    core of an Intel Xeon takes 0.19 of the time of Linen's for LeNet-5's C1, forward and backward, and 0.36 for C3 (jax
    0.10.2, `python benchmarks/layers.py`). There a value that is not finite spreads to neighbours that XLA's keeps
    clear of it. As any `custom_vjp` it takes no forward-mode derivative.
    """

    features: int
    window: tuple[int, int]
    padding: int
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.window, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padding = ((self.padding, self.padding), (self.padding, self.padding))
        sizes = [x.shape[i + 1] + 2 * self.padding - self.window[i] + 1 for i in (0, 1)]
        own = (
            jax.default_backend() == "cpu"
            and one_device()
            and automatic(x, kernel)
            and known(x)
            and len(x) >= 16
            and x.dtype != jnp.bfloat16
            and all(size % 2 == 0 for size in sizes)
            and all(size % 2 == 1 for size in self.window)
            and self.activation in ELEMENTWISE
        )
        return (_conv_pool if own else plain)(self.activation, padding, x, kernel, bias)


def plain(activation: Activation, padding: Padding, x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return max_pool(activation(conv(x, kernel, (1, 1), padding, dimension_numbers=CHANNELS_LAST) + bias))


_conv_pool = jax.custom_vjp(plain, nondiff_argnums=(0, 1))


def _forward(activation, padding, x, kernel, bias):
    (height, width, *_), batch = kernel.shape, len(x)
    x = jnp.pad(batch_last(x), ((0, 0), *padding, (0, 0)))
    rows, columns = (x.shape[1] - height + 1) // 2, (x.shape[2] - width + 1) // 2
    taps = [(i, j) for i in range(height + 1) for j in range(width + 1)]
    met = jnp.concatenate([x[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] for i, j in taps])
    met = met.reshape(len(met), -1)
    y = (four(kernel) @ met).reshape(4, -1, rows, columns, batch) + bias[:, None, None, None]
    z = activation(y)
    chosen, largest, which = y[0], z[0], jnp.zeros(z.shape[1:], jnp.uint8)
    for k in (1, 2, 3):
        keep = (largest >= z[k]) | jnp.isnan(largest)
        chosen, largest, which = (jnp.where(keep, a, b) for a, b in ((chosen, y[k]), (largest, z[k]), (which, k)))
    return batch_first(largest), (which, chosen, met, kernel)


def _backward(activation, padding, saved, dy):
    which, chosen, met, kernel = saved
    (dy,) = jax.vjp(activation, chosen)[1](batch_last(dy))
    dbias = dy.sum((1, 2, 3))
    dy = jnp.concatenate([jnp.where(which == k, dy, 0) for k in range(4)])  # [4D, H'/2, W'/2, B]
    (dkernel,) = jax.linear_transpose(four, kernel)(dy.reshape(len(dy), -1) @ met.T)
    dx = input_gradient(kernel, dy)
    (above, below), (left, right) = padding
    dx = dx[:, above : dx.shape[1] - below, left : dx.shape[2] - right]
    return batch_first(dx), dkernel, dbias


_conv_pool.defvjp(_forward, _backward)


def batch_last(x: jax.Array) -> jax.Array:
    """[B, H, W, C] to [C, H, W, B]."""
    return x.transpose(3, 1, 2, 0)


batch_first = batch_last  # it undoes itself


def four(kernel: jax.Array) -> jax.Array:
    """[h, w, C, D] to [4D, (h + 1) (w + 1) C]: for each pixel that a pool chooses from, in the window of all four."""
    kernels = jnp.stack([jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)])
    return kernels.transpose(0, 4, 1, 2, 3).reshape(4 * kernel.shape[3], -1)


def input_gradient(kernel: jax.Array, dy: jax.Array) -> jax.Array:
    """Of the padded input: for four pixels at a time, from the pools that saw them.

    These are summed over their rows in the product, and over their columns after it: less to copy than both before.
    """
    height, width, channels, _ = kernel.shape
    tall, wide = (height + 1) // 2, (width + 1) // 2  # as many pools see a pixel
    rows, columns = dy.shape[1] + tall - 1, dy.shape[2] + wide - 1
    kernels = four(kernel).reshape(-1, tall, 2, wide, 2, channels)
    kernels = kernels.transpose(3, 5, 2, 4, 1, 0)  # [wide, C, 2, 2, tall, 4D]
    dy = beside(dy, tall - 1, 1)
    seen = jnp.stack([dy[:, tall - 1 - i : tall - 1 - i + rows] for i in range(tall)])
    dx = kernels.reshape(wide * 4 * channels, -1) @ seen.reshape(seen.shape[0] * seen.shape[1], -1)
    dx = beside(dx.reshape(wide, channels, 2, 2, rows, -1, seen.shape[-1]), wide - 1, 5)
    parts = [dx[j, ..., wide - 1 - j : wide - 1 - j + columns, :] for j in range(wide)]
    dx = sum(parts[1:], start=parts[0])
    return dx.transpose(0, 3, 1, 4, 2, 5).reshape(channels, 2 * rows, 2 * columns, -1)


def beside(x: jax.Array, some: int, axis: int) -> jax.Array:
    """With some zeros before and after; not `jnp.pad`, which XLA would look through wherever it is read."""
    zeros = jnp.zeros((*x.shape[:axis], some, *x.shape[axis + 1 :]), x.dtype)
    return jnp.concatenate([zeros, x, zeros], axis)
