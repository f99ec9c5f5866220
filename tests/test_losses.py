"""The losses against their formulas; padded rows count for nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompute import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (6, 4)).astype(np.float32)
LABEL = np.array([0, 3, 2, 1, 1, 0], np.uint8)
MASK = np.array([True, True, False, True, True, False])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_the_mean_over_real_examples(smoothing):
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    target = (1 - smoothing) * np.eye(4)[LABEL] + smoothing / 4
    nll = -(target * np.log(p)).sum(-1)

    padded = np.where(MASK[:, None], LOGITS, np.nan)  # what padding holds must not matter
    value, metrics = losses.cross_entropy(smoothing)(padded, {"label": LABEL, "mask": MASK})
    np.testing.assert_allclose(value, nll[MASK].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"].compute(), nll[MASK].mean(), rtol=1e-6)
    assert metrics["accuracy"].compute() == (LOGITS.argmax(-1) == LABEL)[MASK].mean()

    value, _ = losses.cross_entropy(smoothing)(LOGITS, {"label": LABEL})
    np.testing.assert_allclose(value, nll.mean(), rtol=1e-6)


def test_cross_entropy_of_probabilities_is_that_of_their_labels():
    one_hot = np.eye(4, dtype=np.float32)[LABEL]
    for smoothing in (0.0, 0.2):
        soft, counted = losses.cross_entropy(smoothing)(LOGITS, {"label": one_hot, "mask": MASK})
        hard, expected = losses.cross_entropy(smoothing)(LOGITS, {"label": LABEL, "mask": MASK})
        np.testing.assert_allclose(soft, hard, rtol=1e-6)
        assert counted["accuracy"].compute() == expected["accuracy"].compute()
    half = (one_hot + np.roll(one_hot, 1, -1)) / 2
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))
    np.testing.assert_allclose(
        losses.cross_entropy()(LOGITS, {"label": half})[0], -(half * log_p).sum(-1).mean(), rtol=1e-6
    )


def test_cross_entropy_gradient_is_softmax_minus_target_and_zero_on_padding():
    def value(logits):
        return losses.cross_entropy()(logits, {"label": LABEL, "mask": MASK})[0]

    expected = (jax.nn.softmax(LOGITS) - np.eye(4)[LABEL]) * MASK[:, None] / MASK.sum()
    np.testing.assert_allclose(jax.grad(value)(jnp.asarray(LOGITS)), expected, atol=1e-7)


def test_cross_entropy_shows_a_label_out_of_range():
    value, _ = losses.cross_entropy(0.1)(LOGITS, {"label": LABEL + 1})  # 4 of classes 0 to 3
    assert jnp.isnan(value)


def test_squared_error_has_the_gradient_y_minus_t():
    y, t = RNG.normal(size=(2, 6, 3)).astype(np.float32)

    def value(y):
        return losses.squared_error(y, {"label": t, "mask": MASK})

    (scalar, metrics), gradient = jax.value_and_grad(value, has_aux=True)(y)
    expected = 0.5 * ((y - t)[MASK] ** 2).sum(-1).mean()
    np.testing.assert_allclose([scalar, metrics["loss"].compute()], expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, (y - t) * MASK[:, None] / MASK.sum(), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.cross_entropy(0.1), losses.squared_error])
def test_a_batch_of_padding_alone_has_loss_and_gradient_zero(loss):
    label = LABEL if loss is not losses.squared_error else LOGITS + 1
    batch = {"label": label, "mask": np.zeros(6, bool)}
    value, gradient = jax.value_and_grad(lambda logits: loss(logits, batch)[0])(jnp.asarray(LOGITS))
    assert value == 0
    assert not gradient.any()


def test_float64_stays():
    with jax.enable_x64(True):
        batch = {"label": LABEL, "mask": MASK}
        assert losses.cross_entropy(0.1)(LOGITS.astype(np.float64), batch)[0].dtype == jnp.float64
    assert losses.cross_entropy(0.1)(LOGITS, batch)[0].dtype == jnp.float32
