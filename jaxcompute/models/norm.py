"""Batch norm (Ioffe and Szegedy 2015, arXiv:1502.03167) whose gradient is written by hand."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from .conv import automatic


class BatchNorm(nn.Module):
    """`nn.BatchNorm` over the last axis, of the same names and numbers: [..., C] to [..., C].

    What autodiff keeps for the gradient, several arrays of the input's size and twice as wide under bfloat16, is here
    the input alone, and the two sums over the batch are read in one pass. Outputs are Linen's; gradients are Linen's
    but for rounding. Forward and backward take a core of an Intel Xeon 0.8 of Linen's time (`python
    benchmarks/layers.py`). As any `custom_vjp` it takes no forward-mode derivative: `jax.jvp` and `jax.jacfwd` raise
    TypeError, and `jax.grad` of a `jax.grad` works. Inside `shard_map` and over explicit meshes autodiff does it all.
    """

    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5
    scale_init: Callable[..., jax.Array] = nn.initializers.ones
    bias_init: Callable[..., jax.Array] = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        scale = self.param("scale", self.scale_init, channels)
        bias = self.param("bias", self.bias_init, channels)
        if self.use_running_average:
            return _normalize(x, mean.value, jax.lax.rsqrt(var.value + self.epsilon), scale, bias)
        y, batch_mean, batch_var = batch_norm(self.epsilon, x, scale, bias)
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return y


def batch_norm(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    """x [..., C] normalised by its own mean and variance, and these [C] in float32 or wider.

    var = E[x^2] - E[x]^2, at least 0: the biased one, and less exact than E[(x - E[x])^2] where |E[x]| is a thousand
    times the deviation.
    """
    return (_batch_norm if automatic(x, scale, bias) else _formula)(epsilon, x, scale, bias)


def _formula(epsilon, x, scale, bias):
    return _forward(epsilon, x, scale, bias)[0]


_batch_norm = jax.custom_vjp(_formula, nondiff_argnums=(0,))


def _forward(epsilon, x, scale, bias):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = _sum(wide) / (x.size // x.shape[-1])
    var = jnp.maximum(0, _sum(wide * wide) / (x.size // x.shape[-1]) - mean * mean)
    inverse = jax.lax.rsqrt(var + epsilon)
    return (_normalize(x, mean, inverse, scale, bias), mean, var), (x, mean, inverse, scale, bias)


def _backward(epsilon, saved, cotangents):
    """Section 3 of the paper in two sums: dx = a (dy - E[dy] - x^ E[dy x^]), and what comes through the statistics."""
    x, mean, inverse, scale, bias = saved
    dy, dmean, dvar = cotangents
    dy, centred = dy.astype(mean.dtype), x.astype(mean.dtype) - mean
    dbias, dscale = _sum(dy), _sum(dy * centred) * inverse
    a, n = scale * inverse, x.size // x.shape[-1]
    dx = a * dy + (dmean - a * dbias) / n - centred * ((a * inverse * dscale - 2 * dvar) / n)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_batch_norm.defvjp(_forward, _backward)


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(tuple(range(x.ndim - 1)))


def _normalize(x: jax.Array, mean: jax.Array, inverse: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return ((x - mean) * (inverse * scale) + bias).astype(jnp.result_type(x, scale, bias))
