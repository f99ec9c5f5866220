"""Convolutions that are fast on a CPU, for lenet.py, cnn.py and resnet.py: `nn.Conv(conv_general_dilated=conv)`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Strides = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
TILE = 2**20  # bytes of copies at a time: with what they are multiplied by, what a core's cache holds


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **more: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`: x [B, H, W, C] and kernel [h, w, C, D] to [B, H', W', D].

    On a CPU three things are computed otherwise than by XLA. Times are of one core of an Intel Xeon (jax 0.10.2,
    float32) as parts of XLA's.

    A window to 5x5 at stride 1, of fewer than 16 channels to 64 features at most (in bfloat16 to 16), of 16 examples or
    more: `by_band`. Forward, the kernel's gradient, and of C3 the input's: LeNet-5's C1 0.16, 0.73, C3 0.93, 1.14,
    0.27; 3x3 of 1 channel to 64 0.69, 0.33, of 3 to 16 0.38, 0.81, of 3 to 64 1.98, 0.55; in bfloat16 C1 0.17, 0.76, C3
    1.16, 1.49, 0.66, of 3 to 16 0.59, 1.48.

    Of the others those of 16 to 256 channels on both sides, on one device: the kernel's gradient `by_rows`. 3x3 of 16
    channels 0.49, of 32 0.55, of 64 0.46 to 0.80, of 128 0.53, of 256 0.93 (ResNet-20's and ResNet-18's sizes); in
    bfloat16 0.55 to 0.84, of 256 1.08; at stride 2 of 16 0.50, of 32 0.87, of 64 0.58, of 128 1.04, and 1x1 0.24.

    The other gradients are XLA's, bit for bit, but written in the one form that it has a fast program for: its own
    rewriting into that form leaves out what is inside a loop or a branch, where ResNet-20's step took 30 times as long.

    What is not of two dimensions, channels last, or is dilated, grouped, of a set precision, or padded by less than
    nothing or by a window's width or more, is left to XLA. As any `custom_vjp` these take no forward-mode derivative.
    """
    if not _usual(x, kernel, **more):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    steps: Any = tuple(strides)
    pads: Any = tuple(map(tuple, padding))
    height, width, channels, features = kernel.shape
    if not all(_fits(*side) for side in zip(x.shape[1:3], (height, width), pads, strict=True)):
        return _plain(steps, pads, x, kernel)
    few = channels < 16 and features <= (16 if x.dtype == jnp.bfloat16 else 64)
    if few and steps == (1, 1) and min(height, width) > 1 and height * width <= 25 and len(x) >= 16:
        return _band(pads, x, kernel)
    if jax.default_backend() == "cpu":
        return _canonical(steps, pads, x, kernel)
    return _plain(steps, pads, x, kernel)


def _usual(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, **more: Any) -> bool:
    if (
        not x.size
        or kernel.ndim != 4
        or any(np.any(np.asarray(value) != 1) for value in more.values() if value is not None)
    ):
        return False
    asked, own = (jax.lax.conv_dimension_numbers(x.shape, kernel.shape, d) for d in (dimension_numbers, CHANNELS_LAST))
    return asked == own


def _fits(size: int, window: int, pads: tuple[int, int]) -> bool:
    return size + sum(pads) >= window and 0 <= min(pads) <= max(pads) < window


def _plain(strides: Strides, padding: Padding, x: jax.Array, kernel: jax.Array, **more: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=CHANNELS_LAST, **more)


# -- canonical gradients -----------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _canonical(strides: Strides, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _plain(strides, padding, x, kernel)


def _canonical_forward(strides, padding, x, kernel):
    return _plain(strides, padding, x, kernel), (x, kernel)


def _canonical_backward(strides, padding, saved, dy):
    x, kernel = saved
    rows = 16 <= min(kernel.shape[2:]) <= max(kernel.shape[2:]) <= 256 and one_device()
    dkernel = (by_rows if rows else kernel_gradient)(strides, padding, kernel.shape, x, dy)
    return input_gradient(strides, padding, x.shape, kernel, dy), dkernel.astype(kernel.dtype)


_canonical.defvjp(_canonical_forward, _canonical_backward)


