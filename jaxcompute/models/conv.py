"""Convolutions that are fast on a CPU: `nn.Conv(conv_general_dilated=conv)`."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

Strides = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")
TILE = 2**20  # bytes of copies at a time: with what they are multiplied by, what a core's cache holds


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **more: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`: x [B, H, W, C] and kernel [h, w, C, D] to [B, H', W', D].

    On a CPU some are computed otherwise than by XLA; times are of one core of an Intel Xeon (jax 0.10.2) as parts of
    XLA's, by `python benchmarks/layers.py`.

    The convolution itself, and the input's gradient, which is one, at stride 1. In float32 of 16 channels and features
    at most, or of 7 channels to 32 features, `by_groups`: LeNet-5's C1 0.11, C3 0.55, 3x3 of 3 channels to 16 0.18, to
    32 0.23, of 16 to 16 0.66. A window to 5x5, of fewer than 16 channels to 64 features at most (in bfloat16 to 16), of
    16 examples or more, `by_band` in bfloat16, and in both the gradient of an input larger than the output: C1 0.17, C3
    1.19, of 3 to 16 0.61; C3's gradient 0.26, in bfloat16 0.67.

    The kernel's gradient. Of the same few at stride 1 `by_band`: C1 0.77, C3 1.19, 3x3 of 1 channel to 64 0.49, of 3 to
    16 0.87, of 3 to 64 0.58; in bfloat16 C1 0.86, C3 1.59, of 3 to 16 1.60. Of 16 to 256 channels on both sides, on one
    device, `by_rows`: 3x3 of 16 channels 0.49, of 32 0.51, of 64 0.43 to 0.83 and 1.15 where images are 7x7, of 128
    0.54, of 256 0.97 (sizes of ResNet-20, ResNet-18 and the CNN); at stride 2 of 16 0.53, of 32 0.94, of 64 0.70, of
    128 1.08, and 1x1 0.23 and 0.27; in bfloat16 0.50 to 0.82, of 7x7 1.18, of 256 1.11, at stride 2 0.25 to 1.19.

    The other gradients are XLA's, bit for bit, but written in the one form that it has a fast program for: its own
    rewriting into that form leaves out what is inside a loop or a branch, where ResNet-20's step took 30 times as long.

    What is not of two dimensions, channels last, or is dilated, grouped, of a set precision, or padded by less than
    nothing or by a window's width or more, is left to XLA, and so is all inside `shard_map`, over explicit meshes and
    of a size that `jax.export` leaves open. As any `custom_vjp` these take no forward-mode derivative. Of few channels
    a value that is not finite spreads to neighbours that XLA's keeps clear of it, and features split over devices are
    gathered.
    """
    if not _usual(x, kernel, **more):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **more)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    steps: Any = tuple(strides)
    pads: Any = tuple(map(tuple, padding))
    fits = all(_fits(*side) for side in zip(x.shape[1:3], kernel.shape[:2], pads, strict=True))
    own = fits and jax.default_backend() == "cpu"
    return (_conv if own else _plain)(steps, pads, x, kernel)


def _usual(x: jax.Array, kernel: jax.Array, dimension_numbers: Any = None, **more: Any) -> bool:
    if (
        not known(x)
        or not x.size
        or kernel.ndim != 4
        or not automatic(x, kernel)
        or any(set(v if isinstance(v, Sequence) else [v]) != {1} for v in more.values() if v is not None)
    ):
        return False
    asked, own = (jax.lax.conv_dimension_numbers(x.shape, kernel.shape, d) for d in (dimension_numbers, CHANNELS_LAST))
    return asked == own


def automatic(*arrays: jax.Array) -> bool:
    """Whether XLA alone sees to their sharding: not inside `shard_map`, nor over explicit meshes."""
    return all(kind == AxisType.Auto for a in arrays for kind in jax.typeof(a).sharding.mesh.axis_types)


def known(x: jax.Array) -> bool:
    """Whether its sizes are numbers, none a symbol of `jax.export`."""
    return all(isinstance(size, int) for size in x.shape)


