"""Devices: the mesh, the rules that place parameters, the placing of batches. The only file that knows devices.

Models and steps know nothing of this: under `jit` a sharded batch makes XLA add the collectives, and batch norm covers
the global batch by construction.
"""

import math
import os
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # private: jax has no public door to whether its backends are up
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcompute.core import Batch, PyTree, Rule, Run
from jaxcompute.errors import BadInput

BATCH = PartitionSpec(("data", "fsdp"))  # both axes split the batch; fsdp splits the parameters too
WHOLE = PartitionSpec()
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def make_mesh(config: Run, devices: list[Any] | None = None) -> Mesh:
    """A mesh [data, fsdp] of the sizes in the config, over the first devices of the list.

    Raises:
        BadInput: there are too few devices, or the batch can't be split over them; or it is too late for what is
            deterministic.
    """
    if config.deterministic:
        make_deterministic()
    devices = jax.devices() if devices is None else devices
    sizes = {"mesh_data": config.mesh_data, "mesh_fsdp": config.mesh_fsdp}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise BadInput(f"--config.{name}={size}: give a number of devices, or -1 for all that remain")
    if list(sizes.values()).count(-1) == 2:
        raise BadInput("--config.mesh_data=-1 and --config.mesh_fsdp=-1: only one can be the rest")
    fixed = math.prod(size for size in sizes.values() if size > 0)
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    if not 0 < math.prod(shape) <= len(devices):
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise BadInput(f"--config.{wanted}: needs {fixed} devices and there are {len(devices)}; take fewer, or -1")
    chosen = devices[: math.prod(shape)]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise BadInput(
            f"{len(chosen)} of {len(devices)} devices would leave some of the {jax.process_count()} processes idle: "
            "take them all, --config.mesh_data=-1, or start fewer processes"
        )
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def make_deterministic() -> None:
    """Have XLA run, on GPUs, only operations that give the same bits each time, and tune none by the clock.

    XLA reads its flags once, when the first device is asked for. What it costs has not been measured yet.

    Raises:
        BadInput: that has happened, or XLA_FLAGS says the contrary.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    if DETERMINISTIC in flags:
        return
    if contrary := [flag for flag in flags if flag.startswith(DETERMINISTIC.partition("=")[0])]:
        raise BadInput(f"--config.deterministic: XLA_FLAGS has {contrary[-1]}; take one of them away")
    if xla_bridge.backends_are_initialized():
        raise BadInput(f"--config.deterministic: jax has started its devices; set XLA_FLAGS={DETERMINISTIC} before it")
    os.environ["XLA_FLAGS"] = " ".join([*flags, DETERMINISTIC])


def check_batch(mesh: Mesh, config: Run) -> None:
    """Raises BadInput unless the batch splits evenly over the devices and the micro-batches."""
    parts = mesh.size * config.accumulate
    if config.accumulate < 1 or config.batch_size < 1 or config.batch_size % parts:
        near = max(parts, round(config.batch_size / max(parts, 1)) * parts)
        raise BadInput(
            f"--config.batch_size={config.batch_size}: does not split over {mesh.size} device(s) x "
            f"--config.accumulate={config.accumulate}; take a multiple of {parts}, such as {near}, "
            "or fewer devices by --config.mesh_data"
        )


def replicate(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> PartitionSpec:
    """Every device holds every parameter."""
    return WHOLE


def fsdp(min_size: int = 2**14) -> Rule:
    """Split each array of at least min_size elements along its longest axis that the fsdp devices divide."""

    def rule(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> PartitionSpec:
        parts = mesh.shape["fsdp"]
        axes = [i for i, n in enumerate(leaf.shape) if n % parts == 0]
        if parts == 1 or math.prod(leaf.shape) < min_size or not axes:
            return WHOLE
        longest = max(axes, key=lambda i: leaf.shape[i])
        return PartitionSpec(*("fsdp" if i == longest else None for i in range(len(leaf.shape))))

    return rule


def shardings(mesh: Mesh, rule: Rule | None, tree: PyTree) -> PyTree:
    """A NamedSharding for each leaf; optimizer state and averages have their parameter's shape and so its spec."""
    chosen = rule or (fsdp() if mesh.shape["fsdp"] > 1 else replicate)

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, chosen(tuple(jax.tree_util.keystr((k,), simple=True) for k in path), leaf, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def split(mesh: Mesh, batch: Batch) -> Batch:
    """Inside jit: the batch's leading axis over all devices."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))


def put(mesh: Mesh, spec: PartitionSpec, arrays: PyTree) -> PyTree:
    """Host arrays onto the devices; of several processes each gives the whole, and places its own devices' share."""
    at = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(at, np.asarray(x), np.shape(x)), arrays)
