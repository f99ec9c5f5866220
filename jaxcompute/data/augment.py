"""Augmentation on the device: pure functions of (key, image) on one example, mapped over the batch by `per_example`.

Each example's key comes from its place in the global batch, so the result does not depend on how many devices share it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# mean and standard deviation of each channel, of pixels from 0 to 1
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def per_example(key: jax.Array, images: jax.Array, fn: Callable[..., jax.Array], *more: jax.Array) -> jax.Array:
    """fn(key, image, ...) over images [B, ...] and what else each example has, under a key of its own."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(images), dtype=jnp.uint32))
    return jax.vmap(fn)(keys, images, *more)


def mixup(key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Each example mixed with its neighbour in the batch, whose order is random (Zhang et al. 2017, arXiv:1710.09412).

    Args:
        images: [B, ...] float.
        targets: [B, C] float: probabilities, such as jax.nn.one_hot(label, C).
        alpha: the share that an example keeps is drawn from Beta(alpha, alpha), for each by a key of its own.

    Returns:
        Images and targets, mixed alike; the loss takes the targets as its `label`.
    """
    share = per_example(key, images, lambda key, _: jax.random.beta(key, alpha, alpha, dtype=jnp.float32))

    def mix(x: jax.Array) -> jax.Array:
        own = share.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype)
        return own * x + (1 - own) * jnp.roll(x, 1, axis=0)

    return mix(images), mix(targets)


def flip(key: jax.Array, image: jax.Array) -> jax.Array:
    """image [H, W, C], mirrored left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def crop(
    key: jax.Array, image: jax.Array, padding: int, mode: Literal["constant", "reflect"] = "constant"
) -> jax.Array:
    """image [H, W, C] padded by `padding` pixels on each side, zeros or its reflection, then cut back at random."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)
    y, x = jax.random.randint(key, (2,), 0, 2 * padding + 1, dtype=jnp.int32)
    return jax.lax.dynamic_slice(padded, (y, x, jnp.int32(0)), image.shape)


def random_resized_crop(
    key: jax.Array,
    image: jax.Array,
    size: int,
    scale: tuple[float, float] = (0.35, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    within: jax.Array | None = None,
) -> jax.Array:
    """A random box of image [H, W, C], resampled to [size, size, C] float32 (Szegedy et al. 2014, section 6).

    Args:
        size: side of the result, in pixels.
        scale: the box's share of the image's area, drawn uniformly.
        ratio: its width over height, drawn log-uniformly.
        within: int32 [2], the height and width of the picture at the array's upper left, where the rest is padding.

    The box is the first of ten draws that fits, else the largest centred one of a permitted shape. Bilinear, without
    antialiasing, and clamped at the box's edge.
    """
    height, width = image.shape[:2] if within is None else within
    return resample(image, random_box(key, height, width, scale, ratio), size)


def random_box(
    key: jax.Array,
    height: int | jax.Array,
    width: int | jax.Array,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> jax.Array:
    """int32 [4]: top, left, height and width of a box inside an image, as `random_resized_crop` draws it."""
    draws = jax.random.uniform(key, (22,), jnp.float32)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:10])
    shape = ratio[0] * (ratio[1] / ratio[0]) ** draws[10:20]
    h = jnp.round(jnp.sqrt(area / shape)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area * shape)).astype(jnp.int32)
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = jnp.argmax(fits)
    clamped = jnp.clip(width / height, *ratio)
    h = jnp.where(fits.any(), h[first], jnp.minimum(height, jnp.round(width / clamped).astype(jnp.int32)))
    w = jnp.where(fits.any(), w[first], jnp.minimum(width, jnp.round(height * clamped).astype(jnp.int32)))
    room = jnp.stack([height - h, width - w])
    random = jnp.minimum((draws[20:] * (room + 1).astype(jnp.float32)).astype(jnp.int32), room)
    corner = jnp.where(fits.any(), random, room // 2)
    return jnp.concatenate([corner, jnp.stack([h, w])])


def resample(image: jax.Array, box: jax.Array, size: int) -> jax.Array:
    """The box (top, left, height, width) of image [H, W, C], bilinearly to [size, size, C] float32."""

    def taps(start: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        centre = (jnp.arange(size, dtype=jnp.float32) + 0.5) * (length.astype(jnp.float32) / size) - 0.5
        centre = jnp.clip(centre, 0, length.astype(jnp.float32) - 1)
        low = jnp.floor(centre).astype(jnp.int32)
        return start + low, start + jnp.minimum(low + 1, length - 1), centre - low.astype(jnp.float32)

    top, left, height, width = box
    low, high, weight = taps(top, height)
    a, b = image[low].astype(jnp.float32), image[high].astype(jnp.float32)
    image = a + weight[:, None, None] * (b - a)
    low, high, weight = taps(left, width)
    a, b = image[:, low], image[:, high]
    return a + weight[:, None] * (b - a)


def normalize(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """image [..., C] of 0 to 255 to float32 (image / 255 - mean) / std, mean and std a channel."""
    mean_, std_ = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return (image.astype(jnp.float32) / np.float32(255) - mean_) / std_
