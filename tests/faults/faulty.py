"""digits_mlp with faults at chosen steps, for tests that look at how a run ends.

PYTHONPATH=.:tests python tests/faults/faulty.py --experiment=faulty --config.full_at=40 ...
"""

import dataclasses
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np

from experiments import digits_mlp
from jaxcompute import checkpoint
from jaxcompute.core import Batch, Experiment
from jaxcompute.data import memory, order
from jaxcompute.errors import BadInput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(digits_mlp.Config):
    full_at: Annotated[int, "step from which on no file can grow past 30 kB; 0: never"] = 0
    end_at: Annotated[int, "step whose batch ends the run; 0: never"] = 0
    by: Annotated[Literal["exit", "bad input", "process 1"], "what it is ended by"] = "exit"
    slow: Annotated[float, "seconds that each save takes besides"] = 0.0


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Faulty(memory.Memory):
    """Streamed, so that code of its own runs at every step."""

    config: Config
    resident: bool = dataclasses.field(default=False, init=False)

    def like(self) -> dict[str, np.ndarray]:
        return {name: array[: self.batch_size] for name, array in self.arrays.items()}

    def feed(self, step: int, index: int = 0, count: int = 1) -> dict[str, np.ndarray]:
        if self.config.full_at and step >= self.config.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
        if self.config.end_at and step == self.config.end_at:
            self.end(index)
        assert self.seed is not None
        rows = order.indices(self.seed, step, self.batch_size, self.size, np)
        share = np.split(rows, count)[index]
        return {name: array[share] for name, array in self.arrays.items()}

    def end(self, process: int) -> None:
        if self.config.by == "exit":
            sys.exit(0)
        if self.config.by == "bad input":
            raise BadInput("the batch is damaged")
        if process == 1:
            raise RuntimeError("no more")

    def batch(self, feed: Batch, step: jax.Array) -> Batch:
        return feed


def experiment(config: Config) -> Experiment:
    exp = digits_mlp.experiment(config)
    whole = exp.train
    assert isinstance(whole, memory.Memory)

    def slowly(*args, written=checkpoint._write) -> None:
        written(*args)
        time.sleep(config.slow)

    checkpoint._write = slowly
    return dataclasses.replace(exp, train=Faulty(whole.arrays, whole.batch_size, whole.seed, config=config))


if __name__ == "__main__":
    import launch

    launch.ROOT = Path(__file__).parent
    launch.launch()
