"""LeNet-5 (LeCun et al. 1998, "Gradient-based learning applied to document recognition", figure 2).

Read beside the figure: C1, S2, C3, S4, C5, F6, OUTPUT. This is its usual modern form, which differs from the paper in
four places: a plain maximum in place of S2's and S4's trained averages; C3 sees all maps of S2, not table I's subset;
ReLU by default, where the paper has a scaled tanh; a softmax layer in place of the Gaussian connections at the output.
61,706 parameters for the paper's sizes.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from .conv_pool import ConvPool


class LeNet5(nn.Module):
    """Two 5x5 convolutions, each pooled, then three dense layers."""

    classes: int = 10
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, 28, 28, C] floats to logits [B, classes]; shapes below are the figure's."""
        x = ConvPool(6, (5, 5), 2, self.activation, name="C1")(x)  # [B, 28, 28, 6], as of 32x32; S2 [B, 14, 14, 6]
        x = ConvPool(16, (5, 5), 0, self.activation, name="C3")(x)  # [B, 10, 10, 16]; S4 [B, 5, 5, 16]
        x = x.reshape(x.shape[0], -1)  # [B, 400]
        x = self.activation(nn.Dense(120, name="C5")(x))  # the figure's 5x5 convolution, of a 5x5 map
        x = self.activation(nn.Dense(84, name="F6")(x))
        return nn.Dense(self.classes, name="OUTPUT")(x)
