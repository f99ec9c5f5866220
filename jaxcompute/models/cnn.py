"""A plain convolutional network: stages of a 3x3 convolution and a 2x2 pool, then dense layers."""

import flax.linen as nn
import jax

from .conv import conv
from .norm import BatchNorm
from .pooling import max_pool


class CNN(nn.Module):
    """`features` channels a stage, each stage halving the image; `dense` hidden units a layer after them."""

    features: tuple[int, ...] = (64, 64, 64)
    dense: tuple[int, ...] = (128,)
    classes: int = 10
    norm: bool = False  # batch norm after each convolution
    dropout: float = 0.0  # of each hidden dense layer's units

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, H, W, C] floats to logits [B, classes]; H and W at least 2 ** len(features)."""
        for features in self.features:
            x = nn.Conv(features, (3, 3), use_bias=not self.norm, conv_general_dilated=conv)(x)
            if self.norm:
                x = BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = max_pool(nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        for features in self.dense:
            x = nn.relu(nn.Dense(features)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)
