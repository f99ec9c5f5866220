"""A multilayer perceptron."""

from collections.abc import Callable

import flax.linen as nn
import jax

Activation = Callable[[jax.Array], jax.Array]


class MLP(nn.Module):
    """Dense layers over the flattened input; `features` hidden units a layer."""

    features: tuple[int, ...]
    classes: int
    activation: Activation = nn.relu
    output_activation: Activation | None = None  # None: logits
    dropout: float = 0.0  # of each hidden layer's units

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, ...] floats to [B, classes]."""
        x = x.reshape(x.shape[0], -1)
        for features in self.features:
            x = self.activation(nn.Dense(features)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.Dense(self.classes)(x)
        return x if self.output_activation is None else self.output_activation(x)
