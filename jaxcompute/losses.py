"""What is minimised: (outputs, batch) -> (scalar, metrics).

The scalar is the mean over the real examples: rows where the batch's `mask` is false count for nothing.
"""

import jax
import jax.numpy as jnp
import optax

from jaxcompute.core import Batch, Loss
from jaxcompute.metrics import Mean, Metrics


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """Softmax cross-entropy in nats, of logits [B, C] and integer labels [B], or probabilities [B, C] as of a mix-up.

    With label smoothing, the target is (1 - s) on the label and s / C more on every class (Szegedy et al. 2015,
    arXiv:1512.00567, section 7); the loss reported is the smoothed one.
    """

    def loss(logits: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
        label, mask = batch["label"], batch.get("mask")
        if label.ndim == logits.ndim:
            nll = optax.softmax_cross_entropy(logits, label)
            label = label.argmax(-1)
        else:
            nll = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        if label_smoothing:
            nll = (1 - label_smoothing) * nll - label_smoothing * jax.nn.log_softmax(logits).mean(-1)
        mean = Mean.of(nll, mask)
        return _value(mean), {"loss": mean, "accuracy": Mean.of(logits.argmax(-1) == label, mask)}

    return loss


def squared_error(outputs: jax.Array, batch: Batch) -> tuple[jax.Array, Metrics]:
    """Half the squared distance, 1/2 sum_k (y_k - t_k)^2, of outputs [B, K] and float labels [B, K].

    The half makes the gradient y - t (Rumelhart, Hinton and Williams 1986, equation 3).
    """
    mean = Mean.of(optax.l2_loss(outputs, batch["label"]).sum(-1), batch.get("mask"))
    return _value(mean), {"loss": mean}


def _value(mean: Mean) -> jax.Array:
    return mean.total / jnp.maximum(mean.weight, 1)  # a batch of padding alone has loss 0, not NaN
