"""`--mode=replay`: the step that was not finite, once more, with an eye on every value on its way.

A run that meets such a step leaves in `nonfinite/` the State before it and its batch. Here that step runs again, by the
experiment's own train_step, precision and mesh, with an identity around each layer, the loss and the optimizer that
counts what is not finite: values in the forward pass, their gradients in the backward.
"""

import dataclasses
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompute import checkpoint, log, sharding, step, train
from jaxcompute.core import Batch, Experiment, PyTree, State
from jaxcompute.errors import BadInput

# What is looked at, in the order in which the first that is not finite is the culprit.
STATE, FORWARD, BACKWARD, GRADIENT, UPDATE, METRIC = range(6)


class Seen(NamedTuple):
    """An array on its way, and how much of it is finite."""

    what: str  # "output of Dense_1", "gradient by the input of Dense_1"
    values: int
    nan: int
    inf: int
    largest: float  # magnitude of those that are finite

    @property
    def finite(self) -> bool:
        return not self.nan + self.inf


def replay(exp: Experiment, workdir: Path, say: Callable[[str], None] = print) -> Seen | None:
    """Run the step again that a run was stopped by, and say and return what first is not finite; None if all is.

    Raises:
        BadInput: the work directory holds no such step, or one of another config, or a damaged one.
    """
    folder = workdir / "nonfinite"
    at = max(checkpoint.steps(folder), default=None)
    if at is None:
        raise BadInput(f"no step in {folder}: only a run that met a loss or gradient that is not finite leaves one")
    mesh = sharding.make_mesh(exp.config)
    exp = train.resolve(exp, mesh)
    state = checkpoint.restore(folder, at, train.compile(exp, mesh).abstract)
    try:
        with np.load(folder / "batch.npz", allow_pickle=False) as file:  # never a pickle
            batch = sharding.put(mesh, sharding.BATCH, dict(file))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{folder / 'batch.npz'} is damaged: {error}; run until that step again") from None

    seen = watch(exp, mesh, state, batch)
    first = next((i for i, one in enumerate(seen) if not one.finite), None)
    if first is None:
        say(f"step {at + 1:,} is finite here, in all {len(seen):,} arrays: its State and batch are not to blame alone")
        return None
    around = seen[max(0, first - 4) : first + 3]
    say(log.table(around, ("in order", "values", "nan", "inf", "largest")))
    say(f"step {at + 1:,}: first not finite is the {seen[first].what}")
    return seen[first]


def watch(exp: Experiment, mesh: jax.sharding.Mesh, state: State, batch: Batch) -> list[Seen]:
    """One step of training; all that was seen: the State, the forward pass, the backward pass, the update.

    Order of the backward pass is the forward's, reversed. An array that comes several times (scan, remat) stands once.
    """
    seen: dict[tuple[int, int], Seen] = {}
    number = itertools.count()

    def look(key: tuple[int, int], what: str, x: jax.Array) -> None:
        def note(nan: Any, inf: Any, largest: Any) -> None:
            if key not in seen or seen[key].finite:
                seen[key] = Seen(what, x.size, int(nan), int(inf), float(largest))

        largest = jnp.max(jnp.abs(x), where=jnp.isfinite(x), initial=0)
        jax.debug.callback(note, jnp.isnan(x).sum(), jnp.isinf(x).sum(), largest)

    def look_all(phase: int, what: str, tree: PyTree) -> None:
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            if is_float(x):
                look((phase, next(number)), what + jax.tree_util.keystr(path, simple=True, separator="/"), x)

    def watched(what: str, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: identity(next(number), what, x) if is_float(x) else x, tree)

    def identity(at: int, what: str, x: jax.Array) -> jax.Array:
        def value(x: jax.Array) -> jax.Array:
            look((FORWARD, at), what, x)
            return x

        def gradient(_: None, g: jax.Array) -> tuple[jax.Array]:
            look((BACKWARD, -at), f"gradient by the {what}", g)
            return (g,)

        passed = jax.custom_vjp(value)
        passed.defvjp(lambda x: (value(x), None), gradient)
        return passed(x)

    def layer(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        name = "/".join(context.module.path) or type(context.module).__name__
        return watched(f"output of {name}", call(*watched(f"input of {name}", args), **kwargs))

    def loss(outputs: Any, batch: Batch) -> Any:
        scalar, metrics = exp.loss(outputs, batch)
        return watched("loss", scalar), metrics

    def update(grads: PyTree, *args: Any, **kwargs: Any) -> Any:
        look_all(GRADIENT, "gradient by ", grads)
        updates, opt_state = exp.optimizer.update(grads, *args, **kwargs)
        look_all(UPDATE, "update of ", updates)
        return updates, opt_state

    open_exp = dataclasses.replace(
        exp,
        loss=loss,
        optimizer=exp.optimizer._replace(update=update),
        config=dataclasses.replace(exp.config, clip_norm=0.0),  # it would spread one bad gradient over all
    )

    @jax.jit
    def run(state: State, batch: Batch) -> Any:
        look_all(STATE, "", {"params": state.params, "mutable": state.mutable})
        with nn.intercept_methods(layer):
            new, metrics = (exp.train_step or step.train_step)(open_exp, state, sharding.split(mesh, batch))
        look_all(METRIC, "metric ", metrics)
        return new

    jax.block_until_ready(run(state, batch))
    jax.effects_barrier()
    return [seen[key] for key in sorted(seen)]


def is_float(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
