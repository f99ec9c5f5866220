"""Residual networks for small images (He et al. 2015, arXiv:1512.03385, section 4.2).

Two forms of one network. The CIFAR family (depth 6n + 2, widths 16, 32, 64) has the paper's parameter-free shortcuts
(option A) and its parameter counts: 0.27M at depth 20 to 1.7M at depth 110. The wide form of ResNet-18 (widths 64 to
512, 11.2M) keeps the 3x3 stem and has projections where the shape changes (option B).

Every scale starts at one, as in the paper. Blocks that start as the identity, their last scale at zero (Goyal et al.
2017, arXiv:1706.02677, section 5.1), cost depth 20 most of its first epoch on CIFAR-10.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .norm import BatchNorm

Conv3x3 = partial(nn.Conv, kernel_size=(3, 3), padding=1, use_bias=False, kernel_init=nn.initializers.he_normal())
Conv1x1 = partial(nn.Conv, kernel_size=(1, 1), padding=0, use_bias=False, kernel_init=nn.initializers.he_normal())
Norm = partial(BatchNorm, momentum=0.9)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: [B, H, W, C] to [B, H/stride, W/stride, features]."""

    features: int
    stride: int = 1
    projection: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(Norm, use_running_average=not train)
        y = Conv3x3(self.features, strides=self.stride)(x)
        y = nn.relu(norm()(y))
        y = Conv3x3(self.features)(y)
        y = norm()(y)
        if x.shape != y.shape:
            if self.projection:
                x = norm()(Conv1x1(self.features, strides=self.stride)(x))
            else:  # every stride-th pixel, and zeros for the new channels
                x = x[:, :: self.stride, :: self.stride]
                x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.features - x.shape[-1])))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A 3x3 stem, stages of blocks that halve the image and double the width, global average pool, one dense layer."""

    blocks: tuple[int, ...]  # a stage
    width: int = 16  # of the first stage
    projection: bool = False
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, H, W, C] floats to logits [B, classes]."""
        x = Conv3x3(self.width)(x)
        x = nn.relu(Norm(use_running_average=not train)(x))
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(self.width * 2**stage, stride, self.projection)(x, train)
        x_BxC = x.mean((1, 2))
        return nn.Dense(self.classes)(x_BxC)


ResNet20 = partial(ResNet, blocks=(3, 3, 3))
ResNet32 = partial(ResNet, blocks=(5, 5, 5))
ResNet44 = partial(ResNet, blocks=(7, 7, 7))
ResNet56 = partial(ResNet, blocks=(9, 9, 9))
ResNet110 = partial(ResNet, blocks=(18, 18, 18))
ResNet18 = partial(ResNet, blocks=(2, 2, 2, 2), width=64, projection=True)
