"""Residual networks (He et al. 2015, arXiv:1512.03385): for small images, and for ImageNet's.

Small images (section 4.2): the CIFAR family (depth 6n + 2, widths 16, 32, 64) has the paper's parameter-free shortcuts
(option A) and its parameter counts, 0.27M at depth 20 to 1.7M at depth 110. The wide form of ResNet-18 (widths 64 to
512, 11.2M) keeps the 3x3 stem and has projections where the shape changes (option B).

ImageNet's (section 4.1): a 7x7 stem and a max pool, projections, and bottlenecks from depth 50 on; 11.7M parameters at
depth 18, 25.6M at 50. Two differences from the paper: a bottleneck's stride is in its 3x3 convolution, not in the first
1x1 ("v1.5", as in the published recipes), and its last scale starts at zero, so that it starts as its shortcut (Goyal
et al. 2017, arXiv:1706.02677, section 5.1). The small blocks start with every scale at one, as in the paper: a start as
the identity held depth 20 back by half an epoch to one on CIFAR-10 (one run of each).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from .conv import conv
from .norm import BatchNorm
from .pooling import mean_pool

Conv = partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal(), conv_general_dilated=conv)
Conv3x3 = partial(Conv, kernel_size=(3, 3), padding=1)
Conv1x1 = partial(Conv, kernel_size=(1, 1), padding=0)
Conv7x7 = partial(Conv, kernel_size=(7, 7), strides=2, padding=3)
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


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: [B, H, W, C] to [B, H/stride, W/stride, 4 * features]."""

    features: int
    stride: int = 1
    projection: bool = True  # nothing else is drawn in the paper

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(Norm, use_running_average=not train)
        y = nn.relu(norm()(Conv1x1(self.features)(x)))
        y = nn.relu(norm()(Conv3x3(self.features, strides=self.stride)(y)))
        y = norm(scale_init=nn.initializers.zeros)(Conv1x1(4 * self.features)(y))
        if x.shape != y.shape:
            x = norm()(Conv1x1(4 * self.features, strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A stem, stages of blocks that halve the image and double the width, global average pool, one dense layer."""

    blocks: tuple[int, ...]  # a stage
    width: int = 16  # of the first stage
    projection: bool = False
    classes: int = 10
    block: type[Block] | type[Bottleneck] = Block
    large: bool = False  # images: a 7x7 stem and a max pool leave a quarter of each side, in place of a 3x3 stem

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, H, W, C] floats to logits [B, classes]."""
        x = Conv7x7(self.width)(x) if self.large else Conv3x3(self.width)(x)
        x = nn.relu(Norm(use_running_average=not train)(x))
        if self.large:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self.block(self.width * 2**stage, stride, self.projection)(x, train)
        return nn.Dense(self.classes)(mean_pool(x))


ResNet20 = partial(ResNet, blocks=(3, 3, 3))
ResNet32 = partial(ResNet, blocks=(5, 5, 5))
ResNet44 = partial(ResNet, blocks=(7, 7, 7))
ResNet56 = partial(ResNet, blocks=(9, 9, 9))
ResNet110 = partial(ResNet, blocks=(18, 18, 18))
ResNet18 = partial(ResNet, blocks=(2, 2, 2, 2), width=64, projection=True)

Large = partial(ResNet, width=64, projection=True, classes=1000, large=True)
ImageNetResNet18 = partial(Large, blocks=(2, 2, 2, 2))
ImageNetResNet34 = partial(Large, blocks=(3, 4, 6, 3))
ImageNetResNet50 = partial(Large, blocks=(3, 4, 6, 3), block=Bottleneck)
ImageNetResNet101 = partial(Large, blocks=(3, 4, 23, 3), block=Bottleneck)
