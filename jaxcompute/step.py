"""The training step, pure: no device, file, clock or flag.

    init       (experiment, batch)          -> State
    forward    (experiment, params, ...)    -> outputs, mutable
    train_step (experiment, state, batch)   -> State, metrics
    eval_step  (experiment, state, batch)   -> metrics

All randomness comes from (seed, step): `fold_in(state.key, state.step)`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxcompute.core import Batch, Experiment, Prepare, PyTree, State
from jaxcompute.metrics import Last, Mean, Metrics, add

# Where a loop over micro-batches is unrolled, which saves no memory: a rolled one over convolutions other than those of
# models/conv.py is some 30 times slower there.
UNROLLED = ("cpu",)
Sums = tuple[PyTree, PyTree, Metrics]  # of gradients; the newest batch statistics; of metrics
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}


def init(exp: Experiment, batch: Batch) -> State:
    """The State at step 0; of batch [B, ...], as the source gives it, only the shapes matter."""
    wide = jnp.promote_types(DTYPES[exp.config.precision], jnp.float32)
    init_key, run_key = jax.random.split(jax.random.key(exp.config.seed))
    image = exp.prepare(batch, run_key, True)["image"]  # a streamed batch becomes the network's size by its crop
    variables = jax.tree.map(lambda x: x.astype(wide), dict(exp.model.init(init_key, image, train=False)))
    params = variables.pop("params")
    return State(
        step=jnp.int32(0),
        params=params,
        mutable=variables,
        opt_state=exp.optimizer.init(params),
        key=run_key,
        ema={"params": params, **variables} if exp.config.ema else None,
    )


def forward(
    exp: Experiment, params: PyTree, mutable: PyTree, image: jax.Array, *, train: bool, key: jax.Array | None = None
) -> tuple[PyTree, PyTree]:
    """Outputs (float32 or wider) and the new batch statistics, computed in the run's precision."""
    compute = DTYPES[exp.config.precision]
    variables = {"params": optax.tree.cast(params, compute), **mutable}
    rngs = None if key is None else {"dropout": key}
    outputs, changed = exp.model.apply(
        variables, image.astype(compute), train=train, rngs=rngs, mutable=list(mutable) if train else []
    )
    wide = jnp.promote_types(compute, jnp.float32)
    return optax.tree.cast(outputs, wide), {**mutable, **changed}


def gradient(exp: Experiment, state: State, batch: Batch, key: jax.Array) -> tuple[PyTree, PyTree, Metrics]:
    """The loss's gradient over a prepared batch, with the new batch statistics and the loss's metrics."""

    def loss(params: PyTree, mutable: PyTree, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[PyTree, Metrics]]:
        outputs, mutable = forward(exp, params, mutable, batch["image"], train=True, key=key)
        with jax.named_scope("loss"):
            scalar, metrics = exp.loss(outputs, batch)
        return scalar, (mutable, metrics)

    def micro(i: Any, mutable: PyTree) -> Sums:
        # strided, so that each device's share of the batch holds its share of every micro-batch
        part = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, i], batch)
        (_, (mutable, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params, mutable, part, jax.random.fold_in(key, i)
        )
        return grads, mutable, metrics

    def more(i: Any, sums: Sums) -> Sums:
        grads, mutable, metrics = sums
        new, mutable, seen = micro(i, mutable)
        return optax.tree.add(grads, new), mutable, add(metrics, seen)

    def unrolled(sums: Sums) -> Sums:
        for i in range(1, count):
            sums = more(i, sums)
        return sums

    count = exp.config.accumulate
    sums = micro(0, state.mutable)
    if count == 1:
        return sums
    # in a loop, so that one micro-batch's activations are alive at a time
    flat, rolled = dict.fromkeys(UNROLLED, unrolled), partial(jax.lax.fori_loop, 1, count, more)
    grads, mutable, metrics = jax.lax.platform_dependent(sums, **flat, default=rolled)
    return optax.tree.scale(1 / count, grads), mutable, metrics


@jax.named_scope("optimizer")
def update(exp: Experiment, state: State, grads: PyTree, mutable: PyTree) -> tuple[State, Metrics]:
    """One step of the optimizer; reports the gradient's norm before clipping."""
    norm = optax.tree.norm(grads)
    if exp.config.clip_norm:
        grads = optax.tree.scale(jnp.minimum(1, exp.config.clip_norm / norm), grads)
    updates, opt_state = exp.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:  # of the batch statistics too, as they belong to the parameters
        rate = jnp.maximum(1 - exp.config.ema, 9 / (10 + state.step))  # larger at first, to forget the initial weights
        ema = jax.tree.map(
            lambda old, new: (old + rate * (new - old)).astype(old.dtype), ema, {"params": params, **mutable}
        )
    new = State(step=state.step + 1, params=params, mutable=mutable, opt_state=opt_state, key=state.key, ema=ema)
    metrics: Metrics = {"grad_norm": Mean.of(norm)}
    if exp.schedule is not None:
        metrics["learning_rate"] = Last(jnp.asarray(exp.schedule(state.step), jnp.float32))
    return new, metrics


def train_step(exp: Experiment, state: State, batch: Batch) -> tuple[State, Metrics]:
    """One optimizer step on the global batch."""
    prepare_key, model_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    with jax.named_scope("prepare"):
        batch = exp.prepare(batch, prepare_key, True)
    grads, mutable, metrics = gradient(exp, state, batch, model_key)
    state, more = update(exp, state, grads, mutable)
    return state, metrics | more


def small_first(small: int, prepare: Prepare, exp: Experiment, state: State, batch: Batch) -> tuple[State, Metrics]:
    """`train_step`, its first `small` steps by a `prepare` that makes smaller images, which cost less.

    The model must not ask how large they are. Progressive resizing: Tan and Le 2021, arXiv:2104.00298.
    """
    steps = [partial(train_step, which) for which in (dataclasses.replace(exp, prepare=prepare), exp)]
    return jax.lax.cond(state.step < small, *steps, state, batch)


def evaluated(state: State) -> tuple[PyTree, PyTree]:
    """Parameters and batch statistics to evaluate with: their moving average where it is kept."""
    if state.ema is None:
        return state.params, state.mutable
    return state.ema["params"], {name: value for name, value in state.ema.items() if name != "params"}


def eval_step(exp: Experiment, state: State, batch: Batch) -> Metrics:
    """Metrics of one padded and masked batch, by the moving average where it is kept."""
    batch = exp.prepare(batch, state.key, False)
    outputs, _ = forward(exp, *evaluated(state), batch["image"], train=False)
    return exp.measure(outputs, batch)


def keep_finite(old: State, new: State, metrics: Metrics) -> tuple[State, jax.Array]:
    """The new State if every metric of the step is finite, else the old one; and which [] bool.

    A bad step does not advance, so those dispatched after it meet it again and the loop can stop with the last finite
    State in hand.
    """
    floats = [x for x in jax.tree.leaves(metrics) if jnp.issubdtype(x.dtype, jnp.floating)]
    finite = jnp.array([True, *(jnp.isfinite(x).all() for x in floats)]).all()
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old), finite
