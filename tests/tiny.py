"""Small experiments on made-up data and a full disk, for tests of the core."""

import contextlib
import resource
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxcompute import losses, optim
from jaxcompute.core import Batch, Experiment, Run
from jaxcompute.data import augment, memory
from jaxcompute.models.mlp import MLP
from jaxcompute.models.resnet import ResNet


def arrays(size: int, side: int = 6) -> dict[str, np.ndarray]:
    """Images of three classes that differ in where they are bright, with noise."""
    random = np.random.default_rng(size)
    label = random.integers(0, 3, size, np.int32)
    image = random.integers(0, 128, (size, side, side, 1), np.uint8)
    image[np.arange(size), label] += 100
    return {"image": image, "label": label}


def prepare(batch: Batch, key: jax.Array, train: bool) -> Batch:
    image = augment.normalize(batch["image"], (0.3,), (0.2,))
    if train:
        image = augment.per_example(key, image, augment.flip)
    return batch | {"image": image}


def mlp(model: nn.Module | None = None, size: int = 61, **fields: Any) -> Experiment:
    """An MLP with dropout, 61 training and 23 evaluation examples: numbers that nothing divides."""
    config = Run(**({"batch_size": 8, "steps": 12, "log_every": 4, "eval_every": 6} | fields))
    steps = optim.total_steps(config, size)
    schedule = optim.warmup_cosine(0.05, steps, 2)
    return Experiment(
        config=config,
        model=model or MLP((16,), 3, dropout=0.1),
        loss=losses.cross_entropy(0.1),
        optimizer=optim.sgd(schedule, weight_decay=1e-4),
        schedule=schedule,
        train=memory.shuffled(arrays(size), config.batch_size, config.seed),
        eval=memory.in_order(arrays(23), 8),
        steps=steps,
        prepare=prepare,
        classes=("top", "middle", "bottom"),
    )


def resnet(**fields: Any) -> Experiment:
    """A residual network of one block a stage, with batch norm."""
    return mlp(ResNet(blocks=(1, 1), width=4, classes=3), **fields)


def random_batch(size: int = 8) -> Batch:
    return jax.tree.map(jnp.asarray, arrays(size))


def constant_loss(value: float) -> Any:
    """A loss of the outputs' sum times a value, to break a run with."""

    def loss(outputs: jax.Array, batch: Batch):
        scalar, metrics = losses.cross_entropy()(outputs * value, batch)
        return scalar, metrics

    return loss


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@contextlib.contextmanager
def full_disk(allowed: int) -> Iterator[None]:
    """Every write past so many bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
