"""What this machine can do at most, measured: arithmetic, memory traffic, the way from the host and between devices.

Each figure is the best of several repeats, as a ceiling is what can be reached and not what is reached on average.
What is multiplied is drawn at random: on constants a GPU's circuits switch less, draw less power and clock higher than
on anything that is trained on.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Ceilings(NamedTuple):
    """Of one device; None: the device has no such thing."""

    float32: float  # FLOP/s of a matrix product in full float32
    tensorfloat32: float | None  # FLOP/s of one in TF32, on a GPU
    bfloat16: float  # FLOP/s of one in bfloat16
    convolution: float  # FLOP/s of a 3x3 convolution, bfloat16 on a GPU and float32 on the CPU
    bandwidth: float  # bytes/s read and written by a copy in the device's memory
    host_to_device: float  # bytes/s
    all_reduce: float | None  # bytes/s a device sends and as many it receives, where there are several devices


def measure(seconds: float = 8.0, devices: list[Any] | None = None) -> Ceilings:
    """Measure the first device, and the way between all of them.

    Args:
        seconds: to spend about, compilation apart.
        devices: default jax.devices().
    """
    devices = jax.devices() if devices is None else devices
    device = devices[0]
    gpu = device.platform == "gpu"
    share, sent = seconds / 7, 2**28 if gpu else 2**26
    image, kernel = ((256, 56, 56, 64), (3, 3, 64, 64)) if gpu else ((16, 28, 28, 64), (3, 3, 64, 64))

    def convolution() -> float:
        dtype = jnp.bfloat16 if gpu else jnp.float32
        x, w = (normal(shape, dtype, device) for shape in (image, kernel))
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return 2 * x.size * np.prod(kernel[:3]) / best(jax.jit(conv).lower(x, w).compile(), x, w, seconds=share)

    def to_device() -> float:
        x = np.ones(sent // 4, np.float32)
        return x.nbytes / best(lambda: jax.device_put(x, device, may_alias=False), seconds=share)

    def all_reduce() -> float | None:
        if len(devices) == 1:
            return None
        mesh = jax.make_mesh((len(devices),), ("all",), axis_types=(AxisType.Auto,), devices=devices)
        spec = PartitionSpec("all")
        x = jax.device_put(np.ones((len(devices), sent // 16), np.float32), NamedSharding(mesh, spec))
        add = jax.jit(
            jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
        )
        least = 2 * (len(devices) - 1) / len(devices) * x.nbytes / len(devices)  # what a ring sends
        return least / best(add.lower(x).compile(), x, seconds=share)

    return Ceilings(
        float32=matmul(device, "float32", share),
        tensorfloat32=matmul(device, "tensorfloat32", share) if gpu else None,
        bfloat16=matmul(device, "bfloat16", share),
        convolution=float(convolution()),
        bandwidth=copy(device, share),
        host_to_device=to_device(),
        all_reduce=all_reduce(),
    )


def matmul(device: Any, precision: str, seconds: float) -> float:
    """FLOP/s of a product of two square matrices in float32, tensorfloat32 or bfloat16."""
    side = 8192 if device.platform == "gpu" else 1024
    dtype, exact = {
        "float32": (jnp.float32, "highest"),
        "tensorfloat32": (jnp.float32, "tensorfloat32"),
        "bfloat16": (jnp.bfloat16, "default"),
    }[precision]
    x = normal((side, side), dtype, device)
    with jax.default_matmul_precision(exact):
        return 2 * side**3 / best(jax.jit(jnp.matmul).lower(x, x).compile(), x, x, seconds=seconds)


def normal(shape: tuple[int, ...], dtype: Any, device: Any) -> jax.Array:
    return jax.device_put(jax.random.normal(jax.random.key(0), shape, dtype), device)


def copy(device: Any, seconds: float) -> float:
    """Bytes/s read and written in the device's memory."""
    x = jax.device_put(jnp.ones((2**30 if device.platform == "gpu" else 2**27) // 4, jnp.float32), device)
    add = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()  # fresh pages would cost the CPU more

    def again() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * x.nbytes / best(again, seconds=seconds)


def best(call: Callable[..., Any], *arguments: Any, seconds: float) -> float:
    """Seconds a call, of the fastest of some batches of calls.

    A batch lasts long enough to hide the way to the device, and no longer: a machine that others use as well is left
    alone for moments at best.
    """
    jax.block_until_ready(call(*arguments))  # warm-up

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count - 1):
            call(*arguments)
        jax.block_until_ready(call(*arguments))
        return (time.perf_counter() - began) / count

    end = time.perf_counter() + seconds
    once = run(1)
    count = max(1, min(round(0.02 / once), 100))
    fastest = once
    while time.perf_counter() + count * once < end:
        fastest = min(fastest, run(count))
    return fastest
