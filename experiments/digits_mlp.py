"""A multilayer perceptron on the 8x8 handwritten digits that come inside scikit-learn.

    python launch.py --experiment=digits_mlp --sweep=seed=0,1,2

98.4 % of the held-out 359 digits at the last step (mean of 3 seeds: 98.6, 98.3, 98.3); 5 s a run, command to
end, on one core of an Intel Xeon (jax 0.10.2, float32), 2026-11-22.

Too wide for one device: `--config.features=8192,8192 --config.mesh_model=2` splits each layer over two of them.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxcompute import losses, optim, sharding
from jaxcompute.config import Range
from jaxcompute.core import Batch, Experiment, Run
from jaxcompute.data import memory, sources
from jaxcompute.models.mlp import MLP


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Run):
    features: Annotated[tuple[int, ...], "units of each hidden layer", Range(ge=1)] = (128, 128)
    learning_rate: Annotated[float, "of AdamW, at its peak", Range(ge=0)] = 0.003
    weight_decay: Annotated[float, "of AdamW, on kernels alone", Range(ge=0)] = 0.01
    dropout: Annotated[float, "share of hidden units dropped in training", Range(ge=0, lt=1)] = 0.2
    epochs: float = 60.0
    log_every: int = 100
    eval_every: int = 200


def experiment(config: Config) -> Experiment:
    data = sources.digits()
    steps = optim.total_steps(config, len(data.train["label"]))
    schedule = optim.warmup_cosine(config.learning_rate, steps, steps // 10)
    return Experiment(
        config=config,
        model=MLP(config.features, len(data.classes), dropout=config.dropout),
        loss=losses.cross_entropy(),
        optimizer=optax.adamw(schedule, weight_decay=config.weight_decay, mask=optim.decay_mask),
        schedule=schedule,
        train=memory.shuffled(data.train, config.batch_size, config.seed),
        eval=memory.in_order(data.test, 359),
        steps=steps,
        prepare=prepare,
        classes=data.classes,
        rule=TENSOR_PARALLEL if config.mesh_model > 1 else None,
    )


# Layers by turns by columns and by rows: one sum over `model` for two layers.
TENSOR_PARALLEL = sharding.by_pattern(
    {
        r"Dense_\d*[02468]/kernel": P(None, "model"),
        r"Dense_\d*[02468]/bias": P("model"),
        r"Dense_\d*[13579]/kernel": P("model", None),
    }
)


def prepare(batch: Batch, key: jax.Array, train: bool) -> Batch:
    """Pixels of 0 to 16 to -1 to 1."""
    return batch | {"image": batch["image"].astype(jnp.float32) / 8 - 1}
