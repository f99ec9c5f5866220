import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcompute.data import augment

KEY = jax.random.key(3)
IMAGES = np.random.default_rng(0).integers(1, 256, (256, 6, 8, 3)).astype(np.uint8)


def everything(key, image):
    crop_key, flip_key, box_key = jax.random.split(key, 3)
    image = augment.flip(flip_key, augment.crop(crop_key, image, 2))
    return augment.normalize(augment.random_resized_crop(box_key, image, 5), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def test_any_number_of_devices_gives_the_same_bits():
    results = []
    for count in (1, 2, 4):
        batch = NamedSharding(Mesh(np.array(jax.devices()[:count]), "data"), PartitionSpec("data"))
        mapped = jax.jit(lambda k, x: augment.per_example(k, x, everything), out_shardings=batch)
        out = mapped(KEY, jax.device_put(IMAGES, batch))
        assert len(out.sharding.device_set) == count
        results.append(np.asarray(out))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_an_examples_draw_depends_on_its_place_and_key_alone():
    mapped = jax.jit(lambda key, images: augment.per_example(key, images, everything))
    whole = np.asarray(mapped(KEY, IMAGES))
    changed = IMAGES.copy()
    changed[7:] = 0
    np.testing.assert_array_equal(mapped(KEY, changed)[:7], whole[:7])
    assert (np.asarray(mapped(jax.random.key(4), IMAGES)) != whole).any()
    same = np.broadcast_to(IMAGES[:1], IMAGES.shape)
    assert len(np.unique(mapped(KEY, same), axis=0)) > 200


def test_mixup_mixes_images_and_targets_alike():
    image = IMAGES.astype(np.float32)
    target = np.eye(256, dtype=np.float32)  # so that a target says who is in it, and how much
    mixed, said = map(np.asarray, jax.jit(lambda k: augment.mixup(k, image, target, 0.3))(KEY))
    share = said[np.arange(256), np.arange(256)]
    np.testing.assert_allclose(said[np.arange(256), np.arange(-1, 255)], 1 - share, atol=1e-6)
    np.testing.assert_allclose(mixed, np.einsum("ij,j...->i...", said, image), atol=1e-3)
    # Beta(0.3, 0.3): mean 1/2, variance 1 / (4 (2 alpha + 1)) = 0.156; within 4 standard deviations
    assert abs(share.mean() - 0.5) < 0.1 and abs(share.var() - 0.156) < 0.03
    assert share.min() >= 0 and share.max() <= 1


def test_flip_turns_about_half():
    out = np.asarray(jax.jit(lambda key, x: augment.per_example(key, x, augment.flip))(KEY, IMAGES))
    turned = (out == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert (turned | (out == IMAGES).all((1, 2, 3))).all()
    assert 90 < turned.sum() < 166  # 128 and 4.8 standard deviations


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_is_a_window_of_the_padded_image(mode):
    cut = functools.partial(augment.crop, padding=2, mode=mode)
    out = np.asarray(jax.jit(lambda key, x: augment.per_example(key, x, cut))(KEY, IMAGES))
    assert out.shape == IMAGES.shape and out.dtype == np.uint8
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)), mode)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (6, 8), (1, 2)).transpose(0, 1, 2, 4, 5, 3)
    hits = (windows == out[:, None, None]).all((3, 4, 5))  # [256, 5, 5]: which window each one is
    assert (hits.sum((1, 2)) == 1).all()
    assert hits.sum(0).min() > 0  # each of the 25 places is drawn


def test_random_resized_crop_of_a_constant_is_constant():
    image = jnp.full((9, 6, 1), 77, jnp.uint8)
    images = jnp.broadcast_to(image, (50, *image.shape))
    cut = functools.partial(augment.random_resized_crop, size=5)
    out = jax.jit(lambda key, x: augment.per_example(key, x, cut))(KEY, images)
    assert out.shape == (50, 5, 5, 1) and out.dtype == jnp.float32
    assert (np.asarray(out) == 77).all()


def test_resample_against_numpy():
    image = IMAGES[0]
    resample = jax.jit(augment.resample, static_argnums=2)
    np.testing.assert_array_equal(resample(image[:, :6], jnp.array([0, 0, 6, 6]), 6), image[:, :6])
    top, left, height, width = 1, 2, 4, 5
    box = image[top : top + height, left : left + width].astype(float)
    y = (np.arange(7) + 0.5) * height / 7 - 0.5
    x = (np.arange(7) + 0.5) * width / 7 - 0.5
    rows = np.stack([[np.interp(y, range(height), box[:, j, c]) for j in range(width)] for c in range(3)])
    expected = np.stack([[np.interp(x, range(width), rows[c, :, i]) for i in range(7)] for c in range(3)])
    got = resample(image, jnp.array([top, left, height, width]), 7)
    np.testing.assert_allclose(got, expected.transpose(1, 2, 0), atol=1e-3)


def test_boxes_keep_to_scale_and_ratio():
    draw = jax.jit(jax.vmap(lambda key: augment.random_box(key, 200, 300, (0.35, 1.0), (3 / 4, 4 / 3))))
    top, left, height, width = np.asarray(draw(jax.random.split(KEY, 2000))).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 200).all() and (left + width <= 300).all()
    area, ratio = height * width / 60_000, width / height
    assert 0.34 < area.min() < 0.36 and area.max() > 0.85
    assert 0.74 < ratio.min() < 0.78 and 1.3 < ratio.max() < 1.35
    assert np.corrcoef(top, left)[0, 1] < 0.3 and len(set(top)) > 50


def test_a_box_that_never_fits_is_the_largest_centred_one():
    box = jax.jit(lambda key: augment.random_box(key, 10, 100, (0.9, 1.0), (3 / 4, 4 / 3)))(KEY)
    assert np.asarray(box).tolist() == [0, 43, 10, 13]


@pytest.mark.parametrize("x64", [False, True])
def test_normalize(x64):
    with jax.enable_x64(x64):
        out = augment.normalize(jnp.asarray(IMAGES), (0.5, 0.25, 0.125), (0.5, 0.25, 2.0))
    assert out.dtype == np.float32
    expected = (IMAGES / 255 - [0.5, 0.25, 0.125]) / [0.5, 0.25, 2.0]
    np.testing.assert_allclose(out, expected, atol=1e-6)
