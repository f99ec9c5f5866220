"""Devices: the mesh, the rules that place parameters, the placing of batches.

Models and steps know nothing of this: under `jit` a sharded batch makes XLA add the collectives, and batch norm covers
the global batch by construction.
"""

import ctypes
import importlib.util
import math
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax._src import xla_bridge  # private: jax has no public door to whether its backends are up
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxcompute.core import Batch, PyTree, Rule, Run
from jaxcompute.errors import BadInput

AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))  # both axes split the batch; fsdp splits the parameters too, model them alone
WHOLE = PartitionSpec()
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def make_mesh(config: Run, devices: list[Any] | None = None) -> Mesh:
    """A mesh [data, fsdp, model] of the sizes in the config, over the first devices of the list.

    Sets before it what must be set before jax starts its devices.

    Raises:
        BadInput: there are too few devices, or some would be left over; names the sizes that would fit. Or it is too
            late for what is deterministic.
    """
    if config.deterministic:
        make_deterministic()
    keep_scratch()
    devices = jax.devices() if devices is None else devices
    sizes = {f"mesh_{axis}": getattr(config, f"mesh_{axis}") for axis in AXES}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise BadInput(f"--config.{name}={size}: give a number of devices, or -1 for all that remain")
    rest = [f"--config.{name}=-1" for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise BadInput(f"{' and '.join(rest)}: only one can be the rest")
    count, fixed = len(devices), math.prod(size for size in sizes.values() if size > 0)
    if fixed > count or (rest and count % fixed):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise BadInput(
            f"--config.{asked}: needs {'a multiple of ' if fixed <= count else ''}{fixed} devices and there are "
            f"{count}; {_fitting(sizes, count)} would fit"
        )
    shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
    chosen = devices[: math.prod(shape)]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise BadInput(
            f"{len(chosen)} of {count} devices would leave some of the {jax.process_count()} processes idle: "
            "take them all, --config.mesh_data=-1, or start fewer processes"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen)


def _fitting(sizes: Mapping[str, int], count: int) -> str:
    """For each size that was given, what it might be if the others stay: where the product divides the devices."""
    found = []
    for name, size in sizes.items():
        others = math.prod(other for key, other in sizes.items() if key != name and other > 0)
        *most, last = [str(n) for n in range(1, count + 1) if size > 1 and count % (n * others) == 0] or [""]
        if last:
            found.append(f"{name} of {', '.join(most)} or {last}" if most else f"{name} of {last}")
    return ", or ".join(found) or f"sizes whose product divides {count}"


def rows(mesh: Mesh) -> int:
    """Parts that the batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def share(mesh: Mesh) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process's devices hold; others hold it too, where they share rows.

    Raises:
        BadInput: what they hold is no such part.
    """
    groups = mesh.devices.reshape(rows(mesh), -1)
    held = [i for i, group in enumerate(groups) if any(d.process_index == jax.process_index() for d in group)]
    index, count = held[0] // len(held), len(groups) // len(held)
    if held != [*range(index * len(held), (index + 1) * len(held))] or len(groups) % len(held):
        sizes = " x ".join(f"mesh_{axis}={size}" for axis, size in mesh.shape.items())
        raise BadInput(
            f"--config.{sizes}: the {len(groups)} parts of a streamed batch do not lie evenly on the "
            f"{jax.process_count()} processes; give sizes by which each holds as many, whole"
        )
    return index, count


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


def keep_scratch() -> None:
    """Have glibc keep what a step frees, where the CPU is the device; in vain once jax has started its devices.

    XLA allocates a step's scratch memory anew at each step. glibc gives blocks of that size back to the system, so that
    each step met every page of it as a fault: 73,364 in ResNet-20 at batch 128, a seventh of its time (on an Intel
    Xeon with glibc 2.36, jax 0.10.2; the 3-convolution CNN: a tenth; LeNet and the MLPs: nothing). The memory stays
    with the process until it ends, in some steps at first a block anew; blocks above 1 GiB go back as before.
    """
    only_cpu = jax.config.values["jax_platforms"] == "cpu" or importlib.util.find_spec("jax_plugins") is None
    if not only_cpu or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in {
        -8: 1,  # M_ARENA_MAX: the threads' own arenas hold no block above 64 MB, whatever the thresholds
        -3: 2**30,  # M_MMAP_THRESHOLD: below it a block comes from the heap, not from the system
        -1: 2**31 - 1,  # M_TRIM_THRESHOLD: how much may lie free at the heap's end
    }.items():
        mallopt(option, value)


def check_batch(mesh: Mesh, config: Run) -> None:
    """Raises BadInput unless the batch splits evenly over the devices and the micro-batches."""
    parts = rows(mesh) * config.accumulate
    if config.accumulate < 1 or config.batch_size < 1 or config.batch_size % parts:
        near = max(parts, round(config.batch_size / max(parts, 1)) * parts)
        raise BadInput(
            f"--config.batch_size={config.batch_size}: does not split over {rows(mesh)} device(s) x "
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


def by_pattern(specs: Mapping[str, PartitionSpec], otherwise: Rule = replicate) -> Rule:
    """The spec of the first pattern found in a parameter's path, "params/Dense_0/kernel"; where none is, `otherwise`.

    Two dense layers in a row, tensor parallel (Shoeybi et al. 2019, arXiv:1909.08053, section 3): the first by columns,
    so that each device holds some of the hidden units whole, the second by rows, whose sum is the one collective:

        by_pattern({"Dense_0/kernel": P(None, "model"), "Dense_0/bias": P("model"), "Dense_1/kernel": P("model", None)})
    """

    def rule(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> PartitionSpec:
        for pattern, spec in specs.items():
            if re.search(pattern, "/".join(path)):
                return spec
        return otherwise(path, leaf, mesh)

    return rule


def shardings(mesh: Mesh, rule: Rule | None, tree: PyTree) -> PyTree:
    """A NamedSharding for each leaf of a State.

    The rule places the parameters. What has a parameter's path at its end and its shape (moments, averages) lies as
    the parameter does; all else (counts, keys, batch statistics) is whole on every device.

    Raises:
        BadInput: a parameter does not split as the rule says, or no rule splits any over the axis `model`.
    """
    chosen = rule or (fsdp() if mesh.shape["fsdp"] > 1 else replicate)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [(tuple(jax.tree_util.keystr((k,), simple=True) for k in path), leaf) for path, leaf in leaves]
    specs: dict[tuple[tuple[str, ...], tuple[int, ...]], PartitionSpec] = {}  # by (path, shape) of a parameter
    for path, leaf in named:
        if path[0] == "params":
            specs[path[1:], leaf.shape] = _checked(path, leaf, chosen(path, leaf, mesh), mesh)
    if mesh.shape["model"] > 1 and not any("model" in _axes(spec) for spec in specs.values()):
        raise BadInput(
            f"--config.mesh_model={mesh.shape['model']}: this experiment splits no parameter over it; "
            "give it a rule (sharding.by_pattern), or --config.mesh_model=1"
        )

    def place(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        ends = ((path[i:], leaf.shape) for i in range(len(path)))
        return NamedSharding(mesh, next((specs[end] for end in ends if end in specs), WHOLE))

    return jax.tree.unflatten(structure, [place(path, leaf) for path, leaf in named])


def _axes(spec: PartitionSpec) -> list[str]:
    return [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]


def _checked(path: tuple[str, ...], leaf: Any, spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    name, shape = "/".join(path), "x".join(map(str, leaf.shape))
    if len(spec) > len(leaf.shape) or not set(_axes(spec)) <= set(mesh.axis_names):
        raise BadInput(f"the rule gives {name} [{shape}] {spec}: give at most one of {mesh.axis_names} for each axis")
    for size, part in zip(leaf.shape, spec, strict=False):
        axes = _axes(PartitionSpec(part))
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            fit = ", ".join(str(n) for n in range(1, mesh.size + 1) if size % n == mesh.size % n == 0)
            raise BadInput(
                f"{name} [{shape}] does not split as {spec}: {size} over {parts} devices; "
                f"--config.mesh_{axes[0]} of {fit} would fit"
            )
    return spec


def split(mesh: Mesh, batch: Batch) -> Batch:
    """Inside jit: the batch's leading axis over all devices."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))


def put(mesh: Mesh, spec: PartitionSpec, arrays: PyTree) -> PyTree:
    """Host arrays onto the devices; of several processes each gives the whole, and places its own devices' share."""
    at = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(at, np.asarray(x), np.shape(x)), arrays)


def bytes_per_device(tree: PyTree) -> int:
    """Of arrays, or of shapes with shardings: what lies on one device. Keys and empty trees count nothing."""
    leaves = [x for x in jax.tree.leaves(tree) if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
