"""The digits MLP data parallel with its collectives written out, for those who want to see them.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python launch.py --experiment=digits_shard_map

98.1 % of the held-out 359 digits at the last step (1 run, seed 0); 5 s, command to end, on two virtual devices over
2 cores of an Intel Xeon (jax 0.10.2, float32), 2026-11-25.

Elsewhere the step is written for the whole batch and XLA adds what the devices must exchange. Here `jax.shard_map` runs
the same code on each device's rows, and the two exchanges stand in it: the mean of the gradients and the sum of the
metrics. The result is digits_mlp's without dropout, up to the order of summation: tests/test_sharding.py compares them.
Batch norm, here, would see a device's rows alone: one more reason why the house leaves the collectives to XLA.
"""

import dataclasses
import functools
from typing import Annotated

import jax
from jax.sharding import PartitionSpec as P

from experiments import digits_mlp
from jaxcompute import sharding, step
from jaxcompute.config import Range
from jaxcompute.core import Batch, Experiment, PyTree, State
from jaxcompute.errors import BadInput
from jaxcompute.metrics import Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(digits_mlp.Config):
    dropout: Annotated[float, "share of hidden units dropped; each device draws its own", Range(ge=0, lt=1)] = 0.0


def experiment(config: Config) -> Experiment:
    if config.accumulate > 1:
        raise BadInput(f"--config.accumulate={config.accumulate}: this step takes its batch whole; give 1")
    return dataclasses.replace(digits_mlp.experiment(config), train_step=train_step)


def train_step(exp: Experiment, state: State, batch: Batch) -> tuple[State, Metrics]:
    """`step.train_step` for parameters that every device holds and a batch that all of them split."""
    mesh, axes = sharding.make_mesh(exp.config), sharding.BATCH[0]
    prepare_key, model_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = exp.prepare(batch, prepare_key, True)  # keyed by an example's place in the whole batch

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), sharding.BATCH), out_specs=P(), check_vma=False)
    def gradient(params: PyTree, rows: Batch) -> tuple[PyTree, Metrics]:
        def loss(params: PyTree) -> tuple[jax.Array, Metrics]:
            key = jax.random.fold_in(model_key, jax.lax.axis_index(axes))
            outputs, _ = step.forward(exp, params, state.mutable, rows["image"], train=True, key=key)
            return exp.loss(outputs, rows)

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        grads = jax.lax.pmean(grads, axes)  # an all-reduce of as many bytes as the parameters have
        return grads, jax.lax.psum(metrics, axes)  # a few floats: sums and counts add up

    grads, metrics = gradient(state.params, batch)
    state, more = step.update(exp, state, grads, state.mutable)
    return state, metrics | more
