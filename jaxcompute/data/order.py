"""Which examples make up the batch of a step: a pure function of (seed, step), the same bits in numpy and jax.numpy.

Training reads one endless sequence of positions; batch `step` is positions step*B .. step*B + B-1. Position p lies in
epoch p // size, and within its epoch a keyed bijection of [0, size) says which example stands there. So every epoch
holds each example exactly once, batches run on across its end, and a run resumes from its step alone.

The bijection is an alternating Feistel network over the mixed radix a x b with cycle walking (Black and Rogaway 2002,
"Ciphers with Arbitrary Finite Domains", sections 3 and 5). Only the batch's own indices are computed: a permutation of
60,000 inside a step costs 500 times a small MLP's step.
"""

import functools
import math
from typing import Any

import numpy as np

# Four rounds are a strong pseudorandom permutation while the halves have many values (Luby and Rackoff 1988). For small
# sets more are needed: over 20,000 epochs of 16 examples, the chi-square of who follows whom lies 150 standard
# deviations off after 4 rounds, 8 after 6, and less than 2 after 8.
ROUNDS = 8
_ODD = [pow(0x9E3779B9, i, 2**32) for i in range(1, ROUNDS + 1)]  # sets the rounds apart


def indices(seed: int, step: Any, batch_size: int, size: int, xp: Any) -> Any:
    """The examples of the global batch of a step.

    Args:
        seed: taken modulo 2**32.
        step: int, or an integer scalar that may be traced under jax.numpy.
        batch_size: B, over all devices; may exceed size.
        size: examples in the set, below 2**31.
        xp: numpy or jax.numpy.

    Returns:
        uint32 [B], each below size. The caller keeps steps * B within 2**32, where the order would start over.
    """
    u = xp.uint32
    position = xp.arange(batch_size, dtype=u) + u(step) * u(batch_size)
    epoch, index = position // u(size), position % u(size)
    key = _hash(epoch + _hash(xp.full_like(epoch, seed % 2**32), u), u)
    a, b = _radix(size)

    def encrypt(x: Any) -> Any:
        left, right = x % u(a), x // u(a)
        for i in range(0, ROUNDS, 2):
            left = (left + _hash(key + (right + u(1)) * u(_ODD[i]), u) % u(a)) % u(a)
            right = (right + _hash(key + (left + u(1)) * u(_ODD[i + 1]), u) % u(b)) % u(b)
        return left + right * u(a)

    def walk(x: Any) -> Any:
        return xp.where(x < u(size), x, encrypt(x))

    index = encrypt(index)
    if a * b == size:
        return index
    if xp is np:
        while (index >= size).any():
            index = walk(index)
        return index
    import jax

    return jax.lax.while_loop(lambda x: (x >= u(size)).any(), walk, index)


@functools.cache
def _radix(size: int) -> tuple[int, int]:
    """(a, b), neither far from sqrt(size), with a*b >= size and as little above it as can be: less to walk."""
    root = math.isqrt(size - 1) + 1
    return min(((a, -(-size // a)) for a in range(root, root // 2, -1)), key=math.prod)


def _hash(x: Any, u: Any) -> Any:
    """The finalizer of MurmurHash3 (Appleby 2011): every input bit flips every output bit with probability 1/2."""
    x = (x ^ (x >> u(16))) * u(0x85EBCA6B)
    x = (x ^ (x >> u(13))) * u(0xC2B2AE35)
    return x ^ (x >> u(16))
