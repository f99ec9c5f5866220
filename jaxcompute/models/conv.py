"""Convolutions that are fast on a CPU, for lenet.py, cnn.py and resnet.py: `nn.Conv(conv_general_dilated=conv)`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right
TILE = 2**20  # bytes of gradient at a time: with the rows that meet it, what a core's cache holds


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **more: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`: x [B, H, W, C] and kernel [h, w, C, D] to [B, H', W', D].

    On a CPU, at stride 1, two kinds are computed otherwise than by XLA's convolution; all else is XLA's own. Times are
    of one core of an Intel Xeon (jax 0.10.2, float32) as parts of XLA's.

    16 to 256 channels on both sides, and one device: the kernel's gradient `by_rows`. 3x3 of 16 channels 0.49, of 32
    0.55, of 64 0.46 to 0.80, of 128 0.53, of 256 0.93 (ResNet-20's and ResNet-18's sizes); in bfloat16 0.55 to 0.84, of
    256 1.08.

    A window to 5x5, of fewer than 16 channels to 64 features at most (in bfloat16 to 16), of 16 examples or more:
    `by_band`. Forward, the kernel's gradient, and of C3 the input's: LeNet-5's C1 0.16, 0.73, C3 0.93, 1.14, 0.27; 3x3
    of 1 channel to 64 0.69, 0.33, of 3 to 16 0.38, 0.81, of 3 to 64 1.98, 0.55; in bfloat16 C1 0.17, 0.76, C3 1.16,
    1.49, 0.66, of 3 to 16 0.59, 1.48.

    As any `custom_vjp` these take no forward-mode derivative.
    """
    window, channels = kernel.shape[:-2], kernel.shape[-2:]
    dilated = {more.get("lhs_dilation"), more.get("rhs_dilation")} - {None, (1,) * len(window)}
    if len(window) != 2 or set(strides) != {1} or dilated or more.get("feature_group_count", 1) != 1:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    pads: Any = tuple(map(tuple, padding))
    few = channels[0] < 16 and channels[1] <= (16 if x.dtype == jnp.bfloat16 else 64)
    if few and len(x) >= 16 and min(window) > 1 and math.prod(window) <= 25:
        return _band(pads, x, kernel)
    if 16 <= min(channels) <= max(channels) <= 256 and one_cpu():
        return _rows(pads, x, kernel)
    return _plain(pads, x, kernel)


def _plain(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


# -- by rows -----------------------------------------------------------------------------------------------------------


def one_cpu() -> bool:
    """Over several devices the batch is cut, and a loop over its parts would send them about."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain(padding, x, kernel)


def _rows_forward(padding, x, kernel):
    return _plain(padding, x, kernel), (x, kernel)


def _rows_backward(padding, saved, dy):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _plain(padding, x, kernel), x)(dy)
    return dx, by_rows(padding, kernel.shape[:2], x, dy).astype(kernel.dtype)


_rows.defvjp(_rows_forward, _rows_backward)


def by_rows(padding: Padding, window: tuple[int, int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """The kernel's gradient [h, w, C, D], of x [B, H, W, C] and dy [B, H', W', D], some examples at a time.

    dkernel[i, j] = sum over b, y, u of x[b, y + i, u] dy[b, y, u - j], x and dy padded: a matrix product for each row i
    of the kernel, of the rows of x as they lie by copies of dy, each shifted by its column j.
    """
    (height, width), ((above, below), (left, right)) = window, padding
    (batch, rows, _, features), (columns, channels) = dy.shape, x.shape[2:]
    size = dy[0].size * width * dy.dtype.itemsize
    some = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * size <= TILE))

    def add(i: Any, total: jax.Array) -> jax.Array:
        part_x, part_dy = (jax.lax.dynamic_slice_in_dim(a, i * some, some).astype(total.dtype) for a in (x, dy))
        part_x = jnp.pad(part_x, ((0, 0), (above, below), (0, 0), (0, 0)))
        part_dy = jnp.pad(part_dy, ((0, 0), (0, 0), (width - 1 - left, width - 1 - right), (0, 0)))
        shifted = jnp.concatenate([part_dy[:, :, j : j + columns] for j in reversed(range(width))], -1)
        shifted = shifted.reshape(-1, width * features)
        met = (part_x[:, row : row + rows].reshape(-1, channels) for row in range(height))
        return total + jnp.stack([jax.lax.dot_general(x, shifted, (((0,), (0,)), ((), ()))) for x in met])

    total = jnp.zeros((height, channels, width * features), jnp.promote_types(x.dtype, jnp.float32))
    total = jax.lax.fori_loop(0, batch // some, add, total)
    return total.reshape(height, channels, width, features).swapaxes(1, 2)


# -- by a band matrix --------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _band(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, kernel, cpu=partial(by_band, padding), default=partial(_plain, padding))


def _band_forward(padding, x, kernel):
    return _band(padding, x, kernel), (x, kernel)


def _band_backward(padding, saved, dy):
    def gradient(by):
        def pulled(function):
            return lambda x, kernel, dy: jax.vjp(partial(function, padding), x, kernel)[1](dy)[by]

        return jax.lax.platform_dependent(*saved, dy, cpu=pulled(by_band), default=pulled(_plain))

    return gradient(0), gradient(1)  # one by one, as no one asks for that of the network's input


_band.defvjp(_band_forward, _band_backward)


def by_band(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as one matrix product, of pieces of lines: (u + w - 1) / w times the work, at a product's speed.

    A piece, [u D] outputs side by side in a line, is the h (u + w - 1) C inputs above it times a matrix that has the
    kernel along its diagonals and zeros beside them.
    """
    (height, width, channels, features), batch = kernel.shape, len(x)
    rows, columns = (x.shape[i + 1] + sum(padding[i]) - kernel.shape[i] + 1 for i in (0, 1))
    pieces = max(1, columns // max(4, math.ceil(64 / features)))  # not so narrow that a product were slow
    u = math.ceil(columns / pieces)
    x = jnp.pad(x, ((0, 0), padding[0], (padding[1][0], padding[1][1] + pieces * u - columns), (0, 0)))

    place = jnp.stack([jnp.eye(u + width - 1, u, -j, dtype=kernel.dtype) for j in range(width)])
    band = jnp.einsum("hwcd,wuv->hucvd", kernel, place).reshape(-1, u * features)
    across = jnp.stack([x[:, :, i * u : (i + 1) * u + width - 1] for i in range(pieces)], 2)
    across = across.reshape(batch, x.shape[1], pieces, (u + width - 1) * channels)
    down = jnp.concatenate([across[:, i : i + rows] for i in range(height)], -1)
    y = down.reshape(batch * rows * pieces, -1) @ band
    return y.reshape(batch, rows, pieces * u, features)[:, :, :columns]
