"""A plain small CNN on CIFAR-10: three 3x3 convolutions, Adam at 0.001, no augmentation.

    python launch.py --experiment=cifar_cnn

74.67 % of the 10,000 test images at the last of 10 epochs (1 run, seed 0); 12 min of one core of an Intel Xeon
(jax 0.10.2, float32), 2026-11-22.

    training loss by epoch    1.455  1.013  0.868  0.768  0.696  0.639  0.585  0.536  0.495  0.460
    test loss                 1.144  0.958  0.860  0.823  0.819  0.814  0.797  0.762  0.812  0.795

Without augmentation it begins to overfit after the eighth epoch; `cifar_resnet` is what to use.
"""

import dataclasses
from typing import Annotated

import jax
import optax

from jaxcompute import losses, optim
from jaxcompute.config import Range, text
from jaxcompute.core import Batch, Experiment, Run
from jaxcompute.data import augment, memory, sources
from jaxcompute.errors import BadInput
from jaxcompute.models.cnn import CNN


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Run):
    features: Annotated[tuple[int, ...], "channels of each 3x3 convolution, pooled 2x2", Range(ge=1)] = (32, 64, 64)
    dense: Annotated[tuple[int, ...], "units of each hidden dense layer", Range(ge=1)] = (64,)
    learning_rate: Annotated[float, "of Adam, constant", Range(ge=0)] = 0.001

    def __post_init__(self) -> None:
        if len(self.features) > 5:
            raise BadInput(f"--config.features={text(self.features)}: each halves 32 pixels; give 5 at most")


def experiment(config: Config) -> Experiment:
    data = sources.load("cifar10")
    return Experiment(
        config=config,
        model=CNN(config.features, config.dense, len(data.classes)),
        loss=losses.cross_entropy(),
        optimizer=optax.adam(config.learning_rate),
        train=memory.shuffled(data.train, config.batch_size, config.seed),
        eval=memory.in_order(data.test, 1000),
        steps=optim.total_steps(config, len(data.train["label"])),
        prepare=prepare,
        classes=data.classes,
    )


def prepare(batch: Batch, key: jax.Array, train: bool) -> Batch:
    """Normalise by the training set's mean and deviation."""
    return batch | {"image": augment.normalize(batch["image"], *augment.CIFAR10)}
