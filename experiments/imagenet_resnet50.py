"""ResNet-50 on ImageNet, or on any folders too large for memory (He et al. 2015).

    python launch.py --experiment=imagenet_resnet50                                   TFDS's imagenet2012
    python launch.py --experiment=imagenet_resnet50 --config.train_dir=DIR/train --config.eval_dir=DIR/val

The zero scale at a bottleneck's end, the warm-up and the rate in proportion to the batch are of Goyal et al. 2017.
ImageNet itself was not run, so no accuracy is claimed: recipes like it end near 77 % top-1. What was run is the stream,
on 244 photographs of ants and bees with a small form, 71.2 % of 153 others at the last of 30 epochs (1 run, seed 0;
44 s on 2 cores of an Intel Xeon, jax 0.10.2, 2026-11-25), the loop waiting for data 15 % of the time:

    python launch.py --experiment=imagenet_resnet50 --config.train_dir=DIR/train --config.eval_dir=DIR/val \\
        --config.depth=18 --config.width=16 --config.canvas=160 --config.image_size=96 --config.eval_short=112 \\
        --config.eval_size=96 --config.batch_size=32 --config.epochs=30 --config.learning_rate=0.4

The first `--config.small_epochs` may train on crops of `--config.small_size` pixels: of 160 half the work of 224.
"""

import dataclasses
from functools import partial
from typing import Annotated, Literal

import jax

from jaxcompute import losses, optim, step
from jaxcompute.config import Range
from jaxcompute.core import Batch, Experiment, Run
from jaxcompute.data import augment, sources, stream
from jaxcompute.errors import BadInput
from jaxcompute.models import resnet

MODELS = {
    "18": resnet.ImageNetResNet18,
    "34": resnet.ImageNetResNet34,
    "50": resnet.ImageNetResNet50,
    "101": resnet.ImageNetResNet101,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Run):
    train_dir: Annotated[str, "folder of class sub-folders of images to train on; without: TFDS's imagenet2012"] = ""
    eval_dir: Annotated[str, "folder of the same classes to evaluate on"] = ""
    workers: Annotated[int, "processes that decode; 0: one a core", Range(ge=0, le=1024)] = 0
    canvas: Annotated[int, "pixels that an image's long side is decoded to at most", Range(ge=1, le=4096)] = 352
    image_size: Annotated[int, "side in pixels of the crops the network trains on", Range(ge=1, le=4096)] = 224
    small_size: Annotated[int, "side in pixels of the crops in the first epochs", Range(ge=1, le=4096)] = 160
    small_epochs: Annotated[float, "how many these are; they cost less, and count as whole ones", Range(ge=0)] = 0.0
    eval_short: Annotated[int, "pixels of the short side in evaluation", Range(ge=1, le=4096)] = 256
    eval_size: Annotated[int, "side in pixels of the centre that is evaluated", Range(ge=1, le=4096)] = 224
    min_area: Annotated[float, "least share of an image that a crop shows", Range(gt=0, le=1)] = 0.08
    depth: Annotated[Literal["18", "34", "50", "101"], "layers"] = "50"
    width: Annotated[int, "channels of the first stage", Range(ge=1)] = 64
    batch_size: int = 1024
    epochs: float = 90.0
    learning_rate: Annotated[float, "at its peak, for a batch of 256; in proportion for another", Range(ge=0)] = 0.5
    warmup_epochs: Annotated[float, "passes until the peak", Range(ge=0)] = 5.0
    momentum: Annotated[float, "of SGD, Nesterov's form", Range(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, "L2, on kernels alone", Range(ge=0)] = 5e-5
    label_smoothing: Annotated[float, "probability spread over all classes", Range(ge=0, lt=1)] = 0.1

    def __post_init__(self) -> None:
        if bool(self.train_dir) != bool(self.eval_dir):
            missing = "eval_dir" if self.train_dir else "train_dir"
            raise BadInput(f"--config.{missing} is missing: give both folders, or none for imagenet2012")
        if self.eval_size > self.eval_short:
            raise BadInput(
                f"--config.eval_size={self.eval_size}: is cut out of --config.eval_short={self.eval_short}; "
                "give at most that"
            )
        optim.check_warmup(self, self.warmup_epochs)


def experiment(config: Config) -> Experiment:
    if config.train_dir:
        train, test, classes = sources.files(config.train_dir, config.eval_dir)
    else:
        splits, classes = sources.prepared("imagenet2012")
        train, test = splits["train"], splits["validation"]
    workers = stream.Workers(config.workers)
    steps = optim.total_steps(config, len(train))
    small = optim.small_steps(config, config.small_epochs, len(train))
    small_crops = partial(prepare, dataclasses.replace(config, image_size=config.small_size))
    peak = config.learning_rate * config.batch_size / 256
    schedule = optim.warmup_cosine(peak, steps, round(config.warmup_epochs * len(train) / config.batch_size))
    return Experiment(
        config=config,
        model=MODELS[config.depth](width=config.width, classes=len(classes)),
        loss=losses.cross_entropy(config.label_smoothing),
        optimizer=optim.sgd(schedule, config.momentum, weight_decay=config.weight_decay),
        schedule=schedule,
        train=stream.shuffled(train, config.batch_size, config.seed, stream.whole(config.canvas), workers),
        eval=stream.in_order(
            test, min(config.batch_size, 256), stream.centre(config.eval_size, config.eval_short), workers
        ),
        steps=steps,
        prepare=partial(prepare, config),
        classes=classes,
        train_step=partial(step.small_first, small, small_crops) if small else None,
    )


def prepare(config: Config, batch: Batch, key: jax.Array, train: bool) -> Batch:
    """A random resized crop and flip in training; then normalise by ImageNet's mean and deviation."""
    image = batch["image"]
    if train:
        image = augment.per_example(key, image, partial(crop_and_flip, config), batch["size"])
    return batch | {"image": augment.normalize(image, *augment.IMAGENET)}


def crop_and_flip(config: Config, key: jax.Array, image: jax.Array, size: jax.Array) -> jax.Array:
    crop_key, flip_key = jax.random.split(key)
    scale = (config.min_area, 1.0)
    cropped = augment.random_resized_crop(crop_key, image, config.image_size, scale, within=size)
    return augment.flip(flip_key, cropped)
