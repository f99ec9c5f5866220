"""What fits: the largest batch, and the smallest accumulation, by the compiled step's own account of its memory.

Memory grows with the micro-batch nearly in a line, so a few compilations find where it ends; what is returned has been
compiled and fits.
"""

import dataclasses
from collections.abc import Callable

import jax

from jaxcompute import distributed, sharding, step, train
from jaxcompute.core import Experiment
from jaxcompute.errors import BadInput, line_of
from jaxcompute.log import quantity


def advice(exp: Experiment, error: train.OutOfMemory) -> str:
    """The error's line, with the largest batch that fits where the free memory is known and a batch was too large."""
    error.__cause__ = error.__context__ = None  # its frames hold the arrays of the run that has failed
    if error.of != "train":
        return line_of(error)
    mesh = sharding.make_mesh(exp.config)
    free = error.free or train.free_memory(mesh)
    if free is None:
        return line_of(error)
    try:
        fits = largest_batch(exp, mesh, free, error.need)
    except (jax.errors.JaxRuntimeError, train.OutOfMemory):  # the search needs memory too
        return line_of(error)
    found = "no batch fits" if fits is None else f"the largest that fits is --config.batch_size={fits}"
    return f"{line_of(error)}; {found}"


def need(exp: Experiment, mesh: jax.sharding.Mesh) -> int:
    """Bytes a device that the experiment's step needs, data and State with it."""
    return sum(train.compile(train.resolve(exp, mesh), mesh).memory().values())


def with_batch(exp: Experiment, batch_size: int, accumulate: int) -> Experiment:
    """The experiment with another global batch, cut into so many micro-batches."""
    config = dataclasses.replace(exp.config, batch_size=batch_size, accumulate=accumulate)
    return dataclasses.replace(exp, config=config, train=exp.train.with_batch_size(batch_size))


def largest_batch(exp: Experiment, mesh: jax.sharding.Mesh, free: int, known: int | None = None) -> int | None:
    """The largest global batch below the experiment's that fits, to 5 %, with its accumulation; None: not even one.

    Args:
        known: what the experiment as it is needs, where that is known.
    """
    accumulate, batch = exp.config.accumulate, exp.config.batch_size
    unit = sharding.rows(mesh) * accumulate

    def needed(units: int) -> int:
        whole = known if units * unit == batch else None
        return whole or need(with_batch(exp, units * unit, accumulate), mesh)

    units = largest(needed, batch // unit, free)
    return units and units * unit


def largest(need: Callable[[int], int], above: int, free: int) -> int | None:
    """The largest n in 1 .. above - 1 with need(n) <= free, to 5 %; need grows with n, nearly in a line."""
    low, high = 1, above
    if above <= 1 or (need_low := need(low)) > free:
        return None
    need_high = need(high)
    fitted = False
    while high - low > max(1, low // 20):
        line = low + int((high - low) * (free - need_low) / max(1, need_high - need_low))
        # a guess that fitted is tried again a little above, so that the search ends from both sides
        middle = min(max(line, low + (low // 20 if fitted else 0) + 1), high - 1)
        size = need(middle)
        fitted = size <= free
        if fitted:
            low, need_low = middle, size
        else:
            high, need_high = middle, size
    return low


def fit(exp: Experiment, free: int | None, say: Callable[[str], None]) -> Experiment:
    """The experiment with its global batch cut into as few micro-batches as fit; as it is where it fits already.

    A batch norm then sees a micro-batch at a time, as with any accumulation.

    Args:
        free: bytes a device; None: what the device tells. Of several processes the least of all counts.

    Raises:
        BadInput: not even one example a device fits, or the device doesn't tell its memory.
    """
    mesh = sharding.make_mesh(exp.config)
    platform = mesh.devices.flat[0].platform
    with distributed.together():
        free = train.free_memory(mesh) if free is None else free
        if platform in step.UNROLLED:
            raise BadInput(
                f"--fit_memory: accumulation saves no memory on the {platform}; give a smaller --config.batch_size"
            )
        if free is None:
            raise BadInput("--fit_memory: this device doesn't tell how much memory it has; give --memory_limit=BYTES")
    least = min(map(int, distributed.each(str(free))))

    def needed(accumulate: int) -> int:
        """By the process that needs most: all must come to the same program."""
        with distributed.together():
            own = need(with_batch(exp, batch, accumulate), mesh)
        return max(map(int, distributed.each(str(own))))

    batch, before = exp.config.batch_size, exp.config.accumulate
    share = batch // sharding.rows(mesh)
    counts = [n for n in range(before, share + 1) if share % n == 0]
    last = needed(before)
    if last <= least:
        return exp
    fits = None
    low, high = 1, len(counts) - 1  # the first that fits lies here
    while low <= high:
        middle = (low + high) // 2
        last = needed(counts[middle])
        if last <= least:
            fits, high = counts[middle], middle - 1
        else:
            low = middle + 1
    if fits is None:
        smallest = f"one example a device needs {quantity(last, 'B')}"
        knobs = "a smaller model, --config.mesh_fsdp on several devices, or --config.precision=bfloat16"
        with distributed.together():  # told once
            raise BadInput(f"--fit_memory: {smallest}, and {quantity(least, 'B')} are free: take {knobs}")
    say(f"micro-batches of {batch // fits:,}: --config.accumulate={fits} keeps the batch of {batch:,}")
    return with_batch(exp, batch, fits)
