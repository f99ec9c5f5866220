"""Metrics that merge with `+` and divide once, at the end.

Each is a pytree of sums, so it can be added up inside jit over steps, devices and hosts, and every example counts once
however the data was cut into batches. `compute` runs on the host, on fetched values.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

Array = Any  # jax.Array inside jit, numpy.ndarray once fetched


@flax.struct.dataclass
class Mean:
    """A weighted mean, kept as sum and weight."""

    total: Array
    weight: Array

    @classmethod
    def of(cls, values: jax.Array, mask: jax.Array | None = None) -> "Mean":
        """Of values [...] where mask [...] is true; of all of them without a mask."""
        values = jnp.asarray(values)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            values = values.astype(jnp.float32)
        mask = jnp.ones(values.shape, bool) if mask is None else mask
        # where, not a product: a padded row may hold NaN
        return cls(jnp.where(mask, values, 0).sum(), mask.sum(dtype=jnp.int32))

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> float:
        return float(self.total) / float(self.weight) if self.weight else float("nan")


@flax.struct.dataclass
class Last:
    """The newest value; for what is not summed, such as a learning rate."""

    value: Array

    def __add__(self, other: "Last") -> "Last":
        return other

    def compute(self) -> float:
        return float(self.value)


@flax.struct.dataclass
class Confusion:
    """Counts [classes, classes]: rows are labels, columns predictions."""

    counts: Array

    @classmethod
    def of(cls, logits: jax.Array, label: jax.Array, mask: jax.Array) -> "Confusion":
        """Of logits [B, C], label [B], mask [B]."""
        classes = logits.shape[-1]
        counts = jnp.zeros((classes, classes), jnp.int32)
        return cls(counts.at[label, logits.argmax(-1)].add(mask.astype(jnp.int32)))

    def __add__(self, other: "Confusion") -> "Confusion":
        return Confusion(self.counts + other.counts)

    def compute(self) -> np.ndarray:
        return np.asarray(self.counts)


@flax.struct.dataclass
class Calibration:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, equation 5)."""

    count: Array  # [bins] examples
    confidence: Array  # [bins] sum of the top probability
    correct: Array  # [bins] right predictions

    @classmethod
    def of(cls, logits: jax.Array, label: jax.Array, mask: jax.Array, bins: int = 15) -> "Calibration":
        """Of logits [B, C], label [B], mask [B]."""
        confidence = jnp.where(mask, jax.nn.softmax(logits).max(-1), 0)
        correct = (logits.argmax(-1) == label) & mask
        index = jnp.clip((confidence * bins).astype(jnp.int32), 0, bins - 1)

        def binned(x: jax.Array) -> jax.Array:
            return jnp.zeros(bins, x.dtype).at[index].add(x)

        return cls(binned(mask.astype(jnp.int32)), binned(confidence), binned(correct.astype(jnp.int32)))

    def __add__(self, other: "Calibration") -> "Calibration":
        return Calibration(self.count + other.count, self.confidence + other.confidence, self.correct + other.correct)

    def compute(self) -> float:
        total = np.sum(self.count)
        gaps = np.abs(np.asarray(self.correct, np.float64) - np.asarray(self.confidence, np.float64))
        return float(gaps.sum() / total) if total else float("nan")


Metrics = dict[str, Any]  # name -> Mean, Last, Confusion or Calibration


def add(a: Metrics, b: Metrics) -> Metrics:
    """Merge two dicts of metrics of the same names."""
    return {name: a[name] + b[name] for name in b}


def classification(logits: jax.Array, batch: dict[str, jax.Array]) -> Metrics:
    """What an evaluation of a classifier counts.

    Args:
        logits: [B, C], float32 or wider.
        batch: `label` [B] int, and `mask` [B] bool where padded.

    Returns:
        loss (cross-entropy in nats), accuracy, accuracy_top5 (10 classes or more), ece, confusion.
    """
    label = batch["label"]
    mask = batch.get("mask", jnp.ones(label.shape, bool))
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    metrics: Metrics = {
        "loss": Mean.of(nll, mask),
        "accuracy": Mean.of(logits.argmax(-1) == label, mask),
    }
    if logits.shape[-1] >= 10:
        top5 = jax.lax.top_k(logits, 5)[1]
        metrics["accuracy_top5"] = Mean.of((top5 == label[:, None]).any(-1), mask)
    metrics["ece"] = Calibration.of(logits, label, mask)
    metrics["confusion"] = Confusion.of(logits, label, mask)
    return metrics


def compute(metrics: Metrics) -> dict[str, Any]:
    """Fetched metrics to plain values: floats, and the confusion counts as an array."""
    return {name: metric.compute() for name, metric in metrics.items()}
