"""Convolution with a fast weight gradient on a CPU, for cnn.py and resnet.py: `nn.Conv(conv_general_dilated=conv)`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right
TILE = 2**20  # bytes of gradient at a time: with the rows that meet it, what a core's cache holds


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **more: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`: x [B, H, W, C] and kernel [h, w, C, D] to [B, H', W', D].

    Where a CPU is the one device, a kernel of stride 1 that has 16 to 256 channels on both sides gets its gradient by
    rows; all else is XLA's own. One core of an Intel Xeon (jax 0.10.2, float32) took this part of the time that XLA's
    gradient takes: 3x3 of 16 channels 0.49, of 32 0.55, of 64 0.46 to 0.80, of 128 0.53, of 256 0.93 (ResNet-20's and
    ResNet-18's sizes); in bfloat16 0.55 to 0.84, of 256 1.08. As any `custom_vjp` it takes no forward-mode derivative.
    """
    window, channels = kernel.shape[:-2], kernel.shape[-2:]
    dilated = {more.get("lhs_dilation"), more.get("rhs_dilation")} - {None, (1,) * len(window)}
    simple = len(window) == 2 and set(strides) == {1} and not dilated and more.get("feature_group_count", 1) == 1
    if not (simple and 16 <= min(channels) <= max(channels) <= 256 and one_cpu()):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    return _conv(tuple(map(tuple, padding)), x, kernel)


def one_cpu() -> bool:
    """Over several devices the batch is cut, and a loop over its parts would send them about."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain(padding, x, kernel)


def _plain(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(padding, x, kernel):
    return _plain(padding, x, kernel), (x, kernel)


def _backward(padding, saved, dy):
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: _plain(padding, x, kernel), x)(dy)
    return dx, by_rows(padding, kernel.shape[:2], x, dy).astype(kernel.dtype)


_conv.defvjp(_forward, _backward)


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
