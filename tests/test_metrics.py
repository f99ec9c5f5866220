"""The metrics against plain numpy: however the examples are cut into batches, each counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompute import metrics
from jaxcompute.metrics import Calibration, Confusion, Last, Mean

SIZE, CLASSES = 101, 12
RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, CLASSES, SIZE).astype(np.uint8)
LOGITS = (RNG.normal(0, 2, (SIZE, CLASSES)) + 3 * np.eye(CLASSES)[LABEL]).astype(np.float32)

count = jax.jit(metrics.classification)


def counted(batch_size: int) -> metrics.Metrics:
    """All examples in batches of this size; the last is padded with what must not count."""
    total = None
    for start in range(0, SIZE, batch_size):
        logits, label = LOGITS[start : start + batch_size], LABEL[start : start + batch_size]
        pad = batch_size - len(label)
        part = count(
            np.concatenate([logits, np.full((pad, CLASSES), np.nan, np.float32)]),
            {
                "label": np.concatenate([label, np.zeros(pad, np.uint8)]),
                "mask": np.arange(batch_size) < len(label),
            },
        )
        total = part if total is None else metrics.add(total, part)
    assert total is not None
    return jax.device_get(total)


def reference() -> dict:
    """One example at a time, in float64."""
    p = np.exp(LOGITS.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    confusion = np.zeros((CLASSES, CLASSES), int)
    bins: dict[int, list] = {}
    loss = right = right5 = 0.0
    for probability, label in zip(p, LABEL, strict=True):
        best_first = np.argsort(-probability)
        loss -= np.log(probability[label])
        right += best_first[0] == label
        right5 += label in best_first[:5]
        confusion[label, best_first[0]] += 1
        bins.setdefault(int(probability.max() * 15), []).append((probability.max(), best_first[0] == label))
    gap = sum(len(b) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins.values())
    return {
        "loss": loss / SIZE,
        "accuracy": right / SIZE,
        "accuracy_top5": right5 / SIZE,
        "ece": gap / SIZE,
        "confusion": confusion,
    }


@pytest.mark.parametrize("batch_size", [SIZE, 40, 128])
def test_classification_is_the_reference_however_it_is_cut(batch_size):
    expected, got = reference(), metrics.compute(counted(batch_size))
    assert got.keys() == expected.keys()
    for name in ("accuracy", "accuracy_top5"):
        assert got[name] == expected[name]
    np.testing.assert_array_equal(got["confusion"], expected["confusion"])
    np.testing.assert_allclose([got["loss"], got["ece"]], [expected["loss"], expected["ece"]], rtol=1e-6)


def test_without_a_mask_every_example_counts():
    full = metrics.compute(count(LOGITS, {"label": LABEL}))
    np.testing.assert_allclose(full["loss"], reference()["loss"], rtol=1e-6)
    assert full["confusion"].sum() == SIZE


def test_top5_needs_ten_classes():
    assert "accuracy_top5" not in jax.eval_shape(metrics.classification, LOGITS[:, :9], {"label": LABEL})
    assert "accuracy_top5" in jax.eval_shape(metrics.classification, LOGITS[:, :10], {"label": LABEL})


def test_of_no_example_every_ratio_is_nan():
    nothing = metrics.compute(count(LOGITS, {"label": LABEL, "mask": np.zeros(SIZE, bool)}))
    assert nothing.pop("confusion").sum() == 0
    assert np.isnan(list(nothing.values())).all()


def test_confusion_of_uint8_labels_does_not_wrap_around():
    logits, label = np.eye(200, dtype=np.float32)[[199, 3]], np.array([150, 3], np.uint8)
    rows, columns = np.nonzero(Confusion.of(logits, label, np.ones(2, bool)).compute())
    assert (rows.tolist(), columns.tolist()) == ([3, 150], [3, 199])


def test_calibration_of_full_confidence_is_the_error_rate():
    logits, label = 1000 * jnp.eye(4)[jnp.array([0, 1, 2, 3])], jnp.array([0, 1, 2, 0])
    assert Calibration.of(logits, label, jnp.ones(4, bool)).compute() == 0.25


def test_means_weigh_what_the_mask_shows_and_last_is_the_newest():
    assert (Mean.of(jnp.array([1.0])) + Mean.of(jnp.array([2.0, 3.0, 4.0]))).compute() == 2.5
    assert Mean.of(jnp.array([True, False, True]), jnp.array([True, True, False])).compute() == 0.5
    assert Mean.of(jnp.array([1.0, jnp.nan]), jnp.array([True, False])).compute() == 1
    assert (Last(jnp.float32(1)) + Last(jnp.float32(2))).compute() == 2
