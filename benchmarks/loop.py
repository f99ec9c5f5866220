"""What does the training loop cost? The loop beside its bare compiled call, and what gather and augmentation take.

    python benchmarks/loop.py

Bare: the loop's own compiled call, dispatched some hundred times in a row, and nothing else. The loop: `train.fit` with
metrics, its progress display and files in a work directory, and a log line every 50 steps (of digits_mlp every 100) or
six in a turn; its clock is read by the loop's own meter, as the device is done with the last step of a log line, from
the first to the last. Both run by turns in one process, each turn with a program and a State of its own, as where
these lie in memory is worth a tenth. On the CPU they are pinned to a core and CPU time counts, that of all threads; on
a GPU wall time. Gather and augmentation are timed as a program of their own: inside the step some of it is fused away.
"""

import argparse
import dataclasses
import datetime
import importlib
import io
import itertools
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import side_by_side

SIZES = {"digits_mlp": 6000, "mlp_784": 200, "mnist_lenet": 600, "cifar_resnet": 48}  # steps of a turn


class Loop(NamedTuple):
    """Of one experiment; milliseconds a step are medians over the turns."""

    experiment: str
    batch_size: int
    steps_per_call: int
    bare_ms: float
    loop_ms: float
    share: float  # bare over loop, median over the turns
    low: float  # its quartiles
    high: float
    cost_us: float  # loop less bare, microseconds a step, median over the turns
    batch_ms: float  # gather and augmentation by themselves
    batch_share: float  # of the bare call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", default=",".join(SIZES))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=0, help="of a turn; 0: as many as take some seconds")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    options = parser.parse_args()
    if options.turns < 1 or 0 < options.steps < 6:
        parser.error(f"--turns={options.turns} --steps={options.steps}: give at least 1 turn, and 6 steps or 0")

    from jaxcompute import cache, log

    cache.keep()  # each turn compiles the same again
    named = "" if options.experiments == ",".join(SIZES) else f"-{options.experiments.replace(',', '+')}"
    file = Path(options.out) / f"loop-{datetime.date.today()}{named}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found: list[Loop] = []
    for name in options.experiments.split(","):
        found.append(measure(name, options))
        print(f"{name}: {found[-1].share:.1%} of the bare call", file=sys.stderr, flush=True)
        told = {"device": side_by_side.facts()[0], "turns": options.turns, "loops": [x._asdict() for x in found]}
        log.write_json(file, log.describe({}, **told))
    rows = [
        (
            *(x.experiment, x.batch_size, x.steps_per_call, f"{x.bare_ms:.3g}", f"{x.loop_ms:.3g}", f"{x.share:.1%}"),
            *(f"{x.low:.1%} to {x.high:.1%}", f"{x.cost_us:.1f}", f"{x.batch_ms:.3g}", f"{x.batch_share:.1%}"),
        )
        for x in found
    ]
    headers = (
        "experiment",
        "batch",
        "steps a call",
        "bare, ms",
        "loop, ms",
        "share",
        "quartiles",
        "cost, us a step",
        "gather, augment, ms",
        "of the call",
    )
    print(log.table(rows, headers))


def experiment(name: str, steps: int) -> Any:
    if name == "mlp_784":
        exp = side_by_side.experiment("mlp", "float32")
    else:
        module = importlib.import_module(f"experiments.{name}")
        exp = module.experiment(module.Config(steps=steps, mesh_data=1))
    return shortened(exp, steps, max(1, min(exp.config.log_every, steps // 6)))


def shortened(exp: Any, steps: int, log_every: int) -> Any:
    """For a turn: an evaluation, of one batch, and with it a save come at its end alone."""
    from jaxcompute.data import memory

    few = {name: rows[: exp.config.batch_size] for name, rows in exp.eval.feed(0).items()}
    config = dataclasses.replace(exp.config, steps=steps, log_every=log_every, eval_every=10**9)
    return dataclasses.replace(exp, config=config, steps=steps, eval=memory.in_order(few, len(few["label"])))


def of_fit(exp: Any, mesh: Any, clock: Callable[[], float]) -> float:
    """Seconds a step of `train.fit`, from the first log line to the last."""
    from jaxcompute import log, train

    marks: list[tuple[int, float]] = []  # a step, and what each example took since the mark before
    show, _ = log.console(exp.steps, io.StringIO())

    def write(at: int, values: dict[str, float]) -> None:
        show(at, values, 0.0)
        if "train/loss" in values:
            marks.append((at, values["perf/joules_per_example"]))

    with tempfile.TemporaryDirectory() as folder:
        meter = train.Instruments(joules=clock)  # it counts seconds: read when the device is done, not the host
        train.fit(exp, Path(folder), mesh, write, say=lambda text: None, instruments=meter)
    seconds = sum((to - since) * each for (since, _), (to, each) in itertools.pairwise(marks))
    return exp.config.batch_size * seconds / (marks[-1][0] - marks[0][0])


def measure(name: str, options: argparse.Namespace) -> Loop:
    import jax
    import jax.numpy as jnp

    from jaxcompute import sharding, train

    steps = options.steps or SIZES[name]
    exp = experiment(name, steps)
    mesh = sharding.make_mesh(exp.config)
    exp = train.resolve(exp, mesh)
    clock = side_by_side.clock()

    def bare() -> float:
        program = train.compile(exp, mesh)
        held, count = [program.init(), program.sums()], exp.config.steps_per_call
        call = program.steps(count)

        def run(start: int, end: int) -> float:
            began = clock()
            for at in range(start, end, count):
                held[:] = call(*held, program.feed(at))  # pyright: ignore[reportCallIssue]
            jax.block_until_ready(held)
            return (clock() - began) / (end - start)

        warm = count * max(1, exp.config.log_every // count)  # as far as the loop's first log line
        run(0, warm)
        return run(warm, warm + count * max(1, (steps - warm) // count))

    key, feed = jax.random.key(0), train.compile(exp, mesh).feed(0)
    prepare = jax.jit(lambda feed, at: exp.prepare(exp.train.batch(feed, at), key, True))

    def batch() -> float:
        began, some = clock(), max(5, steps // 10)
        for at in range(some):
            result = prepare(feed, jnp.int32(at))
            jax.block_until_ready(result)
        return (clock() - began) / some

    turns = [(bare(), of_fit(exp, mesh, clock), batch()) for _ in range(options.turns + 1)][1:]
    shares = [a / b for a, b, _ in turns]
    low, share, high = side_by_side.quartiles(shares)
    bare_s, loop_s, batch_s = (statistics.median(column) for column in zip(*turns, strict=True))
    cost = statistics.median(loop_s - bare_s for bare_s, loop_s, _ in turns)
    measured = (1e3 * bare_s, 1e3 * loop_s, share, low, high, 1e6 * cost, 1e3 * batch_s, batch_s / bare_s)
    found = Loop(name, exp.config.batch_size, exp.config.steps_per_call, *measured)
    print(found, flush=True)
    return found


if __name__ == "__main__":
    side_by_side.pin()
    main()
