"""The words of the house: types only.

An experiment file defines a `Config` (a `Run` with its own fields) and `experiment(config) -> Experiment`. Everything
else in this package takes an `Experiment` and a `State` and gives a `State` and `Metrics`.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

import flax.linen as nn
import flax.struct
import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxcompute.config import Range
from jaxcompute.metrics import Metrics, classification

Batch = dict[str, jax.Array]  # image [B, H, W, C], label [B], and mask [B] bool where padded
PyTree = Any


@flax.struct.dataclass
class State:
    """All that a run is at a step, and exactly what a checkpoint holds."""

    step: jax.Array  # int32 []: optimizer steps done
    params: PyTree  # float32 (float64 in a float64 run), whatever the compute precision
    mutable: PyTree  # batch statistics, float32
    opt_state: PyTree
    key: jax.Array  # typed PRNG key; never advanced: each step folds its number in
    ema: PyTree = None  # moving average of {"params": params, **mutable}, or None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The fields every experiment shares; a `Config` inherits them, and each is a flag `--config.<field>`."""

    seed: Annotated[int, "drives initial weights, order, augmentation and dropout", Range(ge=0, lt=2**32)] = 0
    precision: Annotated[
        Literal["auto", "bfloat16", "float32", "float64"],
        "of the model's arithmetic; parameters stay float32. auto: bfloat16 on a GPU, float32 on the CPU",
    ] = "auto"
    deterministic: Annotated[
        bool, "on a GPU only operations that give the same bits each time, some of them slower; a CPU's always do"
    ] = False
    batch_size: Annotated[int, "examples a step, over all devices", Range(ge=1, lt=2**31)] = 128
    epochs: Annotated[float, "passes over the training set", Range(gt=0, lt=2**32)] = 10.0
    steps: Annotated[int, "optimizer steps; 0: from epochs", Range(ge=0, lt=2**32)] = 0
    accumulate: Annotated[int, "micro-batches a step is computed in, to save memory", Range(ge=1)] = 1
    clip_norm: Annotated[float, "clip the gradient's global norm to this; 0: off", Range(ge=0)] = 0.0
    ema: Annotated[float, "decay a step of the moving average that is evaluated; 0: off", Range(ge=0, lt=1)] = 0.0
    log_every: Annotated[int, "steps between log lines", Range(ge=1)] = 50
    eval_every: Annotated[int, "steps between evaluations; 0: once an epoch", Range(ge=0)] = 0
    save_every: Annotated[int, "steps between checkpoints; 0: at each evaluation", Range(ge=0)] = 0
    keep_last: Annotated[int, "newest checkpoints kept", Range(ge=1)] = 3
    keep_best: Annotated[int, "best checkpoints kept besides", Range(ge=0)] = 1
    steps_per_call: Annotated[
        int,
        "steps in one compiled call; 0: on a GPU 8, or what a log, evaluation or save period has of them; else 1",
        Range(ge=0, le=2**16),
    ] = 0
    mesh_data: Annotated[int, "devices that split the batch; -1: all that remain", Range(ge=-1)] = -1
    mesh_fsdp: Annotated[int, "devices that split the batch and the parameters as well", Range(ge=-1)] = 1
    mesh_model: Annotated[int, "devices that split parameters alone, as the experiment's rule says", Range(ge=-1)] = 1


class Source(Protocol):
    """Batches as a function of the step: no iterator, so nothing to save and nothing to replay."""

    @property
    def size(self) -> int: ...  # examples

    @property
    def batch_size(self) -> int: ...  # of the global batch

    @property
    def resident(self) -> bool: ...  # True: feed does not depend on the step and stays on the device

    @property
    def steps(self) -> int:
        """Batches that hold every example once; the last may be padded."""
        ...

    def identity(self) -> str:
        """What it holds, in a few words: another set gives others. A run goes on only with its own."""
        ...

    def like(self) -> dict[str, np.ndarray]:
        """Arrays of the shapes and types of `feed`, of the global batch, whatever their values: nothing is read."""
        ...

    def feed(self, step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        """On the host: the arrays the compiled call is given for this step.

        Of a source that is not resident, the rows of part `index` of `count` equal ones, one after the other.
        """
        ...

    def batch(self, feed: Batch, step: jax.Array) -> Batch:
        """On the device, pure: the global batch of this step."""
        ...

    def with_batch_size(self, batch_size: int) -> "Source": ...

    def close(self) -> None:
        """End the threads and processes that it has; a later `feed` starts others."""
        ...


Prepare = Callable[[Batch, jax.Array, bool], Batch]  # (batch, key, train): cast, normalise, augment
Loss = Callable[[Any, Batch], tuple[jax.Array, Metrics]]  # (outputs, batch) -> scalar and metrics
Measure = Callable[[Any, Batch], Metrics]  # (outputs, batch), masked
TrainStep = Callable[["Experiment", State, Batch], tuple[State, Metrics]]
EvalStep = Callable[["Experiment", State, Batch], Metrics]
Rule = Callable[[tuple[str, ...], jax.ShapeDtypeStruct, Mesh], PartitionSpec]  # (path, leaf, mesh)
Writer = Callable[[int, dict[str, float]], None]  # (step, values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What `experiment(config)` returns: real objects, nothing lazy, no strings that choose code."""

    config: Run
    model: nn.Module  # model(image, train: bool) -> outputs
    loss: Loss
    optimizer: optax.GradientTransformation
    train: Source
    eval: Source
    steps: int  # optimizer steps in all
    prepare: Prepare
    measure: Measure = classification  # what an evaluation counts
    schedule: optax.Schedule | None = None  # logged as train/learning_rate
    best: tuple[str, Literal["max", "min"]] = ("accuracy", "max")  # the evaluation metric that ranks checkpoints
    classes: tuple[str, ...] = ()  # names, for tables and pictures
    rule: Rule | None = None  # None: replicate, or by size where mesh_fsdp > 1
    train_step: TrainStep | None = None  # None: step.train_step; the seam for GANs, distillation, SAM
    eval_step: EvalStep | None = None