def _fits(size: int, window: int, pads: tuple[int, int]) -> bool:
    return size + sum(pads) >= window and 0 <= min(pads) <= max(pads) < window


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(strides: Strides, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return forward(strides, padding, x, kernel)


def _conv_forward(strides, padding, x, kernel):
    return forward(strides, padding, x, kernel), (x, kernel)


def _conv_backward(strides, padding, saved, dy):
    x, kernel = saved
    dkernel = kernel_gradient(strides, padding, kernel.shape, x, dy)
    return input_gradient(strides, padding, x.shape, kernel, dy), dkernel.astype(kernel.dtype)


_conv.defvjp(_conv_forward, _conv_backward)


def forward(strides: Strides, padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    _, width, channels, features = kernel.shape
    default = partial(_plain, strides, padding)
    few = max(channels, features) <= 16 or (channels < 8 and features <= 32)
    few = few and x.shape[2] * max(channels, features) >= 64  # else a group is wider than a line
    if few and strides == (1, 1) and width > 1 and x.dtype == jnp.float32:
        return jax.lax.platform_dependent(x, kernel, cpu=partial(by_groups, padding), default=default)
    if _for_band(strides, x, kernel.shape) and x.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(x, kernel, cpu=partial(by_band, padding), default=default)
    return default(x, kernel)


def input_gradient(
    strides: Strides, padding: Padding, shape: Sequence[int], kernel: jax.Array, dy: jax.Array
) -> jax.Array:
    """Of x, of that shape: a convolution of dy, spread by the strides, with the kernel turned about."""
    pads: list[tuple[int, int]] = []
    for i in range(2):
        below, spread = kernel.shape[i] - 1 - padding[i][0], (dy.shape[i + 1] - 1) * strides[i] + 1
        pads.append((below, shape[i + 1] + kernel.shape[i] - 1 - spread - below))

    def of_kernel(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        if strides == (1, 1):
            return forward(strides, (pads[0], pads[1]), dy, turned)
        return _plain((1, 1), (pads[0], pads[1]), dy, turned, lhs_dilation=strides)

    def of_band(kernel: jax.Array, dy: jax.Array) -> jax.Array:
        like = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda x: by_band(padding, x, kernel), like)(dy)[0]

    larger = shape[1] > dy.shape[1] or shape[2] > dy.shape[2]  # which XLA's fast program leaves out
    if larger and _for_band(strides, dy, kernel.shape):
        return jax.lax.platform_dependent(kernel, dy, cpu=of_band, default=of_kernel)
    return of_kernel(kernel, dy)


def kernel_gradient(strides: Strides, padding: Padding, shape: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """Of a kernel of that shape."""
    channels, features = shape[2:]
    default = partial(by_batch, strides, padding, shape)

    def of_band(x: jax.Array, dy: jax.Array) -> jax.Array:
        like = jax.ShapeDtypeStruct(shape, dy.dtype)
        return jax.linear_transpose(lambda kernel: by_band(padding, x, kernel), like)(dy)[0]

    if _for_band(strides, x, shape):
        return jax.lax.platform_dependent(x, dy, cpu=of_band, default=default)
    if 16 <= min(channels, features) <= max(channels, features) <= 256 and one_device():
        return by_rows(strides, padding, shape, x, dy)
    return default(x, dy)


def _for_band(strides: Strides, x: jax.Array, shape: Sequence[int]) -> bool:
    height, width, channels, features = shape
    few = channels < 16 and features <= (16 if x.dtype == jnp.bfloat16 else 64)
    return few and strides == (1, 1) and min(height, width) > 1 and height * width <= 25 and len(x) >= 16


def one_device() -> bool:
    """In this process's sight: over several the batch is cut, and a loop over its parts would send them about."""
    return jax.device_count() == 1


# -- ways to a convolution ---------------------------------------------------------------------------------------------


def _plain(strides: Strides, padding: Padding, x: jax.Array, kernel: jax.Array, **more: Any) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=CHANNELS_LAST, **more)


def by_groups(padding: Padding, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution as one of g columns at a time, each group a pixel of g times as many channels and features.

    XLA's fast program for float32 leaves out what has 16 or fewer of both; g is the least power of 2 that gives it
    more.
    """
    (height, width, channels, features), batch = kernel.shape, len(x)
    g = 2 ** math.ceil(math.log2(17 / max(channels, features))) if max(channels, features) <= 16 else 2
    columns = x.shape[2] + sum(padding[1]) - width + 1
    groups, seen = math.ceil(columns / g), math.ceil((g + width - 1) / g)
    # of a tap: which group it sees, which column there, from which column of the output's group
    place = jnp.array(
        [
            [[[tap + own == g * group + column for own in range(g)] for column in range(g)] for group in range(seen)]
            for tap in range(width)
        ],
        kernel.dtype,
    )
    kernel = jnp.einsum("hwcd,wsgo->hsgcod", kernel, place).reshape(height, seen, g * channels, g * features)
    right = (groups + seen - 1) * g - x.shape[2] - padding[1][0]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), (0, 0, 0), (padding[1][0], right, 0), (0, 0, 0)))
    x = x.reshape(batch, x.shape[1], groups + seen - 1, g * channels)
    y = _plain((1, 1), (padding[0], (0, 0)), x, kernel)
    return y.reshape(batch, y.shape[1], groups * g, features)[:, :, :columns]


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


# -- ways to the kernel's gradient -------------------------------------------------------------------------------------


def by_batch(strides: Strides, padding: Padding, shape: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """The kernel's gradient as a convolution of x with dy, the batch in the channels' place."""
    pads = []
    for i in range(2):
        spread = (dy.shape[i + 1] - 1) * strides[i] + 1
        pads.append((padding[i][0], shape[i] - 1 + spread - x.shape[i + 1] - padding[i][0]))
    x, dy = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    return _plain((1, 1), tuple(pads), x, dy, rhs_dilation=strides).transpose(1, 2, 0, 3)


def by_rows(strides: Strides, padding: Padding, shape: Sequence[int], x: jax.Array, dy: jax.Array) -> jax.Array:
    """The kernel's gradient: a matrix product for each row of the kernel, of some examples at a time.

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