def one_device() -> bool:
    """Over several the batch is cut, and a loop over its parts would send them about."""
    return jax.device_count() == 1


def input_gradient(
    strides: Strides, padding: Padding, shape: Sequence[int], kernel: jax.Array, dy: jax.Array
) -> jax.Array:
    """Of x, of that shape: a convolution of dy, spread by the strides, with the kernel turned about."""
    window = kernel.shape[:2]
    pads = []
    for i in range(2):
        below, spread = window[i] - 1 - padding[i][0], (dy.shape[i + 1] - 1) * strides[i] + 1
        pads.append((below, shape[i + 1] + window[i] - 1 - spread - below))
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return _plain((1, 1), tuple(pads), dy, turned, lhs_dilation=strides)


def kernel_gradient(strides: Strides, padding: Padding, shape: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """Of a kernel of that shape: a convolution of x with dy, the batch in the channels' place."""
    pads = []
    for i in range(2):
        spread = (dy.shape[i + 1] - 1) * strides[i] + 1
        pads.append((padding[i][0], shape[i] - 1 + spread - x.shape[i + 1] - padding[i][0]))
    x, dy = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return _plain((1, 1), tuple(pads), x, dy, rhs_dilation=strides).transpose(1, 2, 0, 3)


def by_rows(strides: Strides, padding: Padding, shape: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """As `kernel_gradient`: a matrix product for each row of the kernel, of some examples at a time.

    dkernel[i, j] = sum over b, y, u of x[b, s y + i, s u + j] dy[b, y, u], x padded. At stride 1 a product is of rows
    of x as they lie by copies of dy, each shifted by its column j; else of copies of x, what each column met, by dy.
    """
    (height, width, channels, features), ((above, below), (left, right)) = shape, padding
    batch, rows, columns, _ = dy.shape
    shifted = strides == (1, 1)
    size = rows * columns * width * (features if shifted else channels) * dy.dtype.itemsize
    some = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * size <= TILE))

    def factors(x: jax.Array, dy: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """Of some examples: what each row of the kernel met, and what all of them are multiplied by."""
        if shifted:
            x = jnp.pad(x, ((0, 0), (above, below), (0, 0), (0, 0)))
            dy = jnp.pad(dy, ((0, 0), (0, 0), (width - 1 - left, width - 1 - right), (0, 0)))
            copies = [dy[:, :, j : j + x.shape[2]] for j in reversed(range(width))]
            return [x[:, i : i + rows] for i in range(height)], jnp.concatenate(copies, -1)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        lines = [x[:, i :: strides[0]][:, :rows] for i in range(height)]
        copies = [[line[:, :, j :: strides[1]][:, :, :columns] for j in range(width)] for line in lines]
        return [jnp.concatenate(copy, -1) for copy in copies], dy

    def add(i: Any, total: jax.Array) -> jax.Array:
        parts = (jax.lax.dynamic_slice_in_dim(a, i * some, some).astype(total.dtype) for a in (x, dy))
        met, by = factors(*parts)
        by = by.reshape(-1, by.shape[-1])
        products = [jax.lax.dot_general(a.reshape(len(by), -1), by, (((0,), (0,)), ((), ()))) for a in met]
        return total + jnp.stack(products)

    of_a_row = (channels, width * features) if shifted else (width * channels, features)
    total = jnp.zeros((height, *of_a_row), jnp.promote_types(x.dtype, jnp.float32))
    total = jax.lax.fori_loop(0, batch // some, add, total)
    return total.reshape(height, channels, width, features).swapaxes(1, 2) if shifted else total.reshape(shape)


# -- by a band matrix --------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _band(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(
        x, kernel, cpu=partial(by_band, padding), default=partial(_plain, (1, 1), padding)
    )


def _band_forward(padding, x, kernel):
    return _band(padding, x, kernel), (x, kernel)


def _band_backward(padding, saved, dy):
    def gradient(by):
        def pulled(function):
            return lambda x, kernel, dy: jax.vjp(function, x, kernel)[1](dy)[by]

        cpu, default = partial(by_band, padding), partial(_plain, (1, 1), padding)
        return jax.lax.platform_dependent(*saved, dy, cpu=pulled(cpu), default=pulled(default))

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
